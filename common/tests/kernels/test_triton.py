"""The engine's path on a GPU, without one: kernels are interpreted, and a recorder stands in for a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from common.authoring.soak.requests import Letters, random_model
from common.bench.ladder import assembled
from common.tests.kernels.test_fused import MODELS, SHAPES, Requests, error
from solutions.batching import Batch
from solutions.llama_pytorch import Llama, SamplingParams, adjust_logits, sampling_probs, use_kernels
from solutions.llm_basics import ModelConfig
from solutions.paged_attention import AttentionMetadata
from solutions.quantization import Quantization, quantized_copy

pytest.importorskip("triton", reason="Triton is not installed (python -m common setup triton)")

from common.kernels import graphs, sampler, triton_ops
from common.kernels.graphs import DecodingGraphs, capture, sizes_up_to
from common.kernels.triton_layers import TritonBlock


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """So that short contexts have several. An interpreted program takes a millisecond, whatever it computes."""
    monkeypatch.setattr(triton_ops, "TILE", 16)
    monkeypatch.setattr(triton_ops, "PREFILL_ROWS", 16)
    monkeypatch.setattr(triton_ops, "PROGRAMS", 12)


BATCHES = [([0, 0, 0], [1, 9, 20]), ([1, 9, 20], [2, 10, 21]), ([2, 10, 21], [3, 19, 24])]
"""Prompts of three lengths; a decoding step; a chunk and draft tokens beside a decoding request."""


def build(monkeypatch, dtype: torch.dtype = torch.float32, quantization=None, **shapes) -> tuple[Llama, Llama]:
    """A model whose every number is random, and the same with Triton's kernels."""
    torch.manual_seed(0)
    model = Llama(ModelConfig(**{**SHAPES, **shapes})).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3 if parameter.dim() > 1 else 1.0)
    model = model.to(dtype) if quantization is None else quantized_copy(model, quantization)
    packed = copy.deepcopy(model)
    packed.tie_weights()
    monkeypatch.setenv("KERNELS", "triton")
    use_kernels(packed)
    assert all(type(layer) is TritonBlock for layer in packed.model.layers)
    return model, packed


