"""Lesson 1's functions against transformers, live: random weights of several shapes, and the real model.

The lesson's own checks compare with snapshots, since students need not install transformers; here nothing is stored.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.checkpoints import Checkpoint, cached
from solutions.llm_basics import (
    ModelConfig,
    block,
    count_parameters,
    embed,
    forward,
    perplexity,
    rotary_frequencies,
    rotary_tables,
)

transformers = pytest.importorskip("transformers")
REPOSITORY = Path(__file__).resolve().parents[2]

SHAPES = {
    "head_dim apart": dict(hidden_size=20, num_attention_heads=4, num_key_value_heads=2, head_dim=6),
    "one key/value head": dict(hidden_size=24, num_attention_heads=4, num_key_value_heads=1, head_dim=6),
    "as many as query heads": dict(hidden_size=24, num_attention_heads=3, num_key_value_heads=3, head_dim=8),
    "odd number of heads": dict(hidden_size=18, num_attention_heads=9, num_key_value_heads=3, head_dim=2),
}


def tiny(dtype: torch.dtype = torch.float32, **options):
    """A Llama of transformers with random weights, norms included, and its shape as ours."""
    sizes = dict(vocab_size=37, intermediate_size=28, num_hidden_layers=3, rms_norm_eps=1e-3, **options)
    theirs = transformers.LlamaConfig(
        **sizes, rope_parameters={"rope_type": "default", "rope_theta": 100.0}, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(theirs).eval().to(dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model, ModelConfig(**sizes, rope_theta=100.0)


def states_after_layers(model, token_ids: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What leaves each layer of transformers' model, (T, hidden_size) each, and the logits."""
    states: list[torch.Tensor] = []
    handles = [
        each.register_forward_hook(lambda module, arguments, output: states.append(output[0]))
        for each in model.model.layers
    ]
    with torch.no_grad():
        logits = model(input_ids=token_ids[None], use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    return states, logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers(shape: str, tied: bool):
    model, config = tiny(**SHAPES[shape], tie_word_embeddings=tied)
    weights = {name: weight for name, weight in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    token_ids = torch.randint(37, (9,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        forward(token_ids, weights, config), states_after_layers(model, token_ids)[1], rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_states_equal_transformers(shape: str):
    model, config = tiny(**SHAPES[shape])
    weights = model.state_dict()
    token_ids = torch.arange(0, 33, 4)
    expected, _ = states_after_layers(model, token_ids)
    x = embed(token_ids, weights["model.embed_tokens.weight"])
    cos, sin = rotary_tables(torch.arange(len(token_ids)), rotary_frequencies(config.head_dim, config.rope_theta))
    for number, state in enumerate(expected):
        prefix = f"model.layers.{number}."
        layer = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        x = block(x, layer, config, cos, sin)
        torch.testing.assert_close(x, state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_count_equals_transformers_on_odd_shapes(tied: bool):
    for shape in SHAPES.values():
        for option in ({}, {"attention_bias": True}, {"mlp_bias": True}):
            model, config = tiny(**shape, tie_word_embeddings=tied)
            theirs = transformers.LlamaConfig(**{**model.config.to_dict(), **option})
            biased = option.get("attention_bias", False)
            ours = ModelConfig(
                **{**vars(config), "qkv_bias": biased, "o_bias": biased, "mlp_bias": option.get("mlp_bias", False)}
            )
            assert count_parameters(ours) == number_of_parameters(transformers.LlamaForCausalLM, theirs)


def number_of_parameters(model_class, config) -> int:
    """Built without memory for the weights; a tied head counts once."""
    with torch.device("meta"):
        model = model_class(config)
    model.tie_weights()
    return model.num_parameters()


REAL_MODELS = {
    "Llama-2-7B": ("Llama", (32000, 4096, 11008, 32, 32, 32, 128), {}),
    "Llama-3-8B": ("Llama", (128256, 4096, 14336, 32, 32, 8, 128), {}),
    "SmolLM2-135M": ("Llama", (49152, 576, 1536, 30, 9, 3, 64), {"tie_word_embeddings": True}),
    "Qwen2.5-0.5B": ("Qwen2", (151936, 896, 4864, 24, 14, 2, 64), {"tie_word_embeddings": True, "qkv_bias": True}),
    "Qwen3-0.6B": ("Qwen3", (151936, 1024, 3072, 28, 16, 8, 128), {"tie_word_embeddings": True, "qk_norm": True}),
}


@pytest.mark.parametrize("name", REAL_MODELS)
def test_count_equals_transformers(name: str):
    """The numbers in lesson 1's checks are those of the models that transformers builds from these shapes."""
    family, sizes, options = REAL_MODELS[name]
    ours = ModelConfig(*sizes, **options)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "tie_word_embeddings")
    theirs = getattr(transformers, f"{family}Config")(**{each: getattr(ours, each) for each in names})
    assert count_parameters(ours) == number_of_parameters(getattr(transformers, f"{family}ForCausalLM"), theirs)


@pytest.fixture(scope="module")
def smollm2():
    if os.environ.get("COURSE_REAL_MODEL") != "1":
        pytest.skip("set COURSE_REAL_MODEL=1 for the real model")
    folder = cached("smollm2-135m")
    if folder is None:
        pytest.skip("SmolLM2 is not on this machine: `make run` fetches it")
    checkpoint = Checkpoint(folder)
    weights = {name: checkpoint.read(name).float() for name in checkpoint.names()}
    config = ModelConfig(49152, 576, 1536, 30, 9, 3, 64, 1e-5, 100_000.0, tie_word_embeddings=True)
    return folder, weights, config


@pytest.mark.slow
def test_smollm2_equals_transformers(smollm2):
    """Every layer's hidden states and the logits of the real model, and the lesson's snapshot of them."""
    folder, weights, config = smollm2
    stored = load_file(REPOSITORY / "lesson-1-llm-basics" / "snapshots" / "smollm2.safetensors")
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    token_ids = stored["token_ids"]
    states, logits = states_after_layers(model, token_ids)
    num_dimensions = stored["after_layers"].shape[-1]
    torch.testing.assert_close(torch.stack(states)[..., :num_dimensions], stored["after_layers"], rtol=1e-3, atol=2e-3)

    x = embed(token_ids, weights["model.embed_tokens.weight"])
    cos, sin = rotary_tables(torch.arange(len(token_ids)), rotary_frequencies(config.head_dim, config.rope_theta))
    for number, state in enumerate(states):
        prefix = f"model.layers.{number}."
        layer = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
        x = block(x, layer, config, cos, sin)
        torch.testing.assert_close(x, state, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(forward(token_ids, weights, config), logits, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_smollm2_counts(smollm2):
    _, weights, config = smollm2
    assert count_parameters(config) == sum(weight.numel() for weight in weights.values()) == 134_515_008


@pytest.mark.slow
def test_smollm2_finds_text_likelier_than_its_shuffle(smollm2):
    _, weights, config = smollm2
    token_ids = load_file(REPOSITORY / "lesson-1-llm-basics" / "snapshots" / "smollm2.safetensors")["token_ids"]
    shuffled = token_ids[torch.tensor([3, 0, 7, 2, 6, 1, 5, 4])]
    real, mixed = (perplexity(forward(ids, weights, config), ids) for ids in (token_ids, shuffled))
    assert 10 * real < mixed
