"""Lesson 5's reference: the same tokens as alone, whatever else goes on; nobody starves, nothing leaks."""

from __future__ import annotations

import itertools
import os
import pickle
import random
import threading
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch

from common.authoring.soak.invariants import check_books
from common.authoring.soak.load import drive
from common.authoring.soak.oracle import Oracle
from common.authoring.soak.requests import MAX_MODEL_LEN, Letters, random_asks, random_model, random_settings
from solutions import batching, llama_pytorch
from solutions.batching import Engine, LocalExecutor, local_engine
from solutions.llama_pytorch import SamplingParams, load
from solutions.scheduler import RequestStatus, SchedulerOutput


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setenv("KERNELS", "plain")


@pytest.fixture(scope="module")
def model():
    return random_model()


STORIES = [list(range(5, 30)), [*range(5, 15), *range(30, 40)], [7] * 20]


def soak(model, tokenizer, stories, seeds, num_requests: int) -> dict:
    oracle, totals = Oracle(model, tokenizer), {"outputs": 0}
    for seed in seeds:
        rng = random.Random(seed)
        asks = random_asks(rng, list(range(5, 40)), stories, num_requests)
        settings = random_settings(rng, asks)
        try:
            report = drive(local_engine(model, tokenizer, **settings), asks, oracle, rng)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {settings}") from error
        totals["outputs"] += report.counts["answers"]
        for name, count in report.counts.items():
            totals[name] = totals.get(name, 0) + count
    return totals


def test_same_tokens_as_alone(model):
    """100 random requests in five engines; many more in the slow test."""
    totals = soak(model, Letters(), STORIES, range(17, 22), 20)
    assert totals["outputs"] >= 100
    for what in ("preemptions", "swaps_out", "swaps_in", "copies", "chunks", "cached", "aborted", "pipelined"):
        assert totals[what] > 5, f"too few {what} for a soak: {totals}"


@pytest.mark.slow
def test_same_tokens_as_alone_many_times(model):
    soak(model, Letters(), STORIES, range(100, 125), 20)


@pytest.mark.slow
def test_same_tokens_as_alone_on_tales():
    torch.set_num_threads(1)
    model, tokenizer = load("tales", torch.float64, "cpu")
    text = "There was once a small owl who lived by the river. One day the owl found a boat."
    soak(model, tokenizer, [tokenizer.encode(text), tokenizer.encode("Long ago, in a dark wood")], range(2), 20)


@pytest.fixture(scope="module")
def real():
    """What lesson 2's `generate` says with SmolLM2."""
    if os.environ.get("COURSE_REAL_MODEL") != "1":
        pytest.skip("set COURSE_REAL_MODEL=1 for the real model")
    return Oracle(*load("smollm2-135m", torch.float32, "cpu"))


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["plain", "fast"])
def test_real_model_with_kernels(real, kernels, monkeypatch):
    """float32 on SmolLM2: equal to lesson 2's up to the first near-tie, with preemption, sharing and chunks."""
    monkeypatch.setenv("KERNELS", kernels)
    model, tokenizer = load("smollm2-135m", torch.float32, "cpu")
    story = tokenizer.encode("The river was wide and slow, and nobody in the village had ever crossed it.")
    prompts = [story[: 6 + 3 * i] for i in range(4)] + [story + tokenizer.encode(f" Chapter {i}")[:4] for i in range(3)]
    params = SamplingParams(max_tokens=16, ignore_eos=True)
    llama_pytorch.use_kernels(model)
    settings = dict(num_blocks=16, block_size=8, max_num_batched_tokens=24, preemption="swap")
    with local_engine(model, tokenizer, **settings) as engine:
        outputs = engine.generate(prompts, params, progress=False)
        assert engine.metrics().num_preemptions > 0 and engine.metrics().num_cached_tokens > 0
    for prompt, output in zip(prompts, outputs):
        expected = real(prompt, params, output.token_ids).token_ids
        assert len(expected) == len(output.token_ids) == 16
        if output.token_ids != expected:
            same = next(i for i, (a, b) in enumerate(zip(output.token_ids, expected)) if a != b)
            top = real.rows(prompt + expected[:same])[-1].topk(2).values
            assert top[0] - top[1] < 1e-3, f"token {same} of a prompt of {len(prompt)} differs, and it was no tie"


