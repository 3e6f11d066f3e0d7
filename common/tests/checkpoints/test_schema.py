"""What a checkpoint's JSON files may say, and what absent keys mean: refusals name file, key and value."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from common.checkpoints import MODELS, Checkpoint, CheckpointError, check_config
from common.checkpoints.schema import FAMILIES, Moe
from common.tokenizer import load_tokenizer

SIZES = dict(vocab_size=100, hidden_size=128, intermediate_size=80, num_hidden_layers=2, num_attention_heads=32)
LLAMA = {"model_type": "llama", **SIZES}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip

NAMES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe"}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_absent_key_means_what_it_means_to_transformers(family):
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, NAMES[family] + "Config")(**SIZES)
    ours = check_config({"model_type": family, **SIZES})
    assert (ours.num_key_value_heads or 32) == theirs.num_key_value_heads
    assert (ours.head_dim or 4) == (getattr(theirs, "head_dim", None) or 4)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    theirs_windows = [theirs.sliding_window] * 2 if family == "mistral" else [None, None]
    assert list(ours.layer_windows or [None] * 2) == theirs_windows
    for key in ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "hidden_act"):
        assert getattr(ours, key) == getattr(theirs, key), key
    for key in ("attention_bias", "mlp_bias"):
        assert getattr(ours, key) == getattr(theirs, key, False), key


def test_experts_by_layer():
    """As transformers chooses the layers: every `decoder_sparse_step`-th, except for `mlp_only_layers`."""
    config = {**SIZES, "model_type": "qwen3_moe", "num_hidden_layers": 7}
    assert check_config(config).moe == Moe(tuple(range(7)), 128, 8, 768, False)
    own = {"num_local_experts": 6, "num_experts_per_tok": 2, "decoder_sparse_step": 2, "mlp_only_layers": [3, 99]}
    assert check_config({**config, **own}).moe.layers == (1, 5)
    assert check_config({**config, **own}).moe.num_experts == 6
    assert check_config({**config, "num_experts": 0}).moe is check_config({**LLAMA, **own}).moe is None
    with pytest.raises(CheckpointError, match="config.json: num_experts_per_tok is 7; there are 6 experts"):
        check_config({**config, **own, "num_experts_per_tok": 7})
    with pytest.raises(CheckpointError, match="config.json: num_local_experts is 'six'; expected `int`, got `str`"):
        check_config({**config, "num_local_experts": "six"})


def test_a_null_is_an_absent_key_unless_the_family_says_otherwise():
    nulls = dict.fromkeys(
        ("num_key_value_heads", "head_dim", "rms_norm_eps", "rope_scaling", "max_position_embeddings")
    )
    ours = check_config({"model_type": "qwen3", **SIZES, **nulls})
    assert (ours.num_key_value_heads, ours.head_dim, ours.rms_norm_eps, ours.rope_scaling) == (None, 128, 1e-6, None)
    assert ours.max_position_embeddings == 32768


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_rotary_settings_of_all_ages(place):
    plain = {"rope_type": "default", "factor": 4.0, "rope_theta": 7.0}
    ours = check_config({**LLAMA, place: plain})
    assert (ours.rope_theta, ours.rope_scaling) == (7.0, None)
    ours = check_config({**LLAMA, "rope_theta": 9.0, place: {"type": "linear", "factor": 4}})
    assert (ours.rope_theta, ours.rope_scaling) == (9.0, {"rope_type": "linear", "factor": 4.0})
    assert check_config({**LLAMA, place: {"type": "yarn", "factor": 4}}).max_position_embeddings == 4 * 2048
    assert check_config({**LLAMA, place: {"type": "dynamic", "factor": 2}}).max_position_embeddings == 2 * 2048
    ours = check_config({**LLAMA, "original_max_position_embeddings": 32, place: LLAMA3})  # 64; transformers takes 32
    assert ours.rope_scaling["original_max_position_embeddings"] == 32


def test_windows_by_layer():
    qwen = {**LLAMA, "model_type": "qwen2", "num_key_value_heads": 4, "sliding_window": 8, "max_window_layers": 1}
    assert check_config(qwen).layer_windows == ()  # without use_sliding_window, Qwen's numbers mean nothing
    qwen["use_sliding_window"] = True
    assert check_config(qwen).layer_windows == (None, 8)
    assert check_config({**qwen, "layer_types": ["sliding_attention", "full_attention"]}).layer_windows == (8, None)
    assert check_config({**qwen, "max_window_layers": 2}).layer_windows == ()
    mistral = {**LLAMA, "model_type": "mistral"}
    assert check_config(mistral).layer_windows == (4096, 4096)
    assert check_config({**mistral, "sliding_window": None}).layer_windows == ()
    assert check_config({**mistral, "max_position_embeddings": 4096}).layer_windows == ()  # no text is longer
    assert check_config({**LLAMA, "sliding_window": 4}).layer_windows == ()
    with pytest.raises(CheckpointError, match="layer_types is .* each of 2 layers"):
        check_config({**qwen, "layer_types": ["sliding_attention"]})
    with pytest.raises(CheckpointError, match="layer_types.0 is 'linear_attention'"):
        check_config({**qwen, "layer_types": ["linear_attention"] * 2})


NAN, INF = float("nan"), float("inf")
IMPOSSIBLE = [
    ("rms_norm_eps", 160), ("rms_norm_eps", INF), ("rms_norm_eps", NAN), ("rms_norm_eps", True), ("rms_norm_eps", 0),
    ("rope_theta", INF), ("rope_theta", 0), ("rope_theta", "1e4"), ("rope_theta", [1]),
    ("eos_token_id", -1), ("eos_token_id", 100), ("eos_token_id", [2, 1000]), ("eos_token_id", 2.5),
    ("eos_token_id", True), ("eos_token_id", {}), ("bos_token_id", "<s>"),
    ("head_dim", "160"), ("head_dim", {}), ("head_dim", 2**63), ("head_dim", 5), ("head_dim", -4),
    ("num_hidden_layers", 2**31), ("num_hidden_layers", 0), ("vocab_size", None), ("vocab_size", 1.5),
    ("vocab_size", 2**40), ("hidden_size", 100), ("num_key_value_heads", 3), ("num_key_value_heads", 0),
    ("max_position_embeddings", 0), ("max_position_embeddings", "many"), ("tie_word_embeddings", "yes"),
    ("attention_bias", 1), ("is_causal", False), ("is_causal", 0),
    ("hidden_act", "gelu"), ("hidden_act", 3), ("model_type", "gpt2"), ("model_type", ["llama"]),
    ("quantization_config", {"quant_method": "awq"}), ("quantization_config", 4), ("rope_scaling", "linear"),
    ("rope_scaling", 3), ("rope_scaling", {"rope_type": "wavy"}), ("rope_scaling", {"rope_type": ["linear"]}),
    ("rope_scaling", {"rope_type": "linear"}), ("rope_scaling", {"rope_type": "linear", "factor": 0.5}),
    ("rope_scaling", {"rope_type": "linear", "factor": NAN}), ("partial_rotary_factor", 0.5),
    ("rope_scaling", {**LLAMA3, "low_freq_factor": 4.0}),
    ("rope_scaling", {"rope_type": "longrope", "short_factor": [1, 1], "long_factor": [1]}),
    ("rope_scaling", {"rope_type": "longrope", "short_factor": [1, "1"], "long_factor": [1, 2]}),
    ("rope_scaling", {"rope_type": "longrope", "short_factor": [1, 1], "long_factor": [1e-300, 2]}),
]  # fmt: skip


@pytest.mark.parametrize("key, value", IMPOSSIBLE)
def test_an_impossible_value_is_refused_by_file_and_key(key, value):
    with pytest.raises(CheckpointError) as raised:
        check_config({**LLAMA, key: value})
    words = str(raised.value)
    named = {"hidden_size": "num_attention_heads", "rope_scaling": "factor"}.get(key, key)
    assert words.startswith("config.json: ") and (key in words or named in words)
    assert words.endswith(".") and len(words) < 300


@pytest.mark.parametrize("key", sorted(LLAMA3.keys() - {"rope_type"}))
def test_a_scaling_without_one_of_its_keys_is_refused(key):
    rope = {name: value for name, value in LLAMA3.items() if name != key}
    with pytest.raises(CheckpointError, match=rf"config.json: rope_scaling.{key} is None \(missing\)"):
        check_config({**LLAMA, "rope_scaling": rope})


def test_a_weight_of_whole_numbers_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    save_file({"model.norm.weight": torch.ones(4, dtype=torch.int16)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors: tensor 'model.norm.weight' is stored as I16"):
        Checkpoint(tmp_path)


def test_a_name_that_would_write_on_the_terminal_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    save_file({"model.\x1b[31mnorm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model.safetensors: 'model.\\x1b\[31mnorm.weight' is no name"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", [-1, 320, [2, 320], 2.5, True, "</s>", {}])
def test_a_token_that_cannot_end_an_answer_is_refused(tmp_path, file, value):
    (tmp_path / "tokenizer.model").write_bytes((MODELS / "tales" / "tokenizer.model").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 320}))
    said = json.loads((tmp_path / "config.json").read_text()) if file == "config.json" else {}
    (tmp_path / file).write_text(json.dumps({**said, "eos_token_id": value}))
    with pytest.raises(CheckpointError, match=rf"{file}: eos_token_id is "):
        load_tokenizer(tmp_path)
