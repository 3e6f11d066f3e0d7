"""The catalogue of a lesson: named wrong answers, and right answers that differ from the reference.

    ANSWERS = [
        wrong("1.4", "variance instead of mean square", ".pow(2).mean(-1", ".var(-1"),
        right("1.4", "by the norm", "return x / x.norm(dim=-1, keepdim=True) * ..."),
    ]

A wrong answer is plausible: it has the right type and shape and does not crash. It has two uses: CI proves that the
checks catch it, and a student who makes the same mistake is told its name. Where the exercise is to find a bug,
`planted` is the bug: the skeleton has the answer with that edit, and the grader does not tell its name.
"""

from __future__ import annotations

import ast
import runpy
import textwrap
from dataclasses import dataclass

from common.course import CourseError, Lesson, shown
from common.course.exercises import Exercise, begins


@dataclass(frozen=True)
class Answer:
    """One answer to an exercise: the reference with an edit, or with another body."""

    exercise: str
    name: str
    is_right: bool
    old: str | None = None  # replaced by `new`; occurs exactly once in the reference's answer
    new: str | None = None
    body: str | None = None  # or: the whole answer
    top: str = ""  # imports and helpers that the body needs, put above the first definition
    recognised: bool = True  # whether the grader can recognise this mistake by the value that it returns
    is_planted: bool = False  # the bug that is in the skeleton and that the student must find


def wrong(exercise: str, name: str, old: str, new: str, recognised: bool = True) -> Answer:
    """A mistake, as an edit of the reference. name: completes "this is what you get with ..."."""
    return Answer(exercise, name, False, old=old, new=new, recognised=recognised)


def wrong_body(exercise: str, name: str, body: str, top: str = "", recognised: bool = True) -> Answer:
    """A mistake that is too large for an edit: the whole answer."""
    return Answer(exercise, name, False, body=body, top=top, recognised=recognised)


def planted(exercise: str, name: str, old: str, new: str) -> Answer:
    """The bug that the student must find, as an edit of the reference. An exercise has at most one."""
    return Answer(exercise, name, False, old=old, new=new, recognised=False, is_planted=True)


def right(exercise: str, name: str, body: str, top: str = "") -> Answer:
    """Another right answer. name: how it differs from the reference."""
    return Answer(exercise, name, True, body=body, top=top)


def load_catalogue(lesson: Lesson) -> dict[str, object]:
    """The names that the lesson's catalogue defines; {} if it has no catalogue.

    The source is run, and not a cached .pyc file: Python takes that for current if the source was changed within a
    second and kept its length.
    """
    return runpy.run_path(str(lesson.answers)) if lesson.answers.exists() else {}


def load_answers(lesson: Lesson) -> list[Answer]:
    """The lesson's answers; [] if it has no catalogue."""
    return load_catalogue(lesson).get("ANSWERS", [])


def equivalent(exercise: str, reason: str, *changes: str) -> dict[tuple[str, str], str]:
    """Mutants that compute the same as the reference. changes: as `make mutate` names them. reason: why they do."""
    return {(exercise, change): reason for change in changes}


def load_equivalents(lesson: Lesson) -> dict[tuple[str, str], str]:
    """The reasons by (exercise, change), from the catalogue's `EQUIVALENT`, a list of `equivalent(...)`."""
    return {key: why for group in load_catalogue(lesson).get("EQUIVALENT", []) for key, why in group.items()}


def planted_answers(lesson: Lesson) -> dict[str, Answer]:
    """The bugs in the lesson's skeleton, by the id of their exercise."""
    return {answer.exercise: answer for answer in load_answers(lesson) if answer.is_planted}


def edited_body(answer: Answer, source: str, exercise: Exercise) -> str:
    """The reference's answer with this edit. Raises CourseError unless `answer.old` occurs in it exactly once."""
    own = "\n".join(source.splitlines()[exercise.first_answer_line - 1 : exercise.last_line])
    if (count := own.count(answer.old)) != 1:
        raise CourseError(
            f"answer {answer.name!r} of {answer.exercise}: {answer.old!r} occurs {count} times in the reference's "
            "answer, and must occur once."
        )
    return own.replace(answer.old, answer.new)


def apply(answer: Answer, source: str, exercise: Exercise) -> str:
    """The reference's source with this answer in place of its own. Raises CourseError as `edited_body` does."""
    if answer.body is None:
        body = edited_body(answer, source, exercise)
    else:
        body = textwrap.indent(textwrap.dedent(answer.body).strip("\n"), " " * exercise.indent)
    lines = source.splitlines()
    lines[exercise.first_answer_line - 1 : exercise.last_line] = body.splitlines()
    if answer.top:
        definitions = [node for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
        place = begins(definitions[0]) - 1
        lines[place:place] = [*textwrap.dedent(answer.top).strip("\n").splitlines(), ""]
    return "\n".join(lines) + "\n"


def describe(answer: Answer, lesson: Lesson) -> str:
    return f"{'right' if answer.is_right else 'wrong'} {answer.exercise} {answer.name!r} ({shown(lesson.answers)})"
