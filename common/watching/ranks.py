"""The times at which each rank of a grid computed each step. Every rank writes them to a file, and rank 0 reads it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from common.bench.grids import observed_engine, timed_runner, times_of_ranks
from solutions.batching import Engine


def timed_engine(folder: Path, options: dict[str, Any]) -> Engine:
    """An engine on a grid of ranks, which write their times into this folder. options: those of `EngineConfig`."""
    return observed_engine(partial(timed_runner, folder), **options)


def rank_times(folder: Path, begin: float) -> dict[int, list[list[float]]]:
    """[step, start, end] of each rank, in seconds after `begin`."""
    return {
        rank: [[step, round(start - begin, 6), round(end - begin, 6)] for step, _, start, end in times]
        for rank, times in times_of_ranks(folder).items()
    }