# --- Prefixes ---------------------------------------------------------------------------------------------------------


def test_a_prompt_wholly_in_the_cache(model):
    """Its length a multiple of the block size: one block is computed again, for the sake of its last token's logits."""
    engine, prompt = local_engine(model, Letters(), block_size=4, num_blocks=30), list(range(5, 17))
    params = SamplingParams(max_tokens=6)
    (first,) = engine.generate([prompt], params, progress=False)
    (second,) = engine.generate([prompt], params, progress=False)
    assert second.token_ids == first.token_ids
    assert (first.metrics.num_cached_tokens, second.metrics.num_cached_tokens) == (0, 8)


def test_a_prefix_shared_within_one_step(model):
    """Both prompts are computed in the first step, and the beginning that they share only once."""
    engine = local_engine(model, Letters(), block_size=4, num_blocks=30, max_num_batched_tokens=64)
    prompts = [list(range(5, 20)), [*range(5, 17), 30, 31]]
    for prompt in prompts:
        engine.add_request(prompt, SamplingParams(max_tokens=4, ignore_eos=True))
    outputs = [state.output for state in engine.processor.states.values()]
    plans = record(engine)
    while engine.has_unfinished_requests:
        engine.step()
    assert [(each.start, len(each.token_ids)) for each in plans[0].scheduled] == [(0, 15), (12, 2)]
    oracle = Oracle(model, Letters())
    for prompt, output in zip(prompts, outputs):
        assert output.token_ids == oracle(prompt, SamplingParams(max_tokens=4, ignore_eos=True)).token_ids


def test_what_is_not_computed_is_not_found(model):
    """Two equal prompts, the first cut off in the middle of a block: the second shares the whole block before it."""
    settings = dict(block_size=4, num_blocks=30, max_num_batched_tokens=12, long_prefill_token_threshold=6)
    engine = local_engine(model, Letters(), **settings)
    plans = record(engine)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    outputs = engine.generate([list(range(5, 21))] * 2, params, progress=False)
    assert [(each.start, len(each.token_ids)) for each in plans[0].scheduled] == [(0, 6), (4, 6)]
    expected = Oracle(model, Letters())(list(range(5, 21)), params).token_ids
    assert [output.token_ids for output in outputs] == [expected] * 2


def record(engine: Engine) -> list:
    """From now on, every plan that is submitted."""
    plans, submit = [], engine.executor.submit
    engine.executor.submit = lambda plan: (plans.append(plan), submit(plan))
    return plans


@pytest.mark.parametrize("policy", ["paged", "contiguous"])
def test_samples_share_their_prompt(model, policy):
    """Four samples of a prompt of 30 tokens compute it once, and copy the one block that they write to."""
    settings = dict(block_size=4, kv_cache_policy=policy, num_blocks=60, max_model_len=MAX_MODEL_LEN)
    engine = local_engine(model, Letters(), **settings)
    plans = record(engine)
    params = SamplingParams(n=4, temperature=1.0, seed=1, max_tokens=6, ignore_eos=True)
    (output,) = engine.generate([list(range(5, 35))], params, progress=False)
    samples = [output, *output.siblings]
    assert len({tuple(sample.token_ids) for sample in samples}) > 1, "the seeds differ"
    assert plans[0].num_tokens == 30 and sum(plan.num_tokens for plan in plans) == 30 + 3 + 4 * 5
    copies = [copy for plan in plans for copy in plan.copies]
    assert len(copies) == 3, "the last to write needs no copy"
    assert {copy.num_tokens for copy in copies} <= ({1, 2} if policy == "paged" else {29, 30})


