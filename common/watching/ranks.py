"""When each rank of a grid computed each step: every rank notes it in a file of its own, and rank 0 reads them."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from common.bench.grids import observed_engine
from common.config import EngineConfig
from solutions.batching import Engine
from solutions.engine import build_runner


def timed_engine(folder: Path, options: dict[str, Any]) -> Engine:
    """An engine on a grid of ranks, which note their times in this folder. options: those of `EngineConfig`."""
    grid = options.pop("tensor_parallel", 1), options.pop("pipeline_parallel", 1)
    name = options.pop("model", EngineConfig.model)
    return observed_engine(partial(timed_runner, folder), name, grid, **options)


def timed_runner(folder: Path, config: EngineConfig, model, layers: range):
    runner, file = build_runner(config, model, layers), folder / f"rank-{dist.get_rank()}.jsonl"
    runner.execute = partial(timed, runner.execute, file)
    return runner


def timed(execute, file: Path, plan, hidden=None):
    start = time.perf_counter()  # the same clock in every process of a machine
    result = execute(plan, hidden)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps([plan.step_id, start, time.perf_counter()]) + "\n")
    return result


def rank_times(folder: Path, begin: float) -> dict[int, list[list[float]]]:
    """[step, start, end] of each rank, in seconds after `begin`."""
    found = {}
    for file in sorted(folder.glob("rank-*.jsonl"), key=lambda file: int(file.stem[5:])):
        times = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        found[int(file.stem[5:])] = [
            [step, round(start - begin, 6), round(end - begin, 6)] for step, start, end in times
        ]
    return found
