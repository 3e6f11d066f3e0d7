"""The checks of lesson 2. Expected values are worked by hand, by plain loops here, or are snapshots of transformers on
tiny random checkpoints (snapshots/make_snapshots.py).
"""

from __future__ import annotations

import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from common.checkpoints import Checkpoint, CheckpointError
from common.grading import elsewhere, close, equal, exercise, holds, together

SNAPSHOTS = Path(__file__).parent / "snapshots"
FAMILIES = ("llama-2", "llama-3", "qwen2", "qwen2.5", "qwen3")


def snapshot(family: str):
    """A tiny checkpoint of this family and what transformers computes with it."""
    folder = SNAPSHOTS / family
    return Checkpoint(folder), load_file(folder / "expected.safetensors")


def built(code, family: str):
    """The family's tiny model, with its weights."""
    checkpoint, expected = snapshot(family)
    model = code.Llama(code.parse_config(checkpoint.config))
    code.load_weights(model, checkpoint)
    return model.eval(), expected


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """The module with every parameter random: norms and biases are 1 and 0 at first, and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.3 + 0.5 * torch.randn(parameter.shape, generator=generator)
    return module


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- What the checkpoint says about the model -------------------------------------------------------------------------

LLAMA_2_7B = {
    "model_type": "llama", "hidden_act": "silu", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    "rope_scaling": None, "tie_word_embeddings": False, "num_key_value_heads": None,
}  # fmt: skip
LLAMA_3_8B = {
    "model_type": "llama", "hidden_act": "silu", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "attention_bias": False, "mlp_bias": False,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
QWEN_2_5 = {
    "model_type": "qwen2", "hidden_act": "silu", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
    "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True, "use_sliding_window": False,
}  # fmt: skip
QWEN_3 = {
    "model_type": "qwen3", "hidden_act": "silu", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
    "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    "attention_bias": False, "rope_scaling": None,
}  # fmt: skip


@exercise("2.1", points=2)
class TestParseConfig:
    def given(self, config, name, expected, what):
        value = getattr(config, name)
        holds(value is not None, f"{what} is None; it follows from other values.", actual="None")
        equal(value, expected, what)

    def test_llama_2(self, code):
        config = code.parse_config(LLAMA_2_7B)
        equal(config.vocab_size, 32000, "vocab_size of Llama 2 7B")
        equal(config.hidden_size, 4096, "hidden_size of Llama 2 7B")
        equal(config.intermediate_size, 11008, "intermediate_size of Llama 2 7B")
        equal(config.num_hidden_layers, 32, "num_hidden_layers of Llama 2 7B")
        equal(config.num_attention_heads, 32, "num_attention_heads of Llama 2 7B")
        self.given(config, "num_key_value_heads", 32, "num_key_value_heads where the file says null, with 32 heads")
        equal(config.max_position_embeddings, 4096, "max_position_embeddings of Llama 2 7B")
        short = code.parse_config({**LLAMA_2_7B, "max_position_embeddings": 512}).max_position_embeddings
        equal(short, 512, "max_position_embeddings where the file says 512")

    def test_head_dim_absent(self, code):
        self.given(
            code.parse_config(LLAMA_2_7B), "head_dim", 128, "head_dim where the file has none: 4096 hidden, 32 heads"
        )
        config = code.parse_config({**LLAMA_2_7B, "head_dim": None})
        self.given(config, "head_dim", 128, "head_dim where the file says null: 4096 hidden, 32 heads")
        holds(
            isinstance(config.head_dim, int),
            f"head_dim where the file says null is {config.head_dim!r}, a float: torch takes only an int for a size.",
            actual="a float",
        )

    def test_head_dim_absent_with_fewer_kv_heads(self, code):
        what = "head_dim where the file has none: 4096 hidden, 32 heads and 8 KV heads"
        self.given(code.parse_config(LLAMA_3_8B), "head_dim", 128, what)

    def test_head_dim_given(self, code):
        equal(code.parse_config(QWEN_3).head_dim, 128, "head_dim where the file says 128 (1024 hidden, 16 heads)")

    def test_grouped_heads(self, code):
        equal(code.parse_config(LLAMA_3_8B).num_key_value_heads, 8, "num_key_value_heads of Llama 3 8B")

    def test_defaults(self, code):
        keys = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        config = code.parse_config({**{key: LLAMA_2_7B[key] for key in keys}, "num_attention_heads": 32})
        equal(config.rms_norm_eps, 1e-6, "rms_norm_eps where the file has none")
        equal(config.rope_theta, 10000.0, "rope_theta where the file has none")
        equal(config.max_position_embeddings, 2048, "max_position_embeddings where the file has none")
        equal(config.tie_word_embeddings, False, "tie_word_embeddings where the file has none")

    def test_given_values_win(self, code):
        equal(code.parse_config(LLAMA_3_8B).rms_norm_eps, 1e-5, "rms_norm_eps of Llama 3 8B")
        equal(code.parse_config(LLAMA_3_8B).rope_theta, 500000.0, "rope_theta of Llama 3 8B")
        equal(code.parse_config(QWEN_3).tie_word_embeddings, True, "tie_word_embeddings of Qwen3 0.6B")

    def test_biases(self, code):
        both = {"attention_bias": True, "mlp_bias": True}
        for config, expected, case in (
            (LLAMA_3_8B, (False, False, False), "Llama 3 8B"),
            (LLAMA_2_7B, (False, False, False), "Llama 2, whose file names no bias"),
            (QWEN_2_5, (True, False, False), "Qwen2.5, whose file names no bias"),
            ({**QWEN_2_5, **both}, (True, False, False), "a Qwen2 with attention_bias and mlp_bias, which it ignores"),
            ({**LLAMA_3_8B, **both}, (True, True, True), "a Llama with attention_bias and mlp_bias"),
            ({**QWEN_3, **both}, (True, True, False), "a Qwen3 with attention_bias, and an mlp_bias that it ignores"),
            (QWEN_3, (False, False, False), "Qwen3 0.6B"),
        ):
            parsed = code.parse_config(config)
            for name, value in zip(("qkv_bias", "o_bias", "mlp_bias"), expected):
                equal(getattr(parsed, name), value, f"{name} of {case}")

    def test_windows(self, code):
        mistral = {**LLAMA_3_8B, "model_type": "mistral", "num_hidden_layers": 3, "sliding_window": 4096}
        windows = code.parse_config(mistral).layer_windows
        case = "layer_windows of a Mistral of 3 layers with sliding_window 4096"
        holds(windows != (), f"{case} is (): was given.layer_windows passed on?", actual="()")
        equal(windows, (4096,) * 3, case)

    def test_windows_of_some_layers(self, code):
        half = {**QWEN_2_5, "num_hidden_layers": 2, "use_sliding_window": True, "sliding_window": 64}
        windows = code.parse_config({**half, "max_window_layers": 1}).layer_windows
        case = "layer_windows of a Qwen2 of 2 layers with sliding_window 64 and max_window_layers 1"
        equal(str(windows), "(None, 64)", case)

    def test_experts(self, code):
        config = code.parse_config({**QWEN_3, "model_type": "qwen3_moe", "num_experts": 64, "num_experts_per_tok": 4})
        holds(config.moe is not None, "moe of a Qwen3-MoE is None: was given.moe passed on?", actual="None")
        equal(config.moe.num_experts, 64, "moe.num_experts of a Qwen3-MoE with num_experts 64")

    def test_qk_norm(self, code):
        families = [LLAMA_2_7B, LLAMA_3_8B, {**LLAMA_3_8B, "model_type": "mistral"}, QWEN_2_5, QWEN_3]
        norms = [code.parse_config(config).qk_norm for config in [*families, {**QWEN_3, "model_type": "qwen3_moe"}]]
        names = "Llama 2, Llama 3, Mistral, Qwen2.5, Qwen3 and Qwen3-MoE"
        equal(norms, [False, False, False, False, True, True], f"qk_norm of {names}")

    def test_scaling(self, code):
        scaling = code.parse_config(LLAMA_3_8B).rope_scaling
        holds(scaling is not None, "rope_scaling of Llama 3.1 8B is None: the file has a factor.", actual="None")
        equal(scaling["factor"], 8.0, "rope_scaling['factor'] of Llama 3.1 8B")
        equal(scaling["high_freq_factor"], 4.0, "rope_scaling['high_freq_factor'] of Llama 3.1 8B")
        equal(scaling["original_max_position_embeddings"], 8192, "rope_scaling['original_max_position_embeddings']")
        for name, config in (("Llama 2", LLAMA_2_7B), ("Qwen2.5", QWEN_2_5)):
            parsed = code.parse_config(config).rope_scaling
            holds(parsed is None, f"rope_scaling of {name} is {parsed!r}; its file asks for none.", actual=parsed)

    def test_rope_parameters(self, code):
        newer = {key: value for key, value in QWEN_2_5.items() if key != "rope_theta"}
        newer["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000.0}
        config = code.parse_config(newer)
        equal(config.rope_theta, 1000000.0, "rope_theta of a newer file, which has it in rope_parameters")
        holds(
            config.rope_scaling is None,
            f"rope_scaling is {config.rope_scaling!r} for rope_parameters of type 'default': plain RoPE, so None.",
            actual=config.rope_scaling,
        )
        newer = {key: value for key, value in LLAMA_3_8B.items() if key not in ("rope_theta", "rope_scaling")}
        newer["rope_parameters"] = {"rope_theta": 500000.0, **LLAMA_3_8B["rope_scaling"]}
        config = code.parse_config(newer)
        holds(config.rope_scaling is not None, "rope_scaling is None; rope_parameters has a factor.", actual="None")
        equal(config.rope_scaling["factor"], 8.0, "the factor of a newer Llama 3 file, which has it in rope_parameters")


@exercise("2.2", points=2)
class TestScaledFrequencies:
    SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1000}

    def config(self, code, **changes):
        sizes = dict(vocab_size=7, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
        return code.ModelConfig(
            **{**sizes, "num_key_value_heads": 1, "head_dim": 8, "rope_scaling": self.SCALING, **changes}
        )

    def test_by_hand(self, code):
        # Frequencies 1, 0.1, 0.01, 0.001; turns in 1000 tokens 159, 15.9, 1.59, 0.159; kept 1, 1, 0.197183, 0.
        close(
            code.scaled_frequencies(self.config(code, max_position_embeddings=8000)),
            torch.tensor([1.0, 0.1, 0.01 * (0.1971831 + 0.8028169 / 8), 0.001 / 8]),
            "scaled_frequencies for 1, 0.1, 0.01 and 0.001 (159, 15.9, 1.59 and 0.159 turns in the original context)",
        )

    def test_other_bounds(self, code):
        scaling = {**self.SCALING, "low_freq_factor": 2.0, "high_freq_factor": 20.0, "factor": 4.0}
        expected = []
        for frequency in (1.0, 0.1, 0.01, 0.001):
            turns = 1000 * frequency / (2 * math.pi)
            kept = 1.0 if turns > 20 else 0.0 if turns < 2 else (turns - 2) / 18
            expected.append(kept * frequency + (1 - kept) * frequency / 4)
        close(
            code.scaled_frequencies(self.config(code, rope_scaling=scaling)),
            torch.tensor(expected),
            "scaled_frequencies with factor 4, bounds of 2 and 20 turns",
        )

    def test_a_short_context(self, code):
        # Turns in 10 tokens 1.59, 0.159, ...; kept 0.197183, 0, 0, 0.
        scaling = {**self.SCALING, "original_max_position_embeddings": 10}
        close(
            code.scaled_frequencies(self.config(code, rope_scaling=scaling)),
            torch.tensor([0.1971831 + 0.8028169 / 8, 0.1 / 8, 0.01 / 8, 0.001 / 8]),
            "scaled_frequencies for 1, 0.1, 0.01 and 0.001 (1.59, 0.159, ... turns in 10 original tokens)",
        )

    def test_no_scaling(self, code):
        close(
            code.scaled_frequencies(self.config(code, rope_scaling=None)),
            torch.tensor([1.0, 0.1, 0.01, 0.001]),
            "scaled_frequencies without rope_scaling",
        )

    def test_real_sizes(self, code):
        for name, real in json.loads((SNAPSHOTS / "rotary.json").read_text()).items():
            config = self.config(
                code, head_dim=real["head_dim"], rope_theta=500_000.0, rope_scaling=real["rope_scaling"]
            )
            close(code.scaled_frequencies(config), torch.tensor(real["frequencies"]), f"the frequencies of {name}")


# --- The model --------------------------------------------------------------------------------------------------------


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal grouped-query attention, one query at a time. (T, H, D) and (T, K, D)."""
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, values = k[: t + 1, h // group], v[: t + 1, h // group]
            weights = (keys @ q[t, h] / math.sqrt(q.shape[2])).softmax(0)
            out[t, h] = weights @ values
    return out


@exercise("2.3")
class TestCausalAttend:
    def test_by_hand(self, code):
        q = torch.zeros(3, 1, 2)  # every score is 0, so each token takes the mean of the values that it sees
        v = torch.tensor([[[6.0, 0.0]], [[0.0, 6.0]], [[3.0, 3.0]]])
        close(
            code.causal_attend(0, q, torch.ones(3, 1, 2), v),
            torch.tensor([[[6.0, 0.0]], [[3.0, 3.0]], [[3.0, 3.0]]]),
            "causal_attend of values [6, 0], [0, 6], [3, 3] with equal scores",
        )

    def test_groups(self, code):
        q, k, v = noise(5, 6, 4, seed=1), noise(5, 2, 4, seed=2), noise(5, 2, 4, seed=3)
        close(
            code.causal_attend(1, q, k, v),
            naive_attention(q, k, v),
            "causal_attend with 6 query heads on 2 KV heads",
        )

    def test_nothing_is_kept_between_calls(self, code):
        for tokens, layer in ((4, 0), (2, 0), (3, 1)):
            q, k, v = noise(tokens, 2, 4, seed=4), noise(tokens, 1, 4, seed=5), noise(tokens, 1, 4, seed=6)
            close(
                code.causal_attend(layer, q, k, v),
                naive_attention(q, k, v),
                f"causal_attend on {tokens} tokens, called again for layer {layer}",
            )

    def test_16_bits(self, code):
        q, k, v = (noise(3, heads, 4, seed=heads).bfloat16() for heads in (4, 2, 2))
        expected = naive_attention(q.float(), k.float(), v.float()).bfloat16()
        close(code.causal_attend(0, q, k, v), expected, "causal_attend in bfloat16", rtol=2e-2, atol=2e-2)

    def test_one_token(self, code):
        v = noise(1, 2, 4)
        close(code.causal_attend(0, noise(1, 2, 4), noise(1, 2, 4), v), v, "causal_attend of one token (it is v)")

    def test_on_another_device(self, code):
        q, k, v = (noise(3, heads, 4).to("meta") for heads in (4, 2, 2))
        elsewhere(lambda: code.causal_attend(0, q, k, v), "causal_attend(0, q, k, v)", "`q.device`")


def naive_rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Half-split rotation, one head and one pair at a time. x: (T, heads, D)."""
    out, half = torch.zeros_like(x), x.shape[2] // 2
    for t in range(x.shape[0]):
        for i in range(half):
            a, b = x[t, :, i], x[t, :, i + half]
            out[t, :, i] = a * cos[t, i] - b * sin[t, i]
            out[t, :, i + half] = b * cos[t, i] + a * sin[t, i]
    return out


def naive_heads(x: torch.Tensor, linear: nn.Linear, head_dim: int) -> torch.Tensor:
    """Project and cut into heads, one head at a time. (T, hidden) -> (T, heads, D)."""
    heads = []
    for start in range(0, linear.weight.shape[0], head_dim):
        head = x @ linear.weight[start : start + head_dim].T
        heads.append(head if linear.bias is None else head + linear.bias[start : start + head_dim])
    return torch.stack(heads, 1).detach()


def naive_norm(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    return (x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight).detach()


class Recorder:
    """An `attend` that writes down what it is given, and gives back something of its own."""

    def __init__(self):
        self.calls = []

    def __call__(self, layer, q, k, v):
        self.calls.append((layer, q.detach().clone(), k.detach().clone(), v.detach().clone()))
        return q * 2 + 1


@exercise("2.4", points=3)
class TestAttentionForward:
    T, HIDDEN, H, K, D = 3, 10, 4, 2, 6  # 4 heads of 6 are 24 wide, not 10

    def attention(self, code, layer=5, **changes):
        config = code.ModelConfig(
            vocab_size=7, hidden_size=self.HIDDEN, intermediate_size=8, num_hidden_layers=9,
            num_attention_heads=self.H, num_key_value_heads=self.K, head_dim=self.D, **changes,
        )  # fmt: skip
        return shaken(code.Attention(config, layer))

    def run(self, attention):
        hidden = noise(self.T, self.HIDDEN, seed=1)
        angles = 0.7 + noise(self.T, self.D // 2, seed=2)
        recorder = Recorder()
        with torch.inference_mode():
            out = attention(hidden, angles.cos(), angles.sin(), recorder)
        holds(
            len(recorder.calls) == 1,
            f"`attend` is called {len(recorder.calls)} times; once is right.",
            actual=len(recorder.calls),
        )
        return hidden, angles.cos(), angles.sin(), out, recorder.calls[0]

    def test_plain(self, code):
        attention = self.attention(code)
        hidden, cos, sin, out, (_, q, k, v) = self.run(attention)
        expected_q, expected_k, expected_v = (
            naive_heads(hidden, proj, self.D) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        close(v, expected_v, "the v that attend gets (4 heads on 2)")
        close(q, naive_rotate(expected_q, cos, sin), "the q that attend gets")
        close(k, naive_rotate(expected_k, cos, sin), "the k that attend gets")
        mixed = (q * 2 + 1).reshape(self.T, self.H * self.D)
        close(out, (mixed @ attention.o_proj.weight.T).detach(), "what Attention returns", rtol=1e-4, atol=1e-5)

    def test_16_bits(self, code):
        attention = self.attention(code, qkv_bias=True).bfloat16()
        hidden, angles, recorder = noise(self.T, self.HIDDEN, seed=1).bfloat16(), noise(self.T, 3, seed=2), Recorder()
        with torch.inference_mode():
            out = attention(hidden, angles.cos(), angles.sin(), recorder)
        dtypes = {name: str(x.dtype) for name, x in zip(("q", "k", "v", "out"), (*recorder.calls[0][1:], out))}
        equal(dtypes, dict.fromkeys(dtypes, "torch.bfloat16"), "the dtypes of q, k, v and the result, in bfloat16")

    def test_layer_number(self, code):
        equal(self.run(self.attention(code, layer=5))[-1][0], 5, "the layer number that attend gets in layer 5")

    def test_biases(self, code):
        attention = self.attention(code, qkv_bias=True, o_bias=True)
        hidden, cos, sin, out, (_, q, _, v) = self.run(attention)
        close(q, naive_rotate(naive_heads(hidden, attention.q_proj, self.D), cos, sin), "q with a bias, as in Qwen2")
        close(v, naive_heads(hidden, attention.v_proj, self.D), "v with a bias, as in Qwen2")
        mixed = (q * 2 + 1).reshape(self.T, self.H * self.D)
        expected = (mixed @ attention.o_proj.weight.T + attention.o_proj.bias).detach()
        close(out, expected, "what Attention returns with a bias on o_proj", rtol=1e-4, atol=1e-5)

    def test_qk_norm(self, code):
        attention = self.attention(code, qk_norm=True)
        hidden, cos, sin, _, (_, q, k, v) = self.run(attention)
        expected_q = naive_rotate(naive_norm(naive_heads(hidden, attention.q_proj, self.D), attention.q_norm), cos, sin)
        expected_k = naive_rotate(naive_norm(naive_heads(hidden, attention.k_proj, self.D), attention.k_norm), cos, sin)
        close(q, expected_q, "q with QK norm, as in Qwen3", rtol=1e-4, atol=1e-5)
        close(k, expected_k, "k with QK norm, as in Qwen3", rtol=1e-4, atol=1e-5)
        close(v, naive_heads(hidden, attention.v_proj, self.D), "v with QK norm (it has no norm)")

    def test_a_slice_of_the_heads(self, code):
        # Lesson 6 hands each process some of the heads: narrower projections, the same config.
        attention = self.attention(code)
        attention.q_proj = shaken(nn.Linear(self.HIDDEN, 2 * self.D, bias=False), seed=3)
        attention.k_proj = shaken(nn.Linear(self.HIDDEN, 1 * self.D, bias=False), seed=4)
        attention.v_proj = shaken(nn.Linear(self.HIDDEN, 1 * self.D, bias=False), seed=5)
        attention.o_proj = shaken(nn.Linear(2 * self.D, self.HIDDEN, bias=False), seed=6)
        hidden, cos, sin, _, (_, q, k, _) = self.run(attention)
        close(
            q, naive_rotate(naive_heads(hidden, attention.q_proj, self.D), cos, sin), "q where q_proj has 2 heads left"
        )
        close(
            k, naive_rotate(naive_heads(hidden, attention.k_proj, self.D), cos, sin), "k where k_proj has 1 head left"
        )


def recording(calls: list):
    """Causal attention that writes down the layer it was called for."""

    def attend(layer, q, k, v):
        calls.append(layer)
        return naive_attention(q, k, v)

    return attend


@exercise("2.5", points=2)
class TestRunLayers:
    def by_hand(self, model, hidden, positions, layers):
        """Layer after layer, with tables made here."""
        cos, sin = model.rotary(positions)
        for layer in layers:
            hidden = model.model.layers[layer](hidden, cos, sin, recording([]))
        return hidden

    def check(self, code, positions, layers, what, model=None):
        model = model or built(code, "llama-3")[0]
        hidden, calls = noise(len(positions), 16, seed=1), []
        with torch.inference_mode():
            out = model.run_layers(hidden.clone(), torch.tensor(positions), recording(calls), layers)
            expected = self.by_hand(model, hidden, torch.tensor(positions), layers)
        equal(calls, list(layers), f"the layers that {what} passes through")
        close(out, expected, what, rtol=1e-4, atol=1e-4)

    def test_all_layers(self, code):
        self.check(code, [0, 1, 2], range(2), "run_layers at positions 0, 1, 2 through layers 0 and 1")

    def test_positions(self, code):
        self.check(code, [1000, 3, 7], range(2), "run_layers at positions 1000, 3, 7")

    def test_positions_reach_attend(self, code):
        """Attention among these tokens depends on their distances only; in a cache, tokens with other positions lie."""
        model, got = built(code, "llama-3")[0], []
        hidden, positions = noise(3, 16, seed=1), torch.tensor([1000, 3, 7])

        def attend(layer, q, k, v):
            got.append(k)
            return q

        with torch.inference_mode():
            model.run_layers(hidden, positions, attend, range(1))
            found = got[0]
            model.model.layers[0](hidden, *model.rotary(positions), attend)
        close(found, got[-1], "the k that `attend` gets in layer 0, at positions 1000, 3, 7", rtol=1e-4, atol=1e-4)

    def test_the_model_s_own_tables(self, code):
        """YaRN multiplies cosines and sines by a factor, too."""
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
        config = {**snapshot("llama-3")[0].config, "rope_scaling": yarn, "max_position_embeddings": 64}
        config.pop("rope_parameters", None)
        model = code.Llama(code.parse_config(config))
        code.load_weights(model, snapshot("llama-3")[0])
        self.check(code, [0, 1, 2], range(2), "run_layers of a Llama with YaRN, at positions 0, 1, 2", model)

    def test_the_tables_are_made_once(self, code):
        model, calls = built(code, "llama-3")[0], []
        rotary = model.rotary
        model.rotary = lambda positions: calls.append(0) or rotary(positions)
        with torch.inference_mode():
            model.run_layers(noise(2, 16), torch.tensor([0, 1]), recording([]), range(2))
        holds(
            len(calls) < 2,
            f"`rotary` was called {len(calls)} times for 2 layers, whose tables are the same.",
            len(calls),
        )

    def test_some_layers(self, code):
        self.check(code, [4, 5], range(1, 2), "run_layers through layer 1 alone")

    def test_the_first_layer(self, code):
        self.check(code, [4, 5], range(0, 1), "run_layers through layer 0 alone")

    def test_no_layer(self, code):
        self.check(code, [4, 5], range(2, 2), "run_layers through no layer")

    def test_on_another_device(self, code):
        model = built(code, "llama-3")[0].to("meta")  # all but `frequencies`, which is no parameter
        hidden, positions = noise(3, 16).to("meta"), torch.arange(3, device="meta")
        elsewhere(
            lambda: model.run_layers(hidden, positions, lambda layer, q, k, v: q, range(2)),
            "run_layers",
            "`hidden.device`, where `self.frequencies` must be brought",
        )


@exercise("2.6")
class TestLogits:
    def test_by_hand(self, code):
        # A model of 2 numbers and 3 words: [3, 4] has a root mean square of 3.5355.
        config = code.ModelConfig(
            vocab_size=3, hidden_size=2, intermediate_size=2, num_hidden_layers=0, num_attention_heads=1,
            num_key_value_heads=1, head_dim=2, rms_norm_eps=0.0,
        )  # fmt: skip
        model = shaken(code.Llama(config))
        model.model.norm.weight.data = torch.tensor([1.0, 10.0])
        model.lm_head.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        rms = math.sqrt(12.5)
        with torch.inference_mode():
            close(
                model.logits(torch.tensor([[3.0, 4.0]])),
                torch.tensor([[3 / rms, 40 / rms, 43 / rms]]),
                "logits of hidden [3, 4], norm weight [1, 10], head [1, 0], [0, 1], [1, 1]",
            )

    def test_rows(self, code):
        for family in ("qwen2", "qwen2.5"):
            model, _ = built(code, family)
            hidden = noise(4, 16, seed=2)
            with torch.inference_mode():
                expected = naive_norm(hidden, model.model.norm) @ model.lm_head.weight.T
                close(model.logits(hidden), expected, f"logits of 4 rows, {family}", rtol=1e-4, atol=1e-4)
                close(model.logits(hidden[2:3]), expected[2:3], f"logits of 1 row, {family}", rtol=1e-4, atol=1e-4)


@exercise("2.7", points=2)
class TestLlamaForward:
    def test_what_comes_back(self, code):
        model, expected = built(code, "llama-2")
        calls, positions = [], torch.tensor([9, 0, 1, 2, 30, 5, 10])
        with torch.inference_mode():
            hidden = model(expected["token_ids"], positions, recording(calls))
            embedded = model.model.embed_tokens.weight[expected["token_ids"]]
            through = model.run_layers(embedded, positions, recording([]), range(2))
        equal(calls, [0, 1], "the layers for which `attend` is called")
        close(
            hidden, through, "the hidden states after the last layer, before the norm (Llama 2)", rtol=1e-4, atol=1e-4
        )

    def test_the_embedding_is_asked(self, code):
        """Lesson 7 stores the table in fewer bits, of which its layer makes rows."""
        model, _ = built(code, "llama-2")
        rows = noise(3, 16, seed=4)

        class Table(nn.Module):
            weight = torch.zeros(61, 16, dtype=torch.int8)

            def forward(self, token_ids):
                return rows[token_ids - 50]

        model.model.embed_tokens = Table()
        with torch.inference_mode():
            hidden = model(torch.tensor([52, 50]), torch.arange(2), recording([]))
            expected = model.run_layers(rows[[2, 0]], torch.arange(2), recording([]), range(2))
        what = "the hidden states where `embed_tokens` makes rows of numbers in eight bits, as lesson 7 stores them,"
        close(hidden, expected, what, rtol=1e-4, atol=1e-4)

    def test_attend_is_the_one_handed_in(self, code):
        model, expected = built(code, "llama-2")
        with torch.inference_mode():
            hidden = model(expected["token_ids"], torch.arange(7), lambda layer, q, k, v: torch.zeros_like(q))
            embedded = model.model.embed_tokens.weight[expected["token_ids"]]
            through = model.run_layers(embedded, torch.arange(7), lambda layer, q, k, v: torch.zeros_like(q), range(2))
        close(hidden, through, "the hidden states when `attend` returns zeros", rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_equals_transformers(self, code, family):
        model, expected = built(code, family)
        for start in (0, 1000):
            with torch.inference_mode():
                hidden = model(expected["token_ids"], torch.arange(start, start + 7), code.causal_attend)
                logits = model.logits(hidden)
            what = f"logits of a tiny {family}, positions from {start}, beside transformers'"
            close(logits, expected[f"logits_{start}"], what, rtol=0, atol=1e-4)


# --- From the disk into the model -------------------------------------------------------------------------------------


class FakeCheckpoint:
    """A checkpoint in memory that counts how many of the tensors that it has read out are alive at once."""

    folder = Path("checkpoint")

    def __init__(self, tensors: dict[str, torch.Tensor]):
        self.tensors = tensors
        self.alive = self.most_alive = 0

    def names(self):
        return sorted(self.tensors)

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def file(self, name):
        return self.folder / ("b.safetensors" if "norm" in name else "a.safetensors")

    def read(self, name, index=...):
        tensor = self.tensors[name][index].clone()
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        weakref.finalize(tensor, self.died)
        return tensor

    def died(self):
        self.alive -= 1


def what_it_says(call) -> str:
    """The text of the CheckpointError, or that there was none."""
    try:
        call()
    except CheckpointError as error:
        return str(error)
    return "no CheckpointError"


@exercise("2.8", points=3, seconds=30)
class TestLoadWeights:
    def model(self, code, dtype=torch.float32, device="cpu", **changes):
        config = code.ModelConfig(
            **{
                **dict(vocab_size=7, hidden_size=6, intermediate_size=5, num_hidden_layers=2, num_attention_heads=2),
                **dict(num_key_value_heads=1, head_dim=4),
                **changes,
            }
        )
        with torch.device(device):
            return code.Llama(config).to(dtype)

    def tensors(self, code, dtype=torch.float32, **changes):
        names = dict(self.model(code, **changes).named_parameters())
        return {name: noise(*p.shape, seed=i).to(dtype) for i, (name, p) in enumerate(sorted(names.items()))}

    def loaded(self, code, tensors, **changes):
        model, checkpoint = self.model(code, **changes), FakeCheckpoint(tensors)
        code.load_weights(model, checkpoint)
        return model, checkpoint

    def all_equal(self, model, tensors):
        parameters = dict(model.named_parameters())
        for name, tensor in tensors.items():
            close(parameters[name].detach(), tensor, name)

    def test_every_parameter(self, code):
        for changes in ({}, {"qkv_bias": True}, {"qk_norm": True}):
            tensors = self.tensors(code, **changes)
            self.all_equal(self.loaded(code, tensors, **changes)[0], tensors)

    def test_meta_device(self, code):
        tensors = self.tensors(code)
        model, _ = self.loaded(code, tensors, device="meta")
        self.none_on_meta(model)
        self.all_equal(model, tensors)

    def none_on_meta(self, model):
        still = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        holds(
            not still,
            f"these are still on the meta device, where a tensor has no values: {', '.join(still[:3])}.",
            actual=", ".join(still),
        )

    def test_no_gradients(self, code):
        model, _ = self.loaded(code, self.tensors(code))
        wanting = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        holds(
            not wanting,
            f"{len(wanting)} parameters ask for gradients; inference needs none (requires_grad=False).",
            actual=wanting,
        )

    def test_dtype_of_the_parameter(self, code):
        for file, wanted in ((torch.float16, torch.float32), (torch.float32, torch.bfloat16)):
            model, _ = self.loaded(code, self.tensors(code, dtype=file), dtype=wanted, device="meta")
            found = {str(parameter.dtype) for parameter in model.parameters()}
            equal(sorted(found), [str(wanted)], f"dtypes where the file has {file} and the model was built in {wanted}")

    def test_each_layer_reads_what_it_needs(self, code):
        """A layer of which half is elsewhere, as in lesson 6: it expects the whole matrix, and reads two rows of it."""
        model, tensors, name = self.model(code, device="meta"), self.tensors(code), "model.layers.1.self_attn.k_proj"

        class Half(code.Layer):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.empty(2, 6, device="meta"))

            def shapes(self):
                return {"weight": (4, 6)}

            def load(self, read):
                self.put("weight", read("weight", range(1, 3), range(6)))

        model.model.layers[1].self_attn.k_proj = half = Half()
        said = what_it_says(lambda: code.load_weights(model, FakeCheckpoint(tensors)))
        equal(said, "no CheckpointError", f"loading where {name} needs (4, 6) and keeps rows 1 and 2")
        close(half.weight.detach(), tensors[f"{name}.weight"][1:3], f"{name}, which keeps rows 1 and 2 of its matrix")

    def test_one_at_a_time(self, code):
        _, checkpoint = self.loaded(code, self.tensors(code, dtype=torch.float16), device="meta")
        holds(
            checkpoint.most_alive <= 3,
            f"{checkpoint.most_alive} tensors of the file were in memory at once, beside the model's own: a model "
            "that just fits does not fit twice. Read one, convert it, put it in place, then the next.",
            actual=checkpoint.most_alive,
        )

    def test_tied(self, code):
        changes = {"tie_word_embeddings": True}
        tensors = self.tensors(code, **changes)
        said = what_it_says(lambda: self.loaded(code, tensors, **changes))
        equal(said, "no CheckpointError", "loading a tied model whose file has no lm_head.weight")
        model, _ = self.loaded(code, tensors, device="meta", **changes)
        self.none_on_meta(model)
        close(model.model.embed_tokens.weight.detach(), tensors["model.embed_tokens.weight"], "the embedding, tied")
        holds(
            model.lm_head.weight is model.model.embed_tokens.weight,
            "the head is tied, and after loading lm_head.weight is not the embedding's own tensor.",
            actual=(model.lm_head.weight.is_meta, "apart"),
        )

    def test_tied_head_in_the_file(self, code):
        changes = {"tie_word_embeddings": True}
        tensors = {**self.tensors(code, **changes), "lm_head.weight": torch.full((7, 6), 5.0)}
        said = what_it_says(lambda: self.loaded(code, tensors, **changes))
        equal(said, "no CheckpointError", "loading a tied model whose file has a lm_head.weight too")
        model, _ = self.loaded(code, tensors, **changes)
        expected = tensors["model.embed_tokens.weight"]
        close(model.lm_head.weight.detach(), expected, "the head of a tied model whose file has another lm_head.weight")

    def test_old_rotary_buffers(self, code):
        tensors = {**self.tensors(code), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
        said = what_it_says(lambda: self.loaded(code, tensors))
        equal(said, "no CheckpointError", "loading a file with model.layers.0.self_attn.rotary_emb.inv_freq")

    def test_missing(self, code):
        tensors = self.tensors(code)
        del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.norm.weight"]
        self.told(code, tensors, "two tensors are missing", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
        tensors = self.tensors(code)
        del tensors["lm_head.weight"]
        self.told(code, tensors, "the head is missing and not tied", ["lm_head.weight"])
        tensors = self.tensors(code, qkv_bias=True)
        del tensors["model.layers.1.self_attn.q_proj.bias"]
        case = "a bias of q is missing, which the config asks for"
        self.told(code, tensors, case, ["model.layers.1.self_attn.q_proj.bias"], qkv_bias=True)

    def test_unknown(self, code):
        tensors = self.tensors(code)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(8)
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.ones(5, 6)
        tensors["model.layers.0.self_attn.rotary_emb.weight"] = torch.ones(2)
        names = [
            "model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight",
            "model.layers.0.self_attn.rotary_emb.weight",
        ]  # fmt: skip
        self.told(code, tensors, "the file has three tensors more than the model", names)

    def test_misshapen(self, code):
        name = "model.layers.1.self_attn.o_proj.weight"
        tensors = self.tensors(code)
        tensors[name] = tensors[name].T.contiguous()
        self.told(code, tensors, f"{name} is transposed", [name, "8, 6", "6, 8", "a.safetensors"])

    def told(self, code, tensors, case, mentions, **changes):
        model, checkpoint = self.model(code, **changes), FakeCheckpoint(tensors)
        try:
            said = what_it_says(lambda: code.load_weights(model, checkpoint))
        except KeyError:  # of the checkpoint in memory, which was asked for a tensor that it lacks
            said = "a KeyError"
        for mention in mentions:
            holds(
                mention in said,
                f"where {case}, the CheckpointError should mention {mention!r}; load_weights gives: {said}.",
                actual=said,
            )
        holds(
            checkpoint.most_alive == 0,
            f"where {case}, load_weights should say so before it reads any tensor; it has read some.",
            actual="read",
        )


# --- From scores to a token -------------------------------------------------------------------------------------------

NO = -math.inf


def unchanged(before: torch.Tensor, logits: torch.Tensor) -> None:
    holds(torch.equal(before, logits), "the logits that were handed in have been changed.", actual=logits.clone())


@exercise("2.9")
class TestKeepTopK:
    def test_by_hand(self, code):
        logits = torch.tensor([1.0, 4.0, 2.0, -3.0, 3.0])
        close(
            code.keep_top_k(logits.clone(), 2),
            torch.tensor([NO, 4.0, NO, NO, 3.0]),
            "keep_top_k([1, 4, 2, -3, 3], k=2)",
        )
        close(code.keep_top_k(logits.clone(), 1), torch.tensor([NO, 4.0, NO, NO, NO]), "keep_top_k(..., k=1)")

    def test_ties(self, code):
        close(
            code.keep_top_k(torch.tensor([2.0, 5.0, 2.0, 1.0, 2.0]), 2),
            torch.tensor([2.0, 5.0, 2.0, NO, 2.0]),
            "keep_top_k([2, 5, 2, 1, 2], k=2), where three tie for the second place",
        )

    def test_ties_for_the_first_place(self, code):
        close(
            code.keep_top_k(torch.tensor([5.0, 5.0, 2.0, 1.0]), 2),
            torch.tensor([5.0, 5.0, NO, NO]),
            "keep_top_k([5, 5, 2, 1], k=2), where two tie for the first place",
        )

    def test_more_than_there_are(self, code):
        logits = torch.tensor([1.0, 4.0, 2.0])
        close(code.keep_top_k(logits.clone(), 3), logits, "keep_top_k of 3 scores, k=3")
        close(code.keep_top_k(logits.clone(), 50), logits, "keep_top_k of 3 scores, k=50")

    def test_many(self, code):
        logits = noise(200, seed=1)
        ranks = sorted(logits.tolist(), reverse=True)
        for k in (1, 7, 199):
            expected = torch.tensor([x if x >= ranks[k - 1] else NO for x in logits.tolist()])
            close(code.keep_top_k(logits.clone(), k), expected, f"keep_top_k of 200 scores, k={k}")

    def test_another_dtype_and_device(self, code):
        logits = torch.tensor([1.0, 4.0, 2.0]).bfloat16()
        close(
            code.keep_top_k(logits, 1), torch.tensor([NO, 4.0, NO]).bfloat16(), "keep_top_k([1, 4, 2], k=1), bfloat16"
        )
        elsewhere(lambda: code.keep_top_k(logits.to("meta"), 1), "keep_top_k", "`logits.device`")

    def test_leaves_its_input(self, code):
        logits = torch.tensor([1.0, 4.0, 2.0])
        before = logits.clone()
        code.keep_top_k(logits, 1)
        unchanged(before, logits)


def naive_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Walk down from the likeliest until p is reached."""
    exponentials = [math.exp(x) for x in logits.tolist()]
    order = sorted(range(len(exponentials)), key=lambda i: -exponentials[i])
    kept, total = [], 0.0
    for i in order:
        kept.append(i)
        total += exponentials[i] / sum(exponentials)
        if total >= p:
            break
    return torch.tensor([x if i in kept else NO for i, x in enumerate(logits.tolist())])


@exercise("2.10", points=2)
class TestKeepTopP:
    LOGITS = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log()

    def check(self, code, p, kept, why):
        expected = torch.tensor([x if i in kept else NO for i, x in enumerate(self.LOGITS.tolist())])
        close(
            code.keep_top_p(self.LOGITS.clone(), p), expected, f"keep_top_p of 0.1, 0.4, 0.05, 0.3, 0.15, p={p} {why}"
        )

    def test_the_one_that_crosses(self, code):
        self.check(code, 0.6, {1, 3}, "(0.4 + 0.3 reaches it)")

    def test_one_always_stays(self, code):
        self.check(code, 0.2, {1}, "(0.4 alone reaches it)")

    def test_most(self, code):
        self.check(code, 0.9, {0, 1, 3, 4}, "(all but the last reach it)")

    def test_all(self, code):
        self.check(code, 1.0, {0, 1, 2, 3, 4}, "(it takes all)")

    def test_reached_exactly(self, code):
        kept = [int((code.keep_top_p(torch.zeros(4), p) > NO).sum()) for p in (0.25, 0.5, 0.75)]
        equal(kept, [1, 2, 3], "how many of four equally likely tokens keep_top_p leaves, p=0.25, 0.5 and 0.75")

    def test_scores_are_no_log_probabilities(self, code):
        logits = self.LOGITS + 3.0
        close(
            code.keep_top_p(logits.clone(), 0.6), naive_top_p(logits, 0.6), "keep_top_p after adding 3 to every score"
        )

    def test_after_another_filter(self, code):
        logits = torch.tensor([NO, 1.0, NO, 0.5, 0.2])
        close(
            code.keep_top_p(logits.clone(), 0.7),
            torch.tensor([NO, 1.0, NO, 0.5, NO]),
            "keep_top_p where two scores are -inf already, p=0.7",
        )

    def test_many(self, code):
        for seed, p in enumerate((0.3, 0.8, 0.99)):
            logits = 3 * noise(100, seed=seed)
            close(code.keep_top_p(logits.clone(), p), naive_top_p(logits, p), f"keep_top_p of 100 scores, p={p}")

    def test_another_dtype_and_device(self, code):
        logits = torch.tensor([1.0, 4.0, 2.0]).double()
        close(code.keep_top_p(logits, 0.5), torch.tensor([NO, 4.0, NO]).double(), "keep_top_p([1, 4, 2], 0.5), float64")
        elsewhere(lambda: code.keep_top_p(logits.to("meta"), 0.5), "keep_top_p", "`logits.device`")

    def test_leaves_its_input(self, code):
        logits = self.LOGITS.clone()
        code.keep_top_p(logits, 0.5)
        unchanged(self.LOGITS, logits)


@exercise("2.11")
class TestKeepMinP:
    LOGITS = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log()

    def check(self, code, p, kept):
        expected = torch.tensor([x if i in kept else NO for i, x in enumerate(self.LOGITS.tolist())])
        close(
            code.keep_min_p(self.LOGITS.clone(), p),
            expected,
            f"keep_min_p of 0.1, 0.4, 0.05, 0.3, 0.15, p={p} (the limit is {p} x 0.4 = {p * 0.4:.2g})",
        )

    def test_by_hand(self, code):
        self.check(code, 0.3, {1, 3, 4})

    def test_low(self, code):
        self.check(code, 0.2, {0, 1, 3, 4})

    def test_high(self, code):
        self.check(code, 0.9, {1})

    def test_as_likely_as_the_likeliest(self, code):
        close(
            code.keep_min_p(torch.tensor([1.0, 3.0, 2.0, 3.0]), 1.0),
            torch.tensor([NO, 3.0, NO, 3.0]),
            "keep_min_p([1, 3, 2, 3], p=1), where two are exactly p times as likely as the likeliest",
        )

    def test_scores_are_no_log_probabilities(self, code):
        logits = self.LOGITS + 2.0
        expected = logits.masked_fill(torch.tensor([True, False, True, False, False]), NO)
        close(code.keep_min_p(logits.clone(), 0.3), expected, "keep_min_p after adding 2 to every score, p=0.3")

    def test_large_scores(self, code):
        logits = torch.tensor([900.0, 903.0, 902.0])  # exp overflows above 88
        what = "keep_min_p([900, 903, 902], p=0.3)"
        close(code.keep_min_p(logits, 0.3), torch.tensor([NO, 903.0, 902.0]), what)

    def test_sure_and_unsure(self, code):
        sure, unsure = torch.tensor([9.0, 1.0, 1.0, 0.0, 0.5]), torch.tensor([1.1, 1.0, 1.0, 0.0, 0.5])
        kept = [int((code.keep_min_p(x.clone(), 0.2) > NO).sum()) for x in (sure, unsure)]
        equal(kept, [1, 5], "how many tokens keep_min_p(p=0.2) leaves of a sure and of an unsure distribution")

    def test_another_dtype_and_device(self, code):
        logits = torch.tensor([1.0, 4.0, 2.0]).double()
        close(code.keep_min_p(logits, 0.5), torch.tensor([NO, 4.0, NO]).double(), "keep_min_p([1, 4, 2], 0.5), float64")
        elsewhere(lambda: code.keep_min_p(logits.to("meta"), 0.5), "keep_min_p", "`logits.device`")

    def test_leaves_its_input(self, code):
        logits = self.LOGITS.clone()
        code.keep_min_p(logits, 0.5)
        unchanged(self.LOGITS, logits)


def naive_probs(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0) -> torch.Tensor:
    """Plain Python: each filter on what the one before left."""
    scores = {i: x / temperature for i, x in enumerate(logits.tolist())}

    def probabilities():
        top = max(scores.values())
        exponentials = {i: math.exp(x - top) for i, x in scores.items()}
        return {i: e / sum(exponentials.values()) for i, e in exponentials.items()}

    if top_k:
        scores = dict(sorted(scores.items(), key=lambda item: -item[1])[:top_k])
    if top_p < 1:
        kept, total = [], 0.0
        for i, p in sorted(probabilities().items(), key=lambda item: -item[1]):
            if total < top_p:
                kept.append(i)
            total += p
        scores = {i: scores[i] for i in kept}
    if min_p:
        chances = probabilities()
        scores = {i: scores[i] for i in scores if chances[i] >= min_p * max(chances.values())}
    chances = probabilities()
    return torch.tensor([chances.get(i, 0.0) for i in range(len(logits))])


@exercise("2.12", points=2)
class TestSamplingProbs:
    LOGITS = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0])

    def check(self, code, **settings):
        shown = ", ".join(f"{name}={value}" for name, value in settings.items())
        close(
            code.sampling_probs(self.LOGITS.clone(), code.SamplingParams(**settings)),
            naive_probs(self.LOGITS, **settings),
            f"sampling_probs([2, 0.5, 1, -1, 0], {shown})",
        )

    def test_temperature(self, code):
        self.check(code, temperature=2.0)
        self.check(code, temperature=0.5)

    def test_unset_filters_change_nothing(self, code):
        self.check(code, temperature=1.0)
        # The first token's probability is 1 in float32. A top_p of 1 would take it alone.
        logits = torch.tensor([30.0, 0.0, -2.0])
        close(
            code.sampling_probs(logits.clone(), code.SamplingParams(temperature=1.0)),
            naive_probs(logits),
            "sampling_probs([30, 0, -2], temperature=1)",
            rtol=1e-4,
            atol=0,
        )

    def test_one_left(self, code):
        self.check(code, temperature=1.0, top_k=1)

    def test_temperature_before_top_p(self, code):
        # At temperature 1 the first two reach 0.7; at 3 it takes three.
        self.check(code, temperature=3.0, top_p=0.7)

    def test_temperature_before_min_p(self, code):
        self.check(code, temperature=3.0, min_p=0.4)

    def test_top_k_before_top_p(self, code):
        # Of the two that top_k leaves, the first alone has 0.73; of all five it has only 0.55.
        self.check(code, temperature=1.0, top_k=2, top_p=0.7)

    def test_top_k_and_top_p(self, code):
        self.check(code, temperature=1.0, top_k=3, top_p=0.5)

    def test_top_p_before_min_p(self, code):
        # Of all five the first two have 0.77. Of the two that min_p would leave, the first alone has 0.73.
        self.check(code, temperature=1.0, top_p=0.7, min_p=0.3)

    def test_min_p_after_top_p(self, code):
        # top_p keeps four. The last of them is less than a fifth as likely as the first.
        self.check(code, temperature=1.0, top_p=0.9, min_p=0.2)

    def test_all_together(self, code):
        for settings in (
            dict(temperature=1.7, top_k=4, top_p=0.9, min_p=0.2),
            dict(temperature=0.6, top_k=3, top_p=0.95, min_p=0.05),
        ):
            self.check(code, **settings)

    def test_sixteen_bits(self, code):
        logits = noise(50, seed=3).to(torch.bfloat16)
        probabilities = code.sampling_probs(logits, code.SamplingParams(temperature=0.7))
        close(probabilities, naive_probs(logits.float(), temperature=0.7), "sampling_probs of bfloat16 logits")


