"""Fast paths that compute what the lessons compute: packed weights, fused layers, attention over padded keys."""

from common.kernels.cpu import (
    CompiledLinear,
    FastNorm,
    FusedAttention,
    FusedMLP,
    PackedLinear,
    attention,
    can_pack,
    compiled,
    enabled,
    pack,
)

__all__ = [
    "CompiledLinear",
    "FastNorm",
    "FusedAttention",
    "FusedMLP",
    "PackedLinear",
    "attention",
    "can_pack",
    "compiled",
    "enabled",
    "pack",
]
