"""The speed of the same requests on one process and on grids of ranks.

Each rank writes to a file of its own when it computed each step, so that a figure can show how the stages overlap.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from common.config import EngineConfig
from common.machine import median_seconds
from solutions.batching import Engine, ModelRunner, local_engine
from solutions.engine import build_runner, load_model, resolve, start_executor
from solutions.llama_pytorch import SamplingParams, load
from solutions.scheduler import SchedulerOutput


def timed_runner(folder: Path, config: EngineConfig, model, layers: range) -> ModelRunner:
    """A rank's runner, which writes the times of each step to a file of its own."""
    runner = build_runner(config, model, layers)
    runner.execute = partial(timed, runner.execute, folder / f"rank-{dist.get_rank()}.jsonl")
    return runner


def timed(execute: Callable, file: Path, plan: SchedulerOutput, hidden=None):
    start = time.perf_counter()  # the same clock in every process of a machine
    result = execute(plan, hidden)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps([plan.step_id, len(plan.scheduled), start, time.perf_counter()]) + "\n")
    return result


def times_of_ranks(folder: Path) -> dict[int, list[list]]:
    """What the ranks wrote: [step, number of requests, start, end] of each step, by rank."""
    files = sorted((int(file.stem.removeprefix("rank-")), file) for file in folder.glob("rank-*.jsonl"))
    return {rank: [*map(json.loads, file.read_text(encoding="utf-8").splitlines())] for rank, file in files}


def make_probing_runner(folder: Path, config: EngineConfig, model, layers: range) -> ModelRunner:
    """A rank's runner. First all ranks measure an all-reduce of 1, 8 and 64 rows, and rank 0 writes the results."""
    rows = {count: torch.zeros(count, model.config.hidden_size) for count in (1, 8, 64)}
    seconds = {count: median_seconds(partial(dist.all_reduce, x), 200) for count, x in rows.items()}
    if dist.get_rank() == 0:
        (folder / "all_reduce.json").write_text(json.dumps(seconds), encoding="utf-8")
    return build_runner(config, model, layers)


def observed_engine(build: Callable[..., ModelRunner], **options) -> Engine:
    """The assembled engine, but its ranks build their runners by `build(config, model, layers)`."""
    config, tokenizer = resolve(EngineConfig(**options))
    return Engine(start_executor(config, partial(load_model, config), partial(build, config)), tokenizer, config)


@mock.patch.dict(os.environ, KERNELS="plain")  # ranks and stages are compared, not kernels
def measure_grids(name: str, quick: bool) -> dict:
    """Tokens per second of 1, 8 and 32 requests: on one process with one thread and with two, on two tensor-parallel
    ranks, and on two stages with one batch in flight and with two. Then the times of all-reduces.
    """
    model, tokenizer = load(name, torch.float32, "cpu")
    num_tokens, rounds = (6, 1) if quick else (24, 3)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, model.config.vocab_size, (32, 16), generator=generator).tolist()
    params = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
    threads = torch.get_num_threads()
    ways = {
        "one process, 1 thread": None,
        "one process, 2 threads": None,
        "two tensor-parallel ranks": (2, 1),
        "two stages, one batch": (1, 2),
        "two stages, two batches": (1, 2),
    }
    rows: dict[str, dict] = {}
    for way, grid in ways.items():
        torch.set_num_threads(1 if "1 thread" in way else 2)
        row = rows[way] = {}
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            if grid is None:
                engine = local_engine(model, tokenizer, enable_prefix_caching=False)
            else:
                build = partial(timed_runner if "stages" in way else make_probing_runner, folder)
                options = dict(dtype=torch.float32, device="cpu", enable_prefix_caching=False)
                options |= dict(tensor_parallel=grid[0], pipeline_parallel=grid[1])
                engine = observed_engine(build, model=name, **options)
            with engine:
                if way == "two stages, one batch":
                    engine.executor.depth = engine.scheduler.depth = 1
                for count in (1, 8, 32):
                    answer = partial(engine.generate, prompts[:count], params, progress=False)
                    speed = row[f"tokens_per_second_{count}"] = count * num_tokens / median_seconds(answer, rounds)
                    print(f"{name}, {way}, {count} at once: {speed:.1f} tokens/s", flush=True)
            if "stages" in way:
                row["timeline"] = timeline(folder)
            elif grid is not None:
                all_reduce = json.loads((folder / "all_reduce.json").read_text(encoding="utf-8"))
    torch.set_num_threads(threads)
    print("all_reduce: " + ", ".join(f"{rows} rows {seconds * 1e3:.2f} ms" for rows, seconds in all_reduce.items()))
    return {
        "model": name,
        "dtype": "float32",
        "kernels": os.environ.get("KERNELS", ""),
        "num_output_tokens": num_tokens,
        "ways": rows,
        "all_reduce_seconds": all_reduce,
    }


def timeline(folder: Path) -> list[list[list[float]]]:
    """For each stage sixteen of its last steps: [step, number of requests, start, end], in seconds from the first."""
    stages = [spans[-24:-8] for spans in times_of_ranks(folder).values()]
    first = min(stage[0][2] for stage in stages)
    return [[[step, count, start - first, end - first] for step, count, start, end in stage] for stage in stages]