ALIKE = (
    "Each pair of a seed and an index must start the random numbers differently; seed + index, for example, is the "
    "same for seed 1 at index 1 and for seed 2 at index 0."
)


@exercise("2.13", points=2)
class TestSample:
    def draws(self, code, logits, indices, **settings):
        params = code.SamplingParams(**{"temperature": 1.0, "seed": 7, **settings})
        drawn = [code.sample(logits.clone(), params, index) for index in indices]
        equal(drawn[0], int(drawn[0]) if isinstance(drawn[0], int) else 0, "what sample returns")
        return drawn

    def test_greedy(self, code):
        drawn = self.draws(code, torch.tensor([1.0, 1.5, 1.2, 0.3]), range(8), temperature=0.0)
        equal(drawn, [1] * 8, "eight tokens of [1, 1.5, 1.2, 0.3] at temperature 0")

    def test_greedy_ties(self, code):
        drawn = self.draws(code, torch.tensor([0.0, 2.0, 2.0]), [0], temperature=0.0)
        holds(
            drawn[0] in (1, 2), f"sample([0, 2, 2]) at temperature 0 is {drawn[0]}; 1 or 2 is right.", actual=drawn[0]
        )

    def test_the_same_seed_and_index_draw_the_same(self, code):
        logits = torch.zeros(1000)
        first = self.draws(code, logits, range(10))
        torch.rand(3)  # somebody else draws in between
        second = self.draws(code, logits, reversed(range(10)))[::-1]
        equal(second, first, "ten tokens, drawn again, last index first, with the same seed")

    def test_indices_draw_apart(self, code):
        drawn = self.draws(code, torch.zeros(1000), range(10))
        holds(
            len(set(drawn)) > 5,
            f"ten indices of one seed should draw about ten of 1000 equally likely tokens; they draw {drawn}.",
            actual=drawn,
        )

    def test_seeds_draw_apart(self, code):
        one, two = (self.draws(code, torch.zeros(1000), range(10), seed=seed) for seed in (1, 2))
        holds(one != two, f"seeds 1 and 2 draw the same ten tokens: {one}.", actual=one)
        holds(
            one[1:] != two[:-1],
            f"seed 2 draws at each index what seed 1 draws at the next one, {one[1:]}. {ALIKE}",
            actual=one,
        )

    def test_seeds_share_no_draws(self, code):
        one, two = (self.draws(code, torch.zeros(100_000), range(32), seed=seed) for seed in (1, 2))
        shared = sorted({*one} & {*two})
        holds(
            len(shared) < 4,
            f"of the 32 tokens that seed 1 draws, seed 2 draws {len(shared)} too, at other indices; of 100000 "
            f"equally likely tokens it should be none. {ALIKE}",
            actual=shared,
        )

    def test_late_tokens_draw_apart(self, code):
        """Seed 1 at index 1000 is no other than seed 2 at index 0, if both are `seed * 1000 + index`."""
        for step in (100, 128, 256, 1000, 1024, 4096, 10_000, 65_536, 100_000, 10**6):
            one = self.draws(code, torch.zeros(1000), range(step, step + 4), seed=1)
            two = self.draws(code, torch.zeros(1000), range(4), seed=2)
            holds(
                one != two,
                f"seed 1 draws at indices {step} to {step + 3} what seed 2 draws at 0 to 3, {one}. {ALIKE}",
                actual=(step, one),
            )

    def test_seed_0_is_a_seed(self, code):
        one, two = (self.draws(code, torch.zeros(1000), range(10), seed=0) for _ in range(2))
        equal(two, one, "ten tokens, drawn again with seed 0")

    def test_a_low_temperature_is_not_0(self, code):
        logits = torch.tensor([0.0, 0.05 * math.log(3)])
        drawn = self.draws(code, logits, range(200), temperature=0.05)
        holds(
            20 < drawn.count(0) < 80,
            f"200 draws at temperature 0.05 from two tokens, the second three times as likely, give the first "
            f"{drawn.count(0)} times; about 50 were expected.",
            actual=drawn.count(0),
        )

    def test_without_a_seed(self, code):
        one, two = (self.draws(code, torch.zeros(1000), range(10), seed=None) for _ in range(2))
        holds(one != two, f"seed None drew the same ten tokens twice: {one}.", actual=one)

    def test_the_global_generator_is_left_alone(self, code):
        before = torch.get_rng_state()
        self.draws(code, torch.zeros(1000), range(2))
        holds(
            torch.equal(before, torch.get_rng_state()),
            "sample changes the state of torch's global generator, which others draw from too.",
            actual="changed",
        )

    def test_frequencies(self, code):
        logits = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03]).log()
        n = 750
        for settings, what in (
            ({}, "temperature 1"),
            ({"temperature": 2.0}, "temperature 2"),
            ({"top_k": 2}, "temperature 1, top_k 2"),
            ({"top_p": 0.8, "temperature": 0.8}, "temperature 0.8, top_p 0.8"),
        ):
            expected = naive_probs(logits, **{"temperature": 1.0, **settings}) * n
            counts = torch.bincount(torch.tensor(self.draws(code, logits, range(n), **settings)), minlength=5)
            impossible = counts[expected == 0].sum()
            chi2 = ((counts - expected)[expected > 0].pow(2) / expected[expected > 0]).sum()
            holds(
                impossible == 0 and chi2 < 25,  # 4 degrees of freedom: above 25 once in 20,000 seeds
                f"{n} draws at {what} fell {counts.tolist()} times on tokens 0 to 4; about "
                f"{[round(x) for x in expected.tolist()]} were expected.",
                actual=counts.tolist(),
            )


