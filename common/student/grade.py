"""The commands of the grader: test-lesson, test-exercise, hint, progress, reset-lesson."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from textwrap import wrap

import click
from rich.console import Console
from rich.markdown import Markdown
from rich.padding import Padding
from rich.text import Text

from common import course
from common.course import GAINS, LESSONS, CourseError, Lesson, shown, skeleton
from common.course.exercises import TOGETHER, exercises_of, find_exercise, is_begun, read_hints
from common.course.modules import Waits, check_solution
from common.grading.results import Result, kept, next_step
from common.grading.runner import grade, grade_and_keep
from common.options import exercise_id, lesson_number, mine, number, option, several
from common.student import update
from common.student.board import Standing, draw, score
from common.student.watch_exercise import RECORDED

console = Console(highlight=False, soft_wrap=True)


# --- test-lesson, test-exercise ---------------------------------------------------------------------------------------


of_subject = several(
    option("--solution", "SOLUTION", is_flag=True, help="grade the reference"),
    option("--file", "FILE", metavar="FILE", help="grade this file"),
    mine(),
    option("--verbose", "VERBOSE", is_flag=True, help="show tracebacks"),
)
"""The options that say which file is graded, and on top of what."""


@click.command()
@lesson_number
@of_subject
def test_lesson(lesson_number: int, solution: bool, file: str | None, mine: str, verbose: bool) -> int:
    """Grade a lesson and report each exercise as it is decided."""
    modules, results = course.modules_of(lesson_number), []
    if file:
        modules = [each for each in modules if each.module.name == Path(file).name] or modules[:1]
    required = [each for each in modules if not each.is_optional or file]
    course.activate(mine)
    for lesson in required:
        chosen = file_to_grade(lesson, solution, file)
        heading(lesson, chosen)
        results += grade_and_keep(lesson, chosen, on_result=partial(report, lesson, chosen, verbose=verbose))
    code = conclude(required[0], results)
    for lesson in modules:
        if lesson not in required:
            grade_optional(lesson, file_to_grade(lesson, solution, file), verbose)
    return code


def grade_optional(lesson: Lesson, file: Path, verbose: bool) -> None:
    """Print a line for an optional module, and grade it if it is begun."""
    ids = [each.id for each in exercises_of(lesson)]
    console.print(f"\n[bold]Optional: {lesson.title}[/]   {ids[0]} to {ids[-1]} in {shown(file)}")
    if not lesson.is_importable:
        console.print(f"[dim]They need the package {lesson.needs}: python -m common setup {lesson.needs}[/]")
    elif is_begun(lesson, file):
        results = grade_and_keep(lesson, file, on_result=partial(report, lesson, file, verbose=verbose))
        passed = [each for each in results if each.status == "passed" and each.id != TOGETHER]
        console.print(f"\n{len(passed)} of {len(ids)} optional exercises; they are worth no points.")


@click.command()
@exercise_id
@of_subject
@option("--pdb", "PDB", is_flag=True, help="stop in it, in the debugger")
def test_exercise(exercise_id: str, solution: bool, file: str | None, mine: str, verbose: bool, pdb: bool) -> int:
    """Grade one exercise, and show what it prints."""
    lesson, exercise = find_exercise(exercise_id)
    course.activate(mine)
    chosen = file_to_grade(lesson, solution, file)
    heading(lesson, chosen)
    if pdb:
        from common.student.debug import debug

        return debug(lesson, chosen, exercise)
    show = partial(report, lesson, chosen, verbose=verbose)
    results = grade(lesson, chosen, only=[exercise.id], on_result=show, show_prints=True)
    return int(results[0].status != "passed")


def file_to_grade(lesson: Lesson, solution: bool, file: str | None) -> Path:
    """The student's file, the reference (SOLUTION=1) or any other (FILE=...)."""
    if file:
        return Path(file).resolve()
    if solution:
        check_solution(lesson)
    return lesson.solution if solution else lesson.module


def heading(lesson: Lesson, file: Path) -> None:
    earlier = tuple(each for each in LESSONS if each.number < lesson.number)
    console.print(f"[bold]Lesson {lesson.number}: {lesson.title}[/]   {shown(file)}")
    if earlier and not lesson.part:
        mine = "0" if len(earlier) == 1 else f"0-{earlier[-1].number}"
        offer = "" if {each.slug for each in earlier} <= set(course.substitutes()) else f" MINE={mine} uses your own."
        console.print(f"[dim]It runs with {course.whose(earlier)}.{offer}[/]")
    if lesson.is_withheld:
        console.print("[dim]Its solution is withheld: each exercise is checked in your whole file, with the others.[/]")
    console.print()


