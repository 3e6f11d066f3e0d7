"""`make bench`: measures this machine and the engine on it, and writes the results to common/bench/measurements/.

The figures of the READMEs are drawn from these files. Each file names the machine, the versions, the day and the
command. Every number is a median. Ways that are compared are measured in turn, in one process, because the speed of a
machine changes with time. `--quick` runs every measurement in miniature, to see that it works, and keeps nothing.

Without a name it measures the machine, the ladder and speculation, which takes about a quarter of an hour. `all` is
every measurement. The beginning of a name means all that begin so: `python -m common bench speculation`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name

import click
import torch

from common.bench.results import MEASUREMENTS, save
from common.checkpoints import find_checkpoint
from common.course import CourseError, activate, files_used
from common.machine import cpu_name, gemm_rate, interleaved_medians, read_bandwidth
from common.options import threads

# --- The machine ------------------------------------------------------------------------------------------------------


def measure_machine(quick: bool) -> dict:
    megabytes, size, repeats = (16, 256, 3) if quick else (1024, 2048, 15)
    result = {"read_gb_per_s": read_bandwidth(megabytes, repeats), "gemm_gflop_per_s": gemm_rate(size, repeats)}
    print(f"reads {result['read_gb_per_s']:.1f} GB/s, float32 GEMM {result['gemm_gflop_per_s']:.0f} GFLOP/s")
    return {"read_mb": megabytes, "gemm_size": size, "repeats": repeats, **result}


# --- Lessons 2 and 3: a token without a cache and with one ------------------------------------------------------------


def measure_contexts(name: str, lengths: list[int], repeats: int, with_cache: bool) -> dict:
    """Seconds for one more token after a context of each length: recomputed, and, if with_cache, with lesson 3's cache.

    If transformers is installed, its model of the same weights is measured too, with its cache, and, unless with_cache,
    without one.
    """
    from common.bench.peers import load_transformers, transformers_steps
    from solutions.kv_cache import KVCache, decode_step, prefill
    from solutions.llama_pytorch import load, recompute

    model, _ = load(name, torch.float32, "cpu")
    theirs = load_transformers(find_checkpoint(name))
    generator = torch.Generator().manual_seed(0)

    def ways_after(token_ids: torch.Tensor) -> dict[str, Callable[[], object]]:
        ids = token_ids.tolist()
        ways: dict[str, Callable[[], object]] = {"recompute": lambda: recompute(model, ids)}
        if with_cache:
            cache = KVCache(model, len(ids))
            prefill(model, cache, ids[:-1])
            # Truncated, so that the next repeat finds the same context.
            ways["cache"] = lambda: (decode_step(model, cache, ids[-1]), cache.truncate(len(ids) - 1))
        if theirs is not None:
            ways |= transformers_steps(theirs, token_ids)
            if with_cache:
                del ways["transformers, no cache"]
        return ways

    rows = []
    for length in lengths:
        with torch.inference_mode():
            ways = ways_after(torch.randint(model.config.vocab_size, (length,), generator=generator))
            row = {"context": length, **interleaved_medians(ways, repeats)}
        rows.append(row)
        print(f"{name}, {length} tokens: " + ", ".join(f"{way} {row[way] * 1e3:.1f} ms" for way in ways), flush=True)
    return {"model": name, "dtype": "float32", "repeats": repeats, "unit": "seconds per token", "rows": rows}


# --- Lesson 5: the cost of preemption ---------------------------------------------------------------------------------


def measure_preemption(name: str, lengths: list[int], repeats: int, quick: bool) -> dict:
    """Seconds to bring back a preempted sequence: by swapping its blocks out and in, and by computing them again.

    Then the speed of an engine that preempts in either way, because its requests need twice the blocks of the pool.
    """
    from solutions.batching import ModelRunner, local_engine
    from solutions.llama_pytorch import SamplingParams, load, use_kernels
    from solutions.paged_attention import BlockCopy, PagedKVCache, cdiv
    from solutions.scheduler import ScheduledRequest, SchedulerOutput

    model, tokenizer = load(name, torch.float32, "cpu")
    use_kernels(model)
    block_size, chunk = 16, 256
    generator = torch.Generator().manual_seed(0)

    def part(ids: list[int], start: int, table: list[int]) -> ScheduledRequest:
        """A chunk of a prompt, after which no token is sampled."""
        tokens, params = ids[start : start + chunk], SamplingParams()
        return ScheduledRequest("0", start, tokens, 0, table, params, None, ids, [], frozenset(), 1)

    rows = []
    for length in lengths:
        blocks = cdiv(length, block_size)
        cache = PagedKVCache(model, blocks, block_size, blocks)
        runner = ModelRunner(model, cache)
        ids = torch.randint(model.config.vocab_size, (length,), generator=generator).tolist()
        table = list(range(blocks))
        moves = [BlockCopy(block, block, min(block_size, length - block * block_size)) for block in table]
        plans = [SchedulerOutput(1, [part(ids, start, table)]) for start in range(0, length, chunk)]
        ways = {
            "recompute": lambda plans=plans, runner=runner: [runner.execute(plan) for plan in plans],
            "swap": lambda cache=cache, moves=moves: (cache.swap_out(moves), cache.swap_in(moves)),
        }
        rows.append({"tokens": length, **interleaved_medians(ways, repeats)})
        print(f"{name}, {length} tokens: " + ", ".join(f"{way} {rows[-1][way] * 1e3:.2f} ms" for way in ways))

    num_requests, prompt_length, output_length = (4, 8, 24) if quick else (16, 64, 96)
    prompts = torch.randint(model.config.vocab_size, (num_requests, prompt_length), generator=generator).tolist()
    params = SamplingParams(max_tokens=output_length, ignore_eos=True)
    needed = num_requests * cdiv(prompt_length + output_length, block_size)
    served: dict[str, list[dict]] = {"ample": [], "recompute": [], "swap": []}
    for _ in range(1 if quick else 3):
        for way, results in served.items():
            num_blocks, preemption = (needed, "recompute") if way == "ample" else (needed // 2, way)
            settings = dict(num_blocks=num_blocks, preemption=preemption, enable_prefix_caching=False)
            with local_engine(model, tokenizer, **settings) as engine:
                engine.generate(prompts, params, progress=False)
                totals = engine.metrics()
            counts = ("tokens_per_second", "num_preemptions", "num_computed_tokens")
            results.append({name: getattr(totals, name) for name in counts})
    for way, results in served.items():
        speed = statistics.median(each["tokens_per_second"] for each in results)
        served[way] = {**results[0], "tokens_per_second": speed}
        print(f"{name}, {num_requests} requests, {way}: {served[way]}")
    return {
        "model": name,
        "dtype": "float32",
        "repeats": repeats,
        "unit": "seconds for all tokens of a sequence",
        "rows": rows,
        "load": {"num_requests": num_requests, "num_prompt_tokens": prompt_length, "num_output_tokens": output_length},
        "num_blocks": {"ample": needed, "tight": needed // 2},
        "served": served,
    }


# --- The command ------------------------------------------------------------------------------------------------------


NAMES = (
    "machine", "recompute-smollm2-135m", "kv-cache-smollm2-135m", "preemption-smollm2-135m", "grids-smollm2-135m",
    "quality-smollm2-135m", "ladder-smollm2-135m", "speculation-smollm2-135m", "speculation-tales",
    "serving-smollm2-135m",
)  # fmt: skip
DEFAULT = ("machine", "ladder", "speculation")


def measure(name: str, quick: bool, rival: int | None = None) -> dict:
    """The result of the measurement of this name, which ends with the model's name, except for `machine`.

    rival: the port of another server, for the measurement of the server.
    """
    kind = name.removesuffix("-tales").removesuffix("-smollm2-135m")
    model = "tales" if quick or name.endswith("-tales") else "smollm2-135m"
    draft = "tales-draft" if name == "speculation-tales" else None
    lengths, repeats = ([4, 8], 2) if quick else ([16, 32, 64, 128, 256, 384, 512], 9)
    measurements = {
        "machine": lambda: measure_machine(quick),
        "recompute": lambda: measure_contexts(model, lengths, repeats, with_cache=False),
        "kv-cache": lambda: measure_contexts(model, lengths, repeats, with_cache=True),
        "preemption": lambda: measure_preemption(model, [8, 16] if quick else [64, 256, 1024], repeats, quick),
    }
    if kind in measurements:
        return measurements[kind]()
    # The others have modules of their own, which import `solutions`: imported after `activate`, and only if needed.
    more = {"speculation": {"draft": draft}, "serving": {"rival": rival}}.get(kind, {})
    return resolve_name(f"common.bench.{kind}:measure_{kind}")(model, quick=quick, **more)


@click.command(
    help=f"""Measure this machine and the engine on it.

