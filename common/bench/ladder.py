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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from unittest import mock

import torch

from common import kernels
from common.bench import peers as rivals
from common.bench.peers import Served, Unable
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


SLOW = ("recompute", "cache", "paged", "engine", "transformers", "transformers, continuous")
SLOW_ROUNDS = 2
"""The slow ways take most of the time, and no two of them are close: they take part in the first rounds only."""


@dataclass(frozen=True)
class Load:
    """Requests that all arrive at the start."""

    name: str
    prompts: list[list[int]]
    params: list[SamplingParams]
    rounds: int = 1
    sample: int | None = None  # how many requests a way gets that serves one after another; None: all

    @property
    def lengths(self) -> list[int]:
        """The most tokens of each answer, and the exact number where nothing else ends it."""
        return [each.max_tokens for each in self.params]

    @property
    def totals(self) -> list[int]:
        """Tokens of each request, prompt and answer together."""
        return [len(prompt) + length for prompt, length in zip(self.prompts, self.lengths)]

    @property
    def warm_up(self) -> Load:
        """As many requests, but short ones."""
        prompts = [prompt[:8] for prompt in self.prompts]
        return replace(self, prompts=prompts, params=[greedy(2)] * len(prompts), sample=1)


def greedy(length: int) -> SamplingParams:
    return SamplingParams(max_tokens=length, ignore_eos=True)


# --- The ways ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """A way to serve requests, and the bytes that it takes."""

    serve: Callable[[Load], Served]
    weight_bytes: int  # held
    read_bytes: int  # of weights, in each step
    slot_bytes: int  # for the keys and values of a token


def way_of(serve: Callable[[Load], Served], like: Llama, held: int | None = None) -> Way:
    """like: a model with as many bytes of weights and of keys. held: the bytes of weights, if it has others."""
    weights = weights_of(like) if held is None else (held, held)
    return Way(serve, *weights, kv_cache.cache_bytes(like.config, 1, like.model.norm.weight.element_size()))


def weights_of(model: Llama) -> tuple[int, int]:
    """Return the bytes of weights in memory, and how many of them a step reads: of an embedding table that is not also
    the head, a step reads a few rows only.
    """
    held, table = kernels.held_bytes(model), model.model.embed_tokens.weight
    return held, held if model.lm_head.weight is table else held - table.nbytes


class Silent:
    """A tokenizer that gives every token the same text, because detokenizing is not measured."""

    eos_token_ids = frozenset()

    def token_bytes(self, token_id: int) -> bytes:
        return b"."


def one_by_one(model: Llama, generate: Callable, arguments: Callable[[Load], tuple], load: Load) -> Served:
    """Lessons 2 to 4: one request after another. arguments: makes those of `generate` that lesson 2's has not."""
    more, start = arguments(load), time.perf_counter()
    answers: list[list[int]] = []
    times: list[list[float]] = []
    for prompt, params in zip(load.prompts[: load.sample], load.params):
        own: list[float] = []

        def note(piece: str, own: list[float] = own) -> None:
            own.append(time.perf_counter())

        answers.append(generate(model, Silent(), prompt, params, *more, note).token_ids)
        times.append(own)
    return Served(answers, times, max(load.totals), start)


def blocks_for(model: Llama, load: Load) -> tuple[paged_attention.PagedKVCache, paged_attention.KVCacheManager]:
    num_blocks = max(load.totals) // 16 + 1
    manager = paged_attention.KVCacheManager(num_blocks, 16, enable_prefix_caching=False)
    return paged_attention.PagedKVCache(model, num_blocks, 16), manager


def assembled(model: Llama, tokenizer: Tokenizer, **options) -> Engine:
    """The engine that `InferenceEngine` assembles, around a loaded model, which several engines share."""
    weight = model.model.norm.weight
    config = EngineConfig(**{"dtype": weight.dtype, "device": str(weight.device), **options})
    config = config.resolve(model.config, slot_bytes(config, model.config, None))
    runner = build_runner(config, model, range(model.config.num_hidden_layers))
    return Engine(LocalExecutor(kernels.accelerate(runner, config)), tokenizer, config)


