"""Random load for the engine. After every step the block tables and reference counts are checked, and every output is
compared with the answer of lesson 2's `generate` to that request alone.

The first half drives any engine from lesson 5 on. The second builds an assembled engine for each number and drives it.
A number always gives the same run, because the durations of steps are made up, too.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file

from common.authoring.soak.interrupts import AfterLines, tracing
from common.authoring.soak.invariants import Texts, check_books, check_drafts, watch_draft
from common.authoring.soak.oracle import Oracle, check_failed, compare, judge
from common.authoring.soak.requests import FAULTS, TINY, Ask, Fault, Letters, random_asks, random_model, random_settings
from common.bench.grids import observed_engine
from common.checkpoints import find_checkpoint
from common.config import EngineConfig
from common.tokenizer import Tokenizer, load_tokenizer
from solutions.batching import Engine, LocalExecutor, ModelRunner
from solutions.engine import build_runner, load_model
from solutions.llama_pytorch import Llama
from solutions.paged_attention import PagedKVCache, cdiv
from solutions.quantization import Int8KVCache, Quantization
from solutions.scheduler import ModelRunnerOutput, SchedulerOutput
from solutions.speculative import SpeculativeRunner


class Pipelined(LocalExecutor):
    """Allows `depth` steps in flight, as an executor with that number of pipeline stages does."""

    def __init__(self, runner, depth: int):
        super().__init__(runner)
        self.depth = depth


@dataclass
class Report:
    """The counts of a run, and its sampled tokens."""

    counts: Counter = field(default_factory=Counter)
    places: list[float] = field(default_factory=list)  # `place_of` each token that was sampled with a draft model

    def add(self, other: Report) -> None:
        self.counts.update(other.counts)
        self.places += other.places


class Watched:
    """An executor that counts what plans and outputs contain, and asserts what must hold for both."""

    def __init__(self, inner: LocalExecutor, report: Report, budget: int, max_draft_tokens: int | None = None):
        self.inner, self.report, self.budget, self.depth = inner, report, budget, inner.depth
        self.max_draft_tokens = max_draft_tokens  # for a request in a step; None: there is no limit
        self.flying: deque[SchedulerOutput] = deque()  # plans in flight
        self.dropped: set[int] = set()  # steps that were in flight when one was interrupted

    def submit(self, plan: SchedulerOutput) -> None:
        ids = [each.request_id for each in plan.scheduled]
        busy = {each.request_id for other in self.flying for each in other.scheduled}
        assert len(ids) == len(set(ids)) and not set(ids) & busy, "scheduled twice"
        assert not set(plan.preempted_ids) & {*ids, *busy}, (
            "preempted in the step in which it was scheduled, or in flight"
        )
        assert plan.num_tokens <= self.budget
        if self.max_draft_tokens is not None:
            for each in plan.scheduled:
                assert each.num_spec_tokens <= self.max_draft_tokens
                assert not each.num_spec_tokens or each.sample_index + each.num_spec_tokens < each.max_tokens, each
        self.report.counts.update(
            swaps_out=len(plan.swaps_out), swaps_in=len(plan.swaps_in), copies=len(plan.copies),
            preemptions=len(plan.preempted_ids),
            pipelined=len(plan.preempted_ids) * (self.depth > 1),
            chunks=sum(each.sample_index is None for each in plan.scheduled),
        )  # fmt: skip
        self.flying.append(plan)
        self.inner.submit(plan)

    def drop(self, in_flight: Iterable[SchedulerOutput]) -> None:
        """After an interruption: only these steps are in flight now, though outputs of others may still come."""
        kept = {plan.step_id for plan in in_flight}
        self.dropped |= {plan.step_id for plan in self.flying} - kept
        self.flying = deque(plan for plan in self.flying if plan.step_id in kept)

    def collect(self) -> ModelRunnerOutput:
        output = self.inner.collect()
        if output.step_id in self.dropped:
            return output
        plan = self.flying.popleft()
        assert output.step_id == plan.step_id
        self.report.counts.update(drafts=sum(each.num_spec_tokens for each in plan.scheduled))
        for each in plan.scheduled:
            if each.request_id in output.errors:
                continue
            tokens = output.sampled_token_ids.get(each.request_id, [])
            assert (each.sample_index is None) == (not tokens), "a chunk in the middle was sampled, or an end was not"
            assert len(tokens) <= each.num_spec_tokens + 1
            if each.params.logprobs is not None:
                assert len(output.logprobs.get(each.request_id, ())) == len(tokens)
            accepted = max(0, len(tokens) - 1)
            self.report.counts.update(accepted=accepted, rejected=each.num_spec_tokens - accepted)
        return output

    def close(self) -> None:
        self.inner.close()


class Steps:
    """Steps of an engine, of which some are interrupted, at any of their lines."""

    def __init__(self, engine: Engine, rng: random.Random, chance: float):
        self.engine, self.rng, self.chance = engine, rng, chance
        self.num_lines = 2000  # of a step: a first estimate, then that of the last traced step
        self.num_interrupted = 0

    def step(self) -> None:
        if self.rng.random() >= self.chance:
            self.engine.step()
            return
        tracer = AfterLines(self.rng.randrange(self.num_lines))
        try:
            with tracing(tracer):
                self.engine.step()
            self.num_lines = max(tracer.num_lines, 1)
        except KeyboardInterrupt:
            if not tracer.is_pressed:
                raise  # a real one
            self.num_interrupted += 1
            self.engine.executor.drop(self.engine.in_flight)  # all, if it came before the step began


def drive(
    engine: Engine,
    asks: list[Ask],
    oracle: Oracle,
    rng: random.Random,
    texts: Texts | None = None,
    may_be_interrupted: bool = False,
) -> Report:
    """Add the requests at their steps, run the engine until all have finished, and check every step and output.

    texts: those of an earlier call with the same engine, if there was one.
    """
    report, original, before = Report(), engine.executor, engine.metrics()
    executor, runner = original, getattr(getattr(original, "rank", original), "runner", None)
    is_speculative, has_draft = isinstance(runner, SpeculativeRunner), engine.config.draft is not None
    if isinstance(executor, LocalExecutor):
        executor = Pipelined(runner, rng.choice([2, 3])) if rng.random() < 0.4 else LocalExecutor(runner)
        engine.scheduler.depth = rng.choice([1, executor.depth])
    steps = Steps(engine, rng, 0.03 if may_be_interrupted and rng.random() < 0.5 else 0.0)
    if is_speculative and has_draft:
        watch_draft(runner.proposer)
    most = (engine.config.num_speculative_tokens or 8) if engine.config.speculative else None
    engine.executor = Watched(executor, report, engine.config.max_num_batched_tokens, most)
    texts = texts or Texts(engine.config.block_size)
    to_come, outputs, aborted = sorted(enumerate(asks), key=lambda pair: pair[1].step), {}, set()
    failed = [number for number, ask in enumerate(asks) if ask.params.logits_processors]
    while to_come or engine.has_unfinished_requests:
        while to_come and to_come[0][1].step <= report.counts["steps"]:
            number, ask = to_come.pop(0)
            request_id = engine.add_request(ask.prompt, ask.params, f"r{number}", ask.priority, ask.tenant)
            outputs[number] = engine.output(request_id)
            texts.watch(engine.samples(request_id))
        for number in outputs:
            if asks[number].is_impatient and engine.samples(f"r{number}") and rng.random() < 0.1:
                engine.abort(f"r{number}")
                aborted.add(number)
        steps.step()
        check_books(engine)
        texts.check(engine)
        if is_speculative:
            check_drafts(engine, runner)
        report.counts["steps"] += 1
        assert report.counts["steps"] < 20_000, "it does not end"
    assert engine.manager.pool.num_free_blocks == len(engine.manager.pool.blocks), "blocks leaked"
    assert not engine.processor.states and not engine.in_flight
    for number, output in outputs.items():
        ask = asks[number]
        for child, params in zip([output, *output.siblings], ask.params.children()):
            is_drawn = has_draft and params.temperature > 0
            harmless = replace(params, logits_processors=())  # for answers that end before their fault
            if child.error is not None and params.logits_processors:
                check_failed(child, params.logits_processors[0])
                if not is_drawn:
                    expected = oracle(ask.prompt, harmless, child.token_ids).token_ids
                    assert child.token_ids == expected[: len(child.token_ids)]
            elif is_drawn:
                draft = runner.proposer.model if is_speculative else None  # with stages it is in another process
                places = judge(child, oracle, ask.prompt, params, number in aborted, rng, draft)
                report.places += places
                report.counts["drawn"] += len(places)
            else:
                asked = harmless if child.finish_reason == "abort" else params
                compare(child, oracle(ask.prompt, asked, child.token_ids), number in aborted)
            assert 0 <= child.metrics.num_accepted_tokens <= child.metrics.num_draft_tokens
            report.counts["answers"] += 1
    # A rank among several has some heads or layers only.
    if isinstance(original, LocalExecutor) and type(runner.cache) is (oracle.cache or PagedKVCache):
        texts.check_contents(engine, runner.cache, oracle)
    after = engine.metrics()
    uncounted = report.counts["drafts"] - (after.num_draft_tokens - before.num_draft_tokens)
    assert uncounted == 0 or (uncounted > 0 and steps.num_interrupted), "draft tokens were counted wrong"
    assert after.num_accepted_tokens - before.num_accepted_tokens <= report.counts["accepted"]
    report.counts.update(cached=after.num_cached_tokens - before.num_cached_tokens, aborted=len(aborted))
    report.counts.update(interrupts=steps.num_interrupted, failed=len(failed))
    engine.executor = original
    return report


# --- The assembled engine ---------------------------------------------------------------------------------------------

FAMILIES = {
    "llama": dict(num_key_value_heads=1, num_hidden_layers=3, attention_bias=True, tie_word_embeddings=True),
    "qwen2": dict(model_type="qwen2", num_attention_heads=6, num_key_value_heads=3, hidden_size=24),
    "qwen3": dict(model_type="qwen3", num_attention_heads=3, num_key_value_heads=3, head_dim=6),
    "mistral": dict(model_type="mistral", sliding_window=6),
    "qwen3_moe": dict(
        model_type="qwen3_moe", num_experts=5, num_experts_per_tok=2, moe_intermediate_size=10, mlp_only_layers=[0],
    ),
}  # fmt: skip
"""Tiny models with random weights, by name: the values of their configs that differ from `TINY`."""

NOISE = {"itself": 0.0, "close": 0.03, "loose": 0.3}
"""Drafts that are copies of the target: the standard deviation of the noise on their weights."""

STRANGER = dict(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=48
)
"""The config of a draft with weights unlike its target's, and with fewer positions than a request may need."""

