"""Attention of many requests: over padded keys in torch, and a batch's blocks in the form that fused layers need."""

from __future__ import annotations

import functools
from itertools import accumulate, chain, repeat
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels import build
from common.kernels.groups import Metadata

QUERY_BLOCK = 128
"""The number of a prefill chunk's queries that are computed at a time: the first ones see fewer keys than the last."""

FEW_QUERIES = 16
"""If a request has 2 to this number of queries (verification), a group's heads form one matrix, so that its keys are
read once. With a single query that is slower: nine heads are divided among the cores more evenly than three groups."""


class Cache(Protocol):
    """The attributes of lesson 4's `PagedKVCache` that are used here."""

    keys: Tensor  # (num_layers, num_blocks, block_size, K, D)
    values: Tensor
    layers: range


class PagedAttend:
    """Lesson 4's `attend` for a batch, which also has the batch's blocks for fused layers to write and read.

    `attend` and `native` are made on first use, since a layer needs only one of them. dtype: of the keys that the cache
    takes and returns. Layers with weights in bfloat16 compute in float32.
    """

    def __init__(self, cache: Cache, metadata: Metadata):
        self.cache, self.metadata = cache, metadata
        self.dtype = getattr(cache, "dtype", cache.keys.dtype)
        self.has_floats = cache.keys.dtype in (torch.float32, torch.bfloat16)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **window: int) -> Tensor:
        return self.attend(layer, *(x.to(self.dtype) for x in (q, k, v)), **window).to(q.dtype)

    @functools.cached_property
    def attend(self):
        return self.cache.attend(self.metadata)

    @functools.cached_property
    def native(self):
        """The batch and the cache's blocks in the form of the compiled layers (`Paged` in cpu.cpp)."""
        batch = self.metadata
        num_requests = len(batch.context_lens)
        starts = accumulate(map(len, batch.block_tables[:-1]), initial=3 * num_requests + 1)
        numbers = [*batch.query_start, *batch.context_lens, *starts, *chain.from_iterable(batch.block_tables)]
        cache, numbers = self.cache, torch.tensor(numbers)
        return build.compiled().Paged(cache.keys, cache.values, batch.slot_mapping, numbers, num_requests)


def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Attention of B requests, T queries of each, over keys and values that were gathered and padded to one length.

    q: (B, T, H, D); k, v: (B, S, K, D), with K dividing H; positions: (B, T) integers, 0 to S - 1. Query head h
    attends to key/value head h // (H / K). Key s of a request is seen from position s on, so padding at its end is not
    seen. It must still be finite: NaN times a weight of 0 is NaN. Returns (B, T, H, D).
    """
    batch, num_queries, num_heads, head_dim = q.shape
    if num_queries > QUERY_BLOCK:
        blocks = zip(q.split(QUERY_BLOCK, dim=1), repeat(k), repeat(v), positions.split(QUERY_BLOCK, dim=1))
        return torch.cat([attention(*block) for block in blocks], dim=1)

    mask = None
    if q.device.type == "cpu":  # on a GPU this would wait until all its work is done
        seen = int(positions.max()) + 1
        k, v = k[:, :seen], v[:, :seen]
    if q.device.type != "cpu" or positions.numel() > 1:
        mask = (torch.arange(k.shape[1], device=k.device) <= positions[:, :, None])[:, None]  # (B, 1, T, S)

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not 1 < num_queries <= FEW_QUERIES:
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)
    # Lesson 3's folding: the queries of all heads of a group are the rows of one matrix, (B, K, H / K * T, D).
    num_kv_heads = k.shape[1]
    group_size = num_heads // num_kv_heads
    folded = q.reshape(batch, num_kv_heads, group_size * num_queries, head_dim)
    if mask is not None:
        mask = mask.expand(-1, group_size, -1, -1).flatten(1, 2)[:, None]
    mixed = F.scaled_dot_product_attention(folded, k, v, mask)
    return mixed.reshape(batch, num_heads, num_queries, head_dim).transpose(1, 2)
