"""The board of `make progress`: how far each lesson is, what it made possible, and what is next."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.text import Text

from common.course import GAINS, Lesson, shown
from common.course.exercises import TOGETHER
from common.grading.results import Result, next_step

SIGNS = {"passed": ("█", "green"), "wrong": ("x", "red"), "to do": ("░", "dim"), "waiting": ("░", "dim")}
LEGEND = "█ passed, x wrong"
WIDTH = 30
"""Columns of the bar over all lessons."""


@dataclass
class Standing:
    """The results of a lesson, or a note that says why it could not be graded."""

    lesson: Lesson
    results: list[Result] = field(default_factory=list)
    note: Text = field(default_factory=Text)

    @property
    def exercises(self) -> list[Result]:
        return [result for result in self.results if result.id != TOGETHER]

    @property
    def step(self) -> Result | None:
        return next_step(self.results)

    @property
    def is_complete(self) -> bool:
        return bool(self.results) and self.step is None

    @property
    def is_begun(self) -> bool:
        return any(result.status in ("passed", "wrong") for result in self.results)


def bar(results: list[Result]) -> Text:
    """A sign for each exercise."""
    return Text.assemble(*(SIGNS[result.status] for result in results if result.id != TOGETHER))


def count(exercises: list[Result]) -> tuple[int, int, int, int]:
    """The number of exercises passed, of exercises, of points earned, and of points."""
    passed = [result for result in exercises if result.status == "passed"]
    return len(passed), len(exercises), sum(each.points for each in passed), sum(each.points for each in exercises)


def score(results: list[Result]) -> str:
    """The numbers of exercises passed and of points earned, in words."""
    passed, number, got, points = count([result for result in results if result.id != TOGETHER])
    return f"{passed} of {number} exercises, {got} of {points} points"


def draw(standings: list[Standing]) -> Text:
    """The board, in 80 columns: for each lesson a line, and a line for what it made possible or what is next in it."""
    title_width = max(len(each.lesson.title) for each in standings)
    bar_width = max(len(LEGEND), *(len(each.exercises) for each in standings))
    lines = [Text(f"   {'':<{title_width}}  {LEGEND:<{bar_width}}    done  points", "dim")]
    for each in standings:
        lines += lesson_lines(each, title_width, bar_width)
    exercises = [result for each in standings for result in each.exercises]
    _, _, got, points = count(exercises)
    filled = WIDTH * got // max(points, 1)
    whole = Text.assemble(("█" * filled, "green"), ("░" * (WIDTH - filled), "dim"))
    lines += [Text(), Text("   ") + whole + f"  {score(exercises)}"]
    return Text("\n").join([*lines, Text(f"   {next_line(standings)}", "bold")])


def lesson_lines(each: Standing, title_width: int, bar_width: int) -> list[Text]:
    passed, number, got, points = count(each.exercises)
    style = "green" if each.is_complete else "" if each.is_begun else "dim"
    line = Text(f"{each.lesson.number}  ", style) + Text(f"{each.lesson.title:<{title_width}}  ", style)
    line += bar(each.results) + " " * (bar_width - number)
    if each.results:
        line += Text(f"  {f'{passed}/{number}':>6}  {f'{got}/{points}':>6}", style)
    if each.is_complete:
        return [line, Text(f"   {GAINS[each.lesson.number]}", "italic")]
    if each.is_begun:
        return [line, Text(f"   next: {each.step}", "dim")]
    return [line, Text("   ") + each.note] if each.note else [line]


def next_line(standings: list[Standing]) -> str:
    """The next step: in the first lesson that is begun, or else in the first that is not complete."""
    left = [each for each in standings if each.step is not None]
    if not left:
        done = all(each.is_complete for each in standings)
        return "The engine is yours, all of it: make run MINE=0-8 SPEC=ngram" if done else ""
    each = next((each for each in left if each.is_begun), left[0])
    if not each.is_begun:
        return f"Next: {shown(each.lesson.readme)}"
    if each.step.id == TOGETHER:
        return f"Next: your whole file of lesson {each.lesson.number}   make test-lesson-{each.lesson.number}"
    return f"Next: {each.step}   make test-{each.step.id}   make hint-{each.step.id}"
