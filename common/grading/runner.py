"""Grades one file: starts the worker, keeps the time, and makes results of what the worker reports.

A student's code may loop for ever, end the process or crash it. Then the worker is killed with all that it started,
the exercise gets its result, and a new worker goes on with the exercises that are left.

This process imports no torch: it answers at once, and nothing that a student's code does to its process reaches it.
"""

from __future__ import annotations

import ast
import json
import multiprocessing
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.course import CourseError, Lesson, shown, unfinished
from common.skeleton import TOGETHER, exercises_of, walk_functions

START_SECONDS = 120.0
"""How long a worker may take to import torch and collect the checks."""


@dataclass
class Result:
    """What became of one exercise. `line` is where its TODO stands, or its function."""

    id: str
    name: str
    status: str = "to do"  # "passed", "wrong", "to do", "waiting" (the together check, until all have passed)
    points: int = 0
    sentence: str = ""
    mistake: str | None = None
    traceback: str = ""
    line: int = 0
    certain: bool = True  # False where the machine's speed decided: such a result is not kept

    def __str__(self) -> str:
        return self.name if self.id == TOGETHER else f"{self.id} {self.name}"


def grade(
    lesson: Lesson,
    file: Path,
    only: list[str] | None = None,
    on_result: Callable[[Result], None] = lambda result: None,
    show_prints: bool = False,
) -> list[Result]:
    """Grade a file against its lesson's checks. Returns one result for each exercise, and the together check last.

    only: just these exercises. on_result is called with each as soon as it is known, in order. Raises CourseError
    where the file cannot be read, or the checks themselves are broken.
    """
    source = read_source(file)
    lines = todo_lines(source)
    results = {
        each.id: Result(each.id, each.function, line=lines.get(each.id) or lines.get(each.function, 0))
        for each in exercises_of(lesson)
        if only is None or each.id in only
    }
    todo = set(unfinished(source))
    if only is None:
        results[TOGETHER] = Result(TOGETHER, "together", status="waiting")
    waiting = [each for each in results if each != TOGETHER and each not in todo]
    session = Session(lesson, file, show_prints)
    shown_so_far: list[str] = []

    def show_known(until: str | None = None) -> None:
        """Report, in order, what is decided by now."""
        for each in results:
            if each == until:
                return
            if each not in shown_so_far:
                shown_so_far.append(each)
                on_result(results[each])

    if only is None and not todo:
        waiting.append(TOGETHER)
    try:
        while True:
            for each in session.run(waiting, results):
                waiting.remove(each)
                show_known(until=waiting[0] if waiting else None)
            if without := [each for each in waiting if each != TOGETHER and each not in session.checks]:
                raise CourseError(f"{shown(lesson.checks)} has no checks for {', '.join(without)}.")
            if TOGETHER in waiting:  # a worker was lost, so not all exercises have passed
                waiting.remove(TOGETHER)
            if not waiting:
                break
        show_known()
    finally:
        session.close()
    return list(results.values())


class Session:
    """The worker of the moment, and what it said about the checks."""

    def __init__(self, lesson: Lesson, file: Path, show_prints: bool):
        self.lesson = lesson
        self.file = file
        self.show_prints = show_prints
        self.process: multiprocessing.process.BaseProcess | None = None
        self.checks: dict[str, tuple[int, float, int]] = {}

    def run(self, ids: list[str], results: dict[str, Result]):
        """Run these exercises in one worker, as far as it gets; yield each id when its result is known."""
        connection = self.start(ids)
        current, count, deadline = None, 0, time.monotonic() + START_SECONDS
        while True:
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                if current is None:
                    raise CourseError(f"The grader's worker did not start within {START_SECONDS:g} s.")
                fail(results[current], f"took longer than {self.checks[current][1]:g} s: an endless loop?")
                results[current].certain = False
                yield current
                return
            try:
                kind, *event = json.loads(connection.recv_bytes())
            except (EOFError, OSError):
                self.process.join(timeout=5)  # a student's code may have closed the connection and gone on
                self.close()
                code = self.process.exitcode
                if current is None:
                    raise CourseError(f"The grader's worker died (exit code {code}); is torch installed?") from None
                how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
                fail(results[current], f"ended the Python process {how} in the middle of a check.")
                yield current
                return
            if kind == "broken":
                self.close()
                raise CourseError(f"A check of the course is broken, please report it:\n{event[0]}")
            if kind == "collected":
                self.checks = event[0]
                for id, result in results.items():
                    if id not in self.checks:
                        self.close()
                        raise CourseError(f"{shown(self.lesson.checks)} has no check for {id} ({result.name}).")
                    result.points = self.checks[id][0]
            elif kind == "start":
                current, count = event[0], 0
                deadline = time.monotonic() + self.checks[current][1]
            elif kind == "check":
                count += 1
                if event[0] is not None:
                    fail(results[current], **event[0])
            elif kind == "end":
                if current == TOGETHER and not count:
                    results[current].status = "waiting"
                elif count != self.checks[current][2]:
                    fail(results[current], f"only {count} of {self.checks[current][2]} checks were run.")
                elif results[current].status != "wrong":
                    results[current].status = "passed"
                finished, current, deadline = current, None, time.monotonic() + START_SECONDS
                yield finished
            elif kind == "finished":
                self.close()  # not join: a thread that a student's code has left behind would keep the process
                return

    def start(self, ids: list[str]):
        context = multiprocessing.get_context("spawn")
        connection, theirs = context.Pipe()
        self.process = context.Process(
            target=launch, args=(theirs, self.lesson, self.file, ids, self.show_prints), daemon=True
        )
        self.process.start()
        theirs.close()
        return connection

    def close(self) -> None:
        """End the worker and whatever it started."""
        if self.process is None or self.process.exitcode is not None:
            return
        if hasattr(os, "killpg"):
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass  # not the leader of its group yet
        self.process.kill()
        self.process.join()


def launch(*arguments) -> None:
    """In the new process: only there is torch imported."""
    from common.grading.worker import work

    work(*arguments)


def fail(result: Result, sentence: str, mistake: str | None = None, traceback: str = "") -> None:
    """Note a failure. Of several the first is told that a known mistake explains, or else the first."""
    if result.status != "wrong" or (mistake and not result.mistake):
        result.status, result.sentence, result.mistake, result.traceback = "wrong", sentence, mistake, traceback


def read_source(file: Path) -> str:
    """The file's text, if Python can read it. Raises CourseError with file and line."""
    try:
        source = file.read_text(encoding="utf-8")
        compile(source, str(file), "exec")
    except FileNotFoundError:
        raise CourseError(f"{shown(file)} does not exist.") from None
    except UnicodeDecodeError as error:
        raise CourseError(f"{shown(file)} is not UTF-8 text: {error.reason} at byte {error.start}.") from None
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise CourseError(
            f"{shown(file)}:{error.lineno}: Python cannot read this line: {error.msg}."
            + (f"\n    {line}" if line else "")
        ) from None
    except ValueError as error:
        raise CourseError(f"{shown(file)}: {error}") from None
    return source


def todo_lines(source: str) -> dict[str, int]:
    """Where each exercise's TODO stands, by its id, and each function, by its qualified name."""
    lines = {name: node.lineno for name, node in walk_functions(ast.parse(source))}
    for number, text in enumerate(source.splitlines(), 1):
        if match := re.match(r"\s*# TODO (\d+\.\d+):", text):
            lines[match[1]] = number
    return lines
