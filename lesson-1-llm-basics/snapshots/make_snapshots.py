"""Makes the snapshots beside this file: what transformers computes, for the checks of lesson 1.

    python lesson-1-llm-basics/snapshots/make_snapshots.py

llama.safetensors     a Llama of two layers with random weights, and its hidden states and logits
smollm2.safetensors   the hidden states of the real model after each of its layers: a few tokens, a few dimensions

It needs transformers (5.23.0 made these) and, for the second, SmolLM2 in the cache (`make run` puts it there).
Students need neither: the checks read the files.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

# Every size is different, and heads times head_dim is not hidden_size: whoever mixes two up gets another shape.
# eps is large enough to be seen, and theta is not the default.
TINY = {
    "vocab_size": 37,
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-2,
    "rope_theta": 100.0,
}
POSITIONS = [0, 3, 4, 9, 10]  # not 0 to 4: a block must use the angles that it is handed
TEXT_IDS = [504, 2365, 6354, 16438, 27003, 690, 260, 23790]  # "The quick brown fox jumps over the lazy"
NUM_DIMENSIONS = 12


def states_after_layers(model: LlamaForCausalLM, **inputs: Tensor) -> tuple[list[Tensor], Tensor]:
    """The hidden states that leave each layer, before any final norm: a list of (T, hidden_size). And the logits."""
    states: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, arguments, output: states.append(output[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        logits = model(use_cache=False, **inputs).logits[0]
    for handle in handles:
        handle.remove()
    return states, logits


def tiny() -> dict[str, Tensor]:
    """Weights and what they give. Norm weights are random too: a norm that is left out must show."""
    torch.manual_seed(1)
    config = {**TINY, "rope_parameters": {"rope_type": "default", "rope_theta": TINY["rope_theta"]}}
    model = LlamaForCausalLM(LlamaConfig(**config, attn_implementation="eager")).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
    token_ids = torch.tensor([[5, 31, 5, 0, 36, 12, 7]])
    (first, second), logits = states_after_layers(model, input_ids=token_ids)

    x = torch.randn(1, len(POSITIONS), TINY["hidden_size"])
    causal = torch.full((len(POSITIONS), len(POSITIONS)), float("-inf")).triu(1)[None, None]
    (block_output, _), _ = states_after_layers(
        model, inputs_embeds=x, position_ids=torch.tensor([POSITIONS]), attention_mask=causal
    )

    tied = LlamaForCausalLM(LlamaConfig(**config, tie_word_embeddings=True, attn_implementation="eager")).eval()
    tied.load_state_dict(
        {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}, False
    )
    tied.tie_weights()
    _, logits_tied = states_after_layers(tied, input_ids=token_ids)
    assert not torch.allclose(logits, logits_tied)
    return {
        **{name: weight.clone() for name, weight in model.state_dict().items()},
        "snapshot.token_ids": token_ids[0],
        "snapshot.after_layer.0": first,
        "snapshot.after_layer.1": second,
        "snapshot.logits": logits,
        "snapshot.logits_tied": logits_tied,
        "snapshot.block.x": x[0],
        "snapshot.block.positions": torch.tensor(POSITIONS),
        "snapshot.block.output": block_output,
    }


def smollm2() -> dict[str, Tensor]:
    """The real model's states after each layer: (layers, T, NUM_DIMENSIONS)."""
    from common.checkpoints import find_checkpoint

    model = LlamaForCausalLM.from_pretrained(find_checkpoint("smollm2-135m"), dtype=torch.float32).eval()
    token_ids = torch.tensor([TEXT_IDS])
    states, logits = states_after_layers(model, input_ids=token_ids)
    return {
        "token_ids": token_ids[0],
        "after_layers": torch.stack(states)[:, :, :NUM_DIMENSIONS].clone(),
        "logits": logits[:, :NUM_DIMENSIONS].clone(),
    }


if __name__ == "__main__":
    for make, name in ((tiny, "llama"), (smollm2, "smollm2")):
        tensors = {key: value.contiguous() for key, value in make().items()}
        file = HERE / f"{name}.safetensors"
        save_file(tensors, file)
        print(f"{file.name}: {file.stat().st_size:,} bytes, {len(tensors)} tensors")
