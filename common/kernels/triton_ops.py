"""The GPU's kernels, in Triton: everything in a decoder layer except its matrix products, and the sampler.

They are faster versions of lesson 4's optional exercises. One attention kernel serves prompts, chunks and decoding
requests in one launch, as vLLM's `triton_unified_attention` does, and its products are in the dtype of the model. It
reads all numbers about a request on the GPU, so that it can be captured in a CUDA graph.

T tokens, H query heads, K key/value heads, D the head size, R requests. A pool is (num_blocks, block_size, K, D).
"""

from __future__ import annotations

import torch
from torch import Tensor

from common.kernels.triton import tl, triton

INTERPRETED = triton.knobs.runtime.interpret
NO_WINDOW = 1 << 30
TILE = 64  # the number of positions that the attention kernel reads at a time
PREFILL_ROWS = 64
"""The rows of a tile of queries (tokens times the heads of a group) if a request has several new tokens."""
PROGRAMS = 256
"""Contexts of decoding requests are split until there are this many programs, about two for each multiprocessor."""
MOST_SPLITS = 16
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}  # the dtypes of products


def product_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of a product's tiles. The interpreter would treat the bits of bfloat16 as whole numbers."""
    return tl.float32 if INTERPRETED else DTYPES[dtype]


# --- Norm, rotation, activation ---------------------------------------------------------------------------------------


