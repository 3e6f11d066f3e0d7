"""A whole step in few calls: all layers at once, and the likeliest tokens of a batch at once."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from common import kernels
from common.kernels import greedy
from common.tests.kernels.test_fused import BATCHES, Requests, build, error
from solutions.engine import InferenceEngine
from solutions.llama_pytorch import SamplingParams
from solutions.paged_attention import AttentionMetadata, slot_mapping

pytestmark = pytest.mark.skipif(kernels.compiled() is None, reason="no C++ compiler here: no layer is fused")


@pytest.mark.parametrize("size", [1, 3, 16, 50, 1001])
def test_likeliest(size):
    torch.manual_seed(size)
    scores = torch.randn(40, size).mul(3).round()  # many are equal: the first of the largest counts
    scores[1], scores[2], scores[3, -1] = -torch.inf, 7.0, torch.inf
    assert torch.equal(torch.ops.inference_course.likeliest(scores), scores.argmax(-1))
    for place in {0, size // 2, size - 1}:
        scores[4] = 1.0
        scores[4, place] = torch.nan
        found = torch.ops.inference_course.likeliest(scores)
        assert found[4] == -1 and (found == -1).sum() == 1


def request(name: str, output: tuple[int, ...] = (), **params):
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": 4, **params})
    return SimpleNamespace(request_id=name, params=params, output_token_ids=list(output))


def test_whose_tokens_are_chosen_at_once(monkeypatch):
    monkeypatch.setenv("KERNELS", "fast")
    requests = [
        request("plain"),
        request("warm", temperature=0.5),
        request("penalised", repetition_penalty=1.1),
        request("present", presence_penalty=0.1),
        request("frequent", frequency_penalty=0.1),
        request("processed", logits_processors=[lambda output, scores: scores]),
        request("early", min_tokens=2, output=(1,)),
        request("late", min_tokens=2, output=(1, 2)),
        request("broken"),
    ]
    logits = torch.zeros(len(requests), 20)
    logits[range(len(requests)), range(len(requests))] = 1.0
    logits[-1, 3] = torch.nan
    assert greedy.draw(requests, logits) == {"plain": 0, "late": 7}
    assert greedy.draw(requests[1:3], logits[1:3]) == {}
    assert greedy.draw(requests, logits.double()) == {}
    monkeypatch.setenv("KERNELS", "plain")
    assert greedy.draw(requests, logits) == {}


@pytest.mark.parametrize("block_size", [1, 7])
def test_all_layers_in_one_call(block_size, monkeypatch):
    """It computes what one layer after the other computes, from tokens or from a stage's hidden states."""
    plain, packed = build(monkeypatch, layer_windows=(None, 5))
    found = []
    for model, choice in ((plain, "plain"), (packed, "fast")):
        monkeypatch.setenv("KERNELS", choice)
        requests = Requests(model, block_size, [9, 37, 42])
        runner = SimpleNamespace(model=model, cache=requests.cache, forward=None)
        kernels.layers.fuse_forward(runner)
        assert is_fused(runner) == (model is packed)
        for from_hidden, batch in zip((False, True, False), BATCHES):
            found.append(requests.compute(*batch, run(model, runner.forward, requests, batch, from_hidden)))
    for expected, actual in zip(found[:3], found[3:]):
        assert error(actual, expected) < 1e-5


def is_fused(runner) -> bool:
    """Whether the runner's `forward` is the one that `fuse_forward` makes."""
    return getattr(runner.forward, "__module__", None) == "common.kernels.layers"


def run(model, forward, requests: Requests, batch: list, from_hidden: bool):
    def compute(ids: torch.Tensor, positions: torch.Tensor, attend) -> torch.Tensor:
        if forward is None:
            return model(ids, positions, attend)
        starts, ends = batch
        slots = [s for each in zip(requests.tables, starts, ends) for s in slots_of(*each, requests.block_size)]
        query_start = torch.tensor([0, *(end - start for start, end in zip(starts, ends))]).cumsum(0).tolist()
        metadata = AttentionMetadata(query_start, ends, torch.tensor(slots), requests.tables)
        given = SimpleNamespace(token_ids=ids, positions=positions, metadata=metadata)
        return forward(given, model.embed(ids) if from_hidden else None)

    return compute


def slots_of(table: list[int], start: int, end: int, block_size: int) -> list[int]:
    return slot_mapping(table, start, end - start, block_size)


def test_an_engine_computes_all_layers_in_one_call(monkeypatch):
    """Unless it is told not to, at any time; and with INT8 keys the layers write and read outside."""
    params, found = SamplingParams(max_tokens=12), []
    for options in ({}, {"kv_cache_dtype": "int8"}):
        monkeypatch.setenv("KERNELS", "fast")
        with InferenceEngine("tales", device="cpu", **options) as engine:
            runner = engine.executor.runner
            assert is_fused(runner) == (not options) and runner.draw is greedy.draw
            for choice in ("fast", "plain"):
                monkeypatch.setenv("KERNELS", choice)
                found.append(engine.generate(["One day"], replace(params), progress=False)[0].token_ids)
    assert found[0] == found[1] and len(found[0]) == 12
