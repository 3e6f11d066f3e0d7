"""A module that a lesson is complete without."""

from __future__ import annotations

import dataclasses
import os

import pytest
from click.testing import CliRunner

from common import course
from common.course import MODULES_VARIABLE, CourseError
from common.course.skeleton import cut_lesson
from common.grading.runner import grade
from common.student import grade as commands
from common.tests.sample_lesson import write_lesson


@pytest.fixture
def lessons(tmp_path, monkeypatch):
    """Lesson 9 with a module that is solved and an optional one that nobody has begun."""
    modules = []
    for name, is_optional in (("required", False), ("extra", True)):
        (tmp_path / name).mkdir()
        lesson = dataclasses.replace(write_lesson(tmp_path / name, ["one", "two"]), is_optional=is_optional, title=name)
        lesson.module.write_text(cut_lesson(lesson) if is_optional else lesson.solution.read_text())
        modules.append(lesson)
    monkeypatch.setattr(course, "modules_of", lambda number: modules)
    monkeypatch.setattr(course.modules, "modules_of", lambda number: modules)
    monkeypatch.setattr(commands, "heading", lambda *_: None)
    monkeypatch.setenv(MODULES_VARIABLE, "")
    return modules


def test_lesson(**variables) -> tuple[int, str]:
    """The exit code and what is printed."""
    with commands.console.capture() as printed:
        result = CliRunner().invoke(commands.test_lesson, ["1"], standalone_mode=False, env=variables)
    return result.return_value, printed.get()


test_lesson.__test__ = False


def test_a_lesson_is_complete_without_it(lessons):
    code, printed = test_lesson()
    assert code == 0 and "2 of 2 exercises, 3 of 3 points." in printed
    assert printed.rstrip().splitlines()[-1].startswith("Optional: extra   9.1 to 9.2 in ") and "to do" not in printed


def test_it_is_graded_once_it_is_begun_and_changes_no_verdict(lessons):
    extra = lessons[1].module
    extra.write_text(extra.read_text().replace('raise NotImplementedError("TODO 9.1")', "return 3 * x"))
    code, printed = test_lesson()
    assert code == 0 and "2 of 2 exercises, 3 of 3 points." in printed and "wrong   9.1" in printed
    assert "0 of 2 optional exercises" in printed


def test_unfinished_it_stays_the_reference_s(lessons):
    course.activate("1")
    assert os.environ[MODULES_VARIABLE] == f"sample={lessons[0].module}"
    lessons[1].module.write_text(lessons[1].solution.read_text())
    course.activate("1")
    assert str(lessons[1].module) in os.environ[MODULES_VARIABLE]


def test_without_its_package_it_says_what_to_install(lessons):
    lessons[1] = dataclasses.replace(lessons[1], needs="no_such_package")
    code, printed = test_lesson()
    assert code == 0 and "They need the package no_such_package: python -m common setup no_such_package" in printed
    with pytest.raises(CourseError, match="no_such_package"):
        grade(lessons[1], lessons[1].module)
