"""What holds for every lesson, and can be read from its files without running them.

The rest is looked after elsewhere. That an exercise has a docstring: common/course/skeleton.py refuses it without. Its
TODO: test_skeleton.py. Its three hints and place in the README, links and commands of texts and notebooks: `make check`
(common/authoring/readmes/checks.py). Three wrong answers and a right one that are graded so: `make prove-lesson-N`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import nbformat
import pytest

from common.course import LESSONS, MODULES, ROOT
from common.course.exercises import exercises_of
from common.instructor.classroom import points_of

LOOKS_AHEAD = {("intro.py", "llama_pytorch"), ("paged_attention.ipynb", "batching")}
"""Lesson 0 lets a real model judge sentences; no other exercise looks ahead. A figure in lesson 4's notebook
records lesson 5's engine on its blocks.
"""


def imported(source: str) -> Iterator[str]:
    """The slugs of the lessons' modules that a source imports, anywhere in it; as `solutions` or as `reference`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            package, _, slug = name.partition(".")
            if package in ("solutions", "reference"):
                yield slug.partition(".")[0]


def test_imports_are_found_wherever_they_stand():
    source = "from solutions.intro import A\nimport reference.kv_cache\ndef f():\n    from solutions import batching"
    assert {"intro", "kv_cache", "batching"} <= set(imported(source))


@pytest.mark.parametrize("lesson", MODULES, ids=lambda lesson: lesson.slug)
def test_a_lesson_imports_no_later_one(lesson):
    after = {each.slug for each in MODULES[MODULES.index(lesson) + 1 :]}
    for file in (lesson.solution, lesson.checks):
        ahead = {(file.name, slug) for slug in imported(file.read_text(encoding="utf-8")) if slug in after}
        assert ahead <= LOOKS_AHEAD


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.slug)
def test_a_notebook_was_run_from_top_to_bottom_and_imports_no_later_lesson(lesson):
    later = {each.slug for each in MODULES if each.number > lesson.number}
    if (
        lesson.number >= 6
    ):  # ranks and quantized weights are options of the assembly, which imports no more than they need
        later -= {"engine"}
    cells = [cell for cell in nbformat.read(lesson.notebook, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "make notebooks"
    for cell in cells:
        assert not [output for output in cell.outputs if output.output_type == "error"], cell.source
        ahead = {(lesson.notebook.name, slug) for slug in set(imported(cell.source)) & later}
        assert ahead <= LOOKS_AHEAD, cell.source


@pytest.mark.parametrize("lesson", MODULES, ids=lambda lesson: lesson.slug)
def test_every_exercise_is_worth_something(lesson):
    points = points_of(lesson)
    assert set(points) == {exercise.id for exercise in exercises_of(lesson)}
    assert all((0 if lesson.is_optional else 1) <= each <= 5 for each in points.values())


NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def test_the_texts_say_the_same_hours():
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    for lesson in LESSONS:
        link = re.escape(f"({lesson.readme.relative_to(ROOT).as_posix()})")
        assert re.search(
            rf"^\| {lesson.number} \| \[{lesson.title}\]{link} \|.*\| {lesson.hours} \|$", front, re.MULTILINE
        )
        assert f"\nAllow {NUMBERS[lesson.hours - 2]} hours." in lesson.readme.read_text(encoding="utf-8")


@pytest.mark.parametrize("lesson", MODULES, ids=lambda lesson: lesson.slug)
def test_only_optional_exercises_are_worth_no_points(lesson):
    assert {points == 0 for points in points_of(lesson).values()} == {lesson.is_optional}
