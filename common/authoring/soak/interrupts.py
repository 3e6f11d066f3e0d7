"""Ctrl-C at any line of our own code: tracers that record the executed lines and raise the signal at one of them."""

from __future__ import annotations

import functools
import linecache
import signal
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType

from common.course import ROOT

OURS = tuple(str(ROOT / folder) for folder in ("solutions/", "common/"))
WATCHERS = ("/tests/", "/authoring/soak/")
Place = tuple[str, int]  # file, line


class Lines:
    """Counts how often each line of our own code is executed. A tracer, for `tracing`."""

    def __init__(self):
        self.places: dict[Place, int] = defaultdict(int)

    def __call__(self, frame: FrameType, event: str, argument: object) -> Lines | None:
        file = frame.f_code.co_filename
        if not file.startswith(OURS) or any(part in file for part in WATCHERS):
            return None
        if event == "line" and not takes_no_signal(frame):
            self.places[file, frame.f_lineno] += 1
            self.reach((file, frame.f_lineno))
        return self

    def reach(self, place: Place) -> None:
        """Called before each line is executed."""


@functools.cache
def first_offsets(code: CodeType) -> dict[int, int]:
    """Return the offset of the first instruction of each line."""
    return {line: start for start, _, line in reversed(list(code.co_lines())) if line is not None}


def takes_no_signal(frame: FrameType) -> bool:
    """Whether Python handles no signal at this line. It handles them after calls, at the beginning of functions, and
    where loops go back: not where a `with` statement is about to call `__exit__`, nor at a `try`.
    """
    text = linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
    is_left = text.startswith("with ") and frame.f_lasti != first_offsets(frame.f_code)[frame.f_lineno]
    return is_left or text.startswith("try:")


class Pressing(Lines):
    """A tracer that can raise SIGINT once, as Ctrl-C does."""

    def __init__(self):
        super().__init__()
        self.is_pressed = False

    def press(self) -> None:
        sys.settrace(None)
        self.is_pressed = True
        signal.raise_signal(signal.SIGINT)


class AfterLines(Pressing):
    """Raises SIGINT after this number of lines."""

    def __init__(self, number: int):
        super().__init__()
        self.number, self.num_lines = number, 0

    def reach(self, place: Place) -> None:
        self.num_lines += 1
        if self.num_lines > self.number:
            self.press()


@contextmanager
def tracing(tracer: Lines | None) -> Iterator[None]:
    """Trace this thread within the block."""
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        yield
    finally:
        sys.settrace(before)
