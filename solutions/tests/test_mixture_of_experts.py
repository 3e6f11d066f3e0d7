"""Experts in the whole engine: only those that were chosen are read, whatever stores or computes them."""

from __future__ import annotations

import math
import re

import pytest
import torch

from solutions.batching import SamplingParams
from solutions.engine import InferenceEngine
from solutions.llama_pytorch import causal_attend, layers_of, use_kernels
from solutions.mixture_of_experts import SparseMoeBlock, experts_read, route
from solutions.quantization import Quantization, scale_for_activations
from solutions.tests.test_parallelism import checkpoints, plain, whole_model  # noqa: F401  (fixtures)

TOKENS = torch.tensor([5, 9, 31, 12, 7, 7, 20])


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model.logits(model(TOKENS, torch.arange(len(TOKENS)), causal_attend))


@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}, {"quantization": "int4"}], ids=str)
@pytest.mark.parametrize("kernels", ["fast", "plain"])
def test_a_step_reads_the_chosen_experts_and_no_other(checkpoints, monkeypatch, options, kernels):  # noqa: F811
    """In floats and in fewer bits, in plain layers and in fused ones."""
    monkeypatch.setenv("KERNELS", kernels)
    settings = dict(dtype="float32", device="cpu", max_model_len=32)
    params = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=0)
    with InferenceEngine(str(checkpoints["qwen3_moe"]), **settings, **options) as engine:
        blocks = [module for module in engine.executor.runner.model.modules() if isinstance(module, SparseMoeBlock)]
        assert len(blocks) == 3
        called: list[tuple[int, int]] = []  # block and expert, in the order of their calls
        chosen: list[set[int]] = []  # the router's, in the same order
        for i, block in enumerate(blocks):
            block.gate.register_forward_hook(
                lambda gate, given, scores, block=block: chosen.append(
                    {*route(scores, block.top_k, True)[1].flatten().tolist()}
                )
            )
            for j, expert in enumerate(block.experts):
                expert.register_forward_pre_hook(lambda module, given, i=i, j=j: called.append((i, j)))
        engine.add_request([5, 9, 31], params)
        engine.step()  # the prompt, which may use them all
        called.clear(), chosen.clear()
        engine.step()
        assert [len(each) for each in chosen] == [2, 2, 2]
        assert called == [(i, j) for i, each in enumerate(chosen) for j in sorted(each)]


def test_what_no_token_chose_may_hold_anything(checkpoints):  # noqa: F811
    model = whole_model(checkpoints["qwen3_moe"])
    blocks = [module for module in model.modules() if isinstance(module, SparseMoeBlock)]
    called = set()
    for block in blocks:
        for expert in block.experts:
            expert.register_forward_pre_hook(lambda module, given: called.add(module))

    def last() -> torch.Tensor:
        with torch.inference_mode():
            return model.logits(model(TOKENS[:1], torch.arange(1), causal_attend))

    expected = last()
    others = [expert for block in blocks for expert in block.experts if expert not in called]
    assert len(others) == 3 * (5 - 2)
    for expert in others:
        for parameter in expert.parameters():
            parameter.data.fill_(float("nan"))
    assert torch.equal(last(), expected)


def test_kernels_compute_the_same(checkpoints, monkeypatch):  # noqa: F811
    monkeypatch.setenv("KERNELS", "fast")
    model = whole_model(checkpoints["qwen3_moe"]).float()
    expected = logits(model)
    use_kernels(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


def test_activation_aware_scales_change_no_output(checkpoints):  # noqa: F811
    """The router and every expert read the same norm; of an expert that the text does not use, `down_proj` stays."""
    model = whole_model(checkpoints["qwen3_moe"])
    expected, before, used = logits(model), model.state_dict(), set()
    before = {name: tensor.clone() for name, tensor in before.items()}
    for path, layer in layers_of(model).items():
        layer.register_forward_pre_hook(lambda layer, given, path=path: used.add(path))
    with torch.inference_mode():
        scale_for_activations(model, TOKENS[:2].tolist(), Quantization("int4", 4), causal_attend)
    read = set(used)
    torch.testing.assert_close(logits(model), expected)
    downs = [path for path in layers_of(model) if path.endswith("down_proj")]
    changed = {path for path in downs if not torch.equal(model.get_submodule(path).weight, before[f"{path}.weight"])}
    assert changed and not changed - read and set(downs) - read
    assert not torch.equal(
        model.state_dict()["model.layers.0.mlp.gate.weight"], before["model.layers.0.mlp.gate.weight"]
    )


def test_experts_that_stay_on_disk(checkpoints):  # noqa: F811
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    settings = dict(dtype="float64", device="cpu", max_model_len=32)
    tokens, folder = [], str(checkpoints["qwen3_moe"])
    with pytest.raises(ValueError, match=r"needs (\d+) at least") as refused:
        InferenceEngine(folder, offload=1, **settings)
    least = int(str(refused.value).partition("needs ")[2].split()[0])
    for offload in (None, least, 80_000):
        with InferenceEngine(folder, offload=offload, **settings) as engine:
            tokens.append(engine.generate([[5, 9, 31]], params, progress=False)[0].token_ids)
    assert tokens[0] == tokens[1] == tokens[2]


def test_a_step_reads_only_chosen_experts_from_the_disk(checkpoints):  # noqa: F811
    """A token has two of them: a step of one token reads two in each layer, and all of the layer beside them."""
    settings = dict(dtype="float64", device="cpu", max_model_len=32, offload=80_000)
    with InferenceEngine(str(checkpoints["qwen3_moe"]), **settings) as engine:
        model = engine.executor.runner.model
        checkpoint, moe, before = model.checkpoint, model.config.moe, model.checkpoint.num_bytes_read
        engine.generate([[5]], SamplingParams(max_tokens=1, ignore_eos=True), progress=False)
        read = checkpoint.num_bytes_read - before
    assert moe.num_experts_per_tok == 2 < moe.num_experts

    def expected(name: str) -> int:
        layer = re.match(r"model\.layers\.(\d+)\.(?!mlp\.experts\.[2-9])", name)
        is_read = layer and int(layer[1]) in model.prototypes
        return math.prod(checkpoint.shape(name)) * checkpoint.read(name).itemsize if is_read else 0

    assert read == sum(expected(name) for name in checkpoint.names()) > 0


def test_how_many_experts_a_batch_reads():
    generator = torch.Generator().manual_seed(0)
    counts = [len(torch.rand(16, 32, generator=generator).topk(4).indices.unique()) for _ in range(400)]
    assert sum(counts) / 400 == pytest.approx(experts_read(32, 4, 16), rel=0.02)
