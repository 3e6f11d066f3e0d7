"""Cuts solutions/<slug>.py into the skeleton that the student fills in.

A solution reads as finished code. One comment opens an exercise,

    # Exercise 1.4: average the squares in float32.

and everything after it, to the end of that function, is the answer. The comment and the comment lines that follow
it directly become the TODO; the rest becomes `raise NotImplementedError("TODO 1.4")`. What breaks the rules of this
form (in `find_exercises`) is refused with file and line.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import io
import json
import re
import time
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.course import ROOT, WITHHELD, CourseError, Lesson, shown

MAX_ANSWER_LINES = 25
TOGETHER = "together"
"""In place of an exercise's id: the checks of the student's whole module, once every exercise has passed."""
RECORD = ROOT / "common" / "skeletons.json"
"""The SHA-256 of each skeleton as it was last generated: what differs from it has been edited."""
FIND_THE_BUG = "  # take this line out, then find the one mistake below and mend it"
NOTICE = WITHHELD + "# ruff: noqa\n"
"""What a solution opens with that is withheld. As in a skeleton, much that it imports is not used yet."""
BACKUPS = ROOT / ".course" / "backups"


@dataclass(frozen=True)
class Exercise:
    """One exercise of a solution. Lines count from 1; the answer is the lines first_answer_line to last_line."""

    id: str
    function: str  # qualified name: `softmax`, `Attention.forward`
    comment_line: int
    first_answer_line: int
    last_line: int
    indent: int


class SkeletonError(CourseError):
    """A solution that cannot be cut; the text begins with file:line."""


def find_exercises(source: str, file: str, number: int | None = None) -> list[Exercise]:
    """The exercises of a solution, in the order of the file. `number` is the lesson that all ids must belong to."""
    tree = ast.parse(source, file)
    lines = source.splitlines()
    functions = list(walk_functions(tree))
    found: list[Exercise] = []

    def refuse(line: int, why: str) -> None:
        raise SkeletonError(f"{file}:{line}: {why}")

    for line, column, text in comments(source):
        if not re.match(r"#\s*exercise\b", text, re.IGNORECASE):
            continue
        match = re.match(r"# Exercise (\d+)\.(\d+): \S", text)
        if not match:
            refuse(line, f"an exercise opens with '# Exercise N.M: what to do'; this is {text!r}.")
        exercise_id = f"{match[1]}.{match[2]}"
        if number is not None and int(match[1]) != number:
            refuse(line, f"exercise {exercise_id} stands in lesson {number}.")
        around = [(name, node) for name, node in functions if node.lineno <= line <= node.end_lineno]
        if not around:
            refuse(line, f"exercise {exercise_id} stands in no function.")
        if len(around) > 1:
            refuse(line, f"exercise {exercise_id} stands in a function within a function.")
        name, node = around[0]
        for other in found:
            if other.id == exercise_id:
                refuse(line, f"exercise {exercise_id} is there already, on line {other.comment_line}.")
            if other.function == name:
                refuse(line, f"{name} has exercise {other.id} already; one for a function.")
        if not ast.get_docstring(node):
            refuse(node.lineno, f"{name} has no docstring to tell the student what it does.")
        if column != node.body[0].col_offset or any(s.lineno <= line <= s.end_lineno for s in node.body):
            refuse(line, f"exercise {exercise_id} does not stand at the top indentation of {name}'s body.")

        first = line
        while first < len(lines) and lines[first].strip().startswith("#"):
            first += 1
        answer = [statement for statement in node.body if statement.lineno > line]
        if not answer:
            refuse(line, f"exercise {exercise_id} has no answer: nothing follows it in {name}.")
        last = node.end_lineno
        while last < len(lines) and re.match(rf" {{{column}}}\s*#", lines[last]):
            last += 1  # a comment behind the last statement still belongs to the function
        length = sum(1 for text in lines[first:last] if text.strip() and not text.strip().startswith("#"))
        if length > MAX_ANSWER_LINES:
            refuse(line, f"the answer of {exercise_id} has {length} lines; {MAX_ANSWER_LINES} are allowed: split it.")
        found.append(Exercise(exercise_id, name, line, first + 1, last, column))
    return found


def comments(source: str):
    """(line, column, text) of every comment: a `#` in a string is none."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield *token.start, token.string