# --- Nobody starves ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["plain", "fast"])
def test_nan_in_one_request_reaches_no_other(kernels, monkeypatch):
    """One token's embedding is NaN. Its request fails; those that come after use its blocks, and are right."""
    monkeypatch.setenv("KERNELS", kernels)
    model, params = random_model(), SamplingParams(max_tokens=5, ignore_eos=True)
    prompts = [[5, 6, 8, 9, 10], list(range(7, 20))]  # of like length: computed together, the first one padded
    expected = [Oracle(model, Letters())(prompt, params).token_ids for prompt in prompts]
    model.model.embed_tokens.weight.data[1] = float("nan")
    engine = local_engine(model, Letters(), block_size=4, num_blocks=16, max_model_len=MAX_MODEL_LEN)
    (broken,) = engine.generate([[1, *range(7, 40)]], params, progress=False)
    assert broken.finish_reason == "error"
    assert [output.token_ids for output in engine.generate(prompts, params, progress=False)] == expected
    mixed = engine.generate([[1, 7, 8], *prompts], params, progress=False)
    assert [output.finish_reason for output in mixed] == ["error", "length", "length"]
    assert [output.token_ids for output in mixed[1:]] == expected


def test_a_stop_string_waits_for_min_tokens(model):
    """As in lesson 2: the text of the first `min_tokens` tokens is not searched."""
    prompt = [5, 6, 7]
    text = Oracle(model, Letters())(prompt, SamplingParams(max_tokens=8, ignore_eos=True)).text
    for min_tokens in range(8):
        params = SamplingParams(max_tokens=8, ignore_eos=True, stop=[text[0], text[4]], min_tokens=min_tokens)
        engine = local_engine(model, Letters(), block_size=4, num_blocks=16, max_model_len=MAX_MODEL_LEN)
        (output,) = engine.generate([prompt], params, progress=False)
        expected = Oracle(model, Letters())(prompt, params)
        assert (output.token_ids, output.text) == (expected.token_ids, expected.text)
        assert len(output.token_ids) > min_tokens


def test_a_pool_of_two_blocks(model):
    """What can never fit is refused with the reason; what fits only alone takes turns, and ends."""
    engine = local_engine(model, Letters(), block_size=4, num_blocks=2, max_model_len=MAX_MODEL_LEN)
    with pytest.raises(ValueError, match="max_tokens=5 needs 3 blocks of 4; the pool has num_blocks=2"):
        engine.add_request([5, 6, 7, 8, 9], SamplingParams(max_tokens=5))
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15]]
    outputs = engine.generate(prompts, params, progress=False)
    assert [output.token_ids for output in outputs] == [
        Oracle(model, Letters())(prompt, params).token_ids for prompt in prompts
    ]


@pytest.mark.parametrize("policy", ["fcfs", "priority", "fair"])
def test_no_long_prompt_starves_the_others(model, policy):
    """While a prompt of 50 tokens is read with a budget of 8, whoever writes gets a token in every step."""
    settings = dict(num_blocks=60, block_size=4, max_num_batched_tokens=8, long_prefill_token_threshold=8)
    engine = local_engine(model, Letters(), scheduling_policy=policy, **settings)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    short = [engine.add_request([5 + i], params, priority=1, tenant=f"short {i}") for i in range(3)]
    engine.step()
    engine.add_request([7] * 50, params, request_id="long", priority=0, tenant="long")
    plans = record(engine)
    for _ in range(14):
        engine.step()
    for plan in plans:
        assert set(short) <= {each.request_id for each in plan.scheduled}
    assert sum(len(each.token_ids) for plan in plans for each in plan.scheduled if each.request_id == "long") >= 50


def test_a_budget_smaller_than_the_number_of_requests_goes_round(model):
    engine = local_engine(model, Letters(), num_blocks=60, block_size=4)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    for i in range(5):
        engine.add_request([5 + i], params, request_id=str(i))
    engine.step()
    engine.scheduler.max_num_batched_tokens = 2
    plans = record(engine)
    while engine.has_unfinished_requests:
        engine.step()
    served = [{each.request_id for each in plan.scheduled} for plan in plans[:20]]
    for i in "01234":
        gaps = [step for step, ids in enumerate(served) if i in ids]
        assert max(b - a for a, b in pairwise(gaps)) <= 3, f"request {i} waited: {gaps}"


