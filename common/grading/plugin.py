"""The pytest plugin that gives a check its `code` and judges what comes of it.

It is loaded in every pytest run of this project (pyproject.toml), so that a lesson's checks also work in an editor's
test explorer and as `pytest lesson-1-llm-basics`. The worker that `make test-lesson-N` starts adds a listener.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from common.course import MODULES, Lesson
from common.course.exercises import TOGETHER

if TYPE_CHECKING:
    from common.grading.subject import Failure, Subject

ALONE = ["-o", "addopts=", "--disable-plugin-autoload", "-p", "no:cacheprovider"]
ALONE += ["-p", "no:unraisableexception", "-p", "no:logging"]
"""pytest's options for one lesson's checks alone. Other packages' plugins take seconds to import. The first of the last
two collects garbage five times at the end: with all that torch imports, that takes as long as the checks.
"""


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("numprocesses", None):  # pytest-xdist's processes run the tests: this one needs no torch
        from common.machine import let_triton_interpret

        let_triton_interpret()
    config.addinivalue_line("markers", "exercise(id, points, seconds): the checks of one exercise")
    if not any(isinstance(plugin, Grader) for plugin in config.pluginmanager.get_plugins()):
        config.pluginmanager.register(Grader())


def student_s(lesson: Lesson) -> Subject:
    from common.grading.subject import Subject

    return Subject(lesson, lesson.module)


class Grader:
    """Judges the checks of lessons; leaves all other tests alone. `subject` says whose module a lesson's is."""

    def __init__(self, subject: Callable[[Lesson], Subject] | None = None):
        self.subject = functools.lru_cache(subject or student_s)

    @pytest.fixture
    def code(self):
        """The module under test; `pytest_pyfunc_call` fills it in."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        marker = pyfuncitem.get_closest_marker("exercise")
        lesson = self.lesson_of(pyfuncitem.path)
        if marker is None or lesson is None:
            return None
        subject, exercise_id = self.subject(lesson), marker.kwargs["id"]
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
        """The lesson whose checks stand in this file."""
        return next((lesson for lesson in MODULES if lesson.checks == checks), None)

    def judge(self, subject: Subject, exercise_id: str, check: Callable) -> Failure | None:
        """Where the worker listens in."""
        return subject.judge(exercise_id, check)