STORIES = [list(range(5, 30)), [*range(5, 15), *range(30, 40)], [7] * 20]
TALES = [
    "There was once a small owl who lived by the river. One day the owl found a boat. The owl",
    "Long ago, in a dark wood, a fox and a bear were friends. The fox said to the bear: I am",
    "One day the owl found a boat. One day the owl found a boat. One day the owl found a",
]


class Models:
    """The checkpoints and their oracles, each made when it is first needed."""

    def __init__(self):
        self.temporary = tempfile.TemporaryDirectory()
        self.oracles: dict[tuple, Oracle] = {}

    @cached_property
    def tales_tokenizer(self) -> Tokenizer:
        return load_tokenizer(find_checkpoint("tales"))

    def tokenizer(self, name: str):
        return Letters() if name in FAMILIES else self.tales_tokenizer

    def folder(self, family: str, draft: str = "itself") -> str:
        """A family's target, or a draft for it."""
        folder = Path(self.temporary.name) / f"{family}-{draft}"
        if not folder.exists():
            config = {**TINY, **(STRANGER if draft == "stranger" else FAMILIES[family])}
            model, generator = random_model(2 if draft == "stranger" else 1, **config), torch.Generator().manual_seed(3)
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(noise * NOISE.get(draft, 0.0))
            folder.mkdir()
            tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
            save_file(tensors, folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return str(folder)

    def oracle(self, name: str, quantization: Quantization | None, kv_cache_dtype: str) -> Oracle:
        key = name, quantization, kv_cache_dtype
        if key not in self.oracles:
            folder = self.folder(name) if name in FAMILIES else name
            options = options_of(quantization)
            model, *_ = load_model(EngineConfig(model=folder, dtype=torch.float64, device="cpu", **options))
            cache = Int8KVCache if kv_cache_dtype == "int8" else None
            self.oracles[key] = Oracle(model, self.tokenizer(name), cache)
        return self.oracles[key]


def with_made_up_times(seed: int, config: EngineConfig, model: Llama, layers: range) -> ModelRunner:
    """A rank's runner with random durations of steps: adaptive speculation varies, yet a run can be repeated."""
    runner = build_runner(config, model, layers)
    if isinstance(runner, SpeculativeRunner):
        rng, observe = random.Random(seed), runner.adaptive.observe_step

        def observe_made_up(num_requests: int, num_draft_tokens: int, seconds: float) -> None:
            fixed, each = rng.choice([0.01, 0.1]), rng.choice([0.001, 0.1])
            observe(num_requests, num_draft_tokens, fixed + each * (num_requests + num_draft_tokens))

        runner.adaptive.observe_step = observe_made_up
    return runner


def options_of(quantization: Quantization | None) -> dict:
    """The options of an engine that quantizes its weights this way."""
    if quantization is None:
        return {}
    return dict(quantization=quantization.kind, group_size=quantization.group_size, symmetric=quantization.symmetric)


def more_wishes(rng: random.Random, ask: Ask) -> Ask:
    """The same request with random values of all other sampling parameters."""
    max_tokens = rng.randint(1, 30)
    params = replace(
        ask.params,
        max_tokens=max_tokens,
        min_tokens=min(max_tokens, rng.choice([0, 0, 0, 4])),
        temperature=rng.choice([0.0, 0.0, 0.7, 1.3]),
        seed=rng.randrange(2**31),  # few seeds would draw alike, and then places are not independent
        top_k=rng.choice([0, 0, 5]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        stop_token_ids=rng.choice([(), (), (9, 12)]),
        logprobs=rng.choice([None, None, 0, 2]),
        presence_penalty=rng.choice([0.0, 0.0, 0.5]),
        frequency_penalty=rng.choice([0.0, 0.0, -0.2]),
        logits_processors=[Fault(rng.choice(FAULTS), rng.randint(0, 6))] if rng.random() < 0.08 else (),
    )
    return replace(ask, params=params, is_impatient=rng.random() < 0.25)


EVERY = 20
"""Of this many consecutive numbers, the last and the middle one are runs over two processes. The last and some before
it are runs with `tales`; the model of the middle one has a window or experts.
"""


@dataclass(frozen=True)
class Run:
    """One engine and its load. All of it follows from the number."""

    seed: int
    model: str = ""  # of FAMILIES, or "tales"
    speculative: str | None = None  # None, "ngram", or a draft
    grid: tuple[int, int] = (1, 1)
    rounds: tuple[tuple[Ask, ...], ...] = field(default=(), repr=False)
    settings: dict = field(default_factory=dict)

    @classmethod
    def number(cls, seed: int, models: Models) -> Run:
        rng, place = random.Random(seed), seed % EVERY
        if place == EVERY - 1 or place % 7 == 3:
            model, speculative = "tales", rng.choice([None, "ngram", "ngram", "tales-draft", "tales-draft", "tales"])
            grid = rng.choice([(2, 1), (1, 2)]) if place == EVERY - 1 else (1, 1)
            stories = [models.tales_tokenizer.encode(text) for text in TALES]
            num_rounds, num_asks = (2 if grid != (1, 1) else 1), 7
        else:
            model, grid, stories = rng.choice(list(FAMILIES)), (1, 1), STORIES
            if place == EVERY // 2 - 1:
                model, grid = rng.choice(["mistral", "qwen3_moe"]), rng.choice([(2, 1), (1, 2)])
            speculative = rng.choice([None, "ngram", "ngram", "itself", "close", "close", "loose", "stranger"])
            num_rounds, num_asks = 1, rng.randint(6, 20)
        vocabulary = sorted({token for story in stories for token in story})
        rounds = tuple(
            tuple(more_wishes(rng, ask) for ask in random_asks(rng, vocabulary, stories, num_asks))
            for _ in range(num_rounds)
        )
        settings = random_settings(rng, [ask for asks in rounds for ask in asks])
        if rng.random() < 0.6:  # a pool that is too small for the requests that are admitted
            longest = max(len(ask.prompt) + ask.params.max_tokens - 1 for asks in rounds for ask in asks)
            needed = cdiv(longest, settings["block_size"])
            settings["max_num_seqs"] = rng.choice([3, 8, 64])
            settings["max_num_batched_tokens"] = max(16, settings["max_num_batched_tokens"])
            if settings.get("kv_cache_policy") != "contiguous":
                settings["num_blocks"] = needed + rng.choice([0, 1, needed // 2])
            if "num_host_blocks" in settings:
                settings["num_host_blocks"] = rng.choice([needed, 4 * needed])
        if model == "tales":
            settings["max_num_batched_tokens"] = max(8, settings["max_num_batched_tokens"])  # or it takes minutes
        settings["kv_cache_dtype"] = rng.choice(["auto", "auto", "int8"])
        settings["quantization"] = rng.choice([None] * 5 + [Quantization("int8"), Quantization("int4", 8)])
        if speculative is not None:
            settings["num_speculative_tokens"] = rng.randint(1, 6)
            settings["adaptive_speculation"] = rng.random() < 0.5
        return cls(seed, model, speculative, grid, rounds, settings)

    @property
    def features(self) -> Counter:
        """The counts that follow from the run's settings."""
        settings = self.settings
        flags = {
            "runs": True,
            "runs over processes": self.grid != (1, 1),
            "runs with n-grams": self.speculative == "ngram",
            "runs with a draft": self.speculative not in (None, "ngram"),
            "runs with tales": self.model == "tales",
            "runs with windows": self.model == "mistral",
            "runs with experts": self.model == "qwen3_moe",
            "runs, adaptive": settings.get("adaptive_speculation", False),
            "runs, contiguous": settings.get("kv_cache_policy") == "contiguous",
            "runs, int8 cache": settings["kv_cache_dtype"] == "int8",
            "runs, fewer bits": settings["quantization"] is not None,
        }
        return Counter({name: int(flag) for name, flag in flags.items()})

    def execute(self, models: Models) -> Report:
        """Execute the run. Raises AssertionError for the first fault, or the error of the engine."""
        rng, report = random.Random(-self.seed - 1), Report(counts=self.features)
        oracle = models.oracle(self.model, self.settings["quantization"], self.settings["kv_cache_dtype"])
        name, speculative = self.model, self.speculative
        with ExitStack() as stack:
            stack.enter_context(mock.patch.dict("os.environ", KERNELS="plain"))
            if self.model in FAMILIES:
                name = models.folder(self.model)
                speculative = speculative if speculative in (None, "ngram") else models.folder(self.model, speculative)
                stack.enter_context(mock.patch("solutions.engine.load_tokenizer", lambda folder: Letters()))
            settings = {**self.settings, **options_of(self.settings["quantization"])}
            grid = dict(tensor_parallel=self.grid[0], pipeline_parallel=self.grid[1])
            settings |= dict(speculative=speculative, dtype=torch.float64, device="cpu", **grid)
            build = partial(with_made_up_times, self.seed)
            engine = stack.enter_context(observed_engine(build, model=name, **settings))
            texts = Texts(engine.config.block_size)
            for asks in self.rounds:
                report.add(drive(engine, list(asks), oracle, rng, texts, may_be_interrupted=True))
        if speculative == name and self.settings["quantization"] is None and self.settings["kv_cache_dtype"] == "auto":
            report.counts.update(own_accepted=report.counts["accepted"], own_rejected=report.counts["rejected"])
        return report
