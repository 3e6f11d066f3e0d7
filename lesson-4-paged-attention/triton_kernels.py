"""Lesson 4, optional: kernels for a GPU, the engine's device drivers, written in Triton. You need no GPU for them.

A kernel is started as a grid of programs that know nothing of each other. Each program asks for its ids, computes from
them which tile of memory is its own, loads that tile, and stores its results. A row or a block table of lesson 4 is
here a pointer and a stride. Sizes of tiles are powers of two, known when the kernel is compiled (`tl.constexpr`), so a
mask must say which elements of a tile exist. Without a GPU Triton's interpreter runs the programs one after the other.

B requests, H query heads, K key/value heads, G = H / K, D the head size, S splits of a context. A pool of keys or
values is (num_blocks, block_size, K, D), one layer of lesson 4's `PagedKVCache`.

From the tutorials of Triton; Dao et al., "FlashAttention" (2022); Dao et al., "Flash-Decoding" (2023).
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.kernels.triton import tl, triton

TILE = 16
"""Positions that an attention kernel reads at a time. `tl.dot` needs at least 16 in the dimension it sums over."""


def padded(size: int) -> int:
    """Return the size of a tile for `tl.dot` that holds `size` elements: the next power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


# --- The worked example -----------------------------------------------------------------------------------------------


@triton.jit
def add_kernel(x, y, out, size, BLOCK: tl.constexpr):
    """out[i] = x[i] + y[i], for i < size. x, y, out: pointers. Program p has the elements from p * BLOCK on.

    size 10, BLOCK 4      program 0   program 1   program 2
                          0 1 2 3     4 5 6 7     8 9 . .       the mask is false at the dots
    """
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    tl.store(out + offsets, tl.load(x + offsets, mask=mask) + tl.load(y + offsets, mask=mask), mask=mask)


def add(x: Tensor, y: Tensor, block: int = 1024) -> Tensor:
    """Return x + y, two contiguous tensors of one shape. The grid in brackets has one program for each block."""
    out = torch.empty_like(x)
    add_kernel[(triton.cdiv(x.numel(), block),)](x, y, out, x.numel(), BLOCK=block)
    return out


# --- Rows -------------------------------------------------------------------------------------------------------------


@triton.jit
def softmax_kernel(x, out, num_columns, x_stride, out_stride, BLOCK: tl.constexpr):
    """Softmax of each row, in float32. Program r has row r, in a tile of BLOCK >= num_columns elements.

    x, out: pointers to (rows, num_columns). Row r begins at x + r * x_stride and at out + r * out_stride, because the
    rows may be parts of wider rows.
    """
    # TODO 4.18: load the row, with minus infinity for missing elements. Subtract the maximum, as in 1.3. Store the
    # result with the mask.
    raise NotImplementedError("TODO 4.18")


def softmax(x: Tensor) -> Tensor:
    """Return the softmax over the last dimension of x, (rows, columns), whose rows may be parts of wider ones."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    softmax_kernel[(x.shape[0],)](x, out, x.shape[1], x.stride(0), out.stride(0), BLOCK=block)
    return out


@triton.jit
def add_rms_norm_kernel(x, residual, weight, out, num_columns, eps, BLOCK: tl.constexpr):
    """residual += x, and out = RMSNorm(residual) * weight. Program r has row r of (rows, num_columns), contiguous.

    This fuses two operators: each row is read once and written once, and intermediate results stay in registers.
    """
    # TODO 4.19: compute the sum and its mean square in float32; the mean is over num_columns elements, not over the
    # tile. Store the sum in `residual`, and the normalised sum times the weight in `out`.
    raise NotImplementedError("TODO 4.19")


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add x to `residual`, in place, and return its RMSNorm. x, residual: (rows, columns); weight: (columns,)."""
    out = torch.empty_like(x)
    block = triton.next_power_of_2(x.shape[1])
    add_rms_norm_kernel[(x.shape[0],)](x, residual, weight, out, x.shape[1], eps, BLOCK=block)
    return out


# --- Parts of attention that all kernels share ------------------------------------------------------------------------