def test_no_tenant_starves_another(model):
    """One sends thirty requests, then another sends three: they are served long before the thirty are done."""
    settings = dict(num_blocks=60, block_size=4, max_num_seqs=2, max_num_batched_tokens=16)
    finished = {}
    for policy in ("fcfs", "fair"):
        engine = local_engine(model, Letters(), scheduling_policy=policy, **settings)
        params = SamplingParams(max_tokens=6, ignore_eos=True)
        for i in range(30):
            engine.add_request([5, 6, 7 + i], params, request_id=f"many {i}", tenant="many")
        for _ in range(4):
            engine.step()
        for i in range(3):
            engine.add_request([8, 9, 10 + i], params, request_id=f"few {i}", tenant="few")
        order = []
        while engine.has_unfinished_requests:
            order += [output.request_id for output in engine.step() if output.finish_reason]
        finished[policy] = max(order.index(f"few {i}") for i in range(3))
    assert finished["fcfs"] == 32 - 0 and finished["fair"] < 12, finished


def test_an_idle_tenant_gets_no_credit(model):
    engine = local_engine(model, Letters(), num_blocks=60, block_size=4, max_num_seqs=1, scheduling_policy="fair")
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    engine.generate([[5, 6]] * 5, params, progress=False)
    engine.add_request([5, 6, 7], params, tenant="default")
    engine.add_request([5, 6, 7], params, tenant="newcomer")
    assert engine.scheduler.served["newcomer"] == engine.scheduler.served["default"] > 0


def test_priorities(model):
    engine = local_engine(model, Letters(), num_blocks=60, block_size=4, max_num_seqs=1, scheduling_policy="priority")
    params, order = SamplingParams(max_tokens=2, ignore_eos=True), []
    for request_id, priority in (("c", 2), ("a", 0), ("b", 1), ("a2", 0)):
        engine.add_request([5], params, request_id=request_id, priority=priority)
    while engine.has_unfinished_requests:
        order += [output.request_id for output in engine.step() if output.finish_reason]
    assert order == ["a", "a2", "b", "c"]


def test_a_sample_copies_no_block_that_the_same_step_computes(model):
    """Its parent, preempted before, finds its blocks again where another request has just been scheduled to compute
    them. Blocks are copied before that: the sample waits a step.
    """
    prompt, params = [5, 6, 7, 8], SamplingParams(max_tokens=6, n=2, ignore_eos=True)
    engine = local_engine(model, Letters(), num_blocks=30, block_size=2, max_model_len=32, scheduling_policy="priority")
    output = engine.output(engine.add_request(prompt, params, priority=1))
    engine.step()
    scheduler = engine.scheduler
    scheduler.preempt(scheduler.running[0], SchedulerOutput(0))
    engine.manager.reset()
    cache = engine.executor.runner.cache
    for tensor in cache.device_tensors:
        tensor.fill_(9.0)
    engine.add_request([*prompt, 9], replace(params, n=1))
    copied = []
    while engine.has_unfinished_requests:
        engine.step()
        copied += [each for each in scheduler.running if each.parent]
    assert copied, "no sample was forked: test something else"
    expected = Oracle(model, Letters())(prompt, replace(params, n=1)).token_ids
    assert [output.token_ids, output.siblings[0].token_ids] == [expected] * 2


# --- What goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, says",
    [
        (dict(prompt=[]), "The prompt is empty"),
        (dict(prompt=[5] * 64), "The prompt has 64 tokens; max_model_len is 64"),
        (dict(prompt=[40]), "token id 40; the vocabulary ends at 39"),
        (dict(prompt=[5], request_id="taken"), "request_id 'taken' is taken"),
        (dict(prompt=[5], tenant=[]), r"tenant must be text; it is \[\]"),
        (dict(prompt=[5], priority="high"), "priority must be a whole number; it is 'high'"),
        (dict(prompt=[5], request_id=["x"]), r"request_id must be text; it is \['x'\]"),
        (dict(prompt=[5], cache_salt=None), "cache_salt must be text; it is None"),
        (dict(prompt=[5], params={"max_tokens": 3}), r"params must be SamplingParams\(...\); it is {'max_tokens': 3}"),
        (dict(prompt=[5, 100.9]), "prompt must be text or a list of token ids, which are whole numbers"),
        (dict(prompt=[5, True]), r"token ids, which are whole numbers: it is \[5, True\]"),
        (dict(prompt=b"ab"), "token ids, which are whole numbers: it is b'ab'"),
        (dict(prompt=5), "prompt must be text or a list of token ids"),
        (dict(prompt={5, 6}), "token ids, which are whole numbers: it is {5, 6}"),  # in no order
        (dict(prompt={5: 1}), "token ids, which are whole numbers: it is {5: 1}"),
        (dict(prompt=[5], priority=True), "priority must be a whole number; it is True"),
        (dict(prompt=bytearray(b"ab")), "token ids, which are whole numbers: it is bytearray"),
        (dict(prompt=itertools.repeat(5)), "The prompt has 4194304 tokens"),  # without an end
        (dict(prompt=[10**5000]), "token id an object of type int that cannot be written"),
        (dict(prompt=[5], tenant=10**5000), "tenant must be text; it is an object of type int"),
    ],
)
def test_bad_requests_are_refused_at_once(model, arguments, says):
    engine = local_engine(model, Letters(), num_blocks=30, max_model_len=MAX_MODEL_LEN)
    engine.add_request([5], request_id="taken")
    with pytest.raises(ValueError, match=says):
        engine.add_request(**arguments)
    assert list(engine.scheduler.requests) == ["taken"]


