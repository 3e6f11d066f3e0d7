"""Fast paths that compute what the lessons compute: packed weights, fused layers, attention over padded keys."""

from common.kernels.cpu import (
    FastNorm,
    FusedAttention,
    FusedLinear,
    FusedMLP,
    attention,
    can_pack,
    compiled,
    enabled,
    has_kernel,
    held_bytes,
    pack,
    pack_floats,
    pack_int4,
    pack_int8,
)
