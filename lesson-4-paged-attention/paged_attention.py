"""Lesson 4: paged attention. Memory in blocks, a table for each sequence, and attention that follows the table.

Lesson 3 gave each sequence one piece of memory as long as it may become. Here memory is a pool of blocks of a few
tokens each. A sequence holds the blocks that it fills, wherever they lie, and a *block table* says where: block i of
the sequence is block `table[i]` of the pool. Two sequences that begin alike share blocks; a block that is shared is
copied before one of them writes to it. It is what an operating system does with pages, page tables and fork().

Two halves that know nothing of each other. `BlockPool` and `KVCacheManager` deal in ids and counts and hold no tensor;
`PagedKVCache` holds the tensors and does as the ids say. This file does not know about: queues, budgets, who is served
next (lesson 5).

From Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (2023).
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from common import kernels
from common.tokenizer import Tokenizer
from solutions import llama_pytorch
from solutions.kv_cache import fold_groups
from solutions.llama_pytorch import Attend, Llama, RequestOutput, SamplingParams
from solutions.llm_basics import upcast

# ---------------------------------------------------------------------------------------------------------------
# Blocks, and the pool of them
# ---------------------------------------------------------------------------------------------------------------


class BlockHash(NamedTuple):
    """What a full block holds, and what stands before it: the key of the prefix cache.

    `value` stands for everything from the first token of the sequence to the last of this block. Two blocks are the
    same only if all three fields agree, so a hash function that collides costs hits and never gives wrong ones.
    """

    value: bytes
    parent: bytes  # the value of the block before; b"" for the first
    token_ids: tuple[int, ...]


def hash_block(parent: BlockHash | None, token_ids: Sequence[int]) -> BlockHash:
    """The key of a full block with these tokens behind that parent (None: it is the first).

    Keys and values depend on all that came before, so the same tokens behind another parent are another block. Token
    ids go up to the vocabulary's size, which may be more than 100,000.
    """
    # TODO 4.9: a 16-byte `hashlib.blake2b` digest of the parent's value and of these tokens.
    raise NotImplementedError("TODO 4.9")


@dataclass
class KVCacheBlock:
    """The books on one block: room for `block_size` tokens' keys and values, in all layers."""

    block_id: int
    ref_cnt: int = 0  # how many block tables it stands in
    block_hash: BlockHash | None = None  # set once it is full and computed: then it is never written again


