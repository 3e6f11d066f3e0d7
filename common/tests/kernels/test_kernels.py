"""The fast paths compute what the plain ones do, free what they pack, and leave alone what is not theirs."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref

import pytest
import torch

from common import kernels
from common.course import ROOT
from solutions.llama_pytorch import MLP, Attention, Block, Linear, Llama, RMSNorm, causal_attend, layers_of
from solutions.llm_basics import ModelConfig

SHAPES = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
FAMILIES = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-all-biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "qwen2": {"qkv_bias": True, "tie_word_embeddings": True},
    "qwen3": {"qk_norm": True, "head_dim": 10},
}
PACKED = pytest.mark.skipif(not kernels.can_pack(), reason="this build of torch has no oneDNN: nothing is packed")
COMPILED = pytest.mark.skipif(kernels.compiled() is None, reason="no C++ compiler here: there are no compiled kernels")


def pack(model: Llama) -> None:
    kernels.pack(model, linear=Linear, attention=Attention, mlp=MLP, norm=RMSNorm, block=Block)


def tiny(family: str, dtype: torch.dtype = torch.float32) -> Llama:
    """A small model whose every number is random: norms and biases too, so that none can be left out unseen."""
    torch.manual_seed(0)
    model = Llama(ModelConfig(**{**SHAPES, **FAMILIES[family]})).to(dtype).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3 if parameter.dim() > 1 else 1.0)
    return model


def logits(model: Llama, num_tokens: int) -> torch.Tensor:
    token_ids = torch.arange(num_tokens) * 7 % SHAPES["vocab_size"]
    return model.logits(model(token_ids, torch.arange(num_tokens) + 3, causal_attend))


def is_tied(model: Llama) -> bool:
    return model.config.tie_word_embeddings


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


class TestEnabled:
    @pytest.mark.parametrize("value, expected", [(None, True), ("", True), ("fast", True), ("plain", False)])
    def test_reads_the_environment_at_each_call(self, monkeypatch, value, expected):
        monkeypatch.setenv("KERNELS", "plain" if expected else "fast")
        assert kernels.enabled() is not expected
        monkeypatch.delenv("KERNELS") if value is None else monkeypatch.setenv("KERNELS", value)
        assert kernels.enabled() is expected

    @pytest.mark.parametrize("value", ["0", "PLAIN", "off"])
    def test_refuses_what_it_does_not_know(self, monkeypatch, value):
        monkeypatch.setenv("KERNELS", value)
        with pytest.raises(ValueError, match=f"KERNELS={value}.*plain.*fast"):
            kernels.enabled()


ENGINES = """
from solutions.engine import InferenceEngine, SamplingParams
for options in ({}, {"dtype": "bfloat16"}, {"quantization": "w8a8"}, {"quantization": "w4a8", "group_size": 32}):
    with InferenceEngine("tales", device="cpu", **options) as engine:
        print(engine.generate(["One day"], SamplingParams(max_tokens=12), progress=False)[0].token_ids)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the PATH is not all that leads to a compiler")