@triton.jit
def find_slots(table, positions, seen, BLOCK_SIZE: tl.constexpr):
    """Return the slot of each position of a sequence, from its block table, as 4.14 does.

    table: pointer to the sequence's block ids; positions, seen: (TILE,). Where `seen` is false, the table
    may have no entry; such a position counts as one of block 0.

        BLOCK_SIZE 4, table 3, 1, 5      position 6 -> entry 1 -> block 1, offset 2 -> slot 6
    """
    # TODO 4.20: load the block id of each position, with the mask. Multiply by the block size and add the offset.
    raise NotImplementedError("TODO 4.20")


@triton.jit
def online_softmax(maximum, total, weighted, scores, values):
    """Merge a further tile of N keys into the Partials of M queries, as 4.12 does. Returns the new Partials.

    maximum, total: (M,), at first minus infinity and 0; weighted: (M, D); values: (N, D). scores: (M, N), minus
    infinity where a query does not see a key. If a query has seen no key at all, its maximum stays minus infinity and
    its sums 0.
    """
    # TODO 4.21: compute the new maximum first. Multiply the old sums by exp(old maximum - new). The weights of the
    # tile are exp(scores - new). Where the new maximum is minus infinity, subtract 0 instead.
    raise NotImplementedError("TODO 4.21")


# --- Decoding: one query token of each request ------------------------------------------------------------------------


