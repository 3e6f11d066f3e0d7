"""Which models the engine runs."""

from __future__ import annotations

from collections.abc import Mapping

from common.checkpoints.folder import CheckpointError


def check_supported(config: Mapping) -> None:
    """Raise CheckpointError if a `config.json` asks for something that the engine does not compute."""
    if config.get("model_type") not in ("llama", "qwen2", "qwen3"):
        raise CheckpointError(
            f"config.json: model_type is {config.get('model_type')!r}; this engine runs 'llama', 'qwen2' and 'qwen3'."
        )
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise CheckpointError(f"config.json: {key} must be a positive integer, and is {config.get(key)!r}.")
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"config.json: hidden_act is {config['hidden_act']!r}; this engine computes 'silu'.")
    if config.get("use_sliding_window"):
        raise CheckpointError("config.json: use_sliding_window is true; this engine attends to the whole context.")
    if config.get("quantization_config"):
        raise CheckpointError("config.json: quantization_config is set; load the unquantized checkpoint instead.")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise CheckpointError(f"config.json: RoPE scaling of type {rope_type!r}; this engine knows 'llama3'.")
