"""The pytest plugin that passes `code` to a check and judges the result.

It is loaded in every pytest run of this project (pyproject.toml), so that a lesson's checks also work in an editor's
test explorer and as `pytest lesson-1-llm-basics`. The worker of `make test-lesson-N` uses a subclass of `Grader`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from common.course import MODULES, Lesson
from common.course.exercises import TOGETHER

if TYPE_CHECKING:
    from common.grading.subject import Failure, Subject

ALONE = ["-o", "addopts=", "--disable-plugin-autoload", "-p", "no:cacheprovider"]
ALONE += ["-p", "no:unraisableexception", "-p", "no:logging"]
"""pytest's options for one lesson's checks. Other packages' plugins take seconds to import. `unraisableexception`
collects garbage five times at the end, which with torch takes as long as the checks.
"""


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("numprocesses", None):  # with pytest-xdist other processes run the tests and need torch
        from common.machine import let_triton_interpret

        let_triton_interpret()
    config.addinivalue_line("markers", "exercise(id, points, seconds): the checks of one exercise")
    if not any(isinstance(plugin, Grader) for plugin in config.pluginmanager.get_plugins()):
        config.pluginmanager.register(Grader())


def student_s(lesson: Lesson) -> Subject:
    from common.grading.subject import Subject

    return Subject(lesson, lesson.module)


def exercise_of(item: pytest.Item) -> str | None:
    """The id of the exercise that a check belongs to; None for any other test."""
    marker = item.get_closest_marker("exercise")
    return marker.kwargs["id"] if marker else None


class Grader:
    """Judges the checks of lessons. Other tests run as usual.

    subject: returns the module to grade for a lesson, by default the student's. only: the exercises whose checks are
    run; None: all tests are run.
    """

    def __init__(self, subject: Callable[[Lesson], Subject] | None = None, only: Collection[str] | None = None):
        self.subject = functools.lru_cache(subject or student_s)
        self.only = only

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.only is not None:
            items[:] = [item for item in items if exercise_of(item) in self.only]

    @pytest.fixture
    def code(self):
        """The module under test; `pytest_pyfunc_call` passes it."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        exercise_id, lesson = exercise_of(pyfuncitem), self.lesson_of(pyfuncitem.path)
        if exercise_id is None or lesson is None:
            return None
        subject = self.subject(lesson)
        if exercise_id in subject.todo or (exercise_id == TOGETHER and subject.todo):
            pytest.skip("to do")
        arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
        failure = self.judge(subject, exercise_id, lambda code: pyfuncitem.obj(**{**arguments, "code": code}))
        if failure is not None and failure.waits_for:
            pytest.skip(f"waits for {failure.waits_for}")
        if failure is not None:
            pytest.fail(f"{exercise_id}: {failure.sentence}", pytrace=False)
        return True

    def lesson_of(self, checks: Path) -> Lesson | None:
        """The lesson whose checks are in this file, or None."""
        return next((lesson for lesson in MODULES if lesson.checks == checks), None)

    def judge(self, subject: Subject, exercise_id: str, check: Callable) -> Failure | None:
        """Run a check. The worker overrides this to report the result."""
        return subject.judge(exercise_id, check)
