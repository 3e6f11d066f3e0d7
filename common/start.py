"""Makes an engine from a command's options, of the student's modules where MINE names them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

from common.checkpoints import CheckpointError
from common.config import EngineConfig
from common.course import CourseError, activate, substitutes
from common.course.modules import UnfinishedModule, listed
from common.options import ENGINE_FIELDS

LESSON_5 = ("model", "num_blocks", "max_num_batched_tokens", "scheduling_policy", "preemption")
"""The options that lesson 5's `load_engine` takes."""


class OptionError(CourseError):
    """A wrong option or prompt; the text says what to change."""


@contextlib.contextmanager
def option_errors() -> Iterator[None]:
    """Within the context a ValueError, which an engine raises for a wrong option or request, becomes an OptionError."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise OptionError(str(error)) from None


def start_engine(
    options: dict[str, Any], mine: str = "", threads: int | None = None, make: Callable[[dict], Any] | None = None
) -> Any:
    """Load the engine that the options ask for.

    options: every field of EngineConfig. make: makes the engine from the options that differ from the default;
    `make_engine` if None. Raises OptionError for options that do not fit, and CheckpointError.
    """
    activate(mine)  # before anything of `solutions` is imported: it decides which files that means
    if substitutes() and not os.environ.get("KERNELS"):
        os.environ["KERNELS"] = "plain"  # so that the student's code is what runs
    import torch

    if "TORCHELASTIC_RUN_ID" in os.environ:
        from solutions.parallelism import serve_as_worker

        serve_as_worker()
    if threads:
        torch.set_num_threads(threads)
    with option_errors():
        EngineConfig(**options)
        given = {name: options[name] for name, each in ENGINE_FIELDS.items() if options[name] != each.default}
        return (make or make_engine)(given)


def make_engine(options: dict[str, Any]) -> Any:
    """Returns lesson 8's engine, or lesson 5's where lesson 8 is withheld in this copy and not finished yet.

    options: those that were given. Raises OptionError if one of them needs a lesson that is not finished.
    """
    try:
        from solutions.engine import InferenceEngine
    except UnfinishedModule as error:
        if later := [option for option in options if option not in LESSON_5]:
            raise OptionError(f"{listed(later)} cannot be used yet: {error}") from None
        print(f"Lesson 5's engine answers; parallelism, quantization and speculation wait. {error}")
        from solutions.batching import load_engine

        return load_engine(options.pop("model", EngineConfig.model), **options)
    return InferenceEngine(**options)
