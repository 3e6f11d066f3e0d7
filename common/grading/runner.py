"""Grades one file: starts the worker, enforces time limits, and makes results from what the worker reports.

A student's code may loop for ever, end the process or crash it. Then the worker is killed with all that it started,
the exercise gets its result, and a new worker continues with the remaining exercises.

This process imports no torch, so it starts quickly, and a student's code cannot change it.
"""

from __future__ import annotations

import ast
import contextlib
import re
import secrets
import subprocess
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from common.course import CourseError, Lesson, shown, unfinished
from common.course.exercises import TOGETHER, exercises_of, read_source, walk_functions
from common.course.modules import Waits, listed, still_to_do_below
from common.grading.results import Result, fingerprint, keep, look_first
from common.grading.wire import MAX_EVENT, opened
from common.workers import call, kill

START_SECONDS = 120.0  # how long a worker may take to import torch and collect the checks
GONE_SECONDS = 5.0  # how long one that has closed its connection may take to end, before it is killed


class Worker:
    """The process that holds torch and runs the checks, and the connection to it. It waits for `begin`."""

    patience = 1.0  # the factor by which the checks' time limits are extended

    def __init__(self):
        self.process, self.connection = call("common.grading.worker:wait")

    def begin(self, lesson: Lesson, file: Path, ids: list[str], show_prints: bool, key: bytes) -> None:
        self.connection.send((lesson, file, ids, show_prints, key))

    def how_it_ended(self) -> str:
        """How the worker ended, as a phrase, once its connection is closed. The student's code may still be running."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=GONE_SECONDS)
        self.close()
        code = self.process.returncode
        number = -code if code < 0 else code - 128  # of a signal, to which bubblewrap adds 128
        return f"by signal {number}" if number > 0 else f"with exit code {code}"

    def close(self) -> None:
        """End the process and whatever it started."""
        kill(self.process)


def grade(
    lesson: Lesson,
    file: Path,
    only: list[str] | None = None,
    on_result: Callable[[Result], None] = lambda result: None,
    show_prints: bool = False,
    start: Callable[[], Worker] = Worker,
) -> list[Result]:
    """Grade a file with its lesson's checks. Returns a result for each exercise, and that of the whole module last.

    only: the exercises to grade; None: all, and the whole module. on_result: called with each result, in order, as soon
    as it is known. start: starts a worker. Raises CourseError if the file cannot be read, or if
    the checks themselves are broken.
    """
    if not lesson.is_importable:
        raise CourseError(
            f"{shown(lesson.module)} needs the package {lesson.needs}, which is not installed: "
            f"python -m common setup {lesson.needs}"
        )
    source = read_source(file)
    lines = todo_lines(source)
    results = {
        each.id: Result(each.id, each.function, line=lines.get(each.id) or lines.get(each.function, 0))
        for each in exercises_of(lesson)
        if only is None or each.id in only
    }
    todo = set(unfinished(source))
    if below := still_to_do_below(lesson):
        if not lesson.part:
            raise Waits(f"Lesson {lesson.number}", below)
        for result in results.values():  # the first module of this lesson can be worked on
            result.status, result.sentence = "waiting", f"waits for {listed(below)}"
            on_result(result)
        return list(results.values())
    if only is None:
        results[TOGETHER] = Result(TOGETHER, "together", status="waiting")
    waiting = [each for each in results if each not in todo and (each != TOGETHER or not todo)]
    unreported = list(results.values())

    def report_known() -> None:
        """Report known results in order, a wrong exercise only after those that may be the cause."""
        while unreported and not {unreported[0].id, *unreported[0].through}.intersection(waiting):
            result = unreported.pop(0)
            result.sentence += pointer(lesson, result, results)
            on_result(result)

    while True:
        with contextlib.closing(run(start(), lesson, file, waiting, show_prints, results)) as known:
            for each in known:
                waiting.remove(each)
                report_known()
        if TOGETHER in waiting:  # a worker was lost, so not all exercises have passed
            waiting.remove(TOGETHER)
        if not waiting:
            break
    report_known()
    return list(results.values())


def grade_and_keep(lesson: Lesson, file: Path, **options) -> list[Result]:
    """Grade a file and store the results, unless the file was saved meanwhile: they may belong to either version."""
    before = fingerprint(lesson, file)
    results = grade(lesson, file, **options)
    if fingerprint(lesson, file) == before:
        keep(lesson, file, results)
    return results


def run(
    worker: Worker, lesson: Lesson, file: Path, ids: list[str], show_prints: bool, results: dict[str, Result]
) -> Generator[str]:
    """Let a worker run exercises, and put what it reports into the results. Yields an exercise's id when its result is
    known.
    """
    key = secrets.token_bytes(16)
    checks: dict[str, tuple[int, float, int]] = {}  # of each exercise: points, seconds, number of checks
    current, finished, count, limit = None, None, 0, START_SECONDS

    def blame(during: str, after: str, before: str) -> list[str]:
        """Fail the exercise that the worker runs, or ran last, because it hangs or has ended. Returns the ids whose
        results are now known. Raises CourseError if it has run none yet.
        """
        if current is None and finished is None:
            raise CourseError(before)
        fail(results[current or finished], during if current else after)
        return [current] if current else []

    with contextlib.closing(worker):
        with contextlib.suppress(OSError):  # it has ended already, which is noticed below
            worker.begin(lesson, file, ids, show_prints, key)
        deadline = time.monotonic() + limit
        while True:
            if not worker.connection.poll(max(0.0, deadline - time.monotonic())):
                if current:
                    results[current].certain = False
                yield from blame(
                    f"did not end within {limit:g} s: an endless loop? If the machine is busy, try again.",
                    "left the Python process hanging after its checks.",
                    f"The grader's worker did not start within {limit:g} s.",
                )
                return
            try:
                kind, *event = opened(worker.connection.recv_bytes(MAX_EVENT), key)
            except (EOFError, OSError):
                how = worker.how_it_ended()
                yield from blame(
                    f"ended the Python process {how} in the middle of a check.",
                    f"ended the Python process {how} after its checks.",
                    f"The grader's worker ended {how}; is torch installed?",
                )
                return
            except ValueError:
                raise CourseError(f"{shown(file)} wrote into the grader's own connection.") from None
            if kind == "collected":
                checks = event[0]
                for id, result in results.items():
                    if id not in checks:
                        raise CourseError(f"{shown(lesson.checks)} has no check for {id} ({result.name}).")
                    result.points = checks[id][0]
            elif kind == "start":
                current, count = event[0], 0
                limit = worker.patience * checks[current][1]
                deadline = time.monotonic() + limit
            elif kind == "note":
                results[current].notes.append(event[0])
            elif kind == "check":
                count += 1
                if event[0] is not None:
                    fail(results[current], **event[0])
                if count == checks[current][2]:  # naming the mistake does not count as the student's time
                    deadline = time.monotonic() + START_SECONDS
            elif kind == "mistake":
                results[current].mistake = event[0]
            elif kind == "end":
                if current == TOGETHER and not count:
                    results[current].status = "waiting"
                elif count != checks[current][2]:
                    fail(results[current], f"only {count} of {checks[current][2]} checks were run.")
                elif results[current].status != "wrong" and not results[current].sentence:
                    results[current].status = "passed"
                finished, current, deadline = current, None, time.monotonic() + START_SECONDS
                yield finished
            elif kind == "broken" and count:
                fail(results[current], "ended its checks too early: it has changed or closed what pytest needs.")
                yield current
                return
            elif kind == "broken":
                if finished is None:
                    raise CourseError(f"A check of the course is broken, please report it:\n{event[0]}")
                return  # an earlier answer may be the cause; a new process will show it
            elif kind == "finished":
                if not checks:
                    raise CourseError(f"{shown(lesson.checks)} has no checks.")
                return


def fail(
    result: Result, sentence: str, traceback: str = "", waits_for: str | None = None, through: Sequence[str] = ()
) -> None:
    """Record the failure of a check. Of several failures, the first is kept. One that waits for an exercise which is to
    do is replaced by one that does not.
    """
    if result.status == "wrong":
        return
    if waits_for:
        result.status, result.sentence = "waiting", f"waits for {waits_for}"
    else:
        result.status, result.sentence, result.traceback, result.through = "wrong", sentence, traceback, list(through)


def pointer(lesson: Lesson, result: Result, results: dict[str, Result]) -> str:
    """The addition to a wrong exercise's sentence if the whole file is the student's, or ""."""
    if first := look_first(result, results):
        verb = "is" if len(first) == 1 else "are"
        return f"\nThis ran in your whole file, and {listed(first)} {verb} wrong too: look there first."
    if unknown := [id for id in result.through if id not in results]:
        ran = listed(unknown)
        return f"\nThis ran in your whole file, {ran} included: make test-lesson-{lesson.number} says which are right."
    return ""


def todo_lines(source: str) -> dict[str, int]:
    """The line of each TODO, by the exercise's id, and of each function, by its qualified name."""
    lines = {name: node.lineno for name, node in walk_functions(ast.parse(source))}
    for number, text in enumerate(source.splitlines(), 1):
        if match := re.match(r"\s*# TODO (\d+\.\d+):", text):
            lines[match[1]] = number
    return lines
