"""Faster ways to compute what the lessons compute: packed weights, fused layers, attention over padded keys.

Graded code never uses them: `KERNELS=plain` in the environment turns them off. `pack` rearranges the weights of a
loaded model, once; `attention` serves many requests in one call; `paged` lets fused layers read and write blocks.
"""

from common.kernels.attention import PagedAttend, attention
from common.kernels.build import compiled
from common.kernels.gpu import accelerate, pack, paged
from common.kernels.layers import FastNorm, held_bytes
from common.kernels.products import (
    can_pack,
    enabled,
    has_kernel,
    native,
    pack_floats,
    pack_int4,
    pack_int8,
    pack_w4a8,
    pack_w8a8,
)
from common.machine import let_triton_interpret

let_triton_interpret()
