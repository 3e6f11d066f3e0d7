"""The ladder: the speed of each lesson's engine on the same prompts, beside other engines on the same weights.

The loads are one stream, eight equal streams, and 32 requests of mixed lengths that all arrive at once. Every way must
give the same tokens, except at near-ties, unless its weights have fewer bits. Rounds are interleaved and the order of
the ways varies, so that a change in the machine's speed affects all of them. The results are medians. With a GPU all
ways run on it, in bfloat16.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from unittest import mock

import torch

from common import kernels
from common.bench import peers as rivals
from common.bench.results import show_table
from common.checkpoints import find_checkpoint
from common.config import EngineConfig
from common.machine import choose_device, read_bandwidth
from common.tokenizer import Tokenizer
from solutions import kv_cache, llama_pytorch, paged_attention
from solutions.batching import Engine, LocalExecutor
from solutions.engine import build_runner, load_model, slot_bytes
from solutions.llama_pytorch import Llama, SamplingParams, load, use_kernels

NEAR_TIE = {torch.float32: 1e-3, torch.bfloat16: 0.25}
"""The largest difference between the logits of the two likeliest tokens at which two ways may choose differently. The
last digits of a sum depend on the number of rows, and bfloat16 has only three digits."""

ROUGHER = {"llama.cpp": 50, "vLLM": 50}
"""Factors on NEAR_TIE for engines whose kernels round differently. Where llama.cpp's tokens differed from ours, the two
likeliest were up to 0.0084 apart."""

FEWER_BITS = {
    "bfloat16": {"dtype": torch.bfloat16},
    **{kind.upper(): {"quantization": kind} for kind in ("int8", "w8a8", "int4", "w4a8")},
}
"""The ways of lesson 7, with the options of each."""

OTHERS_BITS = ("vLLM, bfloat16", "llama.cpp, Q8_0", "llama.cpp, Q4_0")
OTHER_WEIGHTS = (*FEWER_BITS, *OTHERS_BITS)
"""Ways whose tokens are not compared, since their weights differ; lesson 7 measures their perplexity."""


@dataclass
class Run:
    """The answers of one way to one load."""

    seconds: float
    tokens: list[list[int]]
    first_token: list[float]  # seconds, of each request
    per_token: list[float]  # seconds between tokens, of each request with two or more
    cache_bytes: int  # held at the peak
    weight_bytes: int  # held
    read_bytes: int  # of weights, in each step
    more: dict = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


@dataclass(frozen=True)
class Load:
    """Requests that all arrive at the start."""

    name: str
    prompts: list[list[int]]
    lengths: list[int]
    sample: int | None = None  # how many requests a way gets that serves one after another; None: all

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and answer together."""
        return max(len(prompt) + length for prompt, length in zip(self.prompts, self.lengths))


def stamped(request_times: list[float], start: float) -> tuple[float, list[float]]:
    """Time to the first token, and the mean gap after it if there is one."""
    gaps = [(request_times[-1] - request_times[0]) / (len(request_times) - 1)] if len(request_times) > 1 else []
    return request_times[0] - start, gaps


def weights_of(model: Llama) -> tuple[int, int]:
    """Return the bytes of weights in memory, and how many of them a step reads: of an embedding table that is not also
    the head, a step reads a few rows only.
    """
    held, table = kernels.held_bytes(model), model.model.embed_tokens.weight
    return held, held if model.lm_head.weight is table else held - table.nbytes


def one_by_one(model: Llama, load: Load, answer: Callable[[list[int], int, list[float]], list[int]]) -> Run:
    """Lessons 2 to 4: one request after another. answer(prompt, length, times) notes when each token came."""
    prompts, lengths = load.prompts[: load.sample], load.lengths[: load.sample]
    start, tokens, first, gaps = time.perf_counter(), [], [], []
    for prompt, length in zip(prompts, lengths):
        times: list[float] = []
        tokens.append(answer(prompt, length, times))
        ttft, gap = stamped(times, start)
        first.append(ttft)
        gaps += gap
    held = kv_cache.cache_bytes(model.config, load.longest, model.model.norm.weight.element_size())
    return Run(time.perf_counter() - start, tokens, first, gaps, held, *weights_of(model))


