"""Random load for the engine: requests and settings of all kinds. After every step the books are checked, and every
output is compared with what lesson 2's `generate` gives that request alone.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field, replace

import torch

from solutions import llama_pytorch
from solutions.batching import (
    Engine,
    LocalExecutor,
    ModelRunner,
    ModelRunnerOutput,
    RequestOutput,
    SchedulerOutput,
)
from solutions.llama_pytorch import Llama, SamplingParams, adjust_logits, parse_config, sample, top_logprobs

MAX_MODEL_LEN = 64
END = 3
"""The end-of-sequence token of `Letters`."""


LETTERS = "abcdefghijklmnopqrstuvwxyz é🙂"


class Letters:
    """A tokenizer of 40 tokens, each a piece of text; one of them ends a sequence."""

    bos_token_id, eos_token_ids, chat_template, vocab_size = None, frozenset({END}), None, 40

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == END else LETTERS[token_id % 29].encode()[: 1 + token_id // 10]


def random_model(seed: int = 0, **changes) -> Llama:
    """A tiny Llama with random weights in float64, in which no two tokens are ever as likely as each other."""
    config = dict(
        model_type="llama", vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    model = Llama(parse_config({**config, **changes})).double()
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
    """Makes guesses, few of them right, and verifies them: a guess is accepted if it is what is sampled anyway.

    The reference's sampling depends on the seed and the index alone, so this changes no token, and every rejected guess
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
            guesses = each.token_ids[len(each.token_ids) - each.num_spec_tokens :]
            tokens: list[int] = []
            for i, row in enumerate(rows):
                so_far = each.output_token_ids + tokens
                adjusted = adjust_logits(row, each.params, each.prompt_token_ids, so_far, each.stop_token_ids)
                tokens.append(sample(adjusted, each.params, each.sample_index + i))
                if each.params.logprobs is not None:
                    entry = top_logprobs(row, tokens[-1], each.params.logprobs)
                    output.logprobs.setdefault(each.request_id, []).append(entry)
                if i < len(guesses) and guesses[i] != tokens[-1]:
                    break
            output.sampled_token_ids[each.request_id] = tokens
            likely = rows[-1].topk(3).indices.tolist()
            output.spec_token_ids[each.request_id] = self.rng.choices(likely, k=self.rng.randint(0, 4))


class Oracle:
    """What a request's answer is when it is alone: lesson 2's `generate`, each question asked once."""

    def __init__(self, model: Llama, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.answers: dict = {}

    def __call__(self, prompt: list[int], params: SamplingParams) -> llama_pytorch.RequestOutput:
        params = replace(params, max_tokens=min(params.max_tokens, MAX_MODEL_LEN - len(prompt)), min_tokens=0)
        key = (tuple(prompt), params)
        if key not in self.answers:
            self.answers[key] = llama_pytorch.generate(self.model, self.tokenizer, prompt, params)
        return self.answers[key]


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


class Watched:
    """An executor that counts what passes through it, and checks what a scheduler must never ask for."""

    def __init__(self, inner: LocalExecutor, report: Report, budget: int):
        self.inner, self.report, self.budget, self.depth = inner, report, budget, inner.depth
        self.flying: deque[set[str]] = deque()

    def submit(self, plan: SchedulerOutput) -> None:
        ids = [each.request_id for each in plan.scheduled]
        assert len(ids) == len(set(ids)) and not set(ids) & set().union(*self.flying), "scheduled twice"
        busy = set(ids).union(*self.flying)
        assert not set(plan.preempted_ids) & busy, "preempted in the step in which it was scheduled, or in flight"
        assert plan.num_tokens <= self.budget
        self.flying.append(set(ids))
        self.report.counts.update(
            swaps_out=len(plan.swaps_out), swaps_in=len(plan.swaps_in), copies=len(plan.copies),
            preemptions=len(plan.preempted_ids), guesses=sum(each.num_spec_tokens for each in plan.scheduled),
            pipelined=len(plan.preempted_ids) * (self.depth > 1),
            chunks=sum(each.sample_index is None for each in plan.scheduled),
        )  # fmt: skip
        self.inner.submit(plan)

    def collect(self) -> ModelRunnerOutput:
        self.flying.popleft()
        return self.inner.collect()

    def close(self) -> None:
        self.inner.close()


def drive(engine: Engine, asks: list[Ask], oracle: Oracle, rng: random.Random) -> Report:
    """Send the requests in at their times, step until all are done, check everything."""
    report, executor = Report(), engine.executor
    if isinstance(executor, LocalExecutor):
        runner = executor.runner
        if rng.random() < 0.4:
            runner = GuessingRunner(runner.model, runner.cache, rng)
        executor = Pipelined(runner, rng.choice([2, 3])) if rng.random() < 0.4 else LocalExecutor(runner)
        engine.scheduler.depth = rng.choice([1, executor.depth])
    engine.executor = Watched(executor, report, engine.config.max_num_batched_tokens)
    to_come, outputs, aborted = sorted(enumerate(asks), key=lambda pair: pair[1].step), {}, set()
    while to_come or engine.has_unfinished_requests:
        while to_come and to_come[0][1].step <= report.num_steps:
            number, ask = to_come.pop(0)
            request_id = engine.add_request(ask.prompt, ask.params, f"r{number}", ask.priority, ask.tenant)
            outputs[number] = engine.readers[request_id].output
        for number in outputs:
            if asks[number].is_impatient and f"r{number}" in engine.samples and rng.random() < 0.1:
                engine.abort(f"r{number}")
                aborted.add(number)
        engine.step()
        check_books(engine)
        report.num_steps += 1
        assert report.num_steps < 20_000, "it does not end"
    assert engine.manager.pool.num_free_blocks == len(engine.manager.pool.blocks), "blocks leaked"
    assert not engine.readers and not engine.samples and not engine.in_flight
    for number, output in outputs.items():
        for child, params in zip([output, *output.siblings], asks[number].params.children()):
            compare(child, oracle(asks[number].prompt, params), number in aborted)
            report.num_outputs += 1
    report.counts.update(cached=engine.metrics().num_cached_tokens, aborted=len(aborted))
    return report


def compare(output: RequestOutput, alone: llama_pytorch.RequestOutput, may_be_cut: bool) -> None:
    """The same tokens, text, reason and as many log-probabilities; of an aborted one, the beginning."""
    if output.finish_reason == "abort":
        assert may_be_cut
        assert alone.token_ids[: len(output.token_ids)] == output.token_ids
        return
    told = (output.token_ids, output.text, output.finish_reason, len(output.logprobs))
    expected = (alone.token_ids, alone.text, alone.finish_reason, len(alone.logprobs))
    assert told == expected, output.request_id
