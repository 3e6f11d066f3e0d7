"""`make watch-N.M`: shows the check that an answer fails, call by call, beside the same check of the reference.

It works for exercises whose checks call methods of one object: a block manager, a scheduler or an engine.
"""

from __future__ import annotations

import ctypes
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from common import course
from common.course import CourseError, Lesson, shown
from common.course.exercises import Exercise, find_exercise
from common.course.modules import check_solution
from common.options import exercise_id, mine, option
from common.watching.page import make_page, prepare

RECORDED = {
    **dict.fromkeys([f"4.{number}" for number in range(4, 10)], "KVCacheManager"),
    **dict.fromkeys([f"5.{number}" for number in range(6, 15)], "Scheduler"),
    "5.16": "Engine",
}
"""The exercises that can be watched, and the class whose objects their checks make."""
SECONDS = 5.0
"""The time that a check may take."""


@click.command("watch-exercise")
@exercise_id
@option("--out", "OUT", type=click.Path(path_type=Path, dir_okay=False), help="the page; default: watch-N.M.html")
@option("--file", "FILE", metavar="FILE", help="watch the answer in this file")
@mine()
def watch_exercise(exercise_id: str, out: Path | None, file: str | None, mine: str) -> int:
    """Write a page that replays the check which your answer fails, call by call, beside the reference's."""
    lesson, exercise = find_exercise(exercise_id)
    if exercise_id not in RECORDED:
        raise CourseError(f"{exercise_id} has no sequence of calls to watch. These have: {', '.join(RECORDED)}.")
    check_solution(lesson)
    out = out or Path(f"watch-{exercise_id}.html")
    prepare(out)
    course.activate(mine)
    chosen = Path(file).resolve() if file else lesson.module
    found = watch(lesson, chosen, exercise)
    if found is None:
        print(f"{exercise_id} {exercise.function}: no check fails that has calls to watch.   make test-{exercise_id}")
        return 0
    title, sentence, (mine_, reference) = found
    with tempfile.TemporaryDirectory() as folder:
        pages = [Path(folder) / "mine.jsonl", Path(folder) / "reference.jsonl"]
        for each, recorder in zip(pages, (mine_, reference)):
            each.write_text(recorder.file.getvalue(), encoding="utf-8")
        out.write_text(make_page(*pages), encoding="utf-8")
    print(f"{title}\n  {sentence}\n")
    print("\n".join(parting(mine_.calls, reference.calls)))
    print(f"\nWritten: {shown(out)}. Open it in a browser; its button `Where the runs part` goes to that call.")
    return 1


def parting(mine: list[list[str]], reference: list[list[str]]) -> list[str]:
    """Lines that describe the first call in which two runs differ."""
    for number, (own, other) in enumerate(zip(mine, reference), 1):
        if own != other:
            lines = [f"Your run and the reference's part in call {number} of {len(mine)}: {own[0]}"]
            for who, these, those in (("yours", own, other), ("the reference's", other, own)):
                lines += [f"  {who + ':':<17}{each}" for each in these if each not in those]
            return lines
    return [f"In the {len(mine)} calls until the check fails, your run and the reference's are the same."]


def watch(lesson: Lesson, file: Path, exercise: Exercise) -> tuple[str, str, tuple[Any, Any]] | None:
    """Find the first check of an exercise that has calls to record and that the file's answer fails.

    Returns its name, its message and the recorders of both runs, or None. Raises CourseError if the exercise is still
    to do, or if a check is broken.
    """
    import pytest

    from common.grading.plugin import QUIET, Grader, run_checks
    from common.grading.subject import Subject

    subject = Subject(lesson, file)
    if exercise.id in subject.todo:
        raise CourseError(f"{exercise.id} {exercise.function} is still to do in {shown(file)}.")
    found, broken = [], []

    class Watcher(Grader):
        """Runs the checks of one exercise until one fails, and then records it."""

        def pytest_runtest_setup(self, item: pytest.Item) -> None:
            self.title = f"{exercise.id} {exercise.function}: {item.name}"

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            broken.extend([report.longreprtext] * report.failed)

        def judge(self, subject: Subject, exercise_id: str, check: Callable) -> None:
            if not found and (runs := both_runs(subject, exercise_id, check, self.title)):
                found.append((self.title, *runs))

    run_checks(lesson.checks, Watcher(subject, [exercise.id]), *QUIET, "--capture=no")
    if broken:
        raise CourseError(f"A check of the course is broken, please report it:\n{broken[0]}")
    return found[0] if found else None


def both_runs(subject: Any, exercise_id: str, check: Callable, title: str) -> tuple[str, tuple[Any, Any]] | None:
    """Return a check's message, and the recorders of the answer's run and of the reference's; None if the answer passes
    or makes no calls to record.
    """
    from common.grading.subject import Subject
    from common.watching.calls import recorded_calls

    def run(who: Subject, module: ModuleType, files: str) -> tuple[Any, list]:
        with recorded_calls(module, RECORDED[exercise_id], title, files) as recorders:
            failure = who.attempt(limited, lambda: module, exercise_id)
            for recorder in recorders:
                recorder.failure = failure.sentence if failure else ""
        return failure, recorders

    def limited(code: ModuleType) -> None:
        with at_most(SECONDS):
            check(code)

    failure, mine = run(subject, subject.module(exercise_id), f"{shown(subject.file)}, all else is the reference's.")
    if failure is None or not mine or subject.attempt(limited, subject.untouched, exercise_id) is None:
        return None
    reference = Subject(subject.lesson, subject.lesson.solution)
    _, others = run(reference, reference.untouched(), "The reference's modules.")
    pairs = list(zip(mine, others))
    parted = [pair for pair in pairs if any(own != other for own, other in zip(pair[0].calls, pair[1].calls))]
    return (failure.sentence, [*parted, pairs[-1]][0]) if pairs else None


class Endless(BaseException):
    """A check did not end in time."""

    def __str__(self) -> str:
        return f"it did not end within {SECONDS:g} s"


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise Endless in this thread, at whatever line it is, if the context has not ended after this time."""
    thread = ctypes.c_ulong(threading.get_ident())
    timer = threading.Timer(seconds, ctypes.pythonapi.PyThreadState_SetAsyncExc, (thread, ctypes.py_object(Endless)))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