class BlockPool:
    """All blocks there are: those in use, the free ones, and by their hash those whose content can be found again.

    A free block that has a hash is not empty: until somebody needs the room, a new sequence with the same beginning
    may take it as it is. Free blocks are handed out in the order in which they became free, so those unused for the
    longest time lose their content first (least recently used, LRU).
    """

    def __init__(self, num_blocks: int):
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1; it is {num_blocks}.")
        self.blocks = [KVCacheBlock(block_id) for block_id in range(num_blocks)]
        self.free = OrderedDict((block.block_id, block) for block in self.blocks)
        self.cached: dict[bytes, KVCacheBlock] = {}  # by the hash's value

    @property
    def num_free_blocks(self) -> int:
        return len(self.free)

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Take so many free blocks, the longest unused first. Each comes with ref_cnt 1 and without a hash.

        Raises ValueError if there are not so many, and then takes none.
        """
        # TODO 4.1: `free.popitem(last=False)` gives the oldest, as (id, block); what `cached` knew of it is no
        # longer true.
        raise NotImplementedError("TODO 4.1")

    def free_blocks(self, blocks: Iterable[KVCacheBlock]) -> None:
        """One holder gives these up. A block that nobody holds any more becomes the youngest of the free ones.

        They keep their content and their hash. Raises ValueError for a block that nobody holds.
        """
        # TODO 4.2: count down; at zero, and only then, it joins `free`, in the order given.
        raise NotImplementedError("TODO 4.2")

    def touch(self, blocks: Iterable[KVCacheBlock]) -> None:
        """One more holder takes these as they are; a free one is free no longer."""
        for block in blocks:
            if block.ref_cnt == 0:
                del self.free[block.block_id]
            block.ref_cnt += 1

    def find(self, block_hash: BlockHash) -> KVCacheBlock | None:
        """The block with this content, if there is one."""
        block = self.cached.get(block_hash.value)
        return block if block is not None and block.block_hash == block_hash else None

    def remember(self, block: KVCacheBlock, block_hash: BlockHash) -> None:
        """Let this full block be found by its content, unless another with the same content already is."""
        if block_hash.value not in self.cached:
            self.cached[block_hash.value] = block
            block.block_hash = block_hash

    def forget(self, block: KVCacheBlock) -> None:
        """Let it not be found any more: its content is about to change, or cannot be trusted."""
        if block.block_hash is not None:
            del self.cached[block.block_hash.value]
            block.block_hash = None


# ---------------------------------------------------------------------------------------------------------------
# Who holds which block
# ---------------------------------------------------------------------------------------------------------------


class TokenSequence(Protocol):
    """What the manager needs to know of a request."""

    request_id: str
    all_token_ids: Sequence[int]  # the prompt, and what was generated since
    num_computed_tokens: int  # of so many, from the first on, keys and values are in the cache


class BlockCopy(NamedTuple):
    """The first `num_tokens` slots of a block, to be copied from one id to another."""

    source: int
    target: int
    num_tokens: int


class KVCacheManager:
    """Gives sequences the blocks that they need, and lets them share those that are alike. Ids and counts, no tensors.

    `copies` collects what has to be copied before the next forward pass; whoever runs that takes it with
    `take_copies`. With `enable_prefix_caching` false, no block is ever found by its content.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True):
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1; it is {block_size}.")
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.block_tables: dict[str, list[KVCacheBlock]] = {}
        self.block_hashes: dict[str, list[BlockHash]] = {}  # of each sequence's full blocks, as far as asked for
        self.copies: list[BlockCopy] = []

    def block_table(self, request_id: str) -> list[int]:
        """The ids of the sequence's blocks, in order; empty if it holds none."""
        return [block.block_id for block in self.block_tables.get(request_id, ())]

    def take_copies(self) -> list[BlockCopy]:
        copies, self.copies = self.copies, []
        return copies

    def hashes(self, request: TokenSequence, num_blocks: int) -> list[BlockHash]:
        """The keys of the first `num_blocks` blocks of its tokens, all of which are full. Each is computed once."""
        known = self.block_hashes.setdefault(request.request_id, [])
        for i in range(len(known), num_blocks):
            token_ids = request.all_token_ids[i * self.block_size : (i + 1) * self.block_size]
            known.append(hash_block(known[-1] if known else None, token_ids))
        return known[:num_blocks]

    def get_computed_blocks(self, request: TokenSequence) -> tuple[list[KVCacheBlock], int]:
        """The blocks that hold the beginning of this sequence already, and how many tokens they hold.

        Nothing is taken: `allocate_slots` does that. The last token is never among them, even where its block is
        there: somebody must compute it, or there are no logits to go on from. With `enable_prefix_caching` false there
        are none.
        """
        # TODO 4.10: from the first block on, as long as the pool finds the next; stop before the last token.
        raise NotImplementedError("TODO 4.10")

    def cache_blocks(self, request: TokenSequence, num_verified_tokens: int) -> None:
        """Let the full blocks among the first `num_verified_tokens` tokens be found by sequences that begin alike.

        Verified: computed by now, or before anybody reads them, and no guess that may yet be rejected. A block that
        is not full, or whose last token is such a guess, has no hash. With `enable_prefix_caching` false it does
        nothing.
        """
        # TODO 4.11: pair its blocks with `hashes`; the pool remembers those that have no hash yet.
        raise NotImplementedError("TODO 4.11")

    def allocate_slots(
        self,
        request: TokenSequence,
        num_new_tokens: int,
        num_lookahead_tokens: int = 0,
        computed_blocks: Sequence[KVCacheBlock] = (),
    ) -> list[KVCacheBlock] | None:
        """Make room for the sequence's next tokens. Returns the new blocks it got for that, or None: the pool is too
        full. Computed blocks, and the copies of shared ones, are not among those returned.

        The room is for `num_new_tokens` behind its `num_computed_tokens`, and for `num_lookahead_tokens` guesses
        behind those. `computed_blocks`, from `get_computed_blocks`, become the beginning of a sequence that holds
        nothing yet; its `num_computed_tokens` counts them already. Where None is returned, nothing was changed.
        A block that is shared and about to be written is replaced by a copy of its own.
        """
        # TODO 4.12: how many blocks must the table have, and how many are missing? A computed block that nobody
        # holds is counted as free and yet is none to take; each block of `shared_blocks` needs one for its copy.
        raise NotImplementedError("TODO 4.12")

    def can_allocate(self, num_tokens: int, computed_blocks: Sequence[KVCacheBlock] = ()) -> bool:
        """Whether a sequence of `num_tokens` tokens that begins with these computed blocks fits into the free blocks.

        Nothing is taken: `allocate_slots` does that. A computed block that no sequence holds is itself a free block.
        """
        num_missing = -(-num_tokens // self.block_size) - len(computed_blocks)
        return num_missing <= self.pool.num_free_blocks - sum(block.ref_cnt == 0 for block in computed_blocks)

    def shared_blocks(self, request: TokenSequence) -> list[int]:
        """Which places of its table hold a block that it is about to write to, and that others read."""
        table = self.block_tables.get(request.request_id, [])
        first = request.num_computed_tokens // self.block_size
        return [place for place in range(first, len(table)) if table[place].ref_cnt > 1]

    def fork(self, parent: TokenSequence, child: TokenSequence) -> None:
        """Let a child that begins like its parent share the parent's blocks. Nothing is copied, until one writes.

        The child's tokens are the beginning of the parent's, and the parent has computed all of them. The child has
        computed all but its last: of that it needs the logits, so that its own next token can be drawn. Raises
        ValueError if the parent has not got so far.
        """
        # TODO 4.13: the blocks that hold the child's tokens, and one more holder for each.
        raise NotImplementedError("TODO 4.13")

    def copy_on_write(self, request: TokenSequence, places: Sequence[int]) -> None:
        """Give the sequence a block of its own in each of these places of its table, with the same content.

        The content is copied later, by whoever has the tensors: of each block the slots that the sequence has filled.
        """
        # TODO 4.16: take a new block, note the copy in `copies`, put it in the table, let go of the shared one.
        raise NotImplementedError("TODO 4.16")

    def free(self, request: TokenSequence) -> None:
        """The sequence gives up all its blocks, the last one first: a beginning is the likeliest to be wanted again."""
        self.pool.free_blocks(reversed(self.block_tables.pop(request.request_id, [])))
        self.block_hashes.pop(request.request_id, None)

    def trim(self, request: TokenSequence) -> None:
        """Give up the blocks that lie behind all its computed tokens: room for guesses that were not accepted."""
        # TODO 4.15: find the bug. A sequence is taken back by a few tokens, and goes on; all is well. But
        # sometimes, when the pool is busy, it then says what another sequence was about.
        raise NotImplementedError("TODO 4.15")  # take this line out, then find the one mistake below and mend it

        table = self.block_tables[request.request_id]
        needed = request.num_computed_tokens // self.block_size
        self.pool.free_blocks(reversed(table[needed:]))
        del table[needed:]

    def reset(self) -> None:
        """Make every block free and empty, whatever state an interrupted step has left behind."""
        self.pool = BlockPool(len(self.pool.blocks))
        self.block_tables, self.block_hashes, self.copies = {}, {}, []


def utilisation(num_tokens: Sequence[int], block_size: int) -> float:
    """Of the slots that sequences of these lengths hold, the share that has a token in it: between 0 and 1.

    No block is shared. With blocks as long as the longest sequence there may be, this is the contiguous cache.
    """
    # TODO 4.14: a sequence holds whole blocks.
    raise NotImplementedError("TODO 4.14")


# ---------------------------------------------------------------------------------------------------------------
# Online softmax: attention to a part of the keys, and then to the rest
# ---------------------------------------------------------------------------------------------------------------


class Partial(NamedTuple):
    """Attention to some of the keys, in a form that can be added to. Scores are relative to `maximum`, so that no exp
    overflows, and not yet divided by their sum.
    """

    maximum: Tensor  # (...): the highest score so far; -inf where no key could be seen
    total: Tensor  # (...): the sum of exp(score - maximum)
    weighted: Tensor  # (..., D): the sum of exp(score - maximum) times the value


def partial_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Partial:
    """Attention of all queries to these keys. q: (..., T, D); k, v: (..., S, D); mask: (..., T, S), True where a query
    may look. In float32 at least.

    A query that may see none of these keys has maximum -inf, total 0 and weighted 0.
    """
    # TODO 4.17: as lesson 1's `attention`, but stop before the division. Beware of -inf minus -inf.
    raise NotImplementedError("TODO 4.17")


def merge_partials(a: Partial, b: Partial) -> Partial:
    """Attention to the keys of both. Either may have seen nothing, for some queries or for all.

    From Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
    """
    # TODO 4.6: bring both to the higher maximum: what was relative to m is multiplied by exp(m - higher).
    raise NotImplementedError("TODO 4.6")


def blockwise_attention(
    q: Tensor, positions: Tensor, num_keys: int, read: Callable[[int, int], tuple[Tensor, Tensor]], segment: int
) -> Tensor:
    """Causal attention that reads `segment` keys at a time: of each head no more than T x segment scores exist.

    q: (B, T, H, D), the queries of B sequences; positions: (B, T), where each stands in its own; it sees the keys up
    to there. read(start, end), end at most num_keys, gives keys and values of the slots start to end of each sequence,
    two of (B, n, K, D). Returns (B, T, H, D) in q's dtype. From Dao et al., "FlashAttention" (2022), which does this
    in a GPU's on-chip memory.
    """
    # TODO 4.7: fold the heads with `fold_sequences` (what is read tells K); for each segment `partial_attention`,
    # masked by position (the same for every head); merge; divide at the end.
    raise NotImplementedError("TODO 4.7")


def fold_sequences(q: Tensor, num_kv_heads: int) -> Tensor:
    """Lesson 3's `fold_groups` for each of B sequences. (B, T, H, D) -> (B, K, H / K * T, D)."""
    return torch.stack([fold_groups(each, num_kv_heads) for each in q])


# ---------------------------------------------------------------------------------------------------------------
# The tensors
# ---------------------------------------------------------------------------------------------------------------


def slot_mapping(block_table: Sequence[int], start: int, num_tokens: int, block_size: int) -> list[int]:
    """Where the tokens at positions start, start + 1, ... are kept. Returns `num_tokens` slot numbers.

    Slots are counted through the whole pool: block b has the slots b * block_size to (b + 1) * block_size - 1.
    """
    # TODO 4.3: a position's place in the table, and its place in that block.
    raise NotImplementedError("TODO 4.3")


@dataclass(frozen=True)
class AttentionMetadata:
    """Which rows of a flat batch belong to which of its R requests, and where each one's memory lies.

    Request r owns the rows query_start[r] to query_start[r + 1]; they are its newest tokens. `context_lens` counts its
    tokens up to and with these, so its first row stands at position context_lens[r] minus the number of its rows.
    """

    query_start: list[int]  # R + 1
    context_lens: list[int]  # R
    slot_mapping: Tensor  # (T,): where each row's key and value are kept
    block_tables: list[list[int]]  # R


class QueryGroup(NamedTuple):
    """B requests with equally many new tokens, and contexts of like length: computed as one, padded to the longest."""

    rows: Tensor  # (B, T): which rows of the flat batch
    positions: Tensor  # (B, T): where each stands in its sequence
    block_tables: Tensor  # (B, num_blocks), padded with 0: what is read there is masked
    num_keys: int  # the longest context of the group


MAX_GROUP_SLOTS = 4096
"""A group of several reads at most so many slots, padding included: what is gathered should still be in the
processor's cache when attention reads it."""


def group_queries(metadata: AttentionMetadata, block_size: int) -> list[QueryGroup]:
    """Sort a batch into groups: requests of equally few rows, as in decoding; one of over 16, a prefill chunk, alone.

    In a group no context is longer than twice the shortest and a block, and `MAX_GROUP_SLOTS` are read at most.
    """
    device = metadata.slot_mapping.device
    order = sorted(
        range(len(metadata.context_lens)),
        key=lambda r: (metadata.query_start[r + 1] - metadata.query_start[r], metadata.context_lens[r]),
    )
    groups: list[list[int]] = []
    for r in order:
        num_rows, num_keys = metadata.query_start[r + 1] - metadata.query_start[r], metadata.context_lens[r]
        if groups and num_rows <= 16:
            first = groups[-1][0]
            alike = metadata.query_start[first + 1] - metadata.query_start[first] == num_rows
            if (
                alike
                and num_keys <= 2 * metadata.context_lens[first] + block_size
                and num_keys * (len(groups[-1]) + 1) <= MAX_GROUP_SLOTS
            ):
                groups[-1].append(r)
                continue
        groups.append([r])

    def build(members: list[int]) -> QueryGroup:
        num_rows = metadata.query_start[members[0] + 1] - metadata.query_start[members[0]]
        ends = torch.tensor([[metadata.query_start[r + 1], metadata.context_lens[r]] for r in members])
        back = torch.arange(-num_rows, 0)
        num_keys = max(metadata.context_lens[r] for r in members)
        width = -(-num_keys // block_size)
        tables = [(metadata.block_tables[r] + [0] * width)[:width] for r in members]
        rows, positions = ends[:, :1] + back, ends[:, 1:] + back
        return QueryGroup(rows.to(device), positions.to(device), torch.tensor(tables, device=device), num_keys)

    return [build(members) for members in groups]


class PagedKVCache:
    """The blocks themselves: keys and values of some layers, for this model's heads, on its device.

    keys, values: (num_layers, num_blocks, block_size, K, D); `host_keys` and `host_values` the same in the host's
    memory, for blocks that were swapped out. A layer is called by its number in the whole model. The number of heads
    is that of the projections, so a model that was given a slice of the heads needs a slice of the memory.
    """

    def __init__(
        self,
        model: Llama,
        num_blocks: int,
        block_size: int,
        num_host_blocks: int = 0,
        layers: range | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.layers = layers or range(model.config.num_hidden_layers)
        self.block_size = block_size
        attention = model.model.layers[self.layers.start].self_attn
        num_kv_heads = attention.k_proj.out_features // attention.head_dim
        weight = model.model.norm.weight  # for its device, and its dtype where no other is asked for
        dtype = dtype or weight.dtype
        shape = (len(self.layers), num_blocks, block_size, num_kv_heads, attention.head_dim)
        host_shape = (len(self.layers), num_host_blocks, *shape[2:])
        # Zeros, for what is masked is still multiplied: by 0, which makes 0 of any number but not of NaN.
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=weight.device) for _ in range(2))
        pin = weight.is_cuda and num_host_blocks > 0
        self.host_keys, self.host_values = (torch.zeros(host_shape, dtype=dtype, pin_memory=pin) for _ in range(2))

    @property
    def device_tensors(self) -> list[Tensor]:
        """All that belongs to a block, the block's number on axis 1 and the slot's on axis 2."""
        return [self.keys, self.values]

    @property
    def host_tensors(self) -> list[Tensor]:
        """Their counterparts for swapped blocks, in the same order."""
        return [self.host_keys, self.host_values]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Keep the keys and values of T tokens. slots: (T,) numbers as `slot_mapping` gives them; k, v: (T, K, D).

        layer: its number in the whole model, of which this cache may have only the layers in `self.layers`.
        """
        # TODO 4.4: seen as (num_blocks * block_size, K, D), a layer's memory is indexed by slot.
        raise NotImplementedError("TODO 4.4")

    def gather(self, layer: int, block_tables: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Read positions start to end of B sequences. block_tables: (B, num_blocks).

        Returns keys and values, two of (B, end - start, K, D). Only the blocks in which these positions lie are
        touched. Where all positions lie in one block of each table (a contiguous cache), only the slots asked for are
        copied.
        """
        # TODO 4.5: which columns of the tables? `index_select` of their blocks, laid end to end, cut to measure; if
        # it is one column only, slice the slots before you select.
        raise NotImplementedError("TODO 4.5")

    def attend(self, metadata: AttentionMetadata) -> Attend:
        """The `attend` seam, for a batch of requests. What does not depend on the layer is made once, here."""
        groups = group_queries(metadata, self.block_size)

        # TODO 4.8: a function of (layer, q, k, v) that writes all keys and values first, and then gives each
        # group's rows what `group_attention` says: a request may read what another of its batch has just written.
        raise NotImplementedError("TODO 4.8")

    def group_attention(self, layer: int, q: Tensor, group: QueryGroup) -> Tensor:
        """Attention of one group to what its tables say. q: (B, T, H, D); returns the same shape.

        The kernel wants all keys at once. Ours, the plain one, takes them in segments.
        """
        if kernels.enabled():
            keys, values = self.gather(layer, group.block_tables, 0, group.num_keys)
            return kernels.attention(q, keys, values, group.positions)

        def read(start: int, end: int) -> tuple[Tensor, Tensor]:
            return self.gather(layer, group.block_tables, start, end)

        return blockwise_attention(q, group.positions, group.num_keys, read, SEGMENT)

    def copy(self, copies: Iterable[BlockCopy]) -> None:
        """Copy blocks, in all layers, before the forward pass that writes to the targets."""
        for tensor in self.device_tensors:
            move(copies, tensor, tensor)

    def swap_out(self, copies: Iterable[BlockCopy]) -> None:
        """Bring blocks of the device (sources) to blocks of the host (targets)."""
        for tensor, host in zip(self.device_tensors, self.host_tensors):
            move(copies, tensor, host)

    def swap_in(self, copies: Iterable[BlockCopy]) -> None:
        """Bring blocks of the host (sources) back to blocks of the device (targets)."""
        for tensor, host in zip(self.device_tensors, self.host_tensors):
            move(copies, host, tensor)


SEGMENT = 512
"""How many keys the plain attention takes at a time."""


def move(copies: Iterable[BlockCopy], source: Tensor, target: Tensor) -> None:
    """Copy blocks in all layers, as far as they are filled. Both: (num_layers, num_blocks, block_size, ...)."""
    for copy in copies:
        target[:, copy.target, : copy.num_tokens] = source[:, copy.source, : copy.num_tokens]


# ---------------------------------------------------------------------------------------------------------------
# One sequence, paged
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class PagedSequence:
    """The least that a `TokenSequence` can be."""

    request_id: str
    all_token_ids: Sequence[int]
    num_computed_tokens: int = 0


def compute(model: Llama, cache: PagedKVCache, manager: KVCacheManager, sequence: PagedSequence) -> Tensor:
    """Compute the tokens of a sequence that are not computed yet. Returns the last one's logits, (V,).

    Raises MemoryError if the pool has no room for them.
    """
    start, computed_blocks = sequence.num_computed_tokens, []
    if not manager.block_table(sequence.request_id):
        computed_blocks, start = manager.get_computed_blocks(sequence)
    sequence.num_computed_tokens = start
    new_token_ids = sequence.all_token_ids[start:]
    if manager.allocate_slots(sequence, len(new_token_ids), computed_blocks=computed_blocks) is None:
        raise MemoryError(
            f"{len(sequence.all_token_ids)} tokens need more blocks of {manager.block_size} than are free: "
            f"{manager.pool.num_free_blocks} of {len(manager.pool.blocks)}."
        )
    cache.copy(manager.take_copies())

    device, end = cache.keys.device, len(sequence.all_token_ids)
    table = manager.block_table(sequence.request_id)
    slots = torch.tensor(slot_mapping(table, start, end - start, manager.block_size), device=device)
    metadata = AttentionMetadata([0, end - start], [end], slots, [table])
    hidden = model(
        torch.tensor(new_token_ids, device=device), torch.arange(start, end, device=device), cache.attend(metadata)
    )
    sequence.num_computed_tokens = end
    manager.cache_blocks(sequence, end)
    return model.logits(hidden[-1:])[0]


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    cache: PagedKVCache,
    manager: KVCacheManager,
    on_text: Callable[[str], None] = lambda piece: None,
) -> RequestOutput:
    """What lesson 2's `generate` gives, over memory that other sequences use too. Its blocks are free afterwards, and
    a later prompt that begins alike finds them.
    """
    sequence = PagedSequence("generate", prompt_token_ids)

    def next_logits(token_ids: Sequence[int]) -> Tensor:
        sequence.all_token_ids = token_ids
        return compute(model, cache, manager, sequence)

    try:
        return llama_pytorch.generate(model, tokenizer, prompt_token_ids, params, on_text, next_logits)
    finally:
        manager.free(sequence)
