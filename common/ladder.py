"""The ladder: what each lesson's engine makes of the same prompts, in one run, beside transformers on the same weights.

The loads: one stream; eight equal streams; and 32 requests of all lengths that are there at once. Every way gives the
same tokens, up to near-ties, and that is checked; but not for quantized weights, which are other weights. Rounds are
interleaved and the order of ways varies, so that a machine that drifts does so for all of them; what is told are
medians.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.table import Table

NEAR_TIE = 1e-3
"""Two ways may go on with different tokens where the likeliest two are closer than this: the last digits of sums in
float32 depend on the number of rows."""


@dataclass
class Run:
    """One way's answer to one load."""

    seconds: float
    tokens: list[list[int]]
    first_token: list[float]  # seconds, of each request
    per_token: list[float]  # seconds between tokens, of each request with two or more
    cache_bytes: int  # held at the peak
    more: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """Requests that are all there at the start."""

    name: str
    prompts: list[list[int]]
    lengths: list[int]

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)


def stamped(request_times: list[float], start: float) -> tuple[float, list[float]]:
    """Time to the first token, and the mean gap after it if there is one."""
    gaps = [(request_times[-1] - request_times[0]) / (len(request_times) - 1)] if len(request_times) > 1 else []
    return request_times[0] - start, gaps


def one_by_one(model, load: Load, answer: Callable[[list[int], int, list[float]], list[int]]) -> Run:
    """Lessons 2 to 4: one request after another. answer(prompt, length, times) notes when each token came."""
    from solutions.kv_cache import cache_bytes

    start, tokens, first, gaps = time.perf_counter(), [], [], []
    for prompt, length in zip(load.prompts, load.lengths):
        times: list[float] = []
        tokens.append(answer(prompt, length, times))
        ttft, gap = stamped(times, start)
        first.append(ttft)
        gaps += gap
    longest = max(len(prompt) + length for prompt, length in zip(load.prompts, load.lengths))
    return Run(time.perf_counter() - start, tokens, first, gaps, cache_bytes(model.config, longest, 4))


class Stamp:
    """Notes the time whenever logits are asked for: as each lesson's `next_logits`, and as transformers' processor."""

    def __init__(self, times: list[float]):
        self.times = times

    def __call__(self, input_ids, scores):
        self.times.append(time.perf_counter())
        return scores