class Silent:
    """A tokenizer that gives every token the same text, because detokenizing is not measured."""

    eos_token_ids = frozenset()

    def token_bytes(self, token_id: int) -> bytes:
        return b"."


def assembled(model: Llama, tokenizer: Tokenizer, **options) -> Engine:
    """The engine that `InferenceEngine` assembles, around a loaded model, which several engines share."""
    weight = model.model.norm.weight
    config = EngineConfig(**{"dtype": weight.dtype, "device": str(weight.device), **options})
    config = config.resolve(model.config, slot_bytes(config, model.config, None))
    runner = build_runner(config, model, range(model.config.num_hidden_layers))
    return Engine(LocalExecutor(kernels.accelerate(runner, config)), tokenizer, config)


def greedy(length: int) -> SamplingParams:
    return SamplingParams(max_tokens=length, ignore_eos=True)


def ways_of(model: Llama, packed: Llama, fewer: dict[str, Llama], theirs, others: dict) -> dict[str, Callable]:
    """Return a function from a `Load` to a `Run` for every way, by the way's name.

    fewer: models in fewer bits, by way. theirs: transformers' model, or None. others: other engines, by way.
    """

    def alone(generate: Callable, of_load: Callable[[Load], tuple] = lambda load: ()) -> Callable[[Load], Run]:
        """A lesson's `generate`, for one request after another. of_load: its arguments that lesson 2's has not."""

        def run(load: Load) -> Run:
            more = of_load(load)

            def answer(prompt: list[int], length: int, times: list[float]) -> list[int]:
                def show(piece: str) -> None:
                    times.append(time.perf_counter())

                return generate(model, Silent(), prompt, greedy(length), *more, show).token_ids

            return one_by_one(model, load, answer)

        return run

    def blocks(load: Load) -> tuple[paged_attention.PagedKVCache, paged_attention.KVCacheManager]:
        num_blocks = load.longest // 16 + 1
        manager = paged_attention.KVCacheManager(num_blocks, 16, enable_prefix_caching=False)
        return paged_attention.PagedKVCache(model, num_blocks, 16), manager

    def engine(own: Llama, choice: str, **options) -> Callable[[Load], Run]:
        def run(load: Load) -> Run:
            os.environ["KERNELS"] = choice
            slots = sum(len(prompt) + length for prompt, length in zip(load.prompts, load.lengths))
            settings = dict(num_blocks=slots // 16 + 2 * len(load.prompts), enable_prefix_caching=False)
            settings |= dict(max_num_seqs=len(load.prompts), max_num_batched_tokens=256)
            with assembled(own, Silent(), **settings, **options) as serving:
                return serve(serving, load.prompts, [greedy(length) for length in load.lengths])

        return run

    def rival(serve: Callable[..., rivals.Served], like: Llama = model, held: int | None = None) -> Callable:
        """like: a model with as many bytes of weights and of keys. held: bytes of weights, if there is no such one."""
        size = 2 if like is not model else like.model.norm.weight.element_size()
        weights = weights_of(like) if held is None else (held, held)

        def run(load: Load) -> Run:
            served = serve(load.prompts, load.lengths)
            stamps = [stamped(times, served.start) for times in served.times]
            return Run(
                max(times[-1] for times in served.times) - served.start,
                served.token_ids,
                [first for first, _ in stamps],
                [gap for _, gaps in stamps for gap in gaps],
                kv_cache.cache_bytes(model.config, served.held_slots, size),
                *weights,
            )

        return run

    ways = {"recompute": alone(llama_pytorch.generate), "cache": alone(kv_cache.generate)}
    ways["paged"], ways["engine"] = alone(paged_attention.generate, blocks), engine(model, "plain")
    ways["engine, kernels"] = engine(packed, "fast")
    ways |= {name: engine(own, "fast", **FEWER_BITS[name]) for name, own in fewer.items()}
    ways["speculation"] = engine(packed, "fast", speculative="ngram")
    if theirs is not None:
        ways["transformers"] = rival(lambda *load: rivals.generate_padded(theirs, *load))
        ways["transformers, continuous"] = rival(lambda *load: rivals.serve_continuously(theirs, *load))
    for name, other in others.items():
        like = fewer["bfloat16"] if name == "vLLM, bfloat16" else model
        ways[name] = rival(other.serve, like, other.weight_bytes if name.startswith("llama.cpp, ") else None)
    return ways


def serve(serving: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> Run:
    """Let an engine answer all of these requests, and measure the time. Raises RuntimeError if a request fails."""
    start, peak = time.perf_counter(), 0
    for prompt, own in zip(prompts, params):
        serving.add_request(prompt, own)
    outputs = [state.output for state in serving.processor.states.values()]
    while serving.has_unfinished_requests:
        serving.step()
        peak = max(peak, len(serving.manager.pool.blocks) - serving.manager.pool.num_free_blocks)
    seconds = time.perf_counter() - start
    if failed := [output.error for output in outputs if output.error]:
        raise RuntimeError(f"{len(failed)} of {len(outputs)} requests failed; the first: {failed[0]}")
    metrics, totals = [output.metrics for output in outputs], serving.metrics()
    more = {"num_steps": totals.num_steps}
    if totals.num_draft_tokens:
        more |= {"num_draft_tokens": totals.num_draft_tokens, "acceptance_rate": totals.acceptance_rate}
    slots, size = peak * serving.config.block_size, serving.config.dtype.itemsize
    return Run(
        seconds,
        [output.token_ids for output in outputs],
        [each.time_to_first_token for each in metrics],
        [each.time_per_output_token for each in metrics if each.time_per_output_token is not None],
        kv_cache.cache_bytes(serving.executor.runner.model.config, slots, size),
        *weights_of(serving.executor.runner.model),
        more,
    )


def check_same(model: Llama, load: Load, expected: list[list[int]], tokens: list[list[int]], way: str) -> int:
    """Return how many answers differ from the expected ones at a near-tie. Raises AssertionError if one differs
    elsewhere.
    """
    ties, limit = 0, NEAR_TIE[model.model.norm.weight.dtype] * ROUGHER.get(way, 1)
    for prompt, wanted, got in zip(load.prompts, expected, tokens):
        shared = min(len(wanted), len(got))
        if wanted[:shared] == got[:shared]:
            continue
        place = next(i for i, (a, b) in enumerate(zip(wanted, got)) if a != b)
        with torch.inference_mode():
            best = llama_pytorch.recompute(model, prompt + wanted[:place]).topk(2).values
        gap = float(best[0] - best[1])
        assert gap < limit, f"{load.name}, {way}: token {place} differs, and the likeliest two are {gap:.4f} apart"
        ties += 1
    return ties


def loads(vocab_size: int, quick: bool) -> list[tuple[Load, list[str], int]]:
    """Return each load with the names of its ways and its number of rounds. Prompts are random tokens, the same in
    every run.
    """
    rng = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(100, vocab_size) for _ in range(length)]

    others = ["transformers", "transformers, continuous", "vLLM", "llama.cpp", *OTHERS_BITS]
    serving = ["engine", "engine, kernels", *FEWER_BITS, "speculation", *others]
    every = ["recompute", "cache", "paged", *serving]
    if quick:
        mixed = [rng.randint(4, 12) for _ in range(8)]
        return [
            (Load("recompute", [prompt(12)], [3]), ["recompute", "engine"], 1),
            (Load("one stream", [prompt(12)], [6]), every[1:], 1),
            (Load("4 equal streams", [prompt(8) for _ in range(4)], [5] * 4), serving, 1),
            (Load("4 mixed requests", [prompt(n) for n in mixed[:4]], mixed[4:], sample=1), every, 1),
        ]
    sizes = [(rng.randint(16, LONGEST), rng.randint(16, LONGEST)) for _ in range(32)]
    return [
        (Load("recompute", [prompt(64)], [24]), ["recompute", "engine, kernels"], 3),
        (Load("one stream", [prompt(64)], [64]), every[1:], 5),
        (Load("8 equal streams", [prompt(64) for _ in range(8)], [64] * 8), serving, 5),
        (Load("32 mixed requests", [prompt(p) for p, _ in sizes], [o for _, o in sizes], sample=1), every, 5),
        (Load("prompt of 512", [prompt(512)], [1]), serving, 5),
    ]


SLOW = ("recompute", "cache", "paged", "engine", "transformers", "transformers, continuous")
SLOW_ROUNDS = 2
"""The slow ways take most of the time, and no two of them are close: they take part in the first rounds only."""

LONGEST = 64
"""The longest prompt and the longest answer of the mixed requests; the shortest have 16 tokens."""


@mock.patch.dict(os.environ)  # restores KERNELS
def measure_ladder(name: str, quick: bool) -> dict:
    """Measure every load with every way, and with other engines if they are installed."""
    device = choose_device(None)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    bandwidth = read_bandwidth(*(16, 3) if quick else (1024, 9), device=device)
    print(f"reads {bandwidth:.1f} GB/s", flush=True)
    model, _ = load(name, dtype, device)
    os.environ["KERNELS"] = "fast"  # loading also packs the weights
    packed, _ = load(name, dtype, device)
    use_kernels(packed)
    options = {"model": name, "dtype": dtype, "device": device}
    fewer = {way: load_model(EngineConfig(**{**options, **own}))[0] for way, own in FEWER_BITS.items()}
    skipped: dict[str, str] = {}
    theirs = rivals.load_transformers(find_checkpoint(name), dtype, device)
    if theirs is None:
        skipped |= dict.fromkeys(("transformers", "transformers, continuous"), "transformers is not installed")
    else:
        theirs.generation_config.eos_token_id = None
        theirs.generation_config.pad_token_id = 0
    folder, num_threads, others = find_checkpoint(name), torch.get_num_threads(), {}
    vllm, llama = partial(rivals.Vllm, os.environ.get("VLLM_PYTHON"), folder), rivals.LlamaCpp
    starts = {
        "vLLM": lambda: vllm(dtype, num_threads),
        "vLLM, bfloat16": lambda: vllm(torch.bfloat16, num_threads),
        "llama.cpp": lambda: llama(rivals.gguf_of(folder), num_threads),
        "llama.cpp, Q8_0": lambda: llama(rivals.gguf_of(folder, "Q8_0"), num_threads),
        "llama.cpp, Q4_0": lambda: llama(rivals.gguf_of(folder, "Q4_0"), num_threads),
    }
    with contextlib.ExitStack() as stack:
        for way, start in starts.items():
            try:
                if device != "cpu":
                    raise rivals.Unable("its weights are float32 and on the CPU, the others' are not")
                others[way] = stack.enter_context(contextlib.closing(start()))
            except rivals.Unable as error:
                skipped[way] = str(error)
        ways = ways_of(model, packed, fewer, theirs, others)
        results = []
        for each, names, rounds in loads(model.config.vocab_size, quick):
            chosen = {way: ways[way] for way in names if way in ways and way not in skipped}
            results.append(climb(model, each, chosen, rounds, skipped))
    for way, reason in skipped.items():
        print(f"{way}: not measured: {reason}")
    show(results)
    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "read_gb_per_s": bandwidth,
        "skipped": skipped,
        "loads": results,
    }


