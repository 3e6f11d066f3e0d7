"""Makes the snapshots beside it: a tiny random checkpoint of each family, and what transformers computes with it.

    python lesson-2-llama-pytorch/snapshots/make_snapshots.py        # needs transformers; made with 5.23 on torch 2.13

Each folder is a checkpoint as transformers writes it, with `expected.safetensors` beside: token_ids (T,), the
rotary frequencies, the logits (T, V) at positions from 0 and from 1000, and a greedy continuation of token_ids.
`rotary.json` has the frequencies of Llama 3.1 and 3.2 in their real sizes.
"""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers

HERE = Path(__file__).resolve().parent
TINY = dict(
    vocab_size=61, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=2048,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
)
FAMILIES = {
    "llama-2": ("Llama", dict(num_key_value_heads=4, rms_norm_eps=1e-5)),
    "llama-3": ("Llama", dict(rope_theta=500_000.0, rope_scaling=LLAMA3, tie_word_embeddings=True, head_dim=8)),
    "qwen2": ("Qwen2", dict(rope_theta=1_000_000.0, num_key_value_heads=1)),
    "qwen2.5": ("Qwen2", dict(rope_theta=1_000_000.0, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(rope_theta=1_000_000.0, head_dim=8)),
}


def make(name: str) -> None:
    kind, changes = FAMILIES[name]
    torch.manual_seed(len(name))
    model = getattr(transformers, kind + "ForCausalLM")(getattr(transformers, kind + "Config")(**{**TINY, **changes}))
    model.eval()
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        model.save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink()
        token_ids = torch.tensor([3, 17, 42, 17, 60, 0, 8])
        expected = {"token_ids": token_ids, "frequencies": model.model.rotary_emb.inv_freq.clone()}
        for start in (0, 1000):
            positions = torch.arange(start, start + len(token_ids))
            expected[f"logits_{start}"] = model(token_ids[None], position_ids=positions[None]).logits[0].clone()
        continued = model.generate(
            token_ids[None], attention_mask=torch.ones(1, len(token_ids)), do_sample=False, max_new_tokens=6,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        expected["continuation"] = continued[0, len(token_ids) :].clone()
    save_file(expected, HERE / name / "expected.safetensors")


def make_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer.json as large as the embedding: letters, a space, and no merges."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())[32 : 32 + TINY["vocab_size"] - 1] + ["\u0120"]
    model = models.BPE(vocab={character: i for i, character in enumerate(characters)}, merges=[])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def make_rotary() -> None:
    real = {}
    for name, head_dim, factor in (("Llama 3.1 8B", 128, 8.0), ("Llama 3.2 1B", 64, 32.0)):
        scaling = {**LLAMA3, "factor": factor, "original_max_position_embeddings": 8192}
        config = transformers.LlamaConfig(
            head_dim=head_dim, max_position_embeddings=131072, rope_theta=500_000.0, rope_scaling=scaling
        )
        frequencies = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config).inv_freq
        real[name] = {"head_dim": head_dim, "rope_scaling": scaling, "frequencies": frequencies.tolist()}
    (HERE / "rotary.json").write_text(json.dumps(real, indent=1) + "\n")


if __name__ == "__main__":
    for family in FAMILIES:
        make(family)
    make_tokenizer(HERE / "llama-3")
    make_rotary()