@pytest.mark.parametrize("prompts", [None, 5, 5.0, {"a": 1}, {5, 6}, b"ab", torch.tensor(5), [[[5]]], [None]], ids=str)
def test_what_is_no_list_of_prompts_is_refused(model, prompts):
    engine = local_engine(model, Letters(), num_blocks=30, max_model_len=MAX_MODEL_LEN)
    with pytest.raises(ValueError, match="Prompt 0: prompt must be text or a list of token ids"):
        engine.generate(prompts, progress=False)
    for params in ("greedy", {"max_tokens": 3}, SamplingParams, [{}]):
        with pytest.raises(ValueError, match="Prompt 0: params must be SamplingParams"):
            engine.generate([[5]], params, progress=False)
    with pytest.raises(ValueError, match="params must be SamplingParams"):
        next(engine.stream([5], {"max_tokens": 3}))
    with pytest.raises(KeyError, match="There is no unfinished request 'gone'"):
        engine.output("gone")
    assert not engine.has_unfinished_requests
    prompts = [[5, 6], torch.tensor([5, 6]), range(5, 7), iter([5, 6])]
    outputs = [engine.generate(prompt, SamplingParams(max_tokens=3), progress=False) for prompt in prompts]
    assert [[each.token_ids for each in output] for output in outputs] == [[outputs[0][0].token_ids]] * 4


@pytest.mark.parametrize("field, value", [("n", 1.5), ("stop_token_ids", [[1]]), ("max_tokens", "5")])
def test_bad_parameters_are_refused_before_anything_begins(model, field, value):
    engine = local_engine(model, Letters(), num_blocks=30)
    with pytest.raises(ValueError, match=field):
        engine.generate([[5]], SamplingParams(**{field: value}), progress=False)
    assert len(engine.generate([[5]], SamplingParams(max_tokens=2), progress=False)) == 1


def test_ids_are_chosen_among_those_that_are_free(model):
    engine = local_engine(model, Letters(), num_blocks=30)
    params = SamplingParams(max_tokens=2)
    given = [engine.add_request([5], params, request_id) for request_id in ("request-1", None, None, "own/1", None)]
    assert len(set(given)) == 5
    with pytest.raises(ValueError, match="'own/1' is taken"):
        engine.add_request([5], SamplingParams(n=2, max_tokens=2), "own")
    assert len(engine.scheduler.requests) == 5


@pytest.mark.parametrize("prompt", [[5, 6, 7], (5, 6, 7), torch.tensor([5, 6, 7])])
def test_a_single_prompt_of_token_ids(model, prompt):
    engine = local_engine(model, Letters(), num_blocks=30)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    (output,) = engine.generate(prompt, params, progress=False)
    assert output.token_ids == Oracle(model, Letters())([5, 6, 7], params).token_ids


def test_streams_lose_nothing_when_others_step(model):
    """Between two pieces of a stream the engine serves other requests to their end."""
    engine = local_engine(model, Letters(), num_blocks=60, block_size=4)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    expected = Oracle(model, Letters())([5, 6, 7], params).text
    text = ""
    for piece in engine.stream([5, 6, 7], params):
        text += piece
        engine.generate([[8, 9]], params, progress=False)
    assert text == expected
    pieces = [list(pair) for pair in zip(engine.stream([5, 6, 7], params), engine.stream([5, 6, 7], params))]
    assert "".join(one for one, _ in pieces) == "".join(other for _, other in pieces) == expected[: len(expected)]


