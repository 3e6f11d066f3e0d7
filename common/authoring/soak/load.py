"""Random load for the engine: requests and settings of all kinds. After every step the books are checked, and every
output is compared with what lesson 2's `generate` gives that request alone.

The first half drives any engine from lesson 5 on. The second drives lesson 8's, assembled anew for each number: run 7
is the same every time, for whatever depends on the clock is given made-up times. `python -m common soak` goes through
the numbers.
"""

from __future__ import annotations

import json
import math
import random
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from common.checkpoints import find_checkpoint
from common.config import EngineConfig
from common.tokenizer import Tokenizer, load_tokenizer
from solutions import llama_pytorch
from solutions.batching import Engine, LocalExecutor, ModelRunner, RequestOutput
from solutions.engine import build_runner, load_model, resolve, start_executor
from solutions.llama_pytorch import (
    Llama,
    SamplingParams,
    adjust_logits,
    causal_attend,
    parse_config,
    sample,
    sampling_probs,
    top_logprobs,
)
from solutions.paged_attention import AttentionMetadata, PagedKVCache, hash_block
from solutions.quantization import Int8KVCache, Quantization, load_quantized
from solutions.scheduler import ModelRunnerOutput, Request, SchedulerOutput
from solutions.speculative import AdaptiveSpeculation, DraftProposer, SpeculativeRunner

MAX_MODEL_LEN = 64
END = 3
"""The end-of-sequence token of `Letters`."""


LETTERS = "abcdefghijklmnopqrstuvwxyz é🙂"


class Letters:
    """A tokenizer of 40 tokens, each a piece of text; one of them ends a sequence."""

    bos_token_id, eos_token_ids, chat_template, vocab_size = None, frozenset({END}), None, 40

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == END else LETTERS[token_id % 29].encode()[: 1 + token_id // 10]


TINY = dict(
    model_type="llama", vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip


def random_model(seed: int = 0, **changes) -> Llama:
    """A tiny Llama with random weights in float64, in which no two tokens are ever as likely as each other."""
    model = Llama(parse_config({**TINY, **changes})).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    return model


class Pipelined(LocalExecutor):
    """As many steps in flight as pipeline stages: each is computed in its turn, and collected late."""

    def __init__(self, runner, depth: int):
        super().__init__(runner)
        self.depth = depth


class GuessingRunner(ModelRunner):
    """Makes draft tokens, few of them right, and verifies them: a draft token is accepted if it is sampled anyway.

    The reference's sampling depends on the seed and the index alone, so this changes no token, and every rejected one
    has left its key and value in some block.
    """

    def __init__(self, model: Llama, cache, rng: random.Random):
        super().__init__(model, cache)
        self.rng = rng

    def sample(self, plan: SchedulerOutput, logits: torch.Tensor, output: ModelRunnerOutput) -> None:
        start = 0
        for each in plan.scheduled:
            if each.sample_index is None:
                continue
            rows = logits[start : start + each.num_spec_tokens + 1]
            start += len(rows)
            drafts = each.token_ids[len(each.token_ids) - each.num_spec_tokens :]
            tokens: list[int] = []
            for i, row in enumerate(rows):
                so_far = each.output_token_ids + tokens
                adjusted = adjust_logits(row, each.params, each.prompt_token_ids, so_far, each.stop_token_ids)
                tokens.append(sample(adjusted, each.params, each.sample_index + i))
                if each.params.logprobs is not None:
                    entry = top_logprobs(row, tokens[-1], each.params.logprobs)
                    output.logprobs.setdefault(each.request_id, []).append(entry)
                if i < len(drafts) and drafts[i] != tokens[-1]:
                    break
            output.sampled_token_ids[each.request_id] = tokens
            likely = rows[-1].topk(3).indices.tolist()
            output.spec_token_ids[each.request_id] = self.rng.choices(likely, k=self.rng.randint(0, 4))


class Oracle:
    """What a request's answer is when it is alone: lesson 2's `generate`, each question asked once.

    cache: the kind of cache through which attention reads what it wrote, if that changes the numbers. All tokens are
    computed anew for each next one, whatever the cache: nothing is remembered from step to step.
    """

    def __init__(self, model: Llama, tokenizer, cache: type[PagedKVCache] | None = None):
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self.answers: dict = {}

    def __call__(self, prompt: list[int], params: SamplingParams) -> llama_pytorch.RequestOutput:
        params = clipped(prompt, params)
        key = (tuple(prompt), params)
        if key not in self.answers:
            self.answers[key] = llama_pytorch.generate(
                self.model, self.tokenizer, prompt, params, next_logits=self.cache and (lambda ids: self.rows(ids)[-1])
            )
        return self.answers[key]

    def compute(self, token_ids: Sequence[int], kind: type[PagedKVCache] | None) -> tuple[Tensor, PagedKVCache | None]:
        """Logits (T, V) of what comes after each token, and the one block that holds all their keys and values."""
        num_tokens, cache, attend = len(token_ids), None, causal_attend
        if kind is not None:
            cache = kind(self.model, 1, num_tokens)
            attend = cache.attend(AttentionMetadata([0, num_tokens], [num_tokens], torch.arange(num_tokens), [[0]]))
        hidden = self.model(torch.tensor(token_ids), torch.arange(num_tokens), attend)
        return self.model.logits(hidden), cache

    @torch.inference_mode()
    def rows(self, token_ids: Sequence[int]) -> Tensor:
        return self.compute(token_ids, self.cache)[0]

    @torch.inference_mode()
    def block(self, token_ids: Sequence[int]) -> PagedKVCache:
        """All keys and values of a text, in one block."""
        return self.compute(token_ids, self.cache or PagedKVCache)[1]


def clipped(prompt: Sequence[int], params: SamplingParams) -> SamplingParams:
    """What an engine makes of them: no more tokens than there is room for."""
    most = min(params.max_tokens, MAX_MODEL_LEN - len(prompt))
    return replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most))