@triton.jit
def decode_kernel(
    q, keys, values, block_tables, context_lens, maxima, totals, weighted_sums,
    scale, q_stride, slot_stride, table_stride, split_len,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Compute attention of one query token per request to one split of its context. Program (request, kv_head, split)
    has the GROUP query heads that share a key/value head, so each key is read once for all of them.

        context 40, split_len 16, TILE 8     split 0               split 1               split 2
                                             [0..7] [8..15]        [16..23] [24..31]     [32..39] [  ...  ]
                                             a loop over tiles     another program       the mask ends at 40

    q: (B, H, D), request b at q + b * q_stride; keys, values: pools whose slots are slot_stride apart; block_tables:
    (B, *), table_stride apart; context_lens: (B,), the new token included. Other sequences' slots may hold NaN, and 0
    times NaN is NaN. Stores a Partial of 4.11 for each query head and split: maxima, totals (B, H, S) and weighted_sums
    (B, H, S, D). A split with no position is minus infinity, 0, 0.
    """
    request = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    rows = tl.arange(0, ROWS)  # the heads of this group
    dims = tl.arange(0, DIMS)
    heads = (request * tl.num_programs(1) + kv_head) * GROUP + rows  # in (B, H)
    own = (rows < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    query = request * q_stride + (kv_head * GROUP + rows)[:, None] * HEAD_DIM + dims[None, :]
    queries = tl.load(q + query, mask=own, other=0.0).to(tl.float32)
    begin = split * split_len
    end = tl.minimum(begin + split_len, tl.load(context_lens + request))
    maximum = tl.full((ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS, DIMS), tl.float32)
    # TODO 4.22: for each tile of positions from `begin` to `end` find the slots, load (TILE, DIMS) keys and values
    # of this kv_head in float32, compute scores (`tl.dot` with input_precision="ieee") and merge (`online_softmax`).
    raise NotImplementedError("TODO 4.22")


@triton.jit
def merge_kernel(
    maxima, totals, weighted_sums, out, num_splits, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, DIMS: tl.constexpr
):
    """Merge all splits of each query head at once, by the rule of 4.12, and divide. Program r has row r of (B * H).

    maxima, totals: (B * H, num_splits); weighted_sums: (B * H, num_splits, D); out: (B * H, D). Each row has at
    least one split that saw a key.
    """
    # TODO 4.23: load tiles of SPLITS maxima and totals, and of (SPLITS, DIMS) weighted sums. A split that does not
    # exist must have weight 0.
    raise NotImplementedError("TODO 4.23")


def paged_decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    max_context_len: int,
    num_splits: int = 1,
) -> Tensor:
    """Compute attention of one query token per request to all keys of its block table. Returns (B, H, D), as q.

    q: (B, H, D), which may be parts of wider rows. keys, values: (num_blocks, block_size, K, D), contiguous.
    block_tables: (B, *). context_lens: (B,), at most max_context_len, which is a number: to read it from a GPU, the
    CPU would have to wait. With few requests num_splits > 1 keeps more of a GPU's processors busy.
    """
    (num_requests, num_heads, head_dim), (_, block_size, num_kv_heads, _) = q.shape, keys.shape
    out = torch.empty((num_requests, num_heads, head_dim), dtype=q.dtype, device=q.device)
    sizes = {"HEAD_DIM": head_dim, "DIMS": padded(head_dim)}
    group = {"GROUP": num_heads // num_kv_heads, "ROWS": padded(num_heads // num_kv_heads)}
    strides = (q.stride(0), keys.stride(1), block_tables.stride(0))
    # TODO 4.24: make three float32 tensors for the parts. Start `decode_kernel` on a grid of (requests, key/value
    # heads, splits), with the scale head_dim ** -0.5 and a split_len that covers max_context_len; then `merge_kernel`.
    raise NotImplementedError("TODO 4.24")


# --- Prefill: many query tokens of a request --------------------------------------------------------------------------


@triton.jit
def prefill_kernel(
    q, keys, values, block_tables, query_start, context_lens, out,
    scale, q_stride, out_stride, slot_stride, table_stride,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Compute causal attention of the requests' new tokens. Program (tile, head, request) has TILE tokens of one head.

        context 7, 4 new tokens, TILE 2          keys  0 1 | 2 3 | 4 5 | 6
                                   tile 0, query 3     x x   x x   . .       a tile that no query of the program
                                           query 4     x x   x x   x .       sees is not read
                                   tile 1, query 5     x x   x x   x x   .
                                           query 6     x x   x x   x x   x

    The tokens of the batch lie one after the other: request b has q[query_start[b]] to q[query_start[b + 1] - 1], (*,
    H, D), the last tokens of its context_lens[b]. Their keys and values are in the pool already. out: as q.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.program_id(2)
    first_token = tl.load(query_start + request)
    num_new = tl.load(query_start + request + 1) - first_token
    context_len = tl.load(context_lens + request)
    rows = tile * TILE + tl.arange(0, TILE)  # of the request's new tokens
    dims = tl.arange(0, DIMS)
    own = (rows < num_new)[:, None] & (dims < HEAD_DIM)[None, :]
    query = (first_token + rows)[:, None] * q_stride + head * HEAD_DIM + dims[None, :]
    queries = tl.load(q + query, mask=own, other=0.0).to(tl.float32)
    query_positions = context_len - num_new + rows
    maximum = tl.full((TILE,), -float("inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    weighted = tl.zeros((TILE, DIMS), tl.float32)
    # TODO 4.25: read tiles of keys as in 4.22, but only up to the position of this program's last query. Each query
    # sees the positions up to its own. The key/value head of `head` is head // GROUP. Divide the weighted sums by the
    # totals and store them in `out`.
    raise NotImplementedError("TODO 4.25")


def paged_prefill_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    max_query_len: int,
) -> Tensor:
    """Compute causal attention of all new tokens of a batch to the keys of their block tables. Returns the shape of q.

    q: (tokens, H, D); query_start: (B + 1,), where each request's tokens begin; max_query_len: the largest number of
    one request's tokens. The other arguments are those of `paged_decode_attention`.
    """
    (num_tokens, num_heads, head_dim), (_, block_size, num_kv_heads, _) = q.shape, keys.shape
    out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
    prefill_kernel[(triton.cdiv(max_query_len, TILE), num_heads, len(context_lens))](
        q, keys, values, block_tables, query_start, context_lens, out,
        head_dim**-0.5, q.stride(0), out.stride(0), keys.stride(1), block_tables.stride(0),
        GROUP=num_heads // num_kv_heads, HEAD_DIM=head_dim, BLOCK_SIZE=block_size, TILE=TILE, DIMS=padded(head_dim),
    )  # fmt: skip
    return out
