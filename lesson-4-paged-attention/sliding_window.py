"""Lesson 4, optional: blocks beside a sliding window. Where every layer has one, a sequence needs only its last blocks.

A token attends to itself and to the `window` - 1 tokens before it, in every layer. So a block is free as soon as the
window has passed it, however long the sequence becomes, and a prefix can be continued if the end of it is cached.

This file knows only numbers. Lesson 4's `KVCacheManager` asks it, and moves the blocks. Names as in vLLM's
`SlidingWindowManager`; windows are from Beltagy et al., "Longformer" (2020).
"""

from __future__ import annotations

from collections.abc import Sequence


def num_skipped_blocks(num_computed_tokens: int, window: int, block_size: int) -> int:
    """Return how many of a sequence's first blocks no token will read again.

    The first `num_computed_tokens` tokens are computed. The next one is at that position, and reads the keys of the
    last `window` positions, its own included; later ones read later keys.
    """
    # TODO 4.26: find the first key that the next token reads. The blocks before that key's own are skipped.
    raise NotImplementedError("TODO 4.26")


def longest_hit(is_cached: Sequence[bool], window: int, block_size: int) -> range:
    """Return the blocks that a new sequence takes from the prefix cache, so that the longest prefix is found.

    is_cached: for each full block of the sequence, whether the prefix cache has it. All tokens up to the end of the
    range count as computed, although the blocks before its start may be missing: the next token does not read them.
    So a hit needs the blocks that hold the `window` - 1 keys before its end (at least one block), or all from the first
    on, if those are fewer. `range(0, 0)` if there is none.
    """
    # TODO 4.27: walk from the last block to the first, and count the cached ones in a row.
    raise NotImplementedError("TODO 4.27")
