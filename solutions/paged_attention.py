"""Lesson 4: paged attention. Keys and values live in blocks, and a block table says which blocks a sequence has.

Lesson 3 gave each sequence contiguous memory for its greatest possible length. Here memory is a pool of blocks, each
with slots for a few tokens. A sequence takes blocks as it grows: block i of the sequence is block `table[i]` of the
pool. Sequences with the same beginning share blocks, and a shared block is copied before one of them writes to it. An
operating system does the same with pages, page tables and fork().

The file has two halves that do not know each other: `BlockPool` and `KVCacheManager` handle ids and counts,
`PagedKVCache` holds the tensors. It does not know about queues, budgets or scheduling (lesson 5).

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
from common.kernels.groups import QueryGroup, group_queries
from common.tokenizer import Tokenizer
from common.windows import window_attention
from solutions import llama_pytorch
from solutions.kv_cache import fold_groups
from solutions.llama_pytorch import Attend, Llama, RequestOutput, SamplingParams
from solutions.llm_basics import upcast
from solutions.sliding_window import longest_hit, num_skipped_blocks

# --- Blocks and the block pool ----------------------------------------------------------------------------------------


def cdiv(a: int, b: int) -> int:
    """Divide whole numbers and round up (ceiling division): cdiv(9, 4) is 3."""
    return -(-a // b)


class BlockHash(NamedTuple):
    """The key of a full block in the prefix cache: its tokens and everything before them. Two keys are equal only if
    all three fields are, so a hash collision can lose a hit, but never give a wrong block.
    """

    value: bytes  # digest of all tokens from the start of the sequence to the end of this block
    parent: bytes  # `value` of the block before; b"" for the first block
    token_ids: tuple[int, ...]  # (block_size,)


def hash_block(parent: BlockHash | None, token_ids: Sequence[int]) -> BlockHash:
    """Return the key of a full block with these tokens. parent: the key of the block before it, None for a first block.

    A token's key and value depend on all tokens before it, so the same tokens after another parent need another key.
    Token ids may exceed 100,000.
    """
    # Exercise 4.1: the value is a 16-byte `hashlib.blake2b` digest of the parent's value and these tokens.
    before = parent.value if parent else b""
    text = " ".join(map(str, token_ids)).encode()
    return BlockHash(hashlib.blake2b(before + text, digest_size=16).digest(), before, tuple(token_ids))


def salt_hash(salt: str) -> BlockHash | None:
    """Return the parent of a sequence's first block: None without a salt.

    With a prefix cache, the time to the first token reveals whether another request had the same prompt. A salt enters
    the hashes of all blocks, so only requests with the same salt share blocks.
    """
    return BlockHash(hashlib.blake2b(salt.encode(), digest_size=16).digest(), b"", ()) if salt else None


@dataclass
class KVCacheBlock:
    """Bookkeeping of one block, which stores the keys and values of `block_size` tokens in all layers."""

    block_id: int
    ref_cnt: int = 0  # the number of block tables that contain it
    block_hash: BlockHash | None = None  # set once the block is full and computed; it is never written again


class BlockPool:
    """All blocks: those in use, the free ones, and an index of full blocks by hash (the prefix cache).

    A free block keeps its hash and content until it is reused, so a new sequence with the same prefix can take it back.
    Free blocks are reused in the order in which they became free (least recently used, LRU).
    """

    def __init__(self, num_blocks: int):
        self.blocks = [KVCacheBlock(block_id) for block_id in range(num_blocks)]
        self.free = OrderedDict((block.block_id, block) for block in self.blocks)  # by id, the oldest first
        self.cached: dict[bytes, KVCacheBlock] = {}  # by `block_hash.value`

    @property
    def num_free_blocks(self) -> int:
        return len(self.free)

    def get_new_blocks(self, num_blocks: int) -> list[KVCacheBlock]:
        """Take `num_blocks` free blocks, the least recently used first, each with ref_cnt 1 and no hash. Raises
        ValueError, and takes none, if fewer are free.
        """
        # Exercise 4.2: `free.popitem(last=False)` removes the oldest free block and returns (id, block). `forget` the
        # block, because its old content must no longer be found.
        if num_blocks > len(self.free):
            raise ValueError(f"{num_blocks} blocks requested, {len(self.free)} of {len(self.blocks)} are free.")
        blocks = [self.free.popitem(last=False)[1] for _ in range(num_blocks)]
        for block in blocks:
            self.forget(block)
            block.ref_cnt = 1
        return blocks

    def free_blocks(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Decrement each block's reference count. At 0 it becomes the newest free block; it keeps its content and hash.
        Raises ValueError for a block whose count is 0 already.
        """
        # Exercise 4.3: decrement each count. If it is 0 then, append the block to `free`, in the order given.
        for block in blocks:
            if block.ref_cnt < 1:
                raise ValueError(f"Block {block.block_id} is free already.")
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                self.free[block.block_id] = block

    def touch(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Increment each block's reference count; remove it from the free list if it was free."""
        for block in blocks:
            if block.ref_cnt == 0:
                del self.free[block.block_id]
            block.ref_cnt += 1

    def find(self, block_hash: BlockHash) -> KVCacheBlock | None:
        """Return the cached block with this key, or None."""
        block = self.cached.get(block_hash.value)
        return block if block is not None and block.block_hash == block_hash else None

    def remember(self, block: KVCacheBlock, block_hash: BlockHash) -> None:
        """Enter this full block into the prefix cache, unless the cache has a block with the same content already."""
        if block_hash.value not in self.cached:
            self.cached[block_hash.value] = block
            block.block_hash = block_hash

    def forget(self, block: KVCacheBlock) -> None:
        """Remove this block from the prefix cache, because its content will change or cannot be trusted."""
        if block.block_hash is not None:
            del self.cached[block.block_hash.value]
            block.block_hash = None


# --- Block tables -----------------------------------------------------------------------------------------------------


class TokenSequence(Protocol):
    """What the manager must know about a request."""

    request_id: str
    all_token_ids: Sequence[int]  # prompt and output
    num_computed_tokens: int  # the number of its first tokens whose keys and values are in the cache
    cache_salt: str  # only sequences with the same salt share blocks; "" is a salt, too


class BlockCopy(NamedTuple):
    """A copy of the first `num_tokens` slots of a block."""

    source: int  # block id
    target: int  # block id
    num_tokens: int


class KVCacheManager:
    """Assigns blocks to sequences, and lets sequences with the same prefix share them. It has no tensors.

    `copies` lists the copies to make before the next forward pass; `take_copies` hands them to the caller.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        enable_prefix_caching: bool = True,
        sliding_window: int | None = None,  # the window of all layers; None if some layer reads all keys
    ):
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.sliding_window = sliding_window
        # Stands in a table for a block that the window has passed. It is never read and is not in the pool. It has a
        # hash, so that `cache_blocks` does not enter it into the prefix cache.
        self.dropped = KVCacheBlock(0, ref_cnt=1, block_hash=BlockHash(b"", b"", ()))
        self.block_tables: dict[str, list[KVCacheBlock]] = {}  # by request id
        self.block_hashes: dict[str, list[BlockHash]] = {}  # by request id: keys of full blocks, computed so far
        self.copies: list[BlockCopy] = []

    def block_table(self, request_id: str) -> list[int]:
        """Return the ids of the sequence's blocks, in order; empty if it has none."""
        return [block.block_id for block in self.block_tables.get(request_id, ())]

    def take_copies(self) -> list[BlockCopy]:
        """Return the pending copies and clear the list."""
        copies, self.copies = self.copies, []
        return copies

    def hashes(self, request: TokenSequence, num_blocks: int) -> list[BlockHash]:
        """Return the keys of the sequence's first `num_blocks` blocks, which must be full. Each is computed once."""
        known = self.block_hashes.setdefault(request.request_id, [])
        for i in range(len(known), num_blocks):
            token_ids = request.all_token_ids[i * self.block_size : (i + 1) * self.block_size]
            known.append(hash_block(known[-1] if known else salt_hash(request.cache_salt), token_ids))
        return known[:num_blocks]

    def get_computed_blocks(self, request: TokenSequence) -> tuple[list[KVCacheBlock], int]:
        """Return the cached blocks that hold the beginning of this sequence, and their number of tokens.

        They are only looked up; `allocate_slots` takes them. The last token is never among them, even if its block is
        cached: it must be computed to get its logits. Without `enable_prefix_caching`, there are none.
        """
        if self.sliding_window is not None:
            return self.computed_blocks_in_window(request)
        # Exercise 4.4: look up one block after the other until one is missing, but never the block of the last token.
        if not self.enable_prefix_caching:
            return [], 0
        blocks: list[KVCacheBlock] = []
        for block_hash in self.hashes(request, (len(request.all_token_ids) - 1) // self.block_size):
            block = self.pool.find(block_hash)
            if block is None:
                break
            blocks.append(block)
        return blocks, len(blocks) * self.block_size

    def cache_blocks(self, request: TokenSequence, num_verified_tokens: int) -> None:
        """Enter the full blocks of the first `num_verified_tokens` tokens into the prefix cache.

        Verified tokens are computed, at the latest in this step, and are not draft tokens, which may be rejected. Other
        blocks get no hash. Without `enable_prefix_caching`, do nothing.
        """
        # Exercise 4.5: pair the blocks of the table with `hashes`, and let the pool remember each that has no hash yet.
        if not self.enable_prefix_caching:
            return
        block_hashes = self.hashes(request, num_verified_tokens // self.block_size)
        for block, block_hash in zip(self.block_tables[request.request_id], block_hashes):
            if block.block_hash is None:
                self.pool.remember(block, block_hash)

    def allocate_slots(
        self,
        request: TokenSequence,
        num_new_tokens: int,
        num_lookahead_tokens: int = 0,
        computed_blocks: Sequence[KVCacheBlock] = (),
    ) -> list[KVCacheBlock] | None:
        """Reserve slots for the sequence's next tokens. Returns the new blocks, or None, with no side effects, if the
        pool is too full. Computed blocks and copies of shared blocks are not returned.

        Afterwards the table has slots for the computed tokens, `num_new_tokens` more and `num_lookahead_tokens` draft
        tokens. `computed_blocks`, from `get_computed_blocks`, become the beginning of a new sequence's table; its
        `num_computed_tokens` includes them already. A shared block that will be written is replaced with a copy.
        """
        # Exercise 4.6: count the missing blocks, and one for the copy of each of `shared_blocks`. Compare with the free
        # blocks, without the computed ones with ref_cnt 0. Then touch, copy on write, take and extend the table.
        table = self.block_tables.get(request.request_id, [])
        num_tokens = request.num_computed_tokens + num_new_tokens + num_lookahead_tokens
        num_missing = max(0, cdiv(num_tokens, self.block_size) - len(table) - len(computed_blocks))
        shared = self.shared_blocks(request)
        unheld = sum(block.ref_cnt == 0 for block in computed_blocks)
        if num_missing + len(shared) > self.pool.num_free_blocks - unheld:
            return None
        self.pool.touch(computed_blocks)
        if shared:
            self.copy_on_write(request, shared)
        new_blocks = self.pool.get_new_blocks(num_missing)
        self.block_tables[request.request_id] = [*table, *computed_blocks, *new_blocks]
        return new_blocks

    def can_allocate(self, num_tokens: int, computed_blocks: Sequence[KVCacheBlock] = ()) -> bool:
        """Whether a sequence of `num_tokens` tokens that begins with these computed blocks fits into the free blocks.
        A computed block that no sequence holds is itself a free block.
        """
        num_missing = cdiv(num_tokens, self.block_size) - len(computed_blocks)
        return num_missing <= self.pool.num_free_blocks - sum(block.ref_cnt == 0 for block in computed_blocks)

    def shared_blocks(self, request: TokenSequence) -> list[int]:
        """Return the indices of the table whose blocks are shared and will be written next."""
        table = self.block_tables.get(request.request_id, [])
        first = request.num_computed_tokens // self.block_size
        return [place for place in range(first, len(table)) if table[place].ref_cnt > 1]

    def fork(self, parent: TokenSequence, child: TokenSequence) -> None:
        """Let the child share the parent's blocks that hold its tokens. Nothing is copied until one of them writes.

        The child's tokens are the first of the parent's. All but the child's last count as computed: the last is
        computed again for its logits, from which the child draws its own next token. Raises ValueError if the parent
        has not computed all of the child's tokens.
        """
        # Exercise 4.7: touch the blocks that hold the child's tokens, and put them into a new list, the child's table.
        num_tokens = len(child.all_token_ids)
        if parent.num_computed_tokens < num_tokens:
            raise ValueError(
                f"{child.request_id} has {num_tokens} tokens; {parent.request_id} has computed only "
                f"{parent.num_computed_tokens}."
            )
        blocks = self.block_tables[parent.request_id][: cdiv(num_tokens, self.block_size)]
        self.pool.touch(blocks)
        self.block_tables[child.request_id] = list(blocks)
        child.num_computed_tokens = num_tokens - 1

    def copy_on_write(self, request: TokenSequence, places: Sequence[int]) -> None:
        """Replace the blocks at these indices of the sequence's table with new blocks of the same content. `copies`
        records which slots to copy: those that the sequence has filled. `PagedKVCache.copy` copies them later.
        """
        # Exercise 4.8: for each index take a new block, record the copy, put it into the table, free the old block.
        for place in places:
            table = self.block_tables[request.request_id]
            shared, (own,) = table[place], self.pool.get_new_blocks(1)
            filled = min(self.block_size, request.num_computed_tokens - place * self.block_size)
            if filled > 0:
                self.copies.append(BlockCopy(shared.block_id, own.block_id, filled))
            table[place] = own
            self.pool.free_blocks([shared])

    def free(self, request: TokenSequence) -> None:
        """Free all blocks of the sequence, the last first, because the first are the most likely to be needed again."""
        table = self.block_tables.pop(request.request_id, [])
        self.pool.free_blocks(block for block in reversed(table) if block is not self.dropped)
        self.block_hashes.pop(request.request_id, None)

    def num_dropped(self, request: TokenSequence) -> int:
        """Return how many blocks are missing at the beginning of a sequence's table: the window has passed them."""
        return self.block_tables.get(request.request_id, []).count(self.dropped)

    def num_skipped(self, num_computed_tokens: int) -> int:
        """Return how many first blocks the window has passed when this number of tokens is computed."""
        if self.sliding_window is None:
            return 0
        return num_skipped_blocks(num_computed_tokens, self.sliding_window, self.block_size)

    def computed_blocks_in_window(self, request: TokenSequence) -> tuple[list[KVCacheBlock], int]:
        """`get_computed_blocks` where every layer has a window: blocks that the next token does not read are not looked
        up, and `dropped` stands for them. So a prefix is found although its beginning was evicted long ago.
        """
        if not self.enable_prefix_caching:
            return [], 0
        block_hashes = self.hashes(request, (len(request.all_token_ids) - 1) // self.block_size)
        found = [self.pool.find(block_hash) for block_hash in block_hashes]
        hit = longest_hit([block is not None for block in found], self.sliding_window, self.block_size)
        return [self.dropped] * hit.start + found[hit.start : hit.stop], hit.stop * self.block_size

    def drop_outside_window(self, request: TokenSequence) -> None:
        """Free the blocks that the window has passed: neither the next token nor a later one reads any key in them.

        They keep their content and hash, as all free blocks do: a new sequence may still find them.
        """
        table = self.block_tables.get(request.request_id, [])
        passed = table[: self.num_skipped(request.num_computed_tokens)]
        if not passed or passed[-1] is self.dropped:
            return
        self.pool.free_blocks(block for block in reversed(passed) if block is not self.dropped)
        table[: len(passed)] = [self.dropped] * len(passed)

    def trim(self, request: TokenSequence) -> None:
        """Free the blocks after the computed tokens: slots for draft tokens that were rejected."""
        # Exercise 4.9: find the bug. A sequence goes back by a few tokens and continues, and its text is right. But
        # sometimes, when the pool is busy, its text continues with that of another sequence.

        table = self.block_tables[request.request_id]
        needed = cdiv(request.num_computed_tokens, self.block_size)
        self.pool.free_blocks(reversed(table[needed:]))
        del table[needed:]

    def reset(self) -> None:
        """Make every block free and empty, whatever state an interrupted step has left behind."""
        self.pool = BlockPool(len(self.pool.blocks))
        self.block_tables, self.block_hashes, self.copies = {}, {}, []


def utilisation(num_tokens: Sequence[int], block_size: int) -> float:
    """Return the fraction of reserved slots that hold a token, for sequences of these lengths, without shared blocks.
    If each block is as long as the longest possible sequence, this is the contiguous cache of lesson 3.
    """
    # Exercise 4.10: divide the number of tokens by the number of slots. Each sequence reserves whole blocks.
    slots = sum(cdiv(length, block_size) * block_size for length in num_tokens)
    return sum(num_tokens) / slots


# --- Online softmax: attention to some keys, then to the others -------------------------------------------------------


class Partial(NamedTuple):
    """Attention to some of the keys, before the division. Scores are relative to `maximum`, so no exp overflows."""

    maximum: Tensor  # (...): the highest score; -inf if no key was visible
    total: Tensor  # (...): the sum of exp(score - maximum)
    weighted: Tensor  # (..., D): the sum of exp(score - maximum) * value


def partial_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Partial:
    """Compute the attention of all queries to these keys, in float32 or better.

    q: (..., T, D); k, v: (..., S, D); mask: (..., T, S), True where a query may attend. A query that may attend to none
    of these keys gets maximum -inf, total 0 and weighted 0.
    """
    # Exercise 4.11: as lesson 1's `attention`, but stop before the division. Beware: -inf minus -inf is NaN.
    scores = (upcast(q) @ upcast(k).mT / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
    maximum = scores.amax(-1)
    weights = (scores - maximum.clamp(min=torch.finfo(scores.dtype).min)[..., None]).exp()
    return Partial(maximum, weights.sum(-1), weights @ upcast(v))


def merge_partials(a: Partial, b: Partial) -> Partial:
    """Combine attention to two sets of keys. In either, any query may have seen no key.

    From Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
    """
    # Exercise 4.12: rescale both to the higher maximum: multiply the sums of a part by exp(its maximum - the higher).
    maximum = torch.maximum(a.maximum, b.maximum)
    safe = maximum.clamp(min=torch.finfo(maximum.dtype).min)  # -inf minus -inf is NaN
    scale_a, scale_b = (a.maximum - safe).exp(), (b.maximum - safe).exp()
    return Partial(
        maximum,
        a.total * scale_a + b.total * scale_b,
        a.weighted * scale_a[..., None] + b.weighted * scale_b[..., None],
    )


def fold_sequences(q: Tensor, num_kv_heads: int) -> Tensor:
    """Lesson 3's `fold_groups` for each of B sequences. (B, T, H, D) -> (B, K, H / K * T, D)."""
    return torch.stack([fold_groups(sequence, num_kv_heads) for sequence in q])


def blockwise_attention(
    q: Tensor, positions: Tensor, num_keys: int, read: Callable[[int, int], tuple[Tensor, Tensor]], segment: int
) -> Tensor:
    """Causal attention that reads at most `segment` keys at a time, so that only T x segment scores per head exist.

    q: (B, T, H, D), queries of B sequences; positions: (B, T), the position of each query in its sequence: it attends
    to the keys up to there. read(start, end), with end <= num_keys, returns the keys and values at these positions of
    all sequences, both (B, end - start, K, D). Returns (B, T, H, D) in q's dtype. From Dao et al., "FlashAttention".
    """
    # Exercise 4.13: fold the heads with `fold_sequences` (K is in the shape of what `read` returns). For each segment
    # call `partial_attention`, with a mask by position that all heads of a group share, and merge. Divide at the end.
    num_kv_heads = read(0, 1)[0].shape[2]
    folded = fold_sequences(q, num_kv_heads)  # (B, K, G * T, D): G query heads share their keys
    group_size = q.shape[2] // num_kv_heads
    rows = positions.repeat(1, group_size)[:, None, :, None]  # (B, 1, G * T, 1): row g * T + t is token t
    whole = None
    for start in range(0, num_keys, segment):
        end = min(start + segment, num_keys)
        keys, values = (x.transpose(1, 2) for x in read(start, end))  # (B, K, n, D)
        slots = torch.arange(start, end, device=q.device)
        part = partial_attention(folded, keys, values, slots <= rows)
        whole = part if whole is None else merge_partials(whole, part)
    mixed = (whole.weighted / whole.total[..., None]).to(q.dtype)
    return mixed.view(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)


# --- The tensors ------------------------------------------------------------------------------------------------------


def slot_mapping(block_table: Sequence[int], start: int, num_tokens: int, block_size: int) -> list[int]:
    """Return the slots of `num_tokens` tokens, from position `start` of their sequence on.

    Slots are numbered through the whole pool: block b has slots b * block_size to (b + 1) * block_size - 1.
    """
    # Exercise 4.14: find each position's block in the table, and its offset in that block.
    positions = range(start, start + num_tokens)
    return [block_table[p // block_size] * block_size + p % block_size for p in positions]


@dataclass(frozen=True)
class AttentionMetadata:
    """Which of a batch's T tokens belong to which of its R requests, and where their keys and values are.

    Request r has the tokens query_start[r] to query_start[r + 1] - 1 of the batch. They are its newest, so the first of
    them is at position context_lens[r] minus their number.
    """

    query_start: list[int]  # (R + 1)
    context_lens: list[int]  # (R): the number of all tokens of the request, including those in this batch
    slot_mapping: Tensor  # (T): the slot of each token
    block_tables: list[list[int]]  # (R, blocks of the request)


SEGMENT = 512  # keys that the plain attention reads at a time


def move(copies: Iterable[BlockCopy], sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy the filled slots of blocks. Each tensor: (num_layers, num_blocks, block_size, ...)."""
    for source, target in zip(sources, targets):
        for copy in copies:
            target[:, copy.target, : copy.num_tokens] = source[:, copy.source, : copy.num_tokens]


class PagedKVCache:
    """The tensors: keys and values of some layers on the model's device, and of swapped blocks in host memory.

    Methods take a layer's index in the whole model. A model with a part of the heads gets a cache for that part.
    """

    stored_dtype: torch.dtype | None = None  # None: the one in which keys and values are written and read

    def __init__(
        self,
        model: Llama,
        num_blocks: int,
        block_size: int,
        num_host_blocks: int = 0,
        layers: range | None = None,
        dtype: torch.dtype | None = None,  # None: that of the norms, which compiled kernels keep in float32
    ):
        self.layers = layers or range(model.config.num_hidden_layers)
        self.block_size = block_size
        attention, weight = model.model.layers[self.layers.start].self_attn, model.model.norm.weight
        self.dtype = dtype or weight.dtype
        dtype = self.stored_dtype or self.dtype
        num_kv_heads = attention.k_proj.out_features // attention.head_dim
        shape = (len(self.layers), num_blocks, block_size, num_kv_heads, attention.head_dim)
        host_shape = (len(self.layers), num_host_blocks, *shape[2:])
        pin = weight.is_cuda and num_host_blocks > 0
        # (num_layers, num_blocks, block_size, K, D) each
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=weight.device) for _ in range(2))
        self.host_keys, self.host_values = (torch.zeros(host_shape, dtype=dtype, pin_memory=pin) for _ in range(2))
        self.device_tensors = [self.keys, self.values]  # all that is stored for a block: lesson 7 adds to it
        self.host_tensors = [self.host_keys, self.host_values]  # their counterparts, in the same order

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store the keys and values of T tokens in these slots. slots: (T,); k, v: (T, K, D). layer: the index in the
        whole model; this cache has the layers in `self.layers`.
        """
        # Exercise 4.15: view the layer's memory as (num_blocks * block_size, K, D); its first axis is the slot.
        index = layer - self.layers.start
        self.keys[index].flatten(0, 1).index_copy_(0, slots, k)
        self.values[index].flatten(0, 1).index_copy_(0, slots, v)

    def gather(self, layer: int, block_tables: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Read the positions start to end - 1 of B sequences. block_tables: (B, num_blocks).

        Returns keys and values, both (B, end - start, K, D). Read only the blocks that contain these positions. If they
        are in a single block of each table (as in a contiguous cache), copy only the requested slots.
        """
        # Exercise 4.16: find the columns of the tables that are needed, `index_select` their blocks, join them and cut
        # off both ends. If one column is enough, slice its slots before the `index_select`.
        first, last = start // self.block_size, cdiv(end, self.block_size)
        low, high = start - first * self.block_size, end - first * self.block_size
        block_ids = block_tables[:, first:last].flatten()
        found = []
        for store in (self.keys[layer - self.layers.start], self.values[layer - self.layers.start]):
            if last - first == 1:
                found.append(store[:, low:high].index_select(0, block_ids))
            else:
                whole = store.index_select(0, block_ids).view(len(block_tables), -1, *store.shape[2:])
                found.append(whole[:, low:high])
        return found[0], found[1]

    def attend(self, metadata: AttentionMetadata) -> Attend:
        """Return lesson 2's `attend` for a batch of requests. The groups are the same in all layers, and made once."""
        groups = group_queries(metadata, self.block_size)

        # Exercise 4.17: return a function of (layer, q, k, v, window=None). It first writes all keys and values: a
        # request may read what another request of the batch writes. Then it puts each group's `group_attention`, which
        # takes the window (None in most models), into the group's rows of the result.
        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
            self.write(layer, metadata.slot_mapping, k, v)
            mixed = torch.empty_like(q)
            for group in groups:
                mixed[group.rows] = self.group_attention(layer, q[group.rows], group, window)
            return mixed

        return attend

    def group_attention(self, layer: int, q: Tensor, group: QueryGroup, window: int | None = None) -> Tensor:
        """Compute one group's attention to its own keys. q: (B, T, H, D). Returns the same shape."""

        def read(start: int, end: int) -> tuple[Tensor, Tensor]:
            return group.clear_padding(start, end, *self.gather(layer, group.block_tables, start, end))

        if window is not None:  # read nothing that lies before all windows of the group
            first = max(0, group.first_position - window + 1)
            return window_attention(q, *read(first, group.num_keys), group.positions, first, window)
        if kernels.enabled():  # the kernel takes all keys at once, the plain code in segments
            return kernels.attention(q, *read(0, group.num_keys), group.positions)
        return blockwise_attention(q, group.positions, group.num_keys, read, SEGMENT)

    def copy(self, copies: Iterable[BlockCopy]) -> None:
        """Copy blocks, in all layers. Call it before the forward pass that writes to the targets."""
        move(copies, self.device_tensors, self.device_tensors)

    def swap_out(self, copies: Iterable[BlockCopy]) -> None:
        """Copy blocks of the device (sources) to blocks of the host (targets)."""
        move(copies, self.device_tensors, self.host_tensors)

    def swap_in(self, copies: Iterable[BlockCopy]) -> None:
        """Copy blocks of the host (sources) to blocks of the device (targets)."""
        move(copies, self.host_tensors, self.device_tensors)


# --- One sequence, paged ----------------------------------------------------------------------------------------------


@dataclass
class PagedSequence:
    """The simplest `TokenSequence`."""

    request_id: str
    all_token_ids: Sequence[int]
    num_computed_tokens: int = 0
    cache_salt: str = ""


def compute(model: Llama, cache: PagedKVCache, manager: KVCacheManager, sequence: PagedSequence) -> Tensor:
    """Compute the sequence's remaining tokens. Returns the logits of the last, (V,). Raises MemoryError if the pool has
    too few free blocks.
    """
    computed_blocks: list[KVCacheBlock] = []
    if not manager.block_table(sequence.request_id):
        computed_blocks, sequence.num_computed_tokens = manager.get_computed_blocks(sequence)
    manager.drop_outside_window(sequence)
    start, end = sequence.num_computed_tokens, len(sequence.all_token_ids)
    if manager.allocate_slots(sequence, end - start, computed_blocks=computed_blocks) is None:
        raise MemoryError(
            f"{end} tokens need more blocks of {manager.block_size} than are free: {manager.pool.num_free_blocks} of "
            f"{len(manager.pool.blocks)}."
        )
    cache.copy(manager.take_copies())

    device, table = cache.keys.device, manager.block_table(sequence.request_id)
    slots = torch.tensor(slot_mapping(table, start, end - start, manager.block_size), device=device)
    metadata = AttentionMetadata([0, end - start], [end], slots, [table])
    token_ids = torch.tensor(sequence.all_token_ids[start:], device=device)
    hidden = model(token_ids, torch.arange(start, end, device=device), cache.attend(metadata))
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
    """Return the same tokens as lesson 2's `generate`, from a cache that is shared with other sequences.

    The blocks are free afterwards; a later prompt with the same prefix finds them in the prefix cache.
    """
    sequence = PagedSequence("generate", prompt_token_ids)

    def next_logits(token_ids: Sequence[int]) -> Tensor:
        sequence.all_token_ids = token_ids
        return compute(model, cache, manager, sequence)

    try:
        return llama_pytorch.generate(model, tokenizer, prompt_token_ids, params, on_text, next_logits)
    finally:
        manager.free(sequence)
