"""`make diff-lesson-N` and `make diff-N.M`: the student's answers beside the reference's, once they have passed.

Docstrings and the comments that state the exercise are left out.
"""

from __future__ import annotations

import ast
import textwrap

import click
from rich.columns import Columns
from rich.console import Group
from rich.padding import Padding
from rich.syntax import Syntax
from rich.text import Text

from common import course
from common.course import Lesson, shown
from common.course.exercises import Exercise, begins, exercises_of, find_exercise, read_source, walk_functions
from common.course.modules import check_solution, listed
from common.grading.results import Result, kept
from common.grading.runner import grade, grade_and_keep
from common.options import exercise_id, force, lesson_number
from common.student.grade import console, wrapped

SIDE_BY_SIDE = 100
"""The smallest width in columns at which two answers are shown side by side."""


def answer(source: str, function: str, task: set[str]) -> tuple[str, int]:
    """A function without its docstring and without the comment lines `task`, and the line where it begins."""
    node = dict(walk_functions(ast.parse(source)))[function]
    first = begins(node)
    docstring = node.body[0] if ast.get_docstring(node) is not None else None
    lines = [
        line
        for number, line in enumerate(source.split("\n")[first - 1 : node.end_lineno], first)
        if line.strip().replace("# Exercise", "# TODO") not in task
        and not (docstring and docstring.lineno <= number <= docstring.end_lineno)
    ]
    return textwrap.dedent("\n".join(lines)), first


def show(lesson: Lesson, exercise: Exercise) -> None:
    """Show both answers: side by side, or one above the other on a narrow terminal."""
    reference = lesson.solution.read_text(encoding="utf-8")
    comment = reference.split("\n")[exercise.comment_line - 1 : exercise.first_answer_line - 1]
    task = {line.strip().replace("# Exercise", "# TODO") for line in comment}
    console.print(f"\n[bold]{exercise.id} {exercise.function}[/]")
    yours, line = answer(read_source(lesson.module), exercise.function, task)
    theirs, their_line = answer(reference, exercise.function, task)
    if ast.dump(ast.parse(yours)) == ast.dump(ast.parse(theirs)):
        console.print(Text(f"  the same as the reference's, {shown(lesson.solution)}:{their_line}", "dim"))
        return
    sides = {
        f"yours, {shown(lesson.module)}:{line}": yours,
        f"the reference's, {shown(lesson.solution)}:{their_line}": theirs,
    }
    width = console.width // (2 if console.width >= SIDE_BY_SIDE else 1) - 4
    columns = [Group(Text(head, "dim"), highlighted(text, width)) for head, text in sides.items()]
    console.print(Padding(Columns(columns, width=width), (0, 0, 0, 2)), soft_wrap=False)


def highlighted(code: str, width: int) -> Syntax:
    """Code in colours, wrapped to this number of columns."""
    text = "\n".join(wrapped(line, width) for line in code.split("\n"))
    return Syntax(text, "python", theme="ansi_dark", background_color="default")


def results_of(lesson: Lesson, ids: list[str]) -> dict[str, Result]:
    """The results of these exercises: the kept ones, or else those of a grading now."""
    results = kept(lesson, lesson.module)
    if results is None:
        is_all = ids == [each.id for each in exercises_of(lesson)]
        with console.status(f"grading {shown(lesson.module)} ..."):
            file = lesson.module
            results = grade_and_keep(lesson, file) if is_all else grade(lesson, file, only=ids)
    return {result.id: result for result in results}


def difference(chosen: list[tuple[Lesson, list[Exercise]]], force: bool) -> None:
    """Show these exercises, except those that have not passed, unless `force` is set."""
    held_back: list[str] = []
    for lesson, exercises in chosen:
        check_solution(lesson)
        written = dict(walk_functions(ast.parse(read_source(lesson.module))))
        results = {} if force else results_of(lesson, [each.id for each in exercises])
        for exercise in exercises:
            if exercise.function not in written:
                console.print(f"\n{shown(lesson.module)} has no function {exercise.function}.")
            elif force or results[exercise.id].status == "passed":
                show(lesson, exercise)
            else:
                held_back.append(exercise.id)
    if held_back:
        verb = "has" if len(held_back) == 1 else "have"
        hidden = f"\n{listed(held_back, 99)} {verb} not passed yet, so the reference's answer is not shown."
        console.print(f"{hidden} FORCE=1 shows it anyway.")


even_wrong = force("also where yours has not passed yet")


@click.command()
@lesson_number
@even_wrong
def diff_lesson(lesson_number: int, force: bool) -> None:
    """Show your answers beside the reference's, where yours have passed."""
    course.activate("")
    difference([(lesson, exercises_of(lesson)) for lesson in course.modules_of(lesson_number)], force)


@click.command()
@exercise_id
@even_wrong
def diff_exercise(exercise_id: str, force: bool) -> None:
    """Show your answer to one exercise beside the reference's, if yours has passed."""
    course.activate("")
    lesson, exercise = find_exercise(exercise_id)
    difference([(lesson, [exercise])], force)
