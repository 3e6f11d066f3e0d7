"""From a command's options to an engine: the student's modules with MINE, the reference's otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from common.checkpoints import CheckpointError
from common.config import EngineConfig
from common.course import CourseError, activate, substitutes
from common.course.modules import UnfinishedModule, listed
from common.options import ENGINE_FIELDS

LESSON_5 = ("model", "num_blocks", "max_num_batched_tokens", "scheduling_policy", "preemption")
"""Options that an engine of lesson 5 has, too."""


class OptionError(CourseError):
    """A wrong option or prompt; the text says what to change."""


def start_engine(
    options: dict[str, Any], mine: str = "", threads: int | None = None, make: Callable[[dict], Any] | None = None
) -> Any:
    """Load the engine that the options ask for. options: every field of EngineConfig. make: assembles it, if not
    `make_engine`, from the options that differ from the default.

    Raises OptionError for options that do not fit, and CheckpointError.
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
    try:
        EngineConfig(**options)
        given = {name: options[name] for name, each in ENGINE_FIELDS.items() if options[name] != each.default}
        return (make or make_engine)(given)
    except CheckpointError:
        raise
    except ValueError as error:
        raise OptionError(str(error)) from None


def make_engine(options: dict[str, Any]) -> Any:
    """The assembled engine; lesson 5's, in a copy of the course in which lesson 8 is withheld and not finished yet.

    options: those that were given. Raises OptionError if one of them needs a later lesson that waits.
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