def climb(model: Llama, load: Load, ways: dict[str, Callable], rounds: int, skipped: dict[str, str]) -> dict:
    """Measure one load: a short warm-up of each way, then rounds in which the order varies.

    A way that is `Unable` is left out from then on, and the reason is noted in `skipped`.
    """
    rng = random.Random(1)
    short = replace(load, prompts=[prompt[:8] for prompt in load.prompts], lengths=[2] * len(load.prompts), sample=1)
    runs: dict[str, list[Run]] = {way: [] for way in ways}
    expected: list[list[int]] | None = None
    ties = dict.fromkeys(ways, 0)
    start = time.perf_counter()

    def attempt(way: str, load: Load) -> Run | None:
        try:
            with mock.patch.dict(os.environ, KERNELS="plain"):
                return ways[way](load)
        except rivals.Unable as error:
            skipped[way] = str(error)
            runs.pop(way)
            return None

    for way in ways:
        attempt(way, short)
    for number in range(rounds):
        for way in rng.sample(list(runs), len(runs)):
            if way in SLOW and number >= SLOW_ROUNDS:
                continue
            done = attempt(way, load)
            if done is None:
                continue
            runs[way].append(done)
            passed = time.perf_counter() - start
            print(
                f"{load.name}, round {number + 1} of {rounds}, {way}: {done.tokens_per_second:.1f} tokens/s "
                f"[{passed:.0f} s]",
                flush=True,
            )
            if number == 0 and way not in OTHER_WEIGHTS:
                if expected is None or len(done.tokens) > len(expected):
                    # The others are compared with the first way that answers all requests.
                    expected, earlier = done.tokens, expected
                    ties[way] = check_same(model, load, expected, earlier or [], way)
                else:
                    ties[way] = check_same(model, load, expected, done.tokens, way)
    return {
        "name": load.name,
        "num_requests": len(load.prompts),
        "num_prompt_tokens": sum(map(len, load.prompts)),
        "num_output_tokens": load.num_tokens,
        "num_rounds": rounds,
        "ways": {way: row(load, done, ties[way]) for way, done in runs.items()},
    }