def report(lesson: Lesson, file: Path, result: Result, verbose: bool) -> None:
    """Print the result of one exercise."""
    style = {"passed": "green", "wrong": "red", "to do": "yellow", "waiting": "dim"}[result.status]
    number = "" if result.id == TOGETHER else result.id
    line = Text.assemble((f"  {result.status:<8}", style), f"{number:<6}", (f"{result.name:<35}", "bold"))
    if result.status == "to do":
        line.append(f"{shown(file)}:{result.line}   make hint-{result.id}", "dim")
    elif result.status == "waiting":
        line.append(result.sentence or "your whole file, after every exercise has passed", "dim")
    console.print(line)
    if result.status != "wrong":
        return
    tell(result.sentence)
    if result.mistake:
        tell(f"This is what you get with: {result.mistake}.", "bold")
    if verbose and result.traceback:
        tell(result.traceback.rstrip(), "dim")
    elif result.id != TOGETHER:
        watch = f"   make watch-{result.id}" if result.id in RECORDED and not lesson.is_withheld else ""
        tell(f"{shown(file)}:{result.line}\nmake test-{result.id} VERBOSE=1   make hint-{result.id}{watch}", "dim")


def tell(text: str, style: str = "") -> None:
    console.print(Padding(Text(text, style), (0, 0, 0, 16), expand=False), soft_wrap=False)


def conclude(lesson: Lesson, results: list[Result]) -> int:
    """Print the score and the next step. Returns the exit code: 0 only if everything has passed."""
    console.print(f"\n{score(results)}.")
    first = next_step(results)
    if first is None:
        congratulate(lesson)
        return 0
    if first.id == TOGETHER:
        console.print("Each exercise is right by itself; your file as a whole is not. What did you change around them?")
    else:
        verb = "Mend" if first.status == "wrong" else "Next"
        console.print(f"{verb}: {first}.   make test-{first.id}   make hint-{first.id}")
    return 1


LAST = "It was the last one: the engine is yours, all of it. make run MINE=0-8 SPEC=ngram"


def congratulate(lesson: Lesson) -> None:
    if lesson.is_optional:
        console.print(f"[green bold]The optional part of lesson {lesson.number} is complete.[/]")
        return
    following = [each for each in LESSONS if each.number == lesson.number + 1]
    after = f"Next: {shown(following[0].readme)}" if following else LAST
    gain = GAINS.get(lesson.number, "")
    console.print(f"[green bold]Lesson {lesson.number} is complete.[/] [bold]{gain}[/]")
    console.print(f"[dim]{shown(lesson.notebook)} measures it.[/] {after}")


# --- hint -------------------------------------------------------------------------------------------------------------


@click.command()
@exercise_id
@option("--level", "LEVEL", type=number(), default=1, help="1, 2 or 3: each says more")
def hint(exercise_id: str, level: int) -> int:
    """Show one of an exercise's three hints: a question, then what must hold, then nearly the code."""
    lesson, exercise = find_exercise(exercise_id)
    hints = read_hints(lesson)[exercise.id]
    if not 1 <= level <= len(hints):
        raise CourseError(f"LEVEL={level}: {exercise.id} has the hints 1 to {len(hints)}.")
    console.print(f"[bold]{exercise.id} {exercise.function}[/], hint {level} of {len(hints)}\n")
    console.print(Padding(Markdown(hanging(hints[level - 1], console.width - 10)), (0, 4)), soft_wrap=False)
    if level < len(hints):
        console.print(f"\n[dim]More: make hint-{exercise.id} LEVEL={level + 1}[/]")
    return 0


def hanging(hint: str, width: int) -> str:
    """A hint whose lines of code are wrapped to this number of columns, or to 40."""
    lines, is_code = [], False
    for line in hint.splitlines():
        is_code ^= line.startswith("```")
        lines.append(wrapped(line, max(width, 40)) if is_code else line)
    return "\n".join(lines)


def wrapped(line: str, width: int) -> str:
    """A line of code in lines of this width; those after the first are indented by 8 columns more."""
    indent = " " * (len(line) - len(line.lstrip()) + 8)
    return "\n".join(wrap(line, width, subsequent_indent=indent, break_on_hyphens=False))


# --- progress, reset-lesson -------------------------------------------------------------------------------------------


@click.command()
@mine()
def progress(mine: str) -> int:
    """Draw the board of all lessons; a lesson that has changed since it was last graded is graded again."""
    course.activate(mine)
    standings = []
    for lesson in LESSONS:
        with console.status(f"grading lesson {lesson.number} ..."):
            standings.append(standing(lesson))
    console.print(draw(standings))
    if update.needs_new_numbers():
        console.print("The exercises have other numbers now. Run make update once more: it moves your answers there.")
    return 0


def standing(lesson: Lesson) -> Standing:
    results: list[Result] = []
    try:
        for module in course.modules_of(lesson.number):
            if not module.is_optional:
                results += kept(module, module.module) or grade_and_keep(module, module.module)
    except Waits as error:
        return Standing(lesson, note=Text(f"waits for your {error.lessons}", "dim"))
    except CourseError as error:
        return Standing(lesson, note=Text(str(error).partition("\n")[0], "red"))
    return Standing(lesson, results)


@click.command()
@lesson_number
def reset_lesson(lesson_number: int) -> int:
    """Start a lesson's file again, and keep the present one as a backup."""
    for lesson in course.modules_of(lesson_number):
        backup = skeleton.reset(lesson)
        console.print(f"{shown(lesson.module)} is the empty skeleton again.")
        if backup:
            console.print(f"What was in it is kept in {shown(backup)}.")
    return 0
