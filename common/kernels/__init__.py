"""Fast paths that compute what the lessons compute: packed weights, fused layers, attention over padded keys."""

import os

import torch

# Triton decides when it is imported whether it interprets its kernels, and torch imports it where it thinks best.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

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