def test_without_a_compiler_on_an_older_processor(tmp_path):
    """Nothing was compiled before, nothing can be, torch and oneDNN keep to AVX2: the same tests, the same tokens."""
    older = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    without = {**os.environ, **older, "COURSE_CACHE": str(tmp_path), "PATH": str(tmp_path), "KERNELS": "fast"}
    without.pop("CXX", None)
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-m", "not slow"]
    result = subprocess.run(tests, env=without, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
    run = [sys.executable, "-c", ENGINES]
    bare, plain = (
        subprocess.run(run, env={**without, "KERNELS": kernel}, capture_output=True, text=True)
        for kernel in ("fast", "plain")
    )
    assert bare.stdout == plain.stdout and len(bare.stdout.splitlines()) == 4, bare.stderr
    assert bare.stderr.count("without compiled kernels") == 1 and "compiled kernels" not in plain.stderr


@pytest.mark.slow
def test_a_torch_for_cuda_does_not_complain_that_there_is_no_gpu(tmp_path):
    """It would stand in the output of a notebook's first cell. torch finds CUDA's compiler in CUDA_HOME."""
    program = (
        "import pathlib, sys, torch; torch.cuda._is_compiled = lambda: True; torch.version.cuda = '13.0'; "
        "torch.cuda.is_available = lambda: False; from common.kernels.build import compile_into\n"
        "try: compile_into(pathlib.Path(sys.argv[1]), [], 'native')\n"
        "finally: from torch.utils import cpp_extension; print(cpp_extension.CUDA_HOME)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    environment = os.environ | {"CUDA_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert str(tmp_path) in done.stdout and "No CUDA runtime" not in done.stderr


@COMPILED
def test_what_was_compiled_is_not_compiled_again(monkeypatch):
    """Whichever copy of the course asks for it."""
    monkeypatch.setattr("common.kernels.build.compile_into", lambda *given: pytest.fail("compiled again"))
    assert kernels.compiled.__wrapped__() is torch.classes.inference_course


class TestPack:
    @pytest.mark.parametrize("num_tokens", [1, 3, 8, 40])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_computes_the_same(self, family, num_tokens):
        model = tiny(family)
        expected = logits(model, num_tokens)
        pack(model)
        assert relative_error(logits(model, num_tokens), expected) < 1e-5

    @PACKED
    @COMPILED
    @pytest.mark.parametrize("family", FAMILIES)
    def test_frees_what_it_packed(self, family):
        model = tiny(family)
        held = kernels.held_bytes(model)
        plain = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
        pack(model)
        gc.collect()
        kept = {name for name, parameter in plain.items() if parameter() is not None and not name.endswith("bias")}
        assert kept == (set() if model.config.tie_word_embeddings else {"model.embed_tokens.weight"})
        norms = 4 * SHAPES["num_hidden_layers"] * 10 * 8 if model.config.qk_norm else 0  # a weight for each head
        filled = [module.in_features for module in model.modules() if hasattr(module, "method")]
        filled += [module.gate_up_proj.in_features for module in model.modules() if hasattr(module, "gate_up_proj")]
        biases = 4 * 32 * SHAPES["num_hidden_layers"]
        assert held <= kernels.held_bytes(model) < held + norms + biases + 15 * 4 * sum(filled)  # to whole panels

    @PACKED
    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_layer_is_fused_into_four_products(self, family):
        model = tiny(family)
        pack(model)
        products = [module for module in model.modules() if hasattr(module, "method")]
        shares = is_tied(model) and kernels.compiled() is not None  # oneDNN's order allows no look-up
        assert sum(kernels.has_kernel(module) for module in products) == len(products) - (not shares)
        assert len(products) == 4 * SHAPES["num_hidden_layers"] + 2

    @pytest.mark.parametrize("has_compiler", [True, False])
    @pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 6, 7, 13, 100])
    def test_a_shared_table_is_looked_up_and_multiplied_by(self, num_tokens, has_compiler, monkeypatch):
        if not has_compiler:
            monkeypatch.setattr("common.kernels.build.compiled", lambda: None)
        model = tiny("llama-tied")
        table = model.model.embed_tokens.weight.clone()
        pack(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        ids = torch.arange(num_tokens) * 7 % len(table)
        assert torch.equal(model.embed(ids), table[ids])
        x = torch.randn(num_tokens, table.shape[1])
        torch.testing.assert_close(model.lm_head(x), x @ table.T, rtol=1e-4, atol=1e-4)

    def test_what_others_ask_of_a_model_is_still_there(self):
        model = tiny("llama")
        table = model.model.embed_tokens.weight.clone()
        pack(model)
        attention = model.model.layers[1].self_attn
        assert (attention.layer, attention.head_dim, attention.k_proj.out_features) == (1, 16, 32)
        assert (attention.q_proj.out_features, attention.v_proj.out_features) == (96, 32)
        assert torch.equal(model.model.embed_tokens.weight, table)
        for weight in (model.model.norm.weight, model.lm_head.weight):
            assert (weight.device.type, weight.dtype) == ("cpu", torch.float32)
        assert model.frequencies.dtype == torch.float32

    def test_a_second_time_changes_nothing(self):
        model = tiny("qwen2")
        pack(model)
        before = list(model.modules())
        pack(model)
        after = list(model.modules())
        assert len(before) == len(after) and all(a is b for a, b in zip(before, after))

    def test_modules_of_others_are_left_alone(self):
        class Halved(Linear):
            """A layer of another class, such as those of lesson 6."""

            def forward(self, x):
                return super().forward(x) / 2

        model = tiny("llama")
        layer = model.model.layers[0]
        layer.self_attn.k_proj.__class__ = Halved
        layer.mlp.up_proj.__class__ = Halved
        theirs = (layer.self_attn, layer.mlp, layer.self_attn.k_proj, layer.mlp.up_proj)
        expected = logits(model, 5)
        pack(model)
        assert (layer.self_attn, layer.mlp, layer.self_attn.k_proj, layer.mlp.up_proj) == theirs
        assert relative_error(logits(model, 5), expected) < 1e-5
        if kernels.can_pack():  # their products are packed nevertheless, but they are not fused with others
            assert all(kernels.has_kernel(each) for each in layers_of(layer).values() if hasattr(each, "method"))

    def test_a_norm_of_others_keeps_its_layer_plain(self):
        class Doubled(RMSNorm):
            def forward(self, x):
                return super().forward(x) * 2

        model = tiny("qwen3")
        model.model.layers[0].self_attn.k_norm.__class__ = Doubled
        expected = logits(model, 5)
        pack(model)
        assert relative_error(logits(model, 5), expected) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
    def test_other_dtypes_stay_exactly_as_they_are(self, dtype):
        model = tiny("qwen3", dtype)
        expected = logits(model, 2)
        pack(model)
        assert torch.equal(logits(model, 2), expected)
        assert {type(m) for m in model.model.layers[0].children()} == {RMSNorm, Attention, MLP}

    def test_without_a_compiler_bfloat16_is_torchs(self, monkeypatch):
        monkeypatch.setattr("common.kernels.build.compiled", lambda: None)
        model = tiny("qwen3", torch.bfloat16)
        expected = logits(model, 2)
        pack(model)
        assert torch.equal(logits(model, 2), expected) and expected.dtype == torch.bfloat16

    def test_without_the_private_operators_the_matrices_stay(self, monkeypatch):
        monkeypatch.setattr(torch.ops, "mkldnn", object())
        model = tiny("llama-tied")
        expected = logits(model, 3)
        pack(model)
        assert relative_error(logits(model, 3), expected) < 1e-5
        assert kernels.FastNorm in {type(module) for module in model.model.layers[0].children()}

    def test_a_model_that_was_never_loaded(self):
        with torch.device("meta"):
            model = Llama(ModelConfig(**SHAPES))
        pack(model)
        assert model.lm_head.weight.is_meta and not kernels.has_kernel(model.lm_head)


def pair(in_features: int, out_features: int, bias: bool) -> tuple[Linear, Linear]:
    """A layer, and a copy of it that is packed."""
    linear = Linear(in_features, out_features, bias).requires_grad_(False)
    if bias:
        linear.bias.normal_()
    packed = copy.deepcopy(linear)
    packed.method.process_weights_after_loading(packed)
    assert kernels.has_kernel(packed) and not kernels.has_kernel(linear)
    return linear, packed


@PACKED
class TestPackFloats:
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("shape", [(7,), (1, 7), (5, 7), (2, 3, 7), (0, 7)])
    def test_any_leading_axes(self, shape, bias):
        linear, packed = pair(7, 5, bias)
        x = torch.randn(shape)
        assert packed(x).shape == linear(x).shape
        torch.testing.assert_close(packed(x), linear(x))
        assert (packed.in_features, packed.out_features) == (7, 5)

    def test_an_input_that_does_not_lie_in_one_piece(self):
        linear, packed = pair(8, 5, True)
        wide = torch.randn(6, 16)
        for x in (wide[:, ::2], wide[:, 8:], wide[:, :6].T.expand(2, 6, 6).reshape(2, 6, 6)[..., :1].expand(2, 6, 8)):
            torch.testing.assert_close(packed(x), linear(x))


def attention_by_loops(q, k, v, positions):
    """One query, one head and one request at a time, in float64, over the keys that it sees and no others."""
    result = torch.empty_like(q)
    group_size = q.shape[2] // k.shape[2]
    for b, t, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        seen = slice(0, int(positions[b, t]) + 1)
        keys, values = k[b, seen, h // group_size].double(), v[b, seen, h // group_size].double()
        weights = torch.softmax(keys @ q[b, t, h].double() / q.shape[-1] ** 0.5, dim=0)
        result[b, t, h] = (weights @ values).to(q.dtype)
    return result


class TestAttention:
    @pytest.mark.parametrize("heads, kv_heads", [(6, 2), (3, 3), (4, 1)])
    @pytest.mark.parametrize(
        "batch, num_queries, num_keys",
        [(1, 1, 1), (1, 1, 9), (3, 1, 12), (2, 5, 11), (1, 16, 20), (1, 17, 40), (2, 30, 30), (1, 300, 310)],
    )
    def test_every_shape(self, batch, num_queries, num_keys, heads, kv_heads):
        torch.manual_seed(0)
        q = torch.randn(batch, num_queries, heads, 8)
        k, v = torch.randn(2, batch, num_keys, kv_heads, 8)
        # Each ends elsewhere, and the first not last of all: with one query it ends at its very first key.
        ends = [num_keys - 1 - b * (num_keys - num_queries) // max(batch - 1, 1) for b in range(batch)]
        ends = [*ends[-1:], *ends[:-1]]
        positions = torch.stack([torch.arange(end - num_queries + 1, end + 1) for end in ends])
        result = kernels.attention(q, k, v, positions)
        torch.testing.assert_close(result, attention_by_loops(q, k, v, positions), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("num_queries", [1, 4, 20, 200])
    def test_one_key_is_seen(self, num_queries):
        q = torch.randn(2, num_queries, 4, 8)
        k, v = torch.randn(2, 2, 250, 2, 8)
        result = kernels.attention(q, k, v, torch.zeros(2, num_queries, dtype=torch.long))
        expected = v[:, :1].repeat_interleave(2, dim=2).expand_as(q)
        torch.testing.assert_close(result, expected)

    @pytest.mark.parametrize("num_queries", [1, 4, 20, 200])
    def test_what_pads_the_end_changes_nothing(self, num_queries):
        q = torch.randn(2, num_queries, 4, 8)
        k, v = torch.randn(2, 2, 250, 2, 8)
        positions = torch.arange(num_queries).expand(2, -1) + torch.tensor([[3], [11]])
        expected = kernels.attention(q, k, v, positions)
        k[0, num_queries + 3 :], v[0, num_queries + 3 :] = 1e30, -1e30
        k[1, num_queries + 11 :], v[1, num_queries + 11 :] = 1e30, -1e30
        result = kernels.attention(q, k, v, positions)
        torch.testing.assert_close(result, expected)

    def test_positions_need_not_be_neighbours(self):
        q = torch.randn(1, 200, 4, 8)
        k, v = torch.randn(2, 1, 230, 2, 8)
        positions = torch.randperm(230)[None, :200]
        result = kernels.attention(q, k, v, positions)
        torch.testing.assert_close(result, attention_by_loops(q, k, v, positions), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("num_queries", [1, 4, 20])
    def test_keys_that_lie_in_another_order(self, num_queries):
        """As a cache holds them that is laid out by heads, or keys and values side by side."""
        q = torch.randn(2, 4, num_queries, 8).transpose(1, 2)
        together = torch.randn(2, 30, 2, 2, 8)
        k, v = together[:, :, 0], torch.randn(2, 2, 30, 8).transpose(1, 2)
        positions = torch.arange(num_queries).expand(2, -1) + 5
        result = kernels.attention(q, k, v, positions)
        torch.testing.assert_close(result, attention_by_loops(q, k, v, positions), rtol=1e-4, atol=1e-5)
