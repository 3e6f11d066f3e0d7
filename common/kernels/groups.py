"""Divides a batch into groups of requests that are computed together.

A loop over requests takes a dozen small operations for each; a single padded batch would read much unused memory.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

MAX_GROUP_SLOTS = 4096
"""The most slots that a group of several requests reads, so that they stay in the processor's cache until used."""
MAX_NEW_TOKENS = 16  # a request with more new tokens, a prefill chunk, is a group of its own


class Metadata(Protocol):
    """The attributes of lesson 4's `AttentionMetadata` that are used here."""

    query_start: list[int]
    context_lens: list[int]
    slot_mapping: Tensor
    block_tables: list[list[int]]


class QueryGroup(NamedTuple):
    """B requests with T new tokens each and contexts of similar length, padded to the longest."""

    rows: Tensor  # (B, T): indices into the batch
    positions: Tensor  # (B, T): the position of each token in its sequence
    block_tables: Tensor  # (B, blocks of the longest), padded with 0
    num_keys: int  # the longest context
    first_position: int  # of the tokens computed now
    padding: tuple[Tensor, Tensor]  # request and position, (P) each, of all slots after the end of a context

    def clear_padding(self, start: int, end: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Set what was gathered beyond the end of a context to 0, in place. Its weight is 0, but 0 * NaN is NaN.

        keys, values: (B, end - start, K, D), of the positions start to end - 1. Returns both tensors.
        """
        requests, slots = self.padding
        if len(slots):
            if (start, end) != (0, self.num_keys):
                inside = (start <= slots) & (slots < end)
                requests, slots = requests[inside], slots[inside] - start
            keys[requests, slots], values[requests, slots] = 0, 0
        return keys, values


def group_queries(metadata: Metadata, block_size: int) -> list[QueryGroup]:
    """Divide a batch into groups of requests with the same number of new tokens.

    Within a group no context is longer than twice the shortest plus a block, and all contexts, padded to the longest,
    have at most `MAX_GROUP_SLOTS` slots.
    """
    num_new = [end - start for start, end in pairwise(metadata.query_start)]
    num_keys = metadata.context_lens
    groups: list[list[int]] = []
    for r in sorted(range(len(num_keys)), key=lambda r: (num_new[r], num_keys[r])):
        shortest = groups[-1][0] if groups else r
        if (
            groups
            and num_new[r] == num_new[shortest] <= MAX_NEW_TOKENS
            and num_keys[r] <= 2 * num_keys[shortest] + block_size
            and num_keys[r] * (len(groups[-1]) + 1) <= MAX_GROUP_SLOTS
        ):
            groups[-1].append(r)
        else:
            groups.append([r])

    def build(members: list[int]) -> QueryGroup:
        longest = num_keys[members[-1]]
        width = (longest - 1) // block_size + 1
        tables = [(metadata.block_tables[r] + [0] * width)[:width] for r in members]
        query_ends = torch.tensor([[metadata.query_start[r + 1]] for r in members])
        key_ends = torch.tensor([[num_keys[r]] for r in members])
        new = torch.arange(-num_new[members[0]], 0)
        padding = (torch.arange(longest) >= key_ends).nonzero(as_tuple=True)
        tensors = (query_ends + new, key_ends + new, torch.tensor(tables), *padding)
        rows, positions, block_tables, *padding = (x.to(metadata.slot_mapping.device) for x in tensors)
        first_position = num_keys[members[0]] - num_new[members[0]]
        return QueryGroup(rows, positions, block_tables, longest, first_position, tuple(padding))

    return [build(members) for members in groups]
