"""When each rank of a grid computed each step: every rank notes it in a file of its own, and rank 0 reads them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from common.bench.grids import observed_engine, timed_runner, times_of_ranks
from common.config import EngineConfig
from solutions.batching import Engine


def timed_engine(folder: Path, options: dict[str, Any]) -> Engine:
    """An engine on a grid of ranks, which note their times in this folder. options: those of `EngineConfig`."""
    grid = options.pop("tensor_parallel", 1), options.pop("pipeline_parallel", 1)
    name = options.pop("model", EngineConfig.model)
    return observed_engine(partial(timed_runner, folder), name, grid, **options)


def rank_times(folder: Path, begin: float) -> dict[int, list[list[float]]]:
    """[step, start, end] of each rank, in seconds after `begin`."""
    return {
        rank: [[step, round(start - begin, 6), round(end - begin, 6)] for step, _, start, end in times]
        for rank, times in times_of_ranks(folder).items()
    }
