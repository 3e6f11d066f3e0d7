"""Describes an error in a worker, and tells whether another worker's failure caused it."""

from __future__ import annotations

import functools
import importlib.util
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


class WorkerError(RuntimeError):
    """A worker has died, hangs or failed, so the engine can no longer be used. The text says which worker and why."""


class WorkerLost(RuntimeError):
    """A worker reported a failure or did not answer. `explain` finds the cause."""


@dataclass(frozen=True)
class Failure:
    """The last message of a worker that could not carry out a command."""

    rank: int
    text: str
    is_consequence: bool  # another rank failed first: the connection to it broke, or it did not answer


@functools.cache
def torch_folder() -> Path:
    """The folder of torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec and spec.origin else Path("no torch")


def frame_outside_torch(frames: Sequence[traceback.FrameSummary]) -> traceback.FrameSummary:
    """The innermost frame that is not torch's own code: the line of the program that called into torch."""
    own = [frame for frame in frames if torch_folder() not in Path(frame.filename).parents]
    return (own or frames)[-1]


def describe(error: BaseException) -> str:
    """The error and the line of the program that raised it, in one line of text."""
    frame = frame_outside_torch(traceback.extract_tb(error.__traceback__))
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {error}"


def is_consequence(error: BaseException) -> bool:
    """Whether the error was raised in communication with other ranks, one of which is then likely to be the cause."""
    distributed = torch_folder() / "distributed"
    frames = traceback.extract_tb(error.__traceback__)
    return "gloo/" in str(error) or any(distributed in Path(frame.filename).parents for frame in frames)
