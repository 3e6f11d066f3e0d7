"""The pytest plugin that passes `code` to a check and judges the result.

It is loaded in every pytest run of this project (pyproject.toml), so that a lesson's checks also work in an editor's
test explorer and as `pytest lesson-1-llm-basics`. The worker of `make test-lesson-N` uses a subclass of `Grader`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from common.course import MODULES
from common.course.exercises import TOGETHER

if TYPE_CHECKING:
    from common.grading.subject import Failure, Subject

ALONE = ["-o", "addopts=", "--disable-plugin-autoload", "-p", "no:cacheprovider"]
ALONE += ["-p", "no:unraisableexception", "-p", "no:logging"]
"""pytest's options for one lesson's checks. Other packages' plugins take seconds to import. `unraisableexception`
collects garbage five times at the end, which with torch takes as long as the checks.
"""
QUIET = ["-p", "no:terminal", "-p", "no:faulthandler"]
"""pytest's options with which it prints nothing."""


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("numprocesses", None):  # with pytest-xdist other processes run the tests and need torch
        from common.machine import let_triton_interpret

        let_triton_interpret()
    config.addinivalue_line("markers", "exercise(id, points, seconds): the checks of one exercise")
    if not any(isinstance(plugin, Grader) for plugin in config.pluginmanager.get_plugins()):
        config.pluginmanager.register(Grader())


def exercise(id: str, points: int = 1, seconds: float = 10.0):
    """Class decorator: the checks of this class belong to an exercise, which is worth `points`.

    seconds: the time limit of all its checks together; it is generous, since machines differ.
    """
    return pytest.mark.exercise(id=id, points=points, seconds=seconds)


def together(seconds: float = 30.0):
    """Class decorator: these checks run in the student's whole module, after all exercises have passed."""
    return pytest.mark.exercise(id=TOGETHER, points=0, seconds=seconds)


def exercise_of(item: pytest.Item) -> str | None:
    """The id of the exercise that a check belongs to; None for any other test."""
    marker = item.get_closest_marker("exercise")
    return marker.kwargs["id"] if marker else None


class Grader:
    """Judges the checks of lessons. Other tests run as usual.

    subject: the module to grade; None: of each lesson the student's. only: the exercises whose checks are run; None:
    all tests are run.
    """

    def __init__(self, subject: Subject | None = None, only: Collection[str] | None = None):
        self.by_checks: dict[Path, Subject | None] = {subject.lesson.checks: subject} if subject else {}
        self.only = only

    def subject_of(self, checks: Path) -> Subject | None:
        """The module to grade by the checks in this file; None if the file has no lesson's checks."""
        from common.grading.subject import Subject

        if checks not in self.by_checks:
            lesson = next((each for each in MODULES if each.checks == checks), None)
            self.by_checks[checks] = lesson and Subject(lesson, lesson.module)
        return self.by_checks[checks]

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.only is not None:
            items[:] = [item for item in items if exercise_of(item) in self.only]

    @pytest.fixture
    def code(self):
        """The module under test; `pytest_pyfunc_call` passes it."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        exercise_id = exercise_of(pyfuncitem)
        if exercise_id is None or (subject := self.subject_of(pyfuncitem.path)) is None:
            return None
        if exercise_id in subject.todo or (exercise_id == TOGETHER and subject.todo):
            pytest.skip("to do")
        arguments = {name: pyfuncitem.funcargs[name] for name in pyfuncitem._fixtureinfo.argnames}
        failure = self.judge(subject, exercise_id, lambda code: pyfuncitem.obj(**{**arguments, "code": code}))
        if failure is not None and failure.waits_for:
            pytest.skip(f"waits for {failure.waits_for}")
        if failure is not None:
            pytest.fail(f"{exercise_id}: {failure.sentence}", pytrace=False)
        return True

    def judge(self, subject: Subject, exercise_id: str, check: Callable) -> Failure | None:
        """Run a check. The worker overrides this to report the result."""
        return subject.judge(exercise_id, check)


def run_checks(checks: Path, grader: Grader, *options: str) -> int:
    """Let pytest run the checks in this file, judged by `grader`, with these further options. Returns its exit code."""
    os.environ["KERNELS"] = "plain"  # or a kernel would run in place of what is judged
    return int(pytest.main([str(checks), *ALONE, *options], plugins=[sys.modules[__name__], grader]))