def both(monkeypatch, models, *given) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each of two models computes for the batches: the first with plain kernels."""
    found = []
    for model, choice in zip(models, ("plain", "triton")):
        monkeypatch.setenv("KERNELS", choice)
        requests = Requests(model, *given)
        found.append([requests.compute(*batch) for batch in BATCHES])
    return list(zip(*found))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if number else []) for number, name in enumerate(MODELS)]
)
def test_layers(name, monkeypatch):
    for expected, actual in both(monkeypatch, build(monkeypatch, **MODELS[name]), 7, [3, 19, 24]):
        assert error(actual, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Quantization("int8"), Quantization("int4", 6)], ids=lambda kind: kind.kind)
def test_quantized_layers(kind, monkeypatch):
    for expected, actual in both(monkeypatch, build(monkeypatch, quantization=kind), 7, [3, 19, 24]):
        assert error(actual, expected) < 1e-5


@pytest.mark.slow
def test_layers_in_bfloat16(monkeypatch):
    """Each rounds in other places, and the interpreter truncates: no farther from float32 than plain layers are."""
    exact = build(monkeypatch)[0]
    monkeypatch.setenv("KERNELS", "plain")
    expected = Requests(exact, 7, [3, 19, 24]).compute(*BATCHES[0])
    (plain, actual), *_ = both(monkeypatch, build(monkeypatch, torch.bfloat16), 7, [3, 19, 24])
    assert error(actual.float(), expected) < 2 * error(plain.float(), expected) < 0.1


def test_a_request_without_tokens_fills_up_a_batch():
    """It reads nothing and writes nothing, and no NaN comes of it."""
    keys, values = torch.full((2, 3, 4, 2, 16), torch.nan)
    qkv, cos, sin = torch.randn(2, 8, 16), torch.randn(2, 8), torch.randn(2, 8)
    q = triton_ops.rotate_and_store(qkv, cos, sin, None, 0.0, torch.tensor([4, -1]), keys, values)
    assert keys.isnan().all(2).all(2).flatten().nonzero().flatten().tolist() == [*range(4), *range(5, 12)]
    assert torch.equal(values[1, 0], qkv[0, 6:]) and values[1, 1:].isnan().all()
    given = torch.tensor([[1], [0]]), torch.tensor([0, 1, 2]), torch.tensor([1, 0]), 1
    assert triton_ops.num_splits(4) > 1
    out = triton_ops.paged_attention(q, keys, values, *given)
    assert torch.allclose(out[0], values[1, 0].repeat_interleave(2, 0), atol=1e-5) and torch.equal(out[1] * 0, out[1])


# --- Sampling ---------------------------------------------------------------------------------------------------------


def asking(number: int, output: list[int] = [3, 3, 8], **params) -> SimpleNamespace:  # noqa: B006
    return SimpleNamespace(
        request_id=str(number), params=SamplingParams(**params), sample_index=len(output), prompt_token_ids=[1, 2, 3],
        output_token_ids=output, stop_token_ids=frozenset({5, 999}),
    )  # fmt: skip


ASKING = [
    dict(),
    dict(repetition_penalty=1.7),
    dict(presence_penalty=0.9, frequency_penalty=0.4, temperature=0.7, seed=1),
    dict(min_tokens=9),
    dict(temperature=1.3, seed=2),
    dict(temperature=0.8, top_k=3, seed=3),
    dict(temperature=1.0, top_p=0.6, seed=4),
    dict(temperature=1.5, min_p=0.2, seed=5),
    dict(temperature=0.9, top_k=500, top_p=0.8, min_p=0.1, repetition_penalty=1.2, min_tokens=9, seed=6),
]


def test_a_row_is_adjusted_and_restricted_as_lesson_2_does(monkeypatch):
    logits, seen = 3 * torch.randn(len(ASKING), 40, generator=torch.Generator().manual_seed(0)), []
    requests = [asking(number, **params) for number, params in enumerate(ASKING)]

    def note(*given):
        seen.append(given)
        return torch.zeros(len(given[0]), dtype=torch.int32)

    monkeypatch.setattr(sampler, "draw_tokens", note)
    before = logits.clone()
    assert sampler.draw(requests, logits) == dict.fromkeys(map(str, range(len(ASKING))), 0)
    assert torch.equal(logits, before)
    ((adjusted, temperatures, _),) = seen
    for request, row, temperature, own in zip(requests, adjusted, temperatures.tolist(), logits):
        params = request.params
        given = request.prompt_token_ids, request.output_token_ids, request.stop_token_ids
        expected = adjust_logits(own, params, *given)
        if params.temperature == 0:
            assert torch.allclose(row, expected) and temperature == 0
        else:
            probs = sampling_probs(expected, params)
            assert torch.allclose((row / temperature).softmax(-1), probs, atol=1e-6)
            assert torch.equal(row == -torch.inf, probs == 0)


def test_draws_follow_from_the_seed_and_the_number_of_the_token_alone():
    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(1)).expand(4, -1)
    same = dict(temperature=1.5, seed=7)
    requests = [asking(0, **same), asking(1), asking(2, **same), asking(3, temperature=1.5)]
    drawn = sampler.draw(requests, logits)
    assert drawn["0"] == drawn["2"] == sampler.draw(requests[2:3], logits[:1])["2"]
    assert drawn["1"] == logits[0].argmax()
    others = [sampler.draw([asking(0, [3] * n, **same)], logits[:1])["0"] for n in range(9)]
    assert len(set(others)) > 4


@pytest.mark.slow
def test_draws_have_the_distribution_of_the_logits():
    logits = torch.tensor([3.0, 1.0, -1.0, -torch.inf]).repeat(200, 1)
    seeds = torch.randint(2**62, (200,), generator=torch.Generator().manual_seed(0))
    counts = triton_ops.draw_tokens(logits, torch.full((200,), 2.0), seeds).bincount(minlength=4)
    assert (counts / 200 - (logits[0] / 2).softmax(-1)).abs().max() < 0.06 and counts[3] == 0


def test_what_python_must_decide_is_left_out():
    logits = torch.randn(3, 40)
    logits[2, 7] = torch.nan
    requests = [asking(0, logits_processors=[lambda output, scores: scores]), asking(1), asking(2)]
    assert sampler.draw(requests, logits) == {"1": logits[1].argmax()}
    assert sampler.draw(requests[:1], logits[:1]) == {} == sampler.draw([], logits[:0])


# --- Graphs -----------------------------------------------------------------------------------------------------------


class Recording(TorchDispatchMode):
    """Stands in for a CUDA graph: operators and launches of Triton are noted, and repeated on the same memory.

    No Python of ours runs in a replay, so that what a graph could not follow, such as a number in a launch, is not
    followed here. As on a GPU, nothing may wait for a result while it records.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Callable, tuple, dict, object]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "the CPU waits for the GPU"
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for function, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def record(monkeypatch) -> Callable[[Callable[[], None]], Callable[[], None]]:
    """In place of `capture`."""
    from triton.runtime.interpreter import GridExecutor

    run, recordings = GridExecutor.__call__, []

    def launch(self, *args, **kwargs):
        with _disable_current_modes():
            run(self, *args, **kwargs)
        if recordings:
            recordings[-1].calls.append((run, (self, *args), kwargs, None))

    monkeypatch.setattr(GridExecutor, "__call__", launch)

    def record(compute: Callable[[], None]) -> Callable[[], None]:
        recording = Recording()
        recordings.append(recording)
        with recording:
            compute()
        recordings.pop()
        return recording.replay

    return record