def serve(model: Llama, tokenizer: Tokenizer, options: Mapping[str, object], load: Load) -> Served:
    """Let a new engine with these options answer all requests. Raises RuntimeError if a request fails."""
    count = len(load.prompts)
    settings = dict(num_blocks=sum(load.totals) // 16 + 3 * count, max_num_seqs=count, max_num_batched_tokens=256)
    with assembled(model, tokenizer, **settings, **options) as engine:
        start, peak = time.perf_counter(), 0
        for prompt, params in zip(load.prompts, load.params):
            engine.add_request(prompt, params)
        outputs = [state.output for state in engine.processor.states.values()]
        while engine.has_unfinished_requests:
            engine.step()
            peak = max(peak, len(engine.manager.pool.blocks) - engine.manager.pool.num_free_blocks)
        if failed := [output.error for output in outputs if output.error]:
            raise RuntimeError(f"{len(failed)} of {len(outputs)} requests failed; the first: {failed[0]}")
        totals = engine.metrics()
        counts = {"num_steps": totals.num_steps}
        if totals.num_draft_tokens:
            counts |= {"num_draft_tokens": totals.num_draft_tokens, "acceptance_rate": totals.acceptance_rate}
        times = [[output.metrics.first_token_time, output.metrics.last_token_time] for output in outputs]
        tokens = [output.token_ids for output in outputs]
        return Served(tokens, times, peak * engine.config.block_size, start, counts)


def ways_of(model: Llama, packed: Llama, fewer: dict[str, Llama], theirs, others: dict) -> dict[str, Way]:
    """Return every way by its name.

    fewer: models in fewer bits, by way. theirs: transformers' model, or None. others: other engines, by way.
    """

    def alone(generate: Callable, arguments: Callable[[Load], tuple] = lambda load: ()) -> Way:
        return way_of(partial(one_by_one, model, generate, arguments), model)

    def engine(own: Llama, choice: str, **options) -> Way:
        @mock.patch.dict(os.environ, KERNELS=choice)
        def run(load: Load) -> Served:
            return serve(own, Silent(), {"enable_prefix_caching": False, **options}, load)

        return way_of(run, own)

    def rival(serve: Callable[..., Served], like: Llama = model, held: int | None = None) -> Way:
        return way_of(lambda load: serve(load.prompts, load.lengths), like, held)

    ways = {"recompute": alone(llama_pytorch.generate), "cache": alone(kv_cache.generate)}
    ways["paged"] = alone(paged_attention.generate, partial(blocks_for, model))
    ways |= {"engine": engine(model, "plain"), "engine, kernels": engine(packed, "fast")}
    ways |= {name: engine(own, "fast", **FEWER_BITS[name]) for name, own in fewer.items()}
    ways["speculation"] = engine(packed, "fast", speculative="ngram")
    if theirs is not None:
        ways["transformers"] = rival(partial(rivals.generate_padded, theirs))
        ways["transformers, continuous"] = rival(partial(rivals.serve_continuously, theirs))
    for name, other in others.items():
        like = fewer["bfloat16"] if name == "vLLM, bfloat16" else model
        ways[name] = rival(other.serve, like, other.weight_bytes if name.startswith("llama.cpp, ") else None)
    return ways


# --- The measurement --------------------------------------------------------------------------------------------------


def take_turns(
    what: str, load: Load, ways: Mapping[str, Callable[[Load], Served]], skipped: dict[str, str]
) -> dict[str, list[Served]]:
    """Let each way warm up, and then answer the load in rounds, in which their order varies.

    A way that is `Unable` is left out from then on, and the reason is noted in `skipped`.
    """
    rng, start = random.Random(1), time.perf_counter()
    runs: dict[str, list[Served]] = {way: [] for way in ways}
    for number in range(load.rounds + 1):  # the first warms up
        for way in rng.sample(list(runs), len(runs)):
            if way in SLOW and number > SLOW_ROUNDS:
                continue
            try:
                served = ways[way](load if number else load.warm_up)
            except Unable as error:
                skipped[way] = str(error)
                del runs[way]
                continue
            if number:
                runs[way].append(served)
                speed, passed = served.tokens_per_second, time.perf_counter() - start
                turn = f"{what}, round {number} of {load.rounds}, {way}"
                print(f"{turn}: {speed:.1f} tokens/s [{passed:.0f} s]", flush=True)
    return runs


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


def loads(vocab_size: int, quick: bool) -> list[tuple[Load, list[str]]]:
    """Return each load with the names of its ways. Prompts are random tokens, the same in every run."""
    rng = random.Random(0)

    def load_of(name: str, sizes: list[tuple[int, int]], rounds: int, sample: int | None = None) -> Load:
        """sizes: the tokens of each prompt and of its answer."""
        prompts = [[rng.randrange(100, vocab_size) for _ in range(length)] for length, _ in sizes]
        return Load(name, prompts, [greedy(length) for _, length in sizes], rounds, sample)

    others = ["transformers", "transformers, continuous", "vLLM", "llama.cpp", *OTHERS_BITS]
    serving = ["engine", "engine, kernels", *FEWER_BITS, "speculation", *others]
    every = ["recompute", "cache", "paged", *serving]
    shortest, longest, count = (4, 12, 4) if quick else (16, 64, 32)  # of the mixed requests' prompts and answers
    mixed = [(rng.randint(shortest, longest), rng.randint(shortest, longest)) for _ in range(count)]
    if quick:
        return [
            (load_of("recompute", [(12, 3)], 1), ["recompute", "engine"]),
            (load_of("one stream", [(12, 6)], 1), every[1:]),
            (load_of("4 equal streams", [(8, 5)] * 4, 1), serving),
            (load_of("4 mixed requests", mixed, 1, sample=1), every),
        ]
    return [
        (load_of("recompute", [(64, 24)], 3), ["recompute", "engine, kernels"]),
        (load_of("one stream", [(64, 64)], 5), every[1:]),
        (load_of("8 equal streams", [(64, 64)] * 8, 5), serving),
        (load_of("32 mixed requests", mixed, 5, sample=1), every),
        (load_of("prompt of 512", [(512, 1)], 5), serving),
    ]


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
    os.environ["KERNELS"] = "plain"  # unless a way sets it
    skipped: dict[str, str] = {}
    folder, num_threads, others = find_checkpoint(name), torch.get_num_threads(), {}
    theirs = rivals.load_transformers(folder, dtype, device)
    if theirs is None:
        skipped |= dict.fromkeys(("transformers", "transformers, continuous"), "transformers is not installed")
    vllm = partial(rivals.Vllm, os.environ.get("VLLM_PYTHON"), folder, num_threads=num_threads)
    starts = {"vLLM": partial(vllm, dtype), "vLLM, bfloat16": partial(vllm, torch.bfloat16)}
    for way, kind in {"llama.cpp": "F32", "llama.cpp, Q8_0": "Q8_0", "llama.cpp, Q4_0": "Q4_0"}.items():
        starts[way] = lambda kind=kind: rivals.LlamaCpp(rivals.gguf_of(folder, kind), num_threads)
    with contextlib.ExitStack() as stack:
        for way, start in starts.items():
            try:
                if device != "cpu":
                    raise Unable("its weights are float32 and on the CPU, the others' are not")
                others[way] = stack.enter_context(contextlib.closing(start()))
            except Unable as error:
                skipped[way] = str(error)
        ways = ways_of(model, packed, fewer, theirs, others)
        results = []
        for each, names in loads(model.config.vocab_size, quick):
            chosen = {way: ways[way] for way in names if way in ways and way not in skipped}
            results.append(climb(model, each, chosen, skipped))
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


def climb(model: Llama, load: Load, ways: dict[str, Way], skipped: dict[str, str]) -> dict:
    """Measure one load with these ways, and compare their tokens with those of the first that answers all requests."""
    runs = take_turns(load.name, load, {name: way.serve for name, way in ways.items()}, skipped)
    answers = {way: done[0].token_ids for way, done in runs.items() if way not in OTHER_WEIGHTS}
    expected = max(answers.values(), key=len, default=[])
    ties = {way: check_same(model, load, expected, tokens, way) for way, tokens in answers.items()}
    return {
        "name": load.name,
        "num_requests": len(load.prompts),
        "num_prompt_tokens": sum(map(len, load.prompts)),
        "num_output_tokens": sum(load.lengths),
        "num_rounds": load.rounds,
        "ways": {way: row(load, ways[way], done, ties.get(way, 0)) for way, done in runs.items()},
    }


def row(load: Load, way: Way, done: list[Served], ties: int) -> dict:
    """The results of one way: medians over its runs."""
    gap = statistics.median(each.time_per_output_token for each in done)
    counts, num_answers = done[0].counts, len(done[0].token_ids)
    is_sample = num_answers < len(load.prompts)
    told = {
        "tokens_per_second": statistics.median(each.tokens_per_second for each in done),
        "rounds": [each.tokens_per_second for each in done],
        # A sample does not tell how long the requests after it would have waited.
        "time_to_first_token": None if is_sample else statistics.median(each.time_to_first_token for each in done),
        "time_per_output_token": gap,
        "cache_bytes": done[0].held_slots * way.slot_bytes,
        "weight_bytes": way.weight_bytes,
        "near_ties": ties,
        **counts,
    }
    if is_sample:
        told["num_requests_answered"] = num_answers
    if len(load.prompts) == 1 and load.lengths[0] > 1:
        # After the prompt, which is one step: all weights are read once a step.
        num_gaps = load.lengths[0] - 1
        told["read_gb_per_s"] = way.read_bytes * (counts.get("num_steps", num_gaps + 1) - 1) / (gap * num_gaps) / 1e9
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