# --- From tokens to text ----------------------------------------------------------------------------------------------


class Pieces:
    """A tokenizer whose token i adds the i-th of these pieces of bytes to the text."""

    bos_token_id, eos_token_ids, chat_template = None, frozenset(), None

    def __init__(self, pieces: list[bytes], eos: set[int] = frozenset()):
        self.pieces, self.eos_token_ids, self.vocab_size = pieces, frozenset(eos), len(pieces)

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]

    def decode(self, token_ids, skip_special_tokens=True) -> str:
        return b"".join(self.pieces[token_id] for token_id in token_ids).decode("utf-8", errors="replace")


def streamed(code, pieces: list[bytes]) -> list[str]:
    """What comes out at each piece, and at the end."""
    stream = code.TextStream(Pieces(pieces))
    return [*(stream.push(i) for i in range(len(pieces))), stream.flush()]


@exercise("2.14", points=2)
class TestTextStream:
    def test_plain(self, code):
        equal(streamed(code, [b"Once", b" upon", b" a"]), ["Once", " upon", " a", ""], "pushing Once, upon, a")

    def test_two_halves(self, code):
        equal(
            streamed(code, [b"caf", b"\xc3", b"\xa9", b"!"]),
            ["caf", "", "é", "!", ""],
            "pushing 'caf', the two bytes of 'é' apart, '!'",
        )

    def test_emoji(self, code):
        pieces = [bytes([byte]) for byte in "🙂a".encode()]
        equal(streamed(code, pieces), ["", "", "", "🙂", "a", ""], "pushing the four bytes of 🙂, then 'a'")

    def test_tokens_that_end_in_the_middle(self, code):
        text = "日本".encode()
        pieces = [text[:4], text[4:5], text[5:] + b" ok"]
        equal(
            streamed(code, pieces),
            ["日", "", "本 ok", ""],
            "pushing 日 with the first of the three bytes of 本, then the second byte, then the third with ' ok'",
        )

    def test_a_byte_order_mark(self, code):
        pieces = ["\ufeffa".encode(), b"b", "\ufeff".encode()]
        equal(streamed(code, pieces), ["\ufeffa", "b", "\ufeff", ""], "pushing U+FEFF with 'a', 'b', U+FEFF")

    def test_a_byte_that_never_fits(self, code):
        equal(
            streamed(code, [b"a", b"\xff", b"b"]),
            ["a", "\ufffd", "b", ""],
            "pushing 'a', the byte 0xFF (never valid), 'b'",
        )
        equal(
            streamed(code, [b"\xe6\x97", b"x", b"y"]),
            ["", "\ufffdx", "y", ""],
            "pushing the first two of the three bytes of 日, then 'x', then 'y'",
        )

    def test_special_tokens(self, code):
        equal(
            streamed(code, [b"\xc3", b"", b"\xa9"]),
            ["", "", "é", ""],
            "pushing the first byte of é, a token of no bytes, the second byte of é",
        )

    def test_the_end(self, code):
        equal(
            streamed(code, [b"ok", b"\xf0\x9f"]),
            ["ok", "", "\ufffd"],
            "pushing the first bytes of an emoji last, then flush",
        )

    def test_any_cut(self, code):
        generator = torch.Generator().manual_seed(5)
        text = "Grüße, мир! 漢字かな 🙂👩‍🚀 naïve".encode() + b"\xe2\x28\xa1 \xff" + "é".encode()
        for _ in range(20):
            cuts = sorted(torch.randint(0, len(text), (15,), generator=generator).tolist())
            pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
            equal(
                "".join(streamed(code, pieces)),
                text.decode(errors="replace"),
                "the text of all pieces and of flush, joined, for some ways to cut it into tokens",
            )

    def test_streams_do_not_share(self, code):
        one, two = code.TextStream(Pieces([b"\xc3"])), code.TextStream(Pieces([b"ok"]))
        one.push(0)
        equal(two.push(0), "ok", "what a second stream gives while the first holds half a character")