def row(load: Load, done: list[Run], ties: int) -> dict:
    """The results of one way: medians over its runs."""
    first, gap = (
        statistics.median(statistics.mean(times) for times in all_times)
        for all_times in ([each.first_token for each in done], [each.per_token or [0.0] for each in done])
    )
    is_sample = len(done[0].tokens) < len(load.prompts)
    told = {
        "tokens_per_second": statistics.median(each.tokens_per_second for each in done),
        "rounds": [each.tokens_per_second for each in done],
        # A sample does not tell how long the requests after it would have waited.
        "time_to_first_token": None if is_sample else first,
        "time_per_output_token": gap,
        "cache_bytes": done[0].cache_bytes,
        "weight_bytes": done[0].weight_bytes,
        "near_ties": ties,
        **done[0].more,
    }
    if is_sample:
        told["num_requests_answered"] = len(done[0].tokens)
    if len(load.prompts) == 1 and load.num_tokens > 1:
        # After the prompt, which is one step: all weights are read once a step.
        num_steps = done[0].more.get("num_steps", load.num_tokens) - 1
        told["read_gb_per_s"] = done[0].read_bytes * num_steps / (gap * (load.num_tokens - 1)) / 1e9
    return told


def show(results: list[dict]) -> None:
    """Print the ladder as a table. Ratios are to transformers, if it was measured."""
    groups: dict[str, dict[str, list[str]]] = {}
    for result in results:
        rows = groups[result["name"]] = {}
        theirs = result["ways"].get("transformers")
        for way, told in result["ways"].items():
            first, rate = told["time_to_first_token"], told.get("acceptance_rate")
            rows[way] = [
                f"{told['tokens_per_second']:.1f}",
                f"{told['tokens_per_second'] / theirs['tokens_per_second']:.2f}" if theirs else "",
                "" if first is None else f"{first * 1e3:.0f} ms",
                f"{told['time_per_output_token'] * 1e3:.1f} ms",
                f"{told['read_gb_per_s']:.1f}" if "read_gb_per_s" in told else "",
                f"{told['weight_bytes'] / 1e6:.0f} MB",
                f"{told['cache_bytes'] / 2**20:.1f} MiB",
                "" if rate is None else f"{rate:.0%}",
            ]
    columns = "tokens/s", "x", "first token", "a token", "GB/s", "weights", "cache", "draft tokens right"
    show_table(columns, groups)