@triton.jit
def add_rms_norm_kernel(x, residual, weight, total, out, size, eps, BLOCK: tl.constexpr, ADD: tl.constexpr):
    """total = x + residual, if ADD, and out = RMSNorm(total) * weight. Program r has row r of (rows, size)."""
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    row = tl.program_id(0).to(tl.int64) * size + columns
    hidden = tl.load(x + row, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        hidden += tl.load(residual + row, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + row, hidden, mask=mask)
    scale = tl.rsqrt(tl.sum(hidden * hidden, axis=0) / size + eps)
    tl.store(out + row, hidden * scale * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32), mask=mask)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns x + residual, or x if that is None, and its RMSNorm. x, residual: (..., size)."""
    x = x.contiguous()
    total, out = x if residual is None else torch.empty_like(x), torch.empty_like(x)
    size, added = x.shape[-1], x if residual is None else residual.contiguous()
    block = triton.next_power_of_2(size)
    add_rms_norm_kernel[(x.numel() // size,)](
        x, added, weight, total, out, size, eps, BLOCK=block, ADD=residual is not None
    )
    return total, out


@triton.jit
def rotate_and_store_kernel(
    qkv, cos, sin, weight, slots, q, keys, values, eps, qkv_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Program t computes token t. Its rows are H queries, K keys and K values. Queries and keys are normed and rotated,
    and everything is stored.

    qkv: (T, H + 2 K, D), token t at qkv + t * qkv_stride; cos, sin: (T, D / 2); weight: (H + K, D), if NORM; slots:
    (T,), negative where nothing will be stored. q: (T, H, D); keys, values: (slots, K, D).
    """
    token = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = HEAD_DIM // 2
    row = tl.arange(0, ROWS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    mask = (row < HEADS + 2 * KV_HEADS) & (pair < half)
    turned = mask & (row < HEADS + KV_HEADS)  # the rows that are normed and rotated
    place = row * HEAD_DIM + pair
    a = tl.load(qkv + token * qkv_stride + place, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(qkv + token * qkv_stride + place + half, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / HEAD_DIM + eps)[:, None]
        a *= tl.where(turned, scale * tl.load(weight + place, mask=turned, other=0.0).to(tl.float32), 1.0)
        b *= tl.where(turned, scale * tl.load(weight + place + half, mask=turned, other=0.0).to(tl.float32), 1.0)
    c = tl.where(turned, tl.load(cos + token * half + pair, mask=pair < half, other=1.0), 1.0)
    s = tl.where(turned, tl.load(sin + token * half + pair, mask=pair < half, other=0.0), 0.0)
    a, b = a * c - b * s, b * c + a * s
    is_query = mask & (row < HEADS)
    tl.store(q + token * HEADS * HEAD_DIM + place, a, mask=is_query)
    tl.store(q + token * HEADS * HEAD_DIM + place + half, b, mask=is_query)
    slot = tl.load(slots + token)
    stored = row < tl.where(slot >= 0, ROWS, 0)
    key = slot * KV_HEADS * HEAD_DIM + place - HEADS * HEAD_DIM
    tl.store(keys + key, a, mask=stored & turned & (row >= HEADS))
    tl.store(keys + key + half, b, mask=stored & turned & (row >= HEADS))
    value = key - KV_HEADS * HEAD_DIM
    tl.store(values + value, a, mask=stored & mask & (row >= HEADS + KV_HEADS))
    tl.store(values + value + half, b, mask=stored & mask & (row >= HEADS + KV_HEADS))


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None,
    eps: float,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """Norm (if there is a weight) and rotate queries and keys; store keys and values in their slots.

    qkv: (T, H + 2 K, D); cos, sin: (T, D / 2); weight: (H + K, D); slots: (T,), negative where nothing will be stored.
    keys, values: (..., K, D), contiguous. Returns the queries, (T, H, D).
    """
    num_tokens, heads, head_dim = qkv.shape
    kv_heads = keys.shape[-2]
    q = qkv.new_empty(num_tokens, heads - 2 * kv_heads, head_dim)
    rotate_and_store_kernel[(num_tokens,)](
        qkv, cos, sin, qkv if weight is None else weight, slots, q, keys, values, eps, qkv.stride(0),
        HEADS=heads - 2 * kv_heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
        ROWS=triton.next_power_of_2(heads), PAIRS=triton.next_power_of_2(head_dim // 2), NORM=weight is not None,
    )  # fmt: skip
    return q


@triton.jit
def silu_mul_kernel(gate_up, out, size, BLOCK: tl.constexpr):
    """out = silu(gate) * up. Program (t, i) computes block i of row t. gate_up: (T, 2 * size); out: (T, size)."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    gate = tl.load(gate_up + token * 2 * size + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * size + size + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * size + columns, gate * tl.sigmoid(gate) * up, mask=mask)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Returns silu(gate) * up, (T, size). gate_up: (T, 2 * size), contiguous, gate and up side by side."""
    num_tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(num_tokens, size)
    silu_mul_kernel[(num_tokens, triton.cdiv(size, 1024))](gate_up, out, size, BLOCK=1024)
    return out


# --- Attention --------------------------------------------------------------------------------------------------------


@triton.jit
def attention_kernel(
    q, keys, values, block_tables, query_start, context_lens, out, log_sums, scale, table_stride, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, QUERIES: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, DIMS: tl.constexpr, SPLITS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Attention of a tile of new tokens to one split of the keys that they see. Program (request, kv_head, tile *
    SPLITS + split) computes QUERIES of the request's tokens, in the GROUP heads that share a key/value head.

        GROUP 2, QUERIES 2      row 0  token 0, head 0          keys  0 1 2 3 | 4 5 6 7     context 8, 2 new tokens
                                row 1  token 0, head 1          split 0       | split 1     token 0 sees 0 to 6
                                row 2  token 1, head 0                                      token 1 sees 0 to 7
                                row 3  token 1, head 1

    q: (T, H, D), contiguous. With one split, out is (T, H, D); otherwise (T, H, SPLITS, D), each divided by its own
    sum, of which log_sums, (T, H, SPLITS), has the logarithm. The maximum starts at -1e30 and not at minus infinity, so
    that a row that sees no key needs no special case: its sum is 0, and its weight in a merge is 0.
    """
    request = tl.program_id(0)
    kv_head = tl.program_id(1)
    tile = tl.program_id(2) // SPLITS
    split = tl.program_id(2) % SPLITS
    first_token = tl.load(query_start + request)
    num_new = tl.load(query_start + request + 1) - first_token
    if tile * QUERIES >= num_new:
        return
    first_position = tl.load(context_lens + request) - num_new
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)
    tokens = tile * QUERIES + rows // GROUP
    exists = (rows < QUERIES * GROUP) & (tokens < num_new)
    place = (first_token + tokens) * HEADS + kv_head * GROUP + rows % GROUP  # in (T, H)
    own = exists[:, None] & (dims < HEAD_DIM)[None, :]
    queries = tl.load(q + place[:, None] * HEAD_DIM + dims[None, :], mask=own, other=0.0).to(DTYPE)

    begin = tl.maximum(first_position + tile * QUERIES - window + 1, 0)
    end = first_position + tl.minimum((tile + 1) * QUERIES, num_new)
    split_len = tl.cdiv(tl.cdiv(end - begin, SPLITS), TILE) * TILE
    begin += split * split_len
    end = tl.minimum(end, begin + split_len)
    maximum = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS, DIMS), tl.float32)
    for first in range(begin, end, TILE):
        positions = first + tl.arange(0, TILE)
        inside = positions < end
        blocks = tl.load(block_tables + request * table_stride + positions // BLOCK_SIZE, mask=inside, other=0)
        slots = blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        source = (slots[:, None] * (HEADS // GROUP) + kv_head) * HEAD_DIM + dims[None, :]
        mask = inside[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(keys + source, mask=mask, other=0.0).to(DTYPE)
        v = tl.load(values + source, mask=mask, other=0.0).to(DTYPE)
        age = first_position + tokens[:, None] - positions[None, :]
        seen = inside[None, :] & (age >= 0) & (age < window)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(seen, scores, -float("inf"))
        highest = tl.maximum(maximum, tl.max(scores, axis=1))
        rescale = tl.exp(maximum - highest)
        weights = tl.exp(scores - highest[:, None])
        total = total * rescale + tl.sum(weights, axis=1)
        weighted = weighted * rescale[:, None] + tl.dot(weights.to(DTYPE), v, input_precision="ieee")
        maximum = highest
    total = tl.where(total > 0, total, 1.0)
    part = place * SPLITS + split
    tl.store(out + part[:, None] * HEAD_DIM + dims[None, :], weighted / total[:, None], mask=own)
    if SPLITS > 1:
        tl.store(log_sums + part, maximum + tl.log(total), mask=exists)


@triton.jit
def merge_kernel(parts, log_sums, out, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, SPLITS: tl.constexpr):
    """Merge the splits of each row. parts: (T * H, SPLITS, D); log_sums: (T * H, SPLITS); out: (T * H, D)."""
    row = tl.program_id(0).to(tl.int64)
    splits = row * SPLITS + tl.arange(0, SPLITS)
    dims = tl.arange(0, DIMS)
    log_sum = tl.load(log_sums + splits)
    weights = tl.exp(log_sum - tl.max(log_sum, axis=0))
    part = tl.load(parts + splits[:, None] * HEAD_DIM + dims[None, :], mask=(dims < HEAD_DIM)[None, :], other=0.0)
    mixed = tl.sum(part * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out + row * HEAD_DIM + dims, mixed, mask=dims < HEAD_DIM)


def num_splits(programs: int) -> int:
    """The number of splits of each context, a power of two. programs: their number without splits."""
    return min(MOST_SPLITS, triton.next_power_of_2(triton.cdiv(PROGRAMS, programs)))


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, query_start: Tensor, context_lens: Tensor,
    max_query_len: int, window: int | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of the newest tokens of each request to the keys of its block table. Returns (T, H, D), as q.

    q: (T, H, D), contiguous. keys, values: pools, contiguous. block_tables: (R, *); query_start: (R + 1,), where each
    request's tokens begin; context_lens: (R,), the new tokens included; 0 for a request that only fills up the batch.
    max_query_len: the largest number of one request's tokens. window: how many keys a token sees, at most.
    """
    (num_tokens, heads, head_dim), (_, block_size, kv_heads, _) = q.shape, keys.shape
    group = heads // kv_heads
    queries = 1 if max_query_len == 1 else max(1, PREFILL_ROWS // group)
    tiles = triton.cdiv(max_query_len, queries)
    splits = num_splits(len(context_lens) * kv_heads) if max_query_len == 1 else 1
    out, dims = torch.empty_like(q), max(16, triton.next_power_of_2(head_dim))
    parts, log_sums = out, out
    if splits > 1:
        parts = torch.empty(num_tokens, heads, splits, head_dim, dtype=torch.float32, device=q.device)
        log_sums = torch.empty(num_tokens, heads, splits, dtype=torch.float32, device=q.device)
    attention_kernel[(len(context_lens), kv_heads, tiles * splits)](
        q, keys, values, block_tables, query_start, context_lens, parts, log_sums, head_dim**-0.5,
        block_tables.stride(0), window or NO_WINDOW, HEADS=heads, GROUP=group, HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size, QUERIES=queries, ROWS=max(16, triton.next_power_of_2(queries * group)), TILE=TILE,
        DIMS=dims, SPLITS=splits, DTYPE=product_dtype(q.dtype),
    )  # fmt: skip
    if splits > 1:
        merge_kernel[(num_tokens * heads,)](parts, log_sums, out, HEAD_DIM=head_dim, DIMS=dims, SPLITS=splits)
    return out


# --- Sampling ---------------------------------------------------------------------------------------------------------


@triton.jit
def draw_kernel(logits, temperatures, seeds, tokens, size, TILE: tl.constexpr):
    """Sample a token for each row: the likeliest after adding Gumbel noise, which depends only on the row's seed and
    the token's id; without noise at temperature 0. -1 for a row with a NaN. Program r computes row r of (R, size).
    """
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures + row)
    seed = tl.load(seeds + row)
    best = tl.full((), -float("inf"), tl.float32)
    chosen = tl.full((), 0, tl.int32)
    num_nan = tl.full((), 0, tl.int32)
    for first in range(0, size, TILE):
        ids = first + tl.arange(0, TILE)
        scores = tl.load(logits + row * size + ids, mask=ids < size, other=-float("inf")).to(tl.float32)
        num_nan += tl.sum((scores != scores).to(tl.int32), axis=0)
        if temperature > 0:
            scores = scores / temperature - tl.log(-tl.log(tl.rand(seed, ids)))
        highest, index = tl.max(scores, axis=0, return_indices=True)
        chosen = tl.where(highest > best, first + index, chosen)
        best = tl.maximum(best, highest)
    tl.store(tokens + row, tl.where(num_nan > 0, -1, chosen))


def draw_tokens(logits: Tensor, temperatures: Tensor, seeds: Tensor) -> Tensor:
    """Sample a token for each row of logits, (R, V), contiguous: from softmax(logits / temperature), or the likeliest
    if that is 0. temperatures: (R,) float32; seeds: (R,) long. Returns (R,) int32, -1 for a row with a NaN.
    """
    tokens = torch.empty(len(logits), dtype=torch.int32, device=logits.device)
    tile = min(2048, triton.next_power_of_2(logits.shape[1]))
    draw_kernel[(len(logits),)](logits, temperatures, seeds, tokens, logits.shape[1], TILE=tile)
    return tokens