def test_sizes():
    assert sizes_up_to(1) == [1] and sizes_up_to(5) == [1, 2, 4, 5] and sizes_up_to(8) == [1, 2, 4, 8]
    assert sizes_up_to(40) == [1, 2, 4, 8, 16, 32, 40] and sizes_up_to(10_000)[-1] == graphs.MOST


def test_a_graph_is_recorded_after_a_first_call_and_in_the_pool_of_all(monkeypatch):
    events = []

    @contextmanager
    def recording(graph, pool):
        events.append(f"begin {pool}")
        yield
        events.append("end")

    made = SimpleNamespace(replay=lambda: events.append("replay"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    capture("the pool", lambda: events.append("compute"))()
    assert events == ["compute", "begin the pool", "compute", "end", "replay"]


def metadata(contexts: list[int], new: list[int], tables: list[list[int]]) -> AttentionMetadata:
    start = torch.tensor([0, *new]).cumsum(0).tolist()
    return AttentionMetadata(start, contexts, torch.arange(start[-1]) + 20, tables)


def batch_of(contexts: list[int], new: list[int], tables: list[list[int]]) -> Batch:
    numbers = torch.arange(sum(new)) + 1
    return Batch(numbers, 10 * numbers, metadata(contexts, new, tables), numbers)


@torch.inference_mode()
def test_a_batch_is_filled_up_and_what_no_graph_has_is_computed_as_it_is():
    seen = []

    def forward(batch, hidden):
        seen.append((batch, hidden))
        return batch.token_ids[:, None].float().expand(-1, 3)

    replayed = DecodingGraphs(forward, torch.zeros(3), 4, 5, lambda compute: compute)
    assert not seen and sorted(replayed.replays) == [1, 2, 4]
    out = replayed(batch_of([7, 9, 1], [1, 1, 1], [[5, 6], [7, 8, 9], [4]]))
    assert out.tolist() == [[1] * 3, [2] * 3, [3] * 3]
    given, _ = seen.pop()
    found = given.metadata
    assert (given.token_ids[:3].tolist(), given.positions[:3].tolist()) == ([1, 2, 3], [10, 20, 30])
    assert (found.slot_mapping.tolist(), found.context_lens.tolist()) == ([20, 21, 22, -1], [7, 9, 1, 0])
    assert found.query_start.tolist() == [0, 1, 2, 3, 4] and found.max_query_len == 1
    assert [found.block_tables[i, :n].tolist() for i, n in ((0, 2), (1, 3), (2, 1))] == [[5, 6], [7, 8, 9], [4]]

    replayed(batch_of([8, 3], [1, 1], [[5, 6], [1]]))  # the second request has gone, and with it a part of the tables
    found = seen.pop()[0].metadata
    assert (found.slot_mapping.tolist(), found.context_lens.tolist()) == ([20, 21], [8, 3])
    assert found.block_tables[1, 0] == 1 and not seen
    replayed(batch_of([8, 9], [1, 1], [[5, 6], [7, 8, 9]]))
    assert seen.pop()[0].metadata.block_tables[1, :3].tolist() == [7, 8, 9]

    for prompt in (batch_of([5, 2], [4, 1], [[5, 6], [1]]), batch_of([2] * 5, [1] * 5, [[1]] * 5)):
        replayed(prompt)
        assert seen.pop() == (prompt, None)
    replayed(batch_of([5], [1], [[5, 6]]), torch.ones(1, 3))
    assert seen.pop()[1] is not None


# --- The engine -------------------------------------------------------------------------------------------------------

BEGINNING = list(range(5, 22))
REQUESTS = [
    (BEGINNING + [3], dict(max_tokens=9, ignore_eos=True)),
    (BEGINNING + [3], dict(max_tokens=4, logprobs=2)),
    (BEGINNING, dict(max_tokens=7, repetition_penalty=1.3, frequency_penalty=0.2, min_tokens=3)),
    ([30, 4], dict(max_tokens=9, ignore_eos=True)),
    ([11, 12, 13], dict(max_tokens=6, presence_penalty=0.5, stop=("qq",))),
]


def answers(model: Llama, requests: list, record: Callable | None = None, **options) -> tuple[list[list[int]], object]:
    """The tokens that an engine generates, and its metrics."""
    options = dict(block_size=4, num_blocks=60, max_num_seqs=4, max_model_len=32, max_num_batched_tokens=16) | options
    with assembled(model, Letters(), **options) as engine:
        runner = engine.executor.runner
        if record is not None:
            assert runner.draw is sampler.draw
            runner.forward = DecodingGraphs(runner.forward, model.model.norm.weight, 4, 8, record)
        prompts, params = [ids for ids, _ in requests], [SamplingParams(**each) for _, each in requests]
        outputs = engine.generate(prompts, params, progress=False)
        return [output.token_ids for output in outputs], engine.metrics()


@pytest.fixture
def tiny(monkeypatch) -> tuple[Llama, Llama]:
    """A model without near-ties, plain and with Triton's kernels."""
    model = random_model(1).float()
    packed = copy.deepcopy(model)
    packed.tie_weights()
    monkeypatch.setenv("KERNELS", "triton")
    use_kernels(packed)
    return model, packed


@pytest.mark.slow
def test_the_engine_generates_the_plain_one_s_tokens(tiny, record, monkeypatch):
    """Prefixes in common, chunks of prompts beside decoding requests, preemption; decoding steps are replayed."""
    model, packed = tiny
    monkeypatch.setenv("KERNELS", "plain")
    expected, _ = answers(model, REQUESTS)
    monkeypatch.setenv("KERNELS", "triton")
    found, metrics = answers(packed, REQUESTS, record, num_blocks=11)
    assert found == expected
    assert metrics.num_preemptions > 0 and metrics.num_cached_tokens > 0


@pytest.mark.slow
def test_seeds_give_the_same_tokens_in_every_batch(tiny, record):
    _, packed = tiny
    requests = [(ids, {"max_tokens": 4, "temperature": 1.0, "seed": i}) for i, (ids, _) in enumerate(REQUESTS[2:])]
    together, _ = answers(packed, requests, record, num_blocks=7)
    assert together == [answers(packed, [each])[0][0] for each in requests]
