"""Lesson 4, optional: blocks and a sliding window. If all layers have a window, a sequence needs only its last blocks.

A token attends to itself and to the `window` - 1 tokens before it, in every layer. So a block is free as soon as the
window has passed it, however long the sequence becomes, and a prefix can be continued if its end is cached.

These functions compute with numbers only. Lesson 4's `KVCacheManager` calls them and moves the blocks. The names are
those of vLLM's `SlidingWindowManager`; windows are from Beltagy et al., "Longformer" (2020).
"""

from __future__ import annotations

from collections.abc import Sequence


def num_skipped_blocks(num_computed_tokens: int, window: int, block_size: int) -> int:
    """Return how many of a sequence's first blocks no token will read again.

    The first `num_computed_tokens` tokens are computed. The next token is at that position and reads the keys of the
    last `window` positions, including its own; later tokens read later keys.
    """
    # Exercise 4.26: find the first key that the next token reads. The blocks before the one with this key are skipped.
    first_key = max(0, num_computed_tokens - window + 1)
    return first_key // block_size


def longest_hit(is_cached: Sequence[bool], window: int, block_size: int) -> range:
    """Return the range of blocks that a new sequence takes from the prefix cache, for the longest cached prefix.

    is_cached: for each full block of the sequence, whether the prefix cache has it. All tokens up to the end of the
    range count as computed, although blocks before the range may be missing: the next token does not read them. So a
    hit needs the blocks with the last `window` - 1 keys before its end (at least one block), or all blocks from the
    first on, if those are fewer. Returns `range(0, 0)` if there is no hit.
    """
    # Exercise 4.27: go from the last block to the first, and count how many cached blocks follow each other.
    num_needed = max(1, -(-(window - 1) // block_size))
    num_in_a_row = 0
    for place in reversed(range(len(is_cached))):
        num_in_a_row = num_in_a_row + 1 if is_cached[place] else 0
        if num_in_a_row == num_needed:
            return range(place, place + num_needed)
    return range(num_in_a_row)