def walk_functions(node: ast.AST, prefix: str = ""):
    """(qualified name, node) of every function and method, also of those within functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + child.name, child
            yield from walk_functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.ClassDef):
            yield from walk_functions(child, f"{prefix}{child.name}.")
        else:
            yield from walk_functions(child, prefix)


def cut(
    source: str, file: str, number: int | None = None, plant: Callable[[Exercise], str | None] = lambda exercise: None
) -> str:
    """The skeleton of a solution, as text. plant: gives the faulty body to show, where the exercise is to mend it.

    Raises SkeletonError.
    """
    lines = source.splitlines()
    for exercise in reversed(find_exercises(source, file, number)):
        opening = lines[exercise.comment_line - 1].replace("# Exercise", "# TODO", 1)
        stub = " " * exercise.indent + f'raise NotImplementedError("TODO {exercise.id}")'
        todo = lines[exercise.comment_line : exercise.first_answer_line - 1]
        faulty = plant(exercise)
        shown_body = [stub] if faulty is None else [stub + FIND_THE_BUG, *faulty.splitlines()]
        lines[exercise.comment_line - 1 : exercise.last_line] = [opening, *todo, *shown_body]
    return "\n".join(lines) + "\n"


def cut_lesson(lesson: Lesson) -> str:
    """The skeleton that the lesson's solution and its planted mistakes give now."""
    from common.course.catalogue import edited_body, planted_answers  # it needs our `Exercise`

    if lesson.is_withheld:
        return reopened(lesson.solution.read_text(encoding="utf-8").removeprefix(NOTICE), "Exercise", "TODO")
    source, planted = lesson.solution.read_text(encoding="utf-8"), planted_answers(lesson)

    def plant(exercise: Exercise) -> str | None:
        return edited_body(planted[exercise.id], source, exercise) if exercise.id in planted else None

    return cut(source, shown(lesson.solution), lesson.number, plant)


def emptied(skeleton: str) -> str:
    """What stands in the place of a solution that is withheld: its skeleton, in which exercises can still be found."""
    return NOTICE + reopened(skeleton, "TODO", "Exercise")


def reopened(source: str, old: str, new: str) -> str:
    """The source with the word that opens an exercise, Exercise or TODO, put in place of the other."""
    return re.sub(rf"^( +# ){old}( \d+\.\d+: )", rf"\1{new}\2", source, flags=re.MULTILINE)


def exercises_of(lesson: Lesson) -> list[Exercise]:
    """The lesson's exercises, in the order of the file: that is the order to work in, whatever the numbers."""
    return find_exercises(lesson.solution.read_text(encoding="utf-8"), shown(lesson.solution), lesson.number)


# ---------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def generate(lesson: Lesson) -> str:
    """Write the lesson's skeleton unless it is up to date; refuse if the file was edited. Returns a word for it."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    skeleton = cut_lesson(lesson)
    present = lesson.module.read_text(encoding="utf-8") if lesson.module.exists() else None
    if present not in (None, skeleton) and digest(present) != record.get(lesson.slug):
        raise CourseError(
            f"{shown(lesson.module)} was edited since it was generated, and is left as it is. If the edit is meant "
            f"for the course, make it in {shown(lesson.solution)}; `make reset-lesson-{lesson.number}` backs the file "
            "up and starts it afresh."
        )
    lesson.module.write_text(skeleton, encoding="utf-8")
    RECORD.write_text(json.dumps({**record, lesson.slug: digest(skeleton)}, indent=2, sort_keys=True) + "\n")
    return "unchanged" if present == skeleton else "written"


def reset(lesson: Lesson) -> Path | None:
    """Start a lesson's file afresh. Returns where the old one was kept, or None if there was nothing to keep."""
    skeleton = cut_lesson(lesson)
    backup = None
    if lesson.module.exists() and lesson.module.read_text(encoding="utf-8") != skeleton:
        BACKUPS.mkdir(parents=True, exist_ok=True)
        stamp, n = time.strftime("%Y%m%d-%H%M%S"), 0
        while (backup := BACKUPS / f"{lesson.slug}-{stamp}{f'-{n}' if n else ''}.py").exists():
            n += 1
        backup.write_bytes(lesson.module.read_bytes())
    lesson.module.write_text(skeleton, encoding="utf-8")
    return backup


def difference(lesson: Lesson) -> str:
    """How the committed skeleton differs from the one that the solution gives now; empty if it does not."""
    present = lesson.module.read_text(encoding="utf-8") if lesson.module.exists() else ""
    return "".join(
        difflib.unified_diff(
            present.splitlines(keepends=True),
            cut_lesson(lesson).splitlines(keepends=True),
            shown(lesson.module),
            f"cut from {shown(lesson.solution)}",
        )
    )