def ways_of(model, packed, theirs, quantized: dict) -> dict[str, Callable[[Load], Run]]:
    """Every rung, by its name."""
    from solutions import kv_cache, llama_pytorch, paged_attention, quantization
    from solutions.batching import Engine
    from solutions.llama_pytorch import SamplingParams

    class Silent:
        """A tokenizer without texts: detokenizing is not what is compared."""

        eos_token_ids = frozenset()

        def token_bytes(self, token_id: int) -> bytes:
            return b"."

    def greedy(length: int) -> SamplingParams:
        return SamplingParams(max_tokens=length, ignore_eos=True)

    def timed(generate: Callable) -> Callable[[list[int], int, list[float]], list[int]]:
        def answer(prompt: list[int], length: int, times: list[float]) -> list[int]:
            return generate(prompt, greedy(length), lambda piece: times.append(time.perf_counter())).token_ids

        return answer

    def recompute(load: Load) -> Run:
        return one_by_one(
            model,
            load,
            timed(lambda prompt, params, show: llama_pytorch.generate(model, Silent(), prompt, params, show)),
        )

    def cache(load: Load) -> Run:
        return one_by_one(
            model, load, timed(lambda prompt, params, show: kv_cache.generate(model, Silent(), prompt, params, show))
        )

    def paged(load: Load) -> Run:
        longest = max(len(prompt) + length for prompt, length in zip(load.prompts, load.lengths))
        num_blocks = longest // 16 + 1
        blocks = paged_attention.PagedKVCache(model, num_blocks, 16)
        manager = paged_attention.KVCacheManager(num_blocks, 16, enable_prefix_caching=False)
        return one_by_one(
            model,
            load,
            timed(
                lambda prompt, params, show: paged_attention.generate(
                    model, Silent(), prompt, params, blocks, manager, show
                )
            ),
        )

    def engine(own, kernels: str) -> Callable[[Load], Run]:
        def run(load: Load) -> Run:
            os.environ["KERNELS"] = kernels
            slots = sum(len(prompt) + length for prompt, length in zip(load.prompts, load.lengths))
            settings = dict(num_blocks=slots // 16 + 2 * len(load.prompts), enable_prefix_caching=False)
            with Engine(
                own, Silent(), max_num_seqs=len(load.prompts), max_num_batched_tokens=256, **settings
            ) as serving:
                start, peak = time.perf_counter(), 0
                for prompt, length in zip(load.prompts, load.lengths):
                    serving.add_request(prompt, greedy(length))
                outputs = [reader.output for reader in serving.readers.values()]
                while serving.has_unfinished_requests:
                    serving.step()
                    peak = max(peak, len(serving.manager.pool.blocks) - serving.manager.pool.num_free_blocks)
                seconds = time.perf_counter() - start
                metrics = [output.metrics for output in outputs]
                totals = serving.metrics()
            return Run(
                seconds,
                [output.token_ids for output in outputs],
                [each.time_to_first_token for each in metrics],
                [each.time_per_output_token for each in metrics if each.time_per_output_token is not None],
                kv_cache.cache_bytes(own.config, peak * 16, 4),
                {
                    "slots_per_token": totals.slots_per_token,
                    "num_steps": totals.num_steps,
                    "weight_bytes": quantization.weight_bytes(own),
                },
            )

        return run

    def transformers(load: Load) -> Run:
        longest, steps = max(map(len, load.prompts)), max(load.lengths)
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in load.prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in load.prompts])
        times: list[float] = []
        start = time.perf_counter()
        generated = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, logits_processor=[Stamp(times)]
        )
        seconds = time.perf_counter() - start
        rows = generated[:, longest:].tolist()
        first, gaps = stamped(times, start)
        held = kv_cache.cache_bytes(model.config, len(load.prompts) * (longest + steps), 4)
        return Run(
            seconds,
            [row[:length] for row, length in zip(rows, load.lengths)],
            [first] * len(rows),
            gaps * len(rows),
            held,
        )

    ways = {"recompute": recompute, "cache": cache, "paged": paged, "engine": engine(model, "plain")}
    if packed is not None:
        ways["engine, kernels"] = engine(packed, "fast")
    ways |= {name: engine(own, "fast") for name, own in quantized.items()}
    if theirs is not None:
        ways["transformers"] = transformers
    return ways


def check_same(model, load: Load, expected: list[list[int]], run: Run, way: str) -> int:
    """How many answers go another way at a near-tie. Raises AssertionError where they differ and it was none."""
    from solutions.llama_pytorch import recompute

    ties = 0
    for prompt, wanted, got in zip(load.prompts, expected, run.tokens):
        shared = min(len(wanted), len(got))
        if wanted[:shared] == got[:shared]:
            continue
        place = next(i for i, (a, b) in enumerate(zip(wanted, got)) if a != b)
        with torch.inference_mode():
            best = recompute(model, prompt + wanted[:place]).topk(2).values
        gap = float(best[0] - best[1])
        assert gap < NEAR_TIE, f"{load.name}, {way}: token {place} differs, and the likeliest two are {gap:.4f} apart"
        ties += 1
    return ties


def loads(vocab_size: int, quick: bool) -> list[tuple[Load, list[str], int]]:
    """(load, the ways that it is given to, rounds). Prompts are random tokens, the same at every run."""
    rng = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(100, vocab_size) for _ in range(length)]

    float_ways = ["engine", "engine, kernels", "transformers"]
    serving = [*float_ways, "INT8", "INT4"]  # with dozens of rows a step fewer bytes gain nothing; see 8 streams
    if quick:
        mixed = [rng.randint(4, 12) for _ in range(8)]
        return [
            (Load("recompute", [prompt(12)], [3]), ["recompute", "engine"], 1),
            (Load("one stream", [prompt(12)], [6]), ["cache", "paged", *serving], 1),
            (Load("4 equal streams", [prompt(8) for _ in range(4)], [5] * 4), serving, 1),
            (Load("4 mixed requests", [prompt(n) for n in mixed[:4]], mixed[4:]), serving, 1),
        ]
    sizes = [(rng.randint(16, 256), rng.randint(16, 256)) for _ in range(32)]
    return [
        (Load("recompute", [prompt(64)], [24]), ["recompute", "engine, kernels"], 3),
        (Load("one stream", [prompt(64)], [64]), ["cache", "paged", *serving], 5),
        (Load("8 equal streams", [prompt(64) for _ in range(8)], [64] * 8), serving, 5),
        (Load("32 mixed requests", [prompt(p) for p, _ in sizes], [o for _, o in sizes]), float_ways, 3),
    ]


