"""Lesson 7, optional: the product with a matrix of four bits, as a kernel for a GPU. It is written in Triton, as lesson
4's optional part is, and needs no GPU.

`Int4Method.product` writes the whole matrix in floats to memory and then reads it again. A kernel that unpacks in
registers reads half a byte for each weight and nothing else: this is where four bits become faster.

T tokens, O outputs, I inputs, in groups of `group_size` neighbours with a scale and a minimum each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.kernels.triton import tl, triton

TILE = 16
"""Tokens, outputs and pairs of inputs in a tile; a product of tiles (`tl.dot`) needs at least 16."""


@triton.jit
def dequantize_tile(packed, scale, minimum):
    """Return the weights of the even and of the odd inputs that a tile of bytes stands for, in float32.

    packed: (OUTPUTS, PAIRS) uint8, as `pack_int4` of 7.5 writes them: the even input in the low half, the odd one in
    the high half. scale, minimum: float32, a value for each pair.

        byte 0x5C, scale 0.5, minimum -4      even: 12 * 0.5 - 4 = 2      odd: 5 * 0.5 - 4 = -1.5
    """
    # Exercise 7.16: the low half with `& 15`, the high half with `>> 4`; number * scale + minimum.
    even = (packed & 15).to(tl.float32) * scale + minimum
    odd = (packed >> 4).to(tl.float32) * scale + minimum
    return even, odd


@triton.jit
def int4_kernel(
    x, weight, scales, minima, out, num_tokens, num_outputs, num_inputs, x_stride, num_groups,
    GROUP_SIZE: tl.constexpr, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """out = x @ dequantized weight. Program (i, j) has a tile of TOKENS by OUTPUTS of the result.

                             pairs of inputs, PAIRS at a time
        OUTPUTS of weight    [ byte byte byte ]  ->  even (OUTPUTS, PAIRS), odd (OUTPUTS, PAIRS)
        TOKENS of x          [ 0 1  2 3  4 5  ]  ->  even: 0 2 4            odd: 1 3 5
        tile of out          += even of x @ even of weight, transposed  +  odd of x @ odd of weight, transposed

    x: (T, I), token t at x + t * x_stride; weight: (O, P) bytes, P = cdiv(I, 2); scales, minima: (O, num_groups); out:
    (T, O). GROUP_SIZE is even, so both inputs of a pair are in one group. If I is odd, the last byte has one input.
    """
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    outputs = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    token_exists = (tokens < num_tokens)[:, None]
    output_exists = (outputs < num_outputs)[:, None]
    num_pairs = tl.cdiv(num_inputs, 2)
    total = tl.zeros((TOKENS, OUTPUTS), tl.float32)
    # Exercise 7.17: for each tile of pairs: load bytes, scales and minima of their groups, and the even and odd inputs
    # of x, in float32 and 0 where there is none; add both products (`input_precision="ieee"`). Store the tile of `out`.
    for first in range(0, num_pairs, PAIRS):
        pairs = (first + tl.arange(0, PAIRS))[None, :]
        exists = output_exists & (pairs < num_pairs)
        packed = tl.load(weight + outputs[:, None] * num_pairs + pairs, mask=exists, other=0)
        groups = outputs[:, None] * num_groups + 2 * pairs // GROUP_SIZE
        scale = tl.load(scales + groups, mask=exists, other=0.0).to(tl.float32)
        minimum = tl.load(minima + groups, mask=exists, other=0.0).to(tl.float32)
        even, odd = dequantize_tile(packed, scale, minimum)
        place = x + tokens[:, None] * x_stride + 2 * pairs
        x_even = tl.load(place, mask=token_exists & (2 * pairs < num_inputs), other=0.0).to(tl.float32)
        x_odd = tl.load(place + 1, mask=token_exists & (2 * pairs + 1 < num_inputs), other=0.0).to(tl.float32)
        total += tl.dot(x_even, tl.trans(even), input_precision="ieee")
        total += tl.dot(x_odd, tl.trans(odd), input_precision="ieee")
    mask = token_exists & (outputs < num_outputs)[None, :]
    tl.store(out + tokens[:, None] * num_outputs + outputs[None, :], total, mask=mask)


def int4_matmul(x: Tensor, packed: Tensor, scale: Tensor, minimum: Tensor | None, group_size: int) -> Tensor:
    """Multiply x, (T, I), by the matrix that bytes, scales and minima stand for. Returns (T, O) in x's dtype.

    packed: (O, cdiv(I, 2)) uint8; scale, minimum: (O, groups), as `quantize_int4` gives them; a minimum of None is -8
    scales. group_size must be even.
    """
    minimum = -8 * scale if minimum is None else minimum
    (num_tokens, num_inputs), num_outputs = x.shape, len(packed)
    out = torch.empty((num_tokens, num_outputs), dtype=x.dtype, device=x.device)
    int4_kernel[(triton.cdiv(num_tokens, TILE), triton.cdiv(num_outputs, TILE))](
        x, packed, scale, minimum, out, num_tokens, num_outputs, num_inputs, x.stride(0), scale.shape[1],
        GROUP_SIZE=group_size, TOKENS=TILE, OUTPUTS=TILE, PAIRS=TILE,
    )  # fmt: skip
    return out
