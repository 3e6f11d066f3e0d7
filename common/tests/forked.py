"""Processes for tests that are forked from the test's own, which has torch imported: a tenth of a second, not three."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path

from common.course import Lesson
from common.grading.runner import Worker
from common.grading.worker import work


def fork(function: Callable, *arguments: object) -> int:
    """Call a function in a child process. Returns its process id."""
    if process_id := os.fork():
        return process_id
    status = 1
    try:
        function(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


class ForkedWorker(Worker):
    """A grader's worker for code that ends by itself: how it died cannot be asked."""

    def __init__(self, lesson: Lesson, file: Path, ids: list[str], show_prints: bool, key: bytes):
        self.connection, theirs = Pipe()
        self.process_id: int | None = fork(work, theirs, lesson, file, ids, show_prints, key)
        theirs.close()

    def close(self) -> None:
        if self.process_id is not None:  # once: the number may be another process's afterwards
            for kill in (os.killpg, os.kill):  # with what it has started, if it came so far as to lead a group
                with contextlib.suppress(ProcessLookupError):
                    kill(self.process_id, signal.SIGKILL)
            os.waitpid(self.process_id, 0)
            self.process_id = None
            self.connection.close()