def measure_ladder(name: str, quick: bool, theirs) -> dict:
    """Climb it. theirs: transformers' model of the same checkpoint, or None."""
    from common import kernels
    from solutions.llama_pytorch import load
    from solutions.quantization import Quantization, load_quantized

    model, _ = load(name, torch.float32, "cpu")
    packed, _ = load(name, torch.float32, "cpu")
    kernels.pack(packed)
    kinds = {"INT8": Quantization("int8"), "INT4": Quantization("int4")}
    quantized = {each: load_quantized(name, kind, torch.float32, "cpu")[0] for each, kind in kinds.items()}
    if theirs is not None:
        theirs.generation_config.eos_token_id = None
        theirs.generation_config.pad_token_id = 0
    before = os.environ.get("KERNELS")
    results = []
    try:
        for each, names, rounds in loads(model.config.vocab_size, quick):
            ways = {way: run for way, run in ways_of(model, packed, theirs, quantized).items() if way in names}
            results.append(climb(model, each, ways, rounds))
    finally:
        os.environ.pop("KERNELS") if before is None else os.environ.update(KERNELS=before)
    show(results)
    return {"model": name, "dtype": "float32", "loads": results}


def climb(model, load: Load, ways: dict[str, Callable[[Load], Run]], rounds: int) -> dict:
    """Measure one load: a short warm-up of each way, then rounds in which the order varies."""
    rng = random.Random(1)
    short = Load(load.name, [prompt[:8] for prompt in load.prompts], [2] * len(load.prompts))
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    expected, ties = None, dict.fromkeys(ways, 0)
    for run in ways.values():
        os.environ["KERNELS"] = "plain"
        run(short)
    for number in range(rounds):
        order = rng.sample(list(ways), len(ways))
        for way in order:
            os.environ["KERNELS"] = "plain"
            done = ways[way](load)
            runs[way].append(done)
            print(f"{load.name}, round {number + 1}, {way}: {load.num_tokens / done.seconds:.1f} tokens/s", flush=True)
            if number == 0 and way not in ("INT8", "INT4"):  # those have other weights; perplexity judges them
                os.environ["KERNELS"] = "plain"
                expected = expected or done.tokens
                ties[way] = check_same(model, load, expected, done, way)
    rows = {}
    for way, done in runs.items():
        speeds = [load.num_tokens / each.seconds for each in done]
        rows[way] = {
            "tokens_per_second": statistics.median(speeds),
            "rounds": speeds,
            "time_to_first_token": statistics.median(statistics.mean(each.first_token) for each in done),
            "time_per_output_token": statistics.median(statistics.mean(each.per_token or [0.0]) for each in done),
            "cache_bytes": done[0].cache_bytes,
            "near_ties": ties[way],
            **done[0].more,
        }
    return {
        "name": load.name,
        "num_requests": len(load.prompts),
        "num_prompt_tokens": sum(map(len, load.prompts)),
        "num_output_tokens": load.num_tokens,
        "num_rounds": rounds,
        "ways": rows,
    }


def show(results: list[dict]) -> None:
    """The ladder as a table; ratios are to transformers, where it was measured."""
    table = Table(box=None, header_style="dim", padding=(0, 1))
    for column in ("", "tokens/s", "x", "first token", "a token", "cache", "slots/token", "weights"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for result in results:
        table.add_row(f"[bold]{result['name']}[/]")
        theirs = result["ways"].get("transformers")
        for way, row in result["ways"].items():
            ratio = f"{row['tokens_per_second'] / theirs['tokens_per_second']:.2f}" if theirs else ""
            table.add_row(
                "  " + way,
                f"{row['tokens_per_second']:.1f}",
                ratio,
                f"{row['time_to_first_token'] * 1e3:.0f} ms",
                f"{row['time_per_output_token'] * 1e3:.1f} ms",
                f"{row['cache_bytes'] / 2**20:.1f} MiB",
                f"{row['slots_per_token']:.3f}" if "slots_per_token" in row else "",
                f"{row['weight_bytes'] / 1e6:.0f} MB" if way in ("INT8", "INT4") else "",
            )
    Console(width=110).print(table)