@dataclass
class Ask:
    """One request of the load: when it comes, what it asks, and whether somebody loses patience."""

    prompt: list[int]
    params: SamplingParams
    priority: int
    tenant: str
    step: int  # when it arrives
    is_impatient: bool


def random_asks(rng: random.Random, vocabulary: list[int], stories: list[list[int]], num: int) -> list[Ask]:
    """Prompts that often begin alike; greedy and seeded sampling; stop strings, penalties, several samples."""
    asks = []
    for _ in range(num):
        story = rng.choice(stories)
        prompt = story[: rng.randint(1, len(story))] + rng.choices(vocabulary, k=rng.choice([0, 0, 2, 6]))
        params = SamplingParams(
            max_tokens=rng.randint(1, 14),
            n=rng.choice([1, 1, 1, 2, 3]),
            temperature=rng.choice([0.0, 0.0, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            seed=rng.randint(0, 99),
            ignore_eos=rng.random() < 0.5,
            stop=rng.choice([(), (), ("a",), ("the", "own")]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            logprobs=rng.choice([None, None, 1]),
        )
        asks.append(Ask(prompt, params, rng.randint(0, 3), rng.choice("abc"), rng.randint(0, 20), rng.random() < 0.15))
    return asks


def random_settings(rng: random.Random, asks: list[Ask]) -> dict:
    """An engine that can just serve these requests, or amply: pools, budgets, policies, both preemptions."""
    block_size = rng.choice([1, 2, 4, 7, 16])
    longest = max(len(ask.prompt) + ask.params.max_tokens - 1 for ask in asks)
    needed = -(-longest // block_size)
    settings = dict(
        block_size=block_size,
        num_blocks=rng.choice([needed, needed + 1, needed + 3, 2 * needed, 3 * needed, 20 * needed]),
        max_num_seqs=rng.choice([1, 3, 8, 64]),
        max_num_batched_tokens=rng.choice([1, 2, 5, 16, 64, 1024]),
        scheduling_policy=rng.choice(["fcfs", "priority", "fair"]),
        preemption=rng.choice(["recompute", "swap"]),
        enable_prefix_caching=rng.random() < 0.6,
        max_model_len=MAX_MODEL_LEN,
    )
    if settings["preemption"] == "swap":
        settings["num_host_blocks"] = rng.choice([1, needed, 4 * needed])
    if rng.random() < 0.15:
        settings.update(
            kv_cache_policy="contiguous", enable_prefix_caching=False, num_blocks=rng.choice([1, 2, 5]),
            num_host_blocks=settings.get("num_host_blocks") and 3,
        )  # fmt: skip
    return settings


def check_books(engine: Engine) -> None:
    """Every block is where the books say: held as often as it is counted, free if and only if nobody holds it."""
    manager, scheduler = engine.manager, engine.scheduler
    pool, holders = manager.pool, Counter()
    for table in manager.block_tables.values():
        holders.update(block.block_id for block in table)
        assert len({block.block_id for block in table}) == len(table), "a block stands twice in one table"
        assert engine.config.kv_cache_policy == "paged" or len(table) <= 1, "contiguous, and yet in two pieces"
    for block in pool.blocks:
        assert block.ref_cnt == holders[block.block_id], f"{block}: {holders[block.block_id]} hold it"
        assert (block.block_id in pool.free) == (block.ref_cnt == 0), block
    hashed = {block.block_hash.value: block for block in pool.blocks if block.block_hash}
    assert hashed == pool.cached
    running = {request.request_id for request in scheduler.running}
    assert set(manager.block_tables) <= running, "somebody who does not run holds blocks"
    assert not manager.copies, "a copy was forgotten"
    held = sum(map(len, scheduler.swapped.values()))
    assert held + scheduler.host_pool.num_free_blocks == len(scheduler.host_pool.blocks)
    assert set(scheduler.requests) == {r.request_id for r in [*scheduler.running, *scheduler.waiting]}


@dataclass
class Report:
    """What happened in a run: a soak in which nothing happens proves nothing."""

    num_outputs: int = 0
    num_steps: int = 0
    counts: Counter = field(default_factory=Counter)
    places: list[float] = field(default_factory=list)  # of drawn tokens; see `place_of`

    def add(self, other: Report) -> None:
        self.num_outputs += other.num_outputs
        self.num_steps += other.num_steps
        self.counts.update(other.counts)
        self.places += other.places


class Watched:
    """An executor that counts what passes through it, and checks what a scheduler must never ask for, and what nobody
    must ever answer.
    """

    def __init__(self, inner: LocalExecutor, report: Report, budget: int, max_draft_tokens: int | None = None):
        self.inner, self.report, self.budget, self.depth = inner, report, budget, inner.depth
        self.max_draft_tokens = max_draft_tokens  # for a request in a step; None: whatever proposes knows no measure
        self.flying: deque[SchedulerOutput] = deque()

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
        self.inner.submit(plan)
        self.flying.append(plan)

    def collect(self) -> ModelRunnerOutput:
        plan, output = self.flying.popleft(), self.inner.collect()
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


class Interrupted(KeyboardInterrupt):
    """Ctrl-C that nobody has pressed."""


def interrupt_at_times(runner: ModelRunner, rng: random.Random) -> None:
    """From now on a step is interrupted now and then, before anything of it is computed, or after all of it is."""
    execute = runner.execute

    def interruptible(plan: SchedulerOutput, hidden=None) -> ModelRunnerOutput:
        chance = rng.random()
        if chance < 0.015:
            raise Interrupted
        output = execute(plan, hidden)
        if chance > 0.985:
            raise Interrupted
        return output

    runner.execute = interruptible


class Texts:
    """All that may be found again: the beginnings of texts, made of whole blocks of verified tokens, by their hash."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.beginnings: dict[bytes, list[int]] = {}
        self.growing: list[tuple[Request, list]] = []  # and the hashes of its blocks so far

    def watch(self, requests: Iterable[Request]) -> None:
        self.growing += [(request, []) for request in requests]

    def check(self, engine: Engine) -> None:
        """Nobody finds what was only proposed, and whoever holds a block that can be found has computed that text."""
        size = self.block_size
        for request, hashes in self.growing:
            while (len(hashes) + 1) * size <= request.num_tokens:
                start = len(hashes) * size
                hashes.append(hash_block(hashes[-1] if hashes else None, request.all_token_ids[start : start + size]))
                self.beginnings[hashes[-1].value] = request.all_token_ids[: start + size]
        self.growing = [each for each in self.growing if each[0].finish_reason is None or each[0].in_flight]
        for value in engine.manager.pool.cached:
            assert value in self.beginnings, "a block can be found by tokens that nobody has verified"
        for request in engine.scheduler.running:
            for place, block in enumerate(engine.manager.block_tables[request.request_id]):
                if block.block_hash is not None:
                    text = self.beginnings[block.block_hash.value]
                    assert text == request.all_token_ids[: len(text)] and len(text) == (place + 1) * size
                    assert len(text) <= request.num_computed_tokens, "found before it is computed"

    def check_contents(self, engine: Engine, cache: PagedKVCache, oracle: Oracle) -> None:
        """Each block that can be found holds the keys and values of its text, as if it had been computed alone."""
        cached, compared = engine.manager.pool.cached, set()
        for value in sorted(cached, key=lambda value: -len(self.beginnings[value])):
            if value in compared:
                continue
            alone = oracle.block(self.beginnings[value])
            for end in range(len(self.beginnings[value]), 0, -self.block_size):
                block = cached.get(value)
                if block is None:
                    break  # what stood before it has made room
                for ours, theirs in zip(cache.device_tensors, alone.device_tensors):
                    one, other = ours[:, block.block_id], theirs[:, 0, end - self.block_size : end]
                    assert torch.allclose(one, other, rtol=1e-6, atol=1e-6), f"{block} holds something else"
                compared.add(value)
                value = block.block_hash.parent


def check_drafts(engine: Engine, runner: SpeculativeRunner) -> None:
    """What is kept outside the scheduler: nothing of requests that are gone, and no draft beyond its text."""
    scheduler, proposer = engine.scheduler, runner.proposer
    known = {*scheduler.requests, *scheduler.finished_ids}  # of these the next step will tell
    kept = {"drafts": runner.drafts, "acceptances": runner.adaptive.acceptances}
    if isinstance(proposer, DraftProposer):
        kept["computed counts"] = proposer.num_computed
    for what, each in kept.items():
        assert set(each) <= known, f"{what} of requests that are gone: {set(each) - known}"
    for draft in runner.drafts.values():
        token_ids = draft.draft_token_ids
        assert len(token_ids) <= draft.limit <= runner.adaptive.num_speculative_tokens
        if draft.probs:
            probs = torch.stack(draft.probs)
            assert len(probs) == len(token_ids) and torch.allclose(probs.sum(-1), torch.ones(len(probs)).to(probs))
            assert probs[range(len(probs)), token_ids].gt(0).all(), "a draft token that cannot have been drawn"
    if isinstance(proposer, DraftProposer):
        for request in scheduler.running:
            if not request.in_flight:
                draft = runner.drafts.get(request.request_id)
                end = request.num_tokens + max(0, len(draft.draft_token_ids) - 1 if draft else 0)
                assert proposer.num_computed[request.request_id] <= end, "the draft is ahead of its own draft tokens"


def watch_draft(proposer: DraftProposer) -> None:
    """From now on a draft that believes to have computed what its target has taken back is found out."""
    follow = proposer.follow

    def watched(plan: SchedulerOutput) -> None:
        follow(plan)
        for each in plan.scheduled:
            computed = proposer.num_computed[each.request_id]
            assert computed <= each.start, f"the draft's {computed} computed tokens, the target's {each.start}"

    proposer.follow = watched


def drive(
    engine: Engine,
    asks: list[Ask],
    oracle: Oracle,
    rng: random.Random,
    texts: Texts | None = None,
    may_be_interrupted: bool = False,
) -> Report:
    """Send the requests in at their times, step until all are done, check everything.

    texts: what was verified before, if the engine has served already.
    """
    report, original, before = Report(), engine.executor, engine.metrics()
    executor, runner = original, getattr(getattr(original, "rank", original), "runner", None)
    is_speculative, has_draft = isinstance(runner, SpeculativeRunner), engine.config.draft is not None
    if isinstance(executor, LocalExecutor):
        if rng.random() < 0.4 and not is_speculative:
            runner = GuessingRunner(runner.model, runner.cache, rng)
        executor = Pipelined(runner, rng.choice([2, 3])) if rng.random() < 0.4 else LocalExecutor(runner)
        engine.scheduler.depth = rng.choice([1, executor.depth])
        if may_be_interrupted and executor.depth == 1 and rng.random() < 0.5:
            interrupt_at_times(runner, rng)
    if is_speculative and has_draft:
        watch_draft(runner.proposer)
    most = (engine.config.num_speculative_tokens or 8) if engine.config.speculative else None
    engine.executor = Watched(executor, report, engine.config.max_num_batched_tokens, most)
    texts = texts or Texts(engine.config.block_size)
    to_come, outputs, aborted = sorted(enumerate(asks), key=lambda pair: pair[1].step), {}, set()
    while to_come or engine.has_unfinished_requests:
        while to_come and to_come[0][1].step <= report.num_steps:
            number, ask = to_come.pop(0)
            request_id = engine.add_request(ask.prompt, ask.params, f"r{number}", ask.priority, ask.tenant)
            outputs[number] = engine.output(request_id)
            texts.watch(engine.samples(request_id))
        for number in outputs:
            if asks[number].is_impatient and engine.samples(f"r{number}") and rng.random() < 0.1:
                engine.abort(f"r{number}")
                aborted.add(number)
        try:
            engine.step()
        except Interrupted:
            report.counts["interrupts"] += 1
            engine.executor.flying.clear()
        check_books(engine)
        texts.check(engine)
        if is_speculative:
            check_drafts(engine, runner)
        report.num_steps += 1
        assert report.num_steps < 20_000, "it does not end"
    assert engine.manager.pool.num_free_blocks == len(engine.manager.pool.blocks), "blocks leaked"
    assert not engine.processor.states and not engine.in_flight
    for number, output in outputs.items():
        ask = asks[number]
        for child, params in zip([output, *output.siblings], ask.params.children()):
            if has_draft and params.temperature > 0:
                draft = runner.proposer.model if is_speculative else None  # with stages it is in another process
                places = judge(child, oracle, ask.prompt, params, number in aborted, rng, draft)
                report.places += places
                report.counts["drawn"] += len(places)
            else:
                compare(child, oracle(ask.prompt, params), number in aborted)
            assert 0 <= child.metrics.num_accepted_tokens <= child.metrics.num_draft_tokens
            report.num_outputs += 1
    # A rank among several has some heads or layers only.
    if isinstance(original, LocalExecutor) and type(runner.cache) is (oracle.cache or PagedKVCache):
        texts.check_contents(engine, runner.cache, oracle)
    after = engine.metrics()
    assert after.num_draft_tokens - before.num_draft_tokens == report.counts["drafts"]
    assert after.num_accepted_tokens - before.num_accepted_tokens <= report.counts["accepted"]
    report.counts.update(cached=after.num_cached_tokens - before.num_cached_tokens, aborted=len(aborted))
    engine.executor = original
    return report


def compare(output: RequestOutput, alone: llama_pytorch.RequestOutput, may_be_cut: bool) -> None:
    """The same tokens, text, reason and log-probabilities; of an aborted one, the beginning."""
    assert output.error is None, output.error
    check_logprobs(output.logprobs, alone.logprobs[: len(output.token_ids)])
    if output.finish_reason == "abort":
        assert may_be_cut
        assert alone.token_ids[: len(output.token_ids)] == output.token_ids
        return
    told = (output.token_ids, output.text, output.finish_reason)
    expected = (alone.token_ids, alone.text, alone.finish_reason)
    assert told == expected, f"{output.request_id}: {told}, alone {expected}"


def check_logprobs(told: Sequence[Mapping[int, float]], expected: Sequence[Mapping[int, float]]) -> None:
    """The same tokens in the same order, the chosen one first, and their log-probabilities."""
    assert [list(each) for each in told] == [list(each) for each in expected]
    for one, other in zip(told, expected):
        assert all(math.isclose(one[token_id], other[token_id], abs_tol=1e-6) for token_id in one)


def judge(
    output: RequestOutput,
    oracle: Oracle,
    prompt: list[int],
    params: SamplingParams,
    may_be_cut: bool,
    rng: random.Random,
    draft: Llama | None,
) -> list[float]:
    """What can be said of tokens that were drawn with a draft's help: they are others than without, and as likely.

    Each can have been drawn where it stands; text and reason follow from them; log-probabilities are the model's.
    Returns the tokens' places.
    """
    assert output.error is None, output.error
    tokens, params = output.token_ids, clipped(prompt, params)
    was_cut = output.finish_reason == "abort"
    assert may_be_cut or not was_cut
    if not tokens:
        return []

    def retold(token_ids: Sequence[int]) -> Tensor:
        assert len(token_ids) - len(prompt) < len(tokens), "it ended where it goes on"
        return torch.nn.functional.one_hot(torch.tensor(tokens[len(token_ids) - len(prompt)]), rows.shape[-1]).double()

    rows = oracle.rows([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
    plain = SamplingParams(
        max_tokens=len(tokens) if was_cut else params.max_tokens,
        stop=params.stop, stop_token_ids=params.stop_token_ids, ignore_eos=params.ignore_eos,
    )  # fmt: skip
    again = llama_pytorch.generate(oracle.model, oracle.tokenizer, prompt, plain, next_logits=retold)
    reason = output.finish_reason if was_cut else again.finish_reason
    assert (tokens, output.text, output.finish_reason) == (again.token_ids, again.text, reason)
    if params.logprobs is None:
        assert not output.logprobs
    else:
        expected = [top_logprobs(row, token, params.logprobs) for row, token in zip(rows, tokens)]
        check_logprobs(output.logprobs, expected)
    stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else oracle.tokenizer.eos_token_ids)}

    def probs(rows: Tensor) -> list[Tensor]:
        adjusted = [adjust_logits(row, params, prompt, tokens[:i], stop_ids) for i, row in enumerate(rows)]
        return [sampling_probs(row, params) for row in adjusted]

    ours = probs(rows)
    theirs = ours if draft is None else probs(Oracle(draft, None).rows([*prompt, *tokens[:-1]])[len(prompt) - 1 :])
    return [place_of(token, one, other, rng) for token, one, other in zip(tokens, ours, theirs)]


def place_of(token: int, probs: Tensor, draft: Tensor, rng: random.Random) -> float:
    """Where on a line from 0 to 1 a drawn token lies, if each token takes its probability's length of it; within its
    own length anywhere. probs, draft: (V,).

    Of tokens that were drawn from what they should be drawn from, the places are spread evenly, whatever the
    distributions were and however the line is ordered. Here those come first that the draft likes least, as measured by
    what they should be: whatever favours its draft tokens shifts the places to the end.
    """
    assert probs[token] > 0, f"token {token} cannot have been drawn here"
    order = probs if draft is probs else probs / (draft + 1e-12)
    return float(probs[order > order[token]].sum()) + rng.random() * float(probs[token])


def evenness(places: Sequence[float], num_bins: int = 20) -> float:
    """How likely places that are spread evenly look as uneven as these: Pearson's chi-squared test."""
    counts = torch.histc(torch.tensor(places, dtype=torch.float64), num_bins, 0.0, 1.0)
    expected = len(places) / num_bins
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((num_bins - 1) / 2, dtype=torch.float64), statistic / 2))


# ---------------------------------------------------------------------------------------------------------------
# The assembled engine
# ---------------------------------------------------------------------------------------------------------------

FAMILIES = {
    "llama": dict(num_key_value_heads=1, num_hidden_layers=3, attention_bias=True, tie_word_embeddings=True),
    "qwen2": dict(model_type="qwen2", num_attention_heads=6, num_key_value_heads=3, hidden_size=24),
    "qwen3": dict(model_type="qwen3", num_attention_heads=3, num_key_value_heads=3, head_dim=6),
}
"""Tiny models with random weights, by name: what they have that `TINY` has not."""

NOISE = {"itself": 0.0, "close": 0.03, "loose": 0.3}
"""Drafts that are the target, with so much noise on its weights."""

STRANGER = dict(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=48
)
"""A draft that has nothing to do with its target, and knows fewer positions than there may be."""

STORIES = [list(range(5, 30)), [*range(5, 15), *range(30, 40)], [7] * 20]
TALES = [
    "There was once a small owl who lived by the river. One day the owl found a boat. The owl",
    "Long ago, in a dark wood, a fox and a bear were friends. The fox said to the bear: I am",
    "One day the owl found a boat. One day the owl found a boat. One day the owl found a",
]


class Models:
    """Checkpoints, each made when it is first asked for, and what the oracle says of them."""

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
            model = load_quantized(folder, quantization, torch.float64, "cpu")
            cache = Int8KVCache if kv_cache_dtype == "int8" else None
            self.oracles[key] = Oracle(model, self.tokenizer(name), cache)
        return self.oracles[key]


class MadeUpTimes(AdaptiveSpeculation):
    """Durations of steps are made up: the number of draft tokens that pays varies, and is the same in each run."""

    def __init__(self, num_speculative_tokens: int, is_adaptive: bool, seed: int):
        super().__init__(num_speculative_tokens, is_adaptive)
        self.rng = random.Random(seed)

    def observe_step(self, num_requests: int, num_draft_tokens: int, seconds: float) -> None:
        fixed, each = self.rng.choice([0.01, 0.1]), self.rng.choice([0.001, 0.1])
        super().observe_step(num_requests, num_draft_tokens, fixed + each * (num_requests + num_draft_tokens))


def with_made_up_times(seed: int, config: EngineConfig, model: Llama, layers: range) -> ModelRunner:
    """A rank's runner, independent of the clock."""
    runner = build_runner(config, model, layers)
    if isinstance(runner, SpeculativeRunner):
        before = runner.adaptive
        runner.adaptive = MadeUpTimes(before.num_speculative_tokens, before.is_adaptive, seed)
    return runner


def soaked_engine(seed: int, model: str, **options) -> Engine:
    """Lesson 8's engine, the same in each run."""
    config, tokenizer = resolve(EngineConfig(model=model, **options))
    build = partial(with_made_up_times, seed, config)
    return Engine(start_executor(config, partial(load_model, config), build), tokenizer, config)


def options_of(quantization: Quantization | None) -> dict:
    """The options of an engine that quantizes its weights this way."""
    if quantization is None:
        return {}
    return dict(quantization=quantization.kind, group_size=quantization.group_size, symmetric=quantization.symmetric)


def more_wishes(rng: random.Random, ask: Ask) -> Ask:
    """The same request, with everything else that may be asked for."""
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
    )
    return replace(ask, params=params, is_impatient=rng.random() < 0.25)


EVERY = 20
"""Of so many numbers in a row, the last is a run over two processes, and some before it are runs with `tales`."""


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
            speculative = rng.choice([None, "ngram", "ngram", "itself", "close", "close", "loose", "stranger"])
            num_rounds, num_asks = 1, rng.randint(6, 20)
        vocabulary = sorted({token for story in stories for token in story})
        rounds = tuple(
            tuple(more_wishes(rng, ask) for ask in random_asks(rng, vocabulary, stories, num_asks))
            for _ in range(num_rounds)
        )
        settings = random_settings(rng, [ask for asks in rounds for ask in asks])
        if rng.random() < 0.6:  # a pool that is too small for what is let in
            longest = max(len(ask.prompt) + ask.params.max_tokens - 1 for asks in rounds for ask in asks)
            needed = -(-longest // settings["block_size"])
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
        """What there is to count, whatever happens."""
        settings = self.settings
        flags = {
            "runs": True,
            "runs over processes": self.grid != (1, 1),
            "runs with n-grams": self.speculative == "ngram",
            "runs with a draft": self.speculative not in (None, "ngram"),
            "runs with tales": self.model == "tales",
            "runs, adaptive": settings.get("adaptive_speculation", False),
            "runs, contiguous": settings.get("kv_cache_policy") == "contiguous",
            "runs, int8 cache": settings["kv_cache_dtype"] == "int8",
            "runs, fewer bits": settings["quantization"] is not None,
        }
        return Counter({name: int(flag) for name, flag in flags.items()})

    def execute(self, models: Models) -> Report:
        """Do it. Whatever is wrong is raised."""
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
            engine = stack.enter_context(soaked_engine(self.seed, name, **settings))
            texts = Texts(engine.config.block_size)
            for asks in self.rounds:
                report.add(drive(engine, list(asks), oracle, rng, texts, may_be_interrupted=self.grid == (1, 1)))
        if speculative == name and self.settings["quantization"] is None and self.settings["kv_cache_dtype"] == "auto":
            report.counts.update(own_accepted=report.counts["accepted"], own_rejected=report.counts["rejected"])
        return report


def run(seed: int, models: Models) -> Report:
    """The run of this number; the same every time."""
    return Run.number(seed, models).execute(models)
