"""The engine's path on a GPU, without one: Triton's interpreter runs its kernels, and a recorder stands in for a graph."""

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

from common.kernels import graphs, sampler, triton_ops  # noqa: E402
from common.kernels.graphs import DecodingGraphs, capture, sizes_up_to  # noqa: E402
from common.kernels.triton_layers import DeviceAttend, DeviceMetadata, TritonBlock  # noqa: E402


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


SOME = ("no size that a vector divides", "QK norm and rotations of Llama 3", "a window in one layer")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in SOME else pytest.mark.slow) for name in MODELS]
)
def test_layers(name, monkeypatch):
    for expected, actual in both(monkeypatch, build(monkeypatch, **MODELS[name]), 7, [3, 19, 24]):
        assert error(actual, expected) < 1e-5