WHAT: one of {", ".join(NAMES)}, or the beginning of some; all; default: {" ".join(DEFAULT)}."""
)
@click.argument("what", nargs=-1)
@click.option("--quick", is_flag=True, help="in miniature; nothing is kept")
@click.option("--rival", type=int, help="serving: the port of another server of the same model, to take turns with")
@threads
@click.option("--out", type=Path, default=MEASUREMENTS, help="the folder for the results", show_default=False)
def bench(what: tuple[str, ...], quick: bool, rival: int | None, threads: int | None, out: Path) -> None:
    chosen: list[str] = []
    for word in what or DEFAULT:
        meant = [name for name in NAMES if word == "all" or name == word or name.startswith(f"{word}-")]
        if not meant:
            raise CourseError(f"There is nothing called {word!r} to measure; there is {', '.join(NAMES)}.")
        chosen += [name for name in meant if name not in chosen]
    if threads:
        torch.set_num_threads(threads)
    activate(None)  # the record is of the reference
    print(f"{cpu_name()}, {torch.get_num_threads()} threads. {files_used()}")
    options = [*(["--threads", str(threads)] if threads else []), *(["--rival", str(rival)] if rival else [])]
    command = " ".join(["python -m common bench", *what, *options])
    for name in chosen:
        start = time.perf_counter()
        result = measure(name, quick, rival)
        print(f"{name}: measured in {time.perf_counter() - start:.0f} s.", flush=True)
        if quick:
            print(f"{name}: not kept, since --quick measures nothing worth keeping.")
        else:
            save(out, name, command, result)