def test_threads_share_an_engine(model):
    """Each gets what it would get alone, from steps that compute the requests of all."""
    engine = local_engine(model, Letters(), num_blocks=60, block_size=4)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    start, answers = threading.Barrier(3), {}

    def generate(i: int) -> None:
        start.wait()
        answers[i] = [each.text for each in engine.generate([[5 + i], [7, 5 + i]], params, progress=False)]

    def stream() -> None:
        start.wait()
        next(leaving := engine.stream([5, 6, 7], params))
        leaving.close()
        answers["stream"] = "".join(engine.stream([5, 6, 7], params))

    calls = [stream, *(partial(generate, i) for i in range(2))]
    threads = [threading.Thread(target=call, daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert set(answers) == {0, 1, "stream"}, "a thread has failed, or waits for ever"
    oracle = Oracle(model, Letters())
    for i in range(2):
        assert answers[i] == [oracle(prompt, params).text for prompt in ([5 + i], [7, 5 + i])]
    assert answers["stream"] == oracle([5, 6, 7], params).text
    assert not engine.has_unfinished_requests and engine.manager.pool.num_free_blocks == 60
    check_books(engine)


def test_what_was_aborted_before_it_failed_is_aborted(model):
    engine = local_engine(model, Letters())

    def abort_and_fail(output, scores):
        engine.scheduler.abort("request-0")  # as another thread does while the step is in flight
        raise LookupError("a fault")

    output = engine.output(engine.add_request([5, 6], SamplingParams(logits_processors=[abort_and_fail])))
    while engine.has_unfinished_requests:
        engine.step()
    assert (output.finish_reason, output.error) == ("abort", None)


@pytest.mark.parametrize("call", ["generate", "stream", "step", "abort"])
def test_a_step_cannot_begin_another_one(model, call):
    """A logits processor that calls its engine ends its own request, with the reason; its abort waits for the end."""
    engine = local_engine(model, Letters(), num_blocks=60, block_size=4)
    params = SamplingParams(max_tokens=8, ignore_eos=True)

    actions = {
        "generate": lambda: engine.generate([[5]], params, progress=False),
        "stream": lambda: list(engine.stream([5], params)),
        "step": engine.step,
        "abort": lambda: engine.abort("request-0"),
    }

    def processor(output, scores):
        if len(output) == 2:
            actions[call]()
        return scores

    calling, other = engine.generate(
        [[5, 6], [7, 8]], [replace(params, logits_processors=[processor]), params], progress=False
    )
    if call == "abort":
        assert calling.finish_reason == "abort" and len(calling.token_ids) == 3
    else:
        assert calling.finish_reason == "error" and "from within a step of this engine" in calling.error
    assert other.token_ids == Oracle(model, Letters())([7, 8], params).token_ids
    assert not engine.has_unfinished_requests and engine.manager.pool.num_free_blocks == 60


@pytest.mark.parametrize(
    "settings, says",
    [
        (dict(block_size=0), "block_size must be a whole number of at least 1; it is 0"),
        (dict(num_blocks=10**12), "num_blocks must be a whole number of at most 1000000; it is 1000000000000"),
        (dict(scheduling_policy="random"), "scheduling_policy must be one of fcfs, priority, fair; it is 'random'"),
        (dict(preemption=None), "preemption must be one of recompute, swap; it is None"),
        (dict(max_model_len=129), "max_model_len is 129; the model's context is 128"),
        (dict(kv_cache_memory=100), "kv_cache_memory is 100 bytes: too few"),
        (dict(kv_cache_policy="contiguous", enable_prefix_caching=True), "enable_prefix_caching is True"),
    ],
)
def test_bad_settings_are_named(model, settings, says):
    with pytest.raises(ValueError, match=says):
        local_engine(model, Letters(), **settings)


def test_one_bad_prompt_of_several_begins_nothing(model):
    engine = local_engine(model, Letters(), num_blocks=30)
    with pytest.raises(ValueError, match="Prompt 1: The prompt is empty"):
        engine.generate([[5], []], progress=False)
    assert not engine.has_unfinished_requests and not engine.processor.states


def test_a_request_that_fails_takes_no_other_with_it(model, monkeypatch):
    """In the sampler, and in the forward pass: whoever is to blame fails with the reason, the rest go on."""
    engine = local_engine(model, Letters(), num_blocks=60, block_size=4)
    embed = model.embed

    def poisoned(token_ids):
        if (token_ids == 39).any():
            raise RuntimeError("token 39 is poison")
        hidden = embed(token_ids)
        return torch.where((token_ids == 38)[:, None], torch.nan, hidden)

    monkeypatch.setattr(model, "embed", poisoned)
    params = SamplingParams(max_tokens=3, ignore_eos=True, stop_token_ids=[38, 39])
    outputs = engine.generate([[5, 6], [7, 39], [8, 38], [9, 10]], params, progress=False)
    assert [output.finish_reason for output in outputs][1:3] == ["error", "error"]
    assert "poison" in outputs[1].error and "NaN" in outputs[2].error
    monkeypatch.undo()
    for prompt, output in ((([5, 6]), outputs[0]), ([9, 10], outputs[3])):
        assert output.token_ids == Oracle(model, Letters())(prompt, params).token_ids
    check_books(engine)


def test_an_interrupted_step_loses_nothing(model):
    """Ctrl-C in the middle of a forward pass: all requests are still there, and go on to the same tokens."""
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    prompts = [list(range(5, 5 + n)) for n in (3, 9, 17)]
    for preemption in ("recompute", "swap"):
        settings = dict(num_blocks=8, block_size=4, max_num_batched_tokens=8, preemption=preemption)
        engine = local_engine(model, Letters(), **settings)
        for prompt in prompts:
            engine.add_request(prompt, params)
        outputs = [state.output for state in engine.processor.states.values()]
        execute, calls = engine.executor.runner.execute, [0]

        def interrupted(plan, hidden=None, execute=execute, calls=calls):
            calls[0] += 1
            if calls[0] in (3, 9, 16):
                raise KeyboardInterrupt
            return execute(plan, hidden)

        engine.executor.runner.execute = interrupted
        num_interrupts = 0
        while engine.has_unfinished_requests:
            try:
                engine.step()
            except KeyboardInterrupt:
                num_interrupts += 1
            check_books(engine)
        assert num_interrupts == 3
        oracle = Oracle(model, Letters())
        assert [output.token_ids for output in outputs] == [oracle(prompt, params).token_ids for prompt in prompts]


def test_whoever_stops_listening_frees_the_request(model):
    engine = local_engine(model, Letters(), num_blocks=30, block_size=4)
    params = SamplingParams(max_tokens=50, ignore_eos=True)
    stream = engine.stream([5, 6, 7], params)
    next(stream)
    assert engine.manager.pool.num_free_blocks < 30
    stream.close()
    assert engine.manager.pool.num_free_blocks == 30 and not engine.has_unfinished_requests
    assert "".join(engine.stream([5, 6, 7], params)) == Oracle(model, Letters())([5, 6, 7], params).text


def test_abort_of_a_swapped_request_frees_the_host(model):
    engine = local_engine(model, Letters(), num_blocks=4, block_size=4, preemption="swap", max_model_len=MAX_MODEL_LEN)
    params = SamplingParams(max_tokens=9, ignore_eos=True)
    for i in range(2):
        engine.add_request([5 + i, 6, 7], params, request_id=str(i))
    while engine.scheduler.requests["1"].status is not RequestStatus.SWAPPED:
        engine.step()
    assert engine.scheduler.host_pool.num_free_blocks < 4
    engine.abort("1")
    assert engine.scheduler.host_pool.num_free_blocks == 4
    check_books(engine)


def test_what_passes_to_the_executor_can_be_pickled(model):
    engine = local_engine(model, Letters(), num_blocks=30)
    engine.add_request([5, 6, 7], SamplingParams(max_tokens=4, ignore_eos=True))
    plans = record(engine)
    while engine.has_unfinished_requests:
        engine.step()
    assert pickle.loads(pickle.dumps(plans)) == plans
    assert isinstance(engine.executor, LocalExecutor)


def test_metrics(model):
    engine = local_engine(model, Letters(), num_blocks=30, block_size=4)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    outputs = engine.generate([list(range(5, 15)), list(range(5, 20))], params, progress=False)
    for output in outputs:
        metrics = output.metrics
        assert 0 <= metrics.queue_time <= metrics.time_to_first_token
        assert metrics.num_output_tokens == 5 and metrics.time_per_output_token > 0
    totals = engine.metrics()
    assert (totals.num_output_tokens, totals.num_prompt_tokens, totals.num_finished) == (10, 25, 2)
    assert totals.num_computed_tokens == 25 - totals.num_cached_tokens + 2 * 4
    assert 0 < totals.pool_utilisation < 1 and totals.hit_rate == totals.num_cached_tokens / 25 > 0


def test_a_plan_that_only_moves_blocks_and_fails_is_told():
    """There is no request to blame, so the failure is the engine's: it starts over."""

    class Broken:
        def execute(self, plan):
            raise RuntimeError("no such block")

    with pytest.raises(RuntimeError, match="no such block"):
        batching.LocalExecutor(Broken()).submit(SchedulerOutput(1))


# --- what a server asks for -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"max_num_batched_tokens": 7}, {"num_blocks": 12, "max_num_batched_tokens": 9}]
)
def test_logprobs_of_prompts_are_those_of_one_pass(model, settings):
    """In chunks, beside others, after a preemption, and although the prefix cache knows the prompt."""
    prompts, params = [list(range(5, 34)), list(range(5, 40))], SamplingParams(max_tokens=8, prompt_logprobs=2)
    with local_engine(model, Letters(), **{"block_size": 8, "num_blocks": 64, **settings}) as engine:
        engine.generate(prompts[:1], SamplingParams(max_tokens=2), progress=False)
        outputs = engine.generate(
            [*prompts, prompts[0]], [params, params, SamplingParams(max_tokens=8)], progress=False
        )
        assert engine.totals.num_preemptions > 0 or "num_blocks" not in settings
    assert outputs[2].prompt_logprobs == {} and outputs[0].metrics.num_cached_tokens == 0
    for prompt, output in zip(prompts, outputs):
        assert list(output.prompt_logprobs) == list(range(1, len(prompt)))
        for position, found in output.prompt_logprobs.items():
            logits = llama_pytorch.recompute(model, prompt[:position])
            wanted = llama_pytorch.top_logprobs(logits, prompt[position], 2)
            assert found.keys() == wanted.keys()
            assert all(abs(found[token_id] - wanted[token_id]) < 1e-4 for token_id in wanted)


def test_blocks_are_shared_only_under_the_same_salt(model):
    prompt, params = list(range(5, 38)), SamplingParams(max_tokens=4)
    with local_engine(model, Letters(), block_size=8, num_blocks=64) as engine:

        def ask(salt: str) -> int:
            output = engine.output(engine.add_request(prompt, params, cache_salt=salt))
            while not output.is_finished:
                engine.step()
            return output.metrics.num_cached_tokens

        assert [ask(salt) for salt in ("", "a", "b", "", "a", "a\0", "b")] == [0, 0, 0, 32, 32, 0, 32]


def test_logits_processors_see_the_output_and_each_sample_has_its_own(model):
    """After 5 the next number, as often as asked; the samples do not share a processor's memory."""

    class Counting:
        def __init__(self):
            self.num_calls = 0

        def __call__(self, output, logits):
            assert self.num_calls == len(output)  # one call for each token, of this sample alone
            self.num_calls += 1
            scores = torch.full_like(logits, -torch.inf)
            scores[5 + len(output)] = 0
            return scores

    processor = Counting()
    params = SamplingParams(max_tokens=6, n=3, temperature=1, ignore_eos=True, logits_processors=[processor])
    with local_engine(model, Letters(), num_blocks=64) as engine:
        output = engine.generate([[5, 6, 7]], params, progress=False)[0]
    assert [each.token_ids for each in (output, *output.siblings)] == [list(range(5, 11))] * 3
    assert processor.num_calls == 0
    with pytest.raises(ValueError, match="logits_processors must be functions"):
        SamplingParams(logits_processors=[7])
    processor.lock = threading.Lock()
    with pytest.raises(ValueError, match="logits_processors cannot be copied, and each sample needs its own"):
        engine.add_request([5], SamplingParams(logits_processors=[processor]))
    assert not engine.has_unfinished_requests