def checked(code, stop, pieces: list[str]) -> tuple[list[str], str | None]:
    """What may be shown after each piece (until the stop), and which stop string was found."""
    checker, shown = code.StopChecker(stop), []
    for piece in pieces:
        shown.append(checker.push(piece))
        if checker.found:
            return shown, checker.found
    return [*shown, checker.flush()], None


@exercise("2.15", points=3)
class TestStopChecker:
    def check(self, code, stop, pieces, shown, found, why):
        got_shown, got_found = checked(code, stop, pieces)
        what = f"stop {stop!r}, pieces {pieces!r}{why}"
        equal(got_shown, shown, f"what may be shown: {what}")
        equal(got_found, found, f"`found`: {what}")

    def test_no_stop(self, code):
        self.check(code, [], ["a", "b"], ["a", "b", ""], None, "")
        self.check(code, ["END"], ["Hello", " you"], ["Hello", " you", ""], None, " (nothing is held without need)")

    def test_within_a_piece(self, code):
        self.check(code, ["END"], ["all ENDed", "x"], ["all "], "END", "")

    def test_over_pieces(self, code):
        self.check(code, ["END"], ["all E", "N", "D more"], ["all ", "", ""], "END", " (it arrives in three)")

    def test_nothing_is_held_behind_a_stop(self, code):
        checker = code.StopChecker(["END"])
        for piece in ("all E", "N", "D more"):
            checker.push(piece)
        equal(checker.flush(), "", "flush, after 'END' was found in 'all E', 'N', 'D more' (nothing is held any more),")

    def test_a_false_alarm(self, code):
        self.check(code, ["END"], ["all E", "N", "T"], ["all ", "", "ENT", ""], None, " (EN turns out to be ENT)")
        self.check(code, ["END"], ["all EN"], ["all ", "EN"], None, " (nothing follows: flush gives EN)")

    def test_begins_again(self, code):
        self.check(code, ["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], "aab", " (the third a may be the second)")

    def test_one_begins_the_other(self, code):
        self.check(code, ["\n\nUser", "\n\n"], ["Yes", "\n", "\n", "User"], ["Yes", "", ""], "\n\n", "")

    def test_it_comes_twice(self, code):
        self.check(code, ["END"], ["a END b END c"], ["a "], "END", "")

    def test_letters_are_taken_as_they_are(self, code):
        self.check(code, ["END", "\n\n"], ["the end\r\n", "\r\n End"], ["the end\r", "\n\r\n End", ""], None, "")

    def test_the_longer_one_alone(self, code):
        self.check(code, ["\n\nUser"], ["Yes\n", "\n", "We"], ["Yes", "", "\n\nWe", ""], None, "")

    def test_the_first_in_the_text_counts(self, code):
        self.check(code, ["two", "one"], ["zero one two"], ["zero "], "one", "")

    def test_the_first_in_the_text_is_the_first_in_the_list(self, code):
        self.check(code, ["one", "two"], ["zero one two"], ["zero "], "one", "")

    def test_prefixes_of_two(self, code):
        self.check(code, ["xyz", "yab"], ["wxy", "q"], ["w", "xyq", ""], None, " (xy could be xyz, y yab)")
        self.check(code, ["xyz", "yab"], ["wxy", "ab"], ["w", "x"], "yab", " (xy could be xyz, y yab)")

    def test_whole_text(self, code):
        generator = torch.Generator().manual_seed(2)
        for _ in range(60):
            text = "".join("ab"[i] for i in torch.randint(0, 2, (12,), generator=generator).tolist())
            stop = ["abba", "bbb"]
            starts = [text.find(each) for each in stop if each in text]
            expected = text[: min(starts)] if starts else text
            shown, _ = checked(code, stop, list(text))
            equal("".join(shown), expected, f"all that was shown of {text!r}, letter by letter, stop {stop}")
        checker = code.StopChecker(["abba", "bbb"])
        shown = [checker.push(letter) for letter in "aaaab"]
        equal(shown, ["", "a", "a", "a", ""], "what may be shown of 'aaaab', letter by letter, stop ['abba', 'bbb']")


# --- The loop ---------------------------------------------------------------------------------------------------------

WORDS = [b"<s>", b"</s>", b"<end>", b" one", b" two", b" three", b" EN", b"D", b"T", b"\xf0\x9f", b"\x99\x82", b"!"]
WORDS.append(b"D\xf0\x9f")
S, EOS, END, ONE, TWO, THREE, EN, D, T, LEFT, RIGHT, BANG, D_LEFT = range(len(WORDS))


def scripted(code, script: list[int], context: int = 64, rival: int | None = None):
    """A Llama that says what a script says, whatever the prompt; `rival` is the second likeliest everywhere.

    It notes the tokens and positions of every forward, and how many rows it was asked the logits of.
    """

    class Scripted(code.Llama):
        def __init__(self):
            super().__init__(
                code.ModelConfig(
                    vocab_size=len(WORDS), hidden_size=4, intermediate_size=4, num_hidden_layers=1,
                    num_attention_heads=1, num_key_value_heads=1, head_dim=4, max_position_embeddings=context,
                )
            )  # fmt: skip
            self.forwards, self.rows, self.prompt_length = [], [], None

        def embed(self, token_ids):
            self.prompt_length = self.prompt_length or len(token_ids)
            return token_ids[:, None].float().repeat(1, 4)

        def run_layers(self, hidden, positions, attend, layers):
            self.forwards.append((hidden[:, 0].int().tolist(), positions.tolist()))
            return positions[:, None].float().repeat(1, 4)

        def logits(self, hidden):
            self.rows.append(len(hidden))
            scores = torch.zeros(len(hidden), len(WORDS))
            for row, position in enumerate(hidden[:, 0].int().tolist()):
                if rival is not None:
                    scores[row, rival] = 4.0
                place = position - self.prompt_length + 1
                scores[row, script[place] if 0 <= place < len(script) else S] = 5.0
            return scores

    return Scripted()


def tokenizer() -> Pieces:
    special = (S, EOS, END)
    return Pieces([b"" if i in special else word for i, word in enumerate(WORDS)], eos={EOS, END})


PROMPT = [S, THREE, TWO]


@exercise("2.17", points=4)
class TestGenerate:
    def run(self, code, script, context=64, rival=None, prompt=PROMPT, **settings):
        model, pieces = scripted(code, script, context, rival), []
        params = code.SamplingParams(**{"max_tokens": 8, **settings})
        output = code.generate(model, tokenizer(), list(prompt), params, pieces.append)
        holds(
            output is not None and len(output.token_ids) <= 64,
            "generate returned None: is a `return` missing?" if output is None else "generate went on past 64 tokens.",
        )
        return output, pieces, model

    def check(self, output, token_ids, text, reason, case):
        equal(output.token_ids, token_ids, f"token_ids: {case}")
        equal(output.text, text, f"text: {case}")
        equal(output.finish_reason, reason, f"finish_reason: {case}")

    def test_end_of_sequence(self, code):
        output, pieces, _ = self.run(code, [ONE, TWO, EOS, THREE])
        self.check(output, [ONE, TWO, EOS], " one two", "stop", "the model says one, two, </s>")
        equal(pieces, [" one", " two"], "the pieces that on_text gets: the model says one, two, </s>")

    def test_another_end_of_sequence(self, code):
        output, _, _ = self.run(code, [ONE, END, TWO])
        self.check(output, [ONE, END], " one", "stop", "one, <end>, which is an eos token too")

    def test_every_step_sees_all(self, code):
        seen, script = [], iter([ONE, TWO, EOS])

        def next_logits(token_ids):
            seen.append([int(token_id) for token_id in token_ids])
            return torch.nn.functional.one_hot(torch.tensor(next(script)), len(WORDS)).float()

        model = scripted(code, [])
        code.generate(model, tokenizer(), list(PROMPT), code.SamplingParams(), lambda piece: None, next_logits)
        equal(
            seen,
            [[S, THREE, TWO], [S, THREE, TWO, ONE], [S, THREE, TWO, ONE, TWO]],
            "the tokens that next_logits gets in three steps, where the model says one, two, </s>",
        )

    def test_max_tokens(self, code):
        output, _, _ = self.run(code, [ONE, TWO, THREE, EOS], max_tokens=2)
        self.check(output, [ONE, TWO], " one two", "length", "max_tokens=2")
        output, _, _ = self.run(code, [ONE, EOS, THREE], max_tokens=2)
        self.check(output, [ONE, EOS], " one", "stop", "max_tokens=2, and the second token ends the sequence")

        output, _, _ = self.run(code, [ONE, EN, D, TWO], max_tokens=3, stop="END")
        self.check(output, [ONE, EN, D], " one ", "stop", "max_tokens=3, and the third token completes stop='END'")

    def test_context_is_full(self, code):
        output, _, model = self.run(code, [ONE, TWO, THREE, ONE], context=5)
        self.check(output, [ONE, TWO], " one two", "length", "a context of 5 and a prompt of 3")
        equal(max(len(ids) for ids, _ in model.forwards), 4, "the most tokens in a forward, with a context of 5")

    def test_ignore_eos(self, code):
        output, _, _ = self.run(code, [ONE, EOS, TWO, THREE], ignore_eos=True, max_tokens=3)
        self.check(output, [ONE, EOS, TWO], " one two", "length", "ignore_eos, one, </s>, two")

    def test_stop_token(self, code):
        output, _, _ = self.run(code, [ONE, BANG, TWO], stop_token_ids=[BANG])
        self.check(output, [ONE, BANG], " one", "stop", "one, !, and ! is a stop token")
        output, _, _ = self.run(code, [ONE, BANG, TWO], stop_token_ids=[BANG], ignore_eos=True)
        self.check(output, [ONE, BANG], " one", "stop", "one, !, and ! is a stop token, with ignore_eos")

    def test_stop_string(self, code):
        output, pieces, _ = self.run(code, [ONE, EN, D, TWO], stop="END")
        self.check(output, [ONE, EN, D], " one ", "stop", "stop='END', one, ' EN', 'D'")
        equal("".join(pieces), " one ", "what on_text got: stop='END', one, ' EN', 'D'")
        output, _, _ = self.run(code, [ONE, EN, D_LEFT, TWO], stop="END")
        self.check(
            output, [ONE, EN, D_LEFT], " one ", "stop", "stop='END', one, ' EN', 'D' and half of 🙂 in one token"
        )

    def test_stop_string_that_was_none(self, code):
        output, pieces, _ = self.run(code, [ONE, EN, T, EOS], stop="END")
        self.check(output, [ONE, EN, T, EOS], " one ENT", "stop", "stop='END', one, ' EN', 'T'")
        output, pieces, _ = self.run(code, [ONE, EN, EOS], stop="END")
        self.check(output, [ONE, EN, EOS], " one EN", "stop", "stop='END', one, ' EN', </s>")
        equal("".join(pieces), " one EN", "what on_text got: stop='END', one, ' EN', </s>")

    def test_characters_over_tokens(self, code):
        output, pieces, _ = self.run(code, [LEFT, RIGHT, BANG, EOS])
        self.check(output, [LEFT, RIGHT, BANG, EOS], "🙂!", "stop", "two halves of 🙂, then !")
        equal(pieces, ["🙂", "!"], "the pieces that on_text gets: two halves of 🙂, then !")
        output, _, _ = self.run(code, [ONE, EN, LEFT, EOS], stop="END")
        self.check(output, [ONE, EN, LEFT, EOS], " one EN\ufffd", "stop", "stop='END', one, ' EN', half of 🙂, </s>")
        output, _, _ = self.run(code, [ONE, LEFT, EOS])
        self.check(output, [ONE, LEFT, EOS], " one\ufffd", "stop", "it ends on half of 🙂")
        output, _, _ = self.run(code, [ONE, LEFT, TWO], max_tokens=2)
        self.check(output, [ONE, LEFT], " one\ufffd", "length", "max_tokens=2, the second is half of 🙂")

    def test_min_tokens(self, code):
        output, _, _ = self.run(code, [EOS, EOS, ONE, EOS], rival=TWO, min_tokens=2)
        self.check(output, [TWO, TWO, ONE, EOS], " two two one", "stop", "min_tokens=2, </s> likeliest, two second")

    def test_min_tokens_at_a_temperature(self, code):
        settings = dict(min_tokens=2, temperature=0.01, seed=1)
        output, _, _ = self.run(code, [EOS, EOS, ONE, EOS], rival=TWO, **settings)
        case = "min_tokens=2, </s> likeliest, two second, at temperature 0.01"
        self.check(output, [TWO, TWO, ONE, EOS], " two two one", "stop", case)

    def test_a_stop_string_before_min_tokens(self, code):
        script = [EN, D, ONE, EN, D, TWO]
        output, _, _ = self.run(code, script, stop="END", min_tokens=3)
        case = "stop='END', min_tokens=3: ' EN', 'D', one, ' EN', 'D' (the first END is too early)"
        self.check(output, script[:5], " END one ", "stop", case)
        output, _, _ = self.run(code, [ONE, EN, D, EN, D], stop="D", min_tokens=2)
        case = "stop='D', min_tokens=2: one, ' EN', 'D' (the third token may end it)"
        self.check(output, [ONE, EN, D], " one EN", "stop", case)
        output, _, _ = self.run(code, [ONE, EN, D, TWO, D], stop="D", min_tokens=3)
        case = "stop='D', min_tokens=3: one, ' EN', 'D', two, 'D' (the third token is one of the first three)"
        self.check(output, [ONE, EN, D, TWO, D], " one END two", "stop", case)

    def test_penalties(self, code):
        output, _, _ = self.run(code, [ONE, ONE, ONE, EOS], rival=TWO, presence_penalty=2.0, max_tokens=3)
        self.check(output, [ONE, TWO, ONE], " one two one", "length", "presence_penalty=2, one likeliest, two second")

    def test_repetition_penalty(self, code):
        output, _, _ = self.run(code, [TWO, EOS], rival=ONE, repetition_penalty=2.0, max_tokens=1)
        self.check(output, [ONE], " one", "length", "repetition_penalty=2, two likeliest but in the prompt, one second")

    def test_sampling(self, code):
        script = [ONE, TWO, THREE, ONE, TWO, THREE]
        settings = dict(temperature=2.0, seed=11, max_tokens=6, ignore_eos=True)
        output, _, _ = self.run(code, script, **settings)
        params, expected = code.SamplingParams(**settings), []
        for index, token_id in enumerate(script):
            logits = torch.zeros(len(WORDS))
            logits[token_id] = 5.0
            expected.append(code.sample(logits, params, index))
        equal(
            output.token_ids, expected, "six tokens at temperature 2, seed 11: token i is `sample(logits, params, i)`"
        )

    def test_logprobs(self, code):
        output, _, _ = self.run(code, [ONE, EOS], rival=TWO, logprobs=2, presence_penalty=1.0)
        total = math.log(math.exp(5) + math.exp(4) + len(WORDS) - 2)
        equal(len(output.logprobs), 2, "how many entries logprobs has after two tokens")
        equal(sorted(output.logprobs[0]), [ONE, TWO], "the tokens in logprobs[0], where logprobs=2")
        close(output.logprobs[0][ONE], 5 - total, "logprobs[0] of the token that was chosen")
        output, _, _ = self.run(code, [ONE, EOS], rival=TWO, logprobs=1, min_tokens=1)
        close(output.logprobs[0][ONE], 5 - total, "logprobs are the model's own, whatever min_tokens and penalties do")
        output, _, _ = self.run(code, [ONE, EOS], rival=TWO, logprobs=0)
        reported = [len(output.logprobs), *map(list, output.logprobs)]
        equal(reported, [2, [ONE], [EOS]], "[entries, tokens in the first, tokens in the second], for logprobs=0")
        output, _, _ = self.run(code, [ONE, EOS])
        equal(output.logprobs, [], "logprobs where none were asked for")

    def test_the_prompt_is_left_alone(self, code):
        prompt, model = list(PROMPT), scripted(code, [ONE, TWO, EOS])
        code.generate(model, tokenizer(), prompt, code.SamplingParams())
        equal(prompt, PROMPT, "the prompt's list, after generate")


@exercise("2.16", points=1)
class TestRecompute:
    def test_one_forward_over_all(self, code):
        model = scripted(code, [ONE])
        scores = code.recompute(model, [S, THREE, TWO])
        equal(model.forwards, [([S, THREE, TWO], [0, 1, 2])], "(token ids, positions) of the forward over [0, 5, 4]")
        expected = torch.zeros(len(WORDS))
        expected[ONE] = 5.0
        close(scores, expected, "recompute(model, [0, 5, 4]), where the model says 3 after these tokens")
        equal(model.rows, [1], "how many rows `logits` is asked for (the last one is enough)")

    def test_a_real_model(self, code):
        model, expected = built(code, "llama-3")
        token_ids = expected["token_ids"].tolist()
        with torch.no_grad():
            scores = code.recompute(model, token_ids)
        equal(
            int(scores.argmax()), int(expected["continuation"][0]), "the likeliest token after a prompt of the snapshot"
        )

    def test_on_another_device(self, code):
        model = built(code, "llama-3")[0].to("meta")
        elsewhere(lambda: code.recompute(model, [5, 3, 1]), "recompute", "the weights' device")


@together()
class TestTogether:
    """Your whole file: a checkpoint on disk, loaded, speaking."""

    @pytest.mark.parametrize("family", FAMILIES)
    def test_from_disk_to_tokens(self, code, family):
        model, expected = built(code, family)
        prompt = expected["token_ids"].tolist()
        output = code.generate(model, Pieces([b"."] * 61), prompt, code.SamplingParams(max_tokens=6))
        equal(output.token_ids, expected["continuation"].tolist(), f"six greedy tokens of the tiny {family}")

    def test_load(self, code):
        model, tokenizer = code.load(str(SNAPSHOTS / "llama-3"), dtype=torch.float32, device="cpu")
        pieces: list[str] = []
        params = code.SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, seed=3, ignore_eos=True)
        output = code.generate(model, tokenizer, tokenizer.encode("abc"), params, pieces.append)
        equal(len(output.token_ids), 12, "how many tokens `generate` gives of a loaded checkpoint, max_tokens=12")
        equal("".join(pieces), output.text, "the pieces of on_text, joined, beside output.text")
        equal(output.text, tokenizer.decode(output.token_ids), "output.text beside the tokenizer's decode")
