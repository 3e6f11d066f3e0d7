"""The process that imports torch and runs the checks. It sends its results through a connection, as events.

Events are JSON lists: ["collected", {id: [points, seconds, number of checks]}], ["start", id], ["check", failure or
null], ["note", sentence], ["mistake", its name or null], ["end", id], ["broken", text], ["finished"]. They are not
pickled: the student's code runs in this process, and unpickling its bytes could run anything. The runner notices when
this process hangs or dies.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from common.course import Lesson
from common.course.exercises import TOGETHER
from common.grading.plugin import QUIET, Grader, exercise_of, run_checks
from common.grading.subject import Failure, Subject
from common.grading.wire import readable, sealed


class ReportingGrader(Grader):
    """A grader that sends each result to the runner, and runs only the exercises in `ids`."""

    def __init__(self, subject: Subject, ids: list[str], send: Callable[..., None]):
        super().__init__(subject, ids)
        self.graded, self.send = subject, send
        self.current: str | None = None
        self.failed = False

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        markers = [marker.kwargs for item in items if (marker := item.get_closest_marker("exercise"))]
        counts = Counter(each["id"] for each in markers)
        self.send("collected", {each["id"]: (each["points"], each["seconds"], counts[each["id"]]) for each in markers})
        super().pytest_collection_modifyitems(items)
        items.sort(key=lambda item: self.only.index(exercise_of(item)))

    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        if exercise_of(item) != self.current:
            self.finish()
            self.current = exercise_of(item)
            self.send("start", self.current)

    def pytest_sessionfinish(self) -> None:
        self.finish()

    def finish(self) -> None:
        if self.current is not None:
            if self.current != TOGETHER:
                self.send("mistake", self.graded.mistake(self.current))
            self.send("end", self.current)
            self.current = None

    def judge(self, subject: Subject, exercise_id: str, check: Callable) -> Failure | None:
        if exercise_id == TOGETHER and self.failed:
            pytest.skip("waits for the exercises")
        failure = super().judge(subject, exercise_id, check)
        self.failed |= failure is not None
        if failure is None:
            self.send("check", None)
        else:
            texts = {name: readable(getattr(failure, name)) for name in ("sentence", "traceback")}
            self.send("check", {**texts, "waits_for": failure.waits_for, "through": failure.through})
        return failure

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """Report a check that cannot be collected, or fails before or after its body: a mistake of the course."""
        if report.when != "call" and report.failed:
            self.send("broken", f"{report.nodeid}: {report.longreprtext}")

    pytest_collectreport = pytest_runtest_logreport


def wait(connection: Connection) -> None:
    """Runs in the worker: waits until it is told what to do."""
    try:
        what = connection.recv()
    except EOFError:
        return  # the process that started it has ended
    work(connection, *what)


def work(
    connection: Connection,
    lesson: Lesson,
    file: Path,
    ids: list[str],
    show_prints: bool,
    key: bytes,
    make_grader: Callable[..., ReportingGrader] = ReportingGrader,
) -> None:
    """Runs in the worker: collects the lesson's checks, runs those of `ids` in that order, and reports."""
    if hasattr(os, "setsid") and os.getsid(0) != os.getpid():
        os.setsid()  # processes that the student's code starts are killed with this process's group
    import torch

    torch.set_num_threads(1)

    def send(*event) -> None:
        connection.send_bytes(sealed(event, key))

    grader = make_grader(Subject(lesson, file), ids, send)
    run_checks(lesson.checks, grader, *QUIET, *(["--capture=no"] if show_prints else []))
    send("finished")
    connection.close()
