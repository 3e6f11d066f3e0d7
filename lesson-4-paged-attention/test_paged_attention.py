"""The checks of lesson 4. Block ids are worked by hand; attention is compared with plain loops over whole sequences."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from common.checkpoints import Checkpoint
from common.grading import elsewhere, close, equal, exercise, holds, together

SNAPSHOTS = Path(__file__).parent.parent / "lesson-2-llama-pytorch" / "snapshots"


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids(blocks) -> list[int]:
    return [block.block_id for block in blocks]


def ref_cnts(pool) -> list[int]:
    return [block.ref_cnt for block in pool.blocks]


def refused(call, what: str, left) -> None:
    """`call` must raise ValueError. left(): what is to be seen of it where it does not, (in words, as a value)."""
    try:
        call()
    except ValueError:
        return
    except Exception as error:
        holds(False, f"{what} should raise ValueError; it raised {type(error).__name__}: {error}")
    words, value = left()
    holds(False, f"{what} should raise ValueError; {words}.", actual=value)


def stored(code, manager, name: str, token_ids: list[int]):
    """A sequence whose tokens are all computed, in blocks of its own, and findable where they are full."""
    sequence = code.PagedSequence(name, list(token_ids))
    manager.allocate_slots(sequence, len(token_ids))
    sequence.num_computed_tokens = len(token_ids)
    manager.cache_blocks(sequence, len(token_ids))
    return sequence


def constant_hash(code):
    """A stand-in for `hash_block` that collides always: every value is the same."""

    def hash_block(parent, token_ids):
        return code.BlockHash(b"the same", parent.value if parent else b"", tuple(token_ids))

    return hash_block


# --- Blocks, and the pool of them -------------------------------------------------------------------------------------


@exercise("4.1")
class TestHashBlock:
    def test_the_fields(self, code):
        first = code.hash_block(None, [5, 7])
        holds(first is not None, "hash_block(None, [5, 7]) is None: is a `return` missing?")
        equal(first.token_ids, (5, 7), "hash_block(None, [5, 7]).token_ids")
        equal(first.parent, b"", "hash_block(None, [5, 7]).parent")
        second = code.hash_block(first, [8, 9])
        holds(
            second.parent == first.value,
            "The field `parent` of the second block is not the `value` of the first.",
            actual=str(second.parent == b""),
        )
        equal(len(first.value), 16, "the number of bytes in a value")

    def test_what_a_value_depends_on(self, code):
        a, b = code.hash_block(None, [1, 2]), code.hash_block(None, [3, 4])
        a_c, b_c = code.hash_block(a, [5, 6]), code.hash_block(b, [5, 6])
        differ = {
            "[1, 2] and [3, 4]": a.value != b.value,
            "[1, 2] and [2, 1]": a.value != code.hash_block(None, [2, 1]).value,
            "[1, 23] and [12, 3]": code.hash_block(None, [1, 23]).value != code.hash_block(None, [12, 3]).value,
            "[5, 6] after [1, 2], and [5, 6] as the first block": a_c.value != code.hash_block(None, [5, 6]).value,
            "[5, 6] after [1, 2], and [5, 6] after [3, 4]": a_c.value != b_c.value,
            "[7, 8] after [1, 2] [5, 6], and [7, 8] after [3, 4] [5, 6]": (
                code.hash_block(a_c, [7, 8]).value != code.hash_block(b_c, [7, 8]).value
            ),
        }
        alike = [case for case, differs in differ.items() if not differs]
        holds(
            not alike, f"These blocks must have different values, but have the same: {'; '.join(alike)}.", actual=alike
        )

    def test_a_large_vocabulary(self, code):
        alike = []
        for one, other in ((1, 257), (44, 300), (1, 65_537), (4_464, 70_000), (0, 128_000)):
            try:
                if code.hash_block(None, [one, 5]).value == code.hash_block(None, [other, 5]).value:
                    alike.append(f"[{one}, 5] and [{other}, 5]")
            except (ValueError, OverflowError) as error:
                text = f"{type(error).__name__}: {error}"
                holds(False, f"hash_block(None, [{other}, 5]) raises {text}. Token ids can be that large.")
        holds(
            not alike, f"These blocks must have different values, but have the same: {'; '.join(alike)}.", actual=alike
        )

    def test_the_same_again(self, code):
        a, b = code.hash_block(None, [1, 2]), code.hash_block(None, (1, 2))
        holds(a == b, "hash_block of [1, 2] and of the tuple (1, 2) differ.", actual="differ")
        holds(
            code.hash_block(a, [3]) == code.hash_block(b, [3]),
            "hash_block of the same tokens after equal parents differs from one call to the next.",
            actual="differ",
        )


@exercise("4.2", points=2)
class TestGetNewBlocks:
    def test_by_hand(self, code):
        pool = code.BlockPool(5)
        what = "the ids of the blocks from get_new_blocks(2), in a new pool of 5 blocks,"
        equal(ids(pool.get_new_blocks(2)), [0, 1], what)
        equal(pool.num_free_blocks, 3, "num_free_blocks of a pool of 5 blocks after get_new_blocks(2)")
        equal(ref_cnts(pool), [1, 1, 0, 0, 0], "the ref_cnt of the five blocks after get_new_blocks(2)")
        what = "the ids of the blocks from get_new_blocks(3), after get_new_blocks(2),"
        equal(ids(pool.get_new_blocks(3)), [2, 3, 4], what)
        equal(pool.num_free_blocks, 0, "num_free_blocks when all blocks are taken")
        what = "the ids of the blocks from get_new_blocks(0), when all blocks are taken,"
        equal(ids(pool.get_new_blocks(0)), [], what)

    def test_the_longest_unused_first(self, code):
        pool = code.BlockPool(4)
        blocks = pool.get_new_blocks(4)
        for freed in (2, 0, 3):
            pool.free_blocks([blocks[freed]])
        what = "the ids of get_new_blocks(2), after the blocks 2, 0 and 3 became free in this order,"
        equal(ids(pool.get_new_blocks(2)), [2, 0], what)

    def test_a_block_with_a_hash_has_no_privilege(self, code):
        pool = code.BlockPool(3)
        block, *_ = pool.get_new_blocks(2)
        pool.remember(block, code.hash_block(None, [4, 5]))
        pool.free_blocks([block])
        order = "where block 2 became free first, and block 0, which has a hash, after it"
        equal(ids(pool.get_new_blocks(2)), [2, 0], f"the ids of get_new_blocks(2), {order},")
        pool = code.BlockPool(3)
        first, second, _ = pool.get_new_blocks(3)
        pool.remember(first, code.hash_block(None, [4, 5]))
        pool.free_blocks([first, second])
        what = "the id of get_new_blocks(1), where block 0, which has a hash, became free first, and block 1 after it,"
        equal(ids(pool.get_new_blocks(1)), [0], what)

    def test_what_it_held_is_not_found_any_more(self, code):
        pool = code.BlockPool(3)
        block, *_ = pool.get_new_blocks(3)
        key = code.hash_block(None, [4, 5])
        pool.remember(block, key)
        pool.free_blocks([block])
        pool.get_new_blocks(1)
        state = (block.block_hash is None, pool.find(key) is None, len(pool.cached))
        equal(
            state,
            (True, True, 0),
            "(block_hash is None, `find` returns None, len(cached)) after get_new_blocks took a block that had a hash",
        )

    def test_too_many(self, code):
        pool = code.BlockPool(3)
        block, *_ = pool.get_new_blocks(3)
        pool.remember(block, code.hash_block(None, [4, 5]))
        pool.free_blocks([block])
        got = []
        refused(
            lambda: got.extend(ids(pool.get_new_blocks(2))),
            "get_new_blocks(2), where one block is free,",
            lambda: (f"it returned the blocks {got}", got),
        )
        what = "(num_free_blocks, the list of ref_cnt, len(cached)) after get_new_blocks raised ValueError"
        equal((pool.num_free_blocks, ref_cnts(pool), len(pool.cached)), (1, [0, 1, 1], 1), what)


@exercise("4.3", points=2)
class TestFreeBlocks:
    def test_by_hand(self, code):
        pool = code.BlockPool(5)
        blocks = pool.get_new_blocks(5)
        pool.free_blocks([blocks[3], blocks[1], blocks[4]])
        what = "the ref_cnt of five blocks, all 1 before, after free_blocks of 3, 1 and 4,"
        equal(ref_cnts(pool), [1, 0, 1, 0, 0], what)
        equal(list(pool.free), [3, 1, 4], "the ids in `free`, the oldest first, after free_blocks of 3, 1 and 4")

    def test_behind_those_that_are_free(self, code):
        pool = code.BlockPool(4)
        blocks = pool.get_new_blocks(3)
        pool.free_blocks(reversed(blocks))
        what = "the ids in `free`, the oldest first, after 0, 1 and 2 were taken, and freed in the order 2, 1, 0,"
        equal(list(pool.free), [3, 2, 1, 0], what)

    def test_two_holders(self, code):
        pool = code.BlockPool(3)
        (block,) = pool.get_new_blocks(1)
        pool.touch([block])
        pool.free_blocks([block])
        what = "(ref_cnt of block 0, the ids in `free`) after one of its two holders freed it"
        equal((block.ref_cnt, list(pool.free)), (1, [1, 2]), what)
        pool.free_blocks([block])
        what = "(ref_cnt of block 0, the ids in `free`) after both of its holders freed it"
        equal((block.ref_cnt, list(pool.free)), (0, [1, 2, 0]), what)
        pool.touch([block])
        pool.touch([block])
        pool.free_blocks([block, block])
        what = "(ref_cnt of block 0, the ids in `free`) after both holders freed it in one call"
        equal((block.ref_cnt, list(pool.free)), (0, [1, 2, 0]), what)

    def test_content_is_kept(self, code):
        pool = code.BlockPool(2)
        (block,) = pool.get_new_blocks(1)
        key = code.hash_block(None, [4, 5])
        pool.remember(block, key)
        pool.free_blocks([block])
        found = pool.find(key)
        holds(
            found is block,
            "`find` does not find a full block after it was freed. It must keep its hash until it is reused.",
            actual=(found is None, block.block_hash is None),
        )

    def test_nobody_holds_it(self, code):
        pool = code.BlockPool(3)
        (block,) = pool.get_new_blocks(1)
        pool.free_blocks([block])
        refused(
            lambda: pool.free_blocks([block]),
            "free_blocks of a block whose ref_cnt is 0 already",
            lambda: (f"it left ref_cnt at {block.ref_cnt}", (block.ref_cnt, list(pool.free))),
        )


# --- Who holds which block --------------------------------------------------------------------------------------------


@exercise("4.4", points=2)
class TestGetComputedBlocks:
    def check(self, code, manager, token_ids, expected, what):
        blocks, num_tokens = manager.get_computed_blocks(code.PagedSequence(f"new {token_ids}", list(token_ids)))
        equal(
            (ids(blocks), num_tokens),
            expected,
            f"(block ids, number of tokens) from get_computed_blocks of {token_ids}, {what},",
        )

    def test_by_hand(self, code):
        manager = code.KVCacheManager(6, 2)
        stored(code, manager, "first", [1, 2, 3, 4, 5])
        what = "where [1, 2] [3, 4] are cached and [5] is computed"
        self.check(code, manager, [1, 2, 3, 4, 9, 9, 9], ([0, 1], 4), what)
        self.check(code, manager, [1, 2, 9, 9, 9], ([0], 2), what)
        self.check(code, manager, [9, 9, 9], ([], 0), what)
        self.check(code, manager, [1, 9, 9], ([], 0), what)

    def test_a_whole_prompt_that_is_there(self, code):
        manager = code.KVCacheManager(6, 2)
        stored(code, manager, "first", [1, 2, 3, 4])
        what = "where [1, 2] [3, 4] are cached (the last token must be computed)"
        self.check(code, manager, [1, 2, 3, 4], ([0], 2), what)
        self.check(code, manager, [1, 2], ([], 0), what)
        self.check(code, manager, [1, 2, 3], ([0], 2), what)
        self.check(code, manager, [1, 2, 3, 4, 5], ([0, 1], 4), what)
        manager = code.KVCacheManager(6, 1)
        stored(code, manager, "first", [1, 2, 3])
        self.check(code, manager, [1, 2, 3], ([0, 1], 2), "where [1] [2] [3] are cached, in blocks of 1")

    def test_not_without_what_stands_before(self, code):
        manager = code.KVCacheManager(8, 2)
        stored(code, manager, "first", [1, 2, 3, 4, 5, 6])
        self.check(code, manager, [3, 4, 9], ([], 0), "where [1, 2] [3, 4] [5, 6] are cached")
        self.check(code, manager, [9, 9, 3, 4, 9], ([], 0), "where [1, 2] [3, 4] [5, 6] are cached")
        manager.pool.forget(manager.pool.blocks[1])
        self.check(
            code, manager, [1, 2, 3, 4, 5, 6, 7], ([0], 2), "where [1, 2] and [5, 6] are cached, and [3, 4] is not"
        )
        manager.pool.forget(manager.pool.blocks[0])
        self.check(code, manager, [1, 2, 3, 4, 5, 6, 7], ([], 0), "where only [5, 6] is cached")

    def test_hashes_that_collide(self, code):
        real = code.hash_block
        code.hash_block = constant_hash(code)
        try:
            manager = code.KVCacheManager(6, 2)
            stored(code, manager, "first", [1, 2, 3, 4])
            what = "where [1, 2] [3, 4] are cached, and all hashes have the same value"
            self.check(code, manager, [3, 4, 9], ([], 0), what)
            self.check(code, manager, [5, 6, 3, 4, 9], ([], 0), what)
            self.check(code, manager, [1, 2, 9], ([0], 2), what)
        finally:
            code.hash_block = real

    def test_switched_off(self, code):
        manager = code.KVCacheManager(6, 2, enable_prefix_caching=False)
        stored(code, manager, "first", [1, 2, 3, 4])
        self.check(code, manager, [1, 2, 3, 4, 5], ([], 0), "where enable_prefix_caching=False")

    def test_nothing_is_taken(self, code):
        manager = code.KVCacheManager(4, 2)
        first = stored(code, manager, "first", [1, 2, 3, 4])
        request = code.PagedSequence("second", [1, 2, 3, 4, 5])
        manager.get_computed_blocks(request)
        what = "the ref_cnt of four blocks after get_computed_blocks, which takes none,"
        equal(ref_cnts(manager.pool), [1, 1, 0, 0], what)
        manager.free(first)
        blocks, num_tokens = manager.get_computed_blocks(request)
        what = "(block ids, number of tokens) from get_computed_blocks after the cached blocks became free"
        equal((ids(blocks), num_tokens), ([0, 1], 4), what)
        equal(
            (ref_cnts(manager.pool), list(manager.pool.free)),
            ([0, 0, 0, 0], [2, 3, 1, 0]),
            "(the list of ref_cnt, the ids in `free`) after get_computed_blocks found two free blocks, and took none,",
        )


@exercise("4.5", points=2)
class TestCacheBlocks:
    def sequence(self, code, manager, token_ids, name="first", computed=None):
        sequence = code.PagedSequence(name, list(token_ids))
        manager.allocate_slots(sequence, len(token_ids))
        sequence.num_computed_tokens = len(token_ids) if computed is None else computed
        return sequence

    def found(self, code, manager, token_ids) -> list:
        """Which block is found for each full block of these tokens; None for none."""
        size, parent, found = manager.block_size, None, []
        for start in range(0, len(token_ids) - size + 1, size):
            parent = code.hash_block(parent, token_ids[start : start + size])
            block = manager.pool.find(parent)
            found.append(None if block is None else block.block_id)
        return found

    def test_by_hand(self, code):
        manager = code.KVCacheManager(6, 2)
        sequence = self.sequence(code, manager, [1, 2, 3, 4, 5])
        manager.cache_blocks(sequence, 5)
        what = "the cached blocks of [1, 2] and [3, 4], after cache_blocks of [1, 2, 3, 4, 5],"
        equal(self.found(code, manager, [1, 2, 3, 4]), [0, 1], what)
        has = [block.block_hash is not None for block in manager.pool.blocks[:3]]
        equal(has, [True, True, False], "whether the blocks [1, 2] [3, 4] [5 _] have a hash")

    def test_step_by_step(self, code):
        manager = code.KVCacheManager(6, 2)
        sequence = self.sequence(code, manager, [1, 2, 3, 4, 5, 6], computed=5)
        steps = []
        for num_tokens in (0, 1, 2, 3, 5, 6):
            manager.cache_blocks(sequence, num_tokens)
            steps.append(self.found(code, manager, [1, 2, 3, 4, 5, 6]))
        nothing, one, two, three = [None, None, None], [0, None, None], [0, 1, None], [0, 1, 2]
        what = "the cached blocks of [1, 2] [3, 4] [5, 6] after cache_blocks with 0, 1, 2, 3, 5 and 6 verified tokens"
        equal(steps, [nothing, nothing, one, one, two, three], what)

    def test_a_draft_token_is_not_cached(self, code):
        manager = code.KVCacheManager(6, 2)
        sequence = self.sequence(code, manager, [1, 2, 3, 8])  # 8 is a draft token
        manager.cache_blocks(sequence, 3)
        has = [block.block_hash is not None for block in manager.pool.blocks[:2]]
        what = "whether [1, 2] [3, 8] have a hash, where 4 tokens are computed and 3 of them are verified,"
        equal(has, [True, False], what)
        sequence.all_token_ids = [1, 2, 3, 4]  # it was rejected, and 4 was computed instead
        manager.cache_blocks(sequence, 4)
        found = (self.found(code, manager, [1, 2, 3, 4]), self.found(code, manager, [1, 2, 3, 8]))
        what = "(the cached blocks of [1, 2, 3, 4], those of [1, 2, 3, 8]) after the draft token 8 was replaced by 4"
        equal(found, ([0, 1], [0, None]), what)

    def test_what_stands_before_counts(self, code):
        manager = code.KVCacheManager(6, 2)
        manager.cache_blocks(self.sequence(code, manager, [1, 2, 3, 4]), 4)
        what = "the cached block of [3, 4] as a first block, where [1, 2] [3, 4] are cached,"
        equal(self.found(code, manager, [3, 4]), [None], what)
        what = "the cached blocks of [9, 9] [3, 4], where [1, 2] [3, 4] are cached,"
        equal(self.found(code, manager, [9, 9, 3, 4]), [None, None], what)

    def test_the_same_content_twice(self, code):
        manager = code.KVCacheManager(6, 2)
        for name in ("first", "second"):  # both computed before either was cached
            self.sequence(code, manager, [1, 2, 3, 4], name)
        first, second = (code.PagedSequence(name, [1, 2, 3, 4], 4) for name in ("first", "second"))
        manager.cache_blocks(first, 4)
        manager.cache_blocks(second, 4)
        found = self.found(code, manager, [1, 2, 3, 4])
        has = [block.block_hash is not None for block in manager.pool.blocks[:4]]
        equal(
            (found, has),
            ([0, 1], [True, True, False, False]),
            "(the cached blocks, whether the blocks 0 to 3 have a hash), where 2 and 3 hold the same tokens as 0 and 1",
        )

    def test_the_same_beginning_twice(self, code):
        manager = code.KVCacheManager(6, 2)
        rows = {"first": [1, 2, 3, 4], "second": [1, 2, 5, 6]}
        own = [self.sequence(code, manager, token_ids, name) for name, token_ids in rows.items()]
        for sequence in own:  # both computed before either was cached
            manager.cache_blocks(sequence, 4)
        what = (
            "the cached blocks of [1, 2] and [5, 6], where blocks 0 and 2 both hold [1, 2], and block 3 holds [5, 6],"
        )
        equal(self.found(code, manager, [1, 2, 5, 6]), [0, 3], what)

    def test_switched_off(self, code):
        manager = code.KVCacheManager(6, 2, enable_prefix_caching=False)
        sequence = self.sequence(code, manager, [1, 2, 3, 4])
        manager.cache_blocks(sequence, 4)
        what = "the cached blocks of [1, 2] and [3, 4], where enable_prefix_caching=False,"
        equal(self.found(code, manager, [1, 2, 3, 4]), [None, None], what)

    def test_blocks_that_a_window_has_passed(self, code):
        manager = code.KVCacheManager(6, 2, sliding_window=2)
        sequence = self.sequence(code, manager, [1, 2, 3, 4, 5, 6])
        manager.drop_outside_window(sequence)
        manager.cache_blocks(sequence, 6)
        what = "the cached blocks of [1, 2], [3, 4] and [5, 6], where the window has passed the first two,"
        equal(self.found(code, manager, [1, 2, 3, 4, 5, 6]), [None, None, 2], what)


def bookkeeping(manager) -> dict[str, object]:
    """Everything that a manager records about its blocks, to be compared before and after a call."""
    return {
        "block tables": {name: ids(table) for name, table in manager.block_tables.items() if table},
        "ref_cnt": ref_cnts(manager.pool),
        "free": list(manager.pool.free),
        "copies": [tuple(copy) for copy in manager.copies],
        "number of cached blocks": len(manager.pool.cached),
    }


@exercise("4.6", points=3)
class TestAllocateSlots:
    def allocate(self, expected, what, manager, sequence, *arguments, **named):
        """Check the ids of the new blocks. expected None: the pool is too full, so nothing may change."""
        before = bookkeeping(manager)
        try:
            blocks = manager.allocate_slots(sequence, *arguments, **named)
        except ValueError as error:
            should = "return None" if expected is None else f"return the blocks {expected}"
            holds(False, f"allocate_slots, {what}, should {should}; it raised ValueError: {error}")
        got = None if blocks is None else ids(blocks)
        if expected is None:
            holds(got is None, f"allocate_slots, {what}, should return None; it returned the blocks {got}.", got)
            equal(bookkeeping(manager), before, f"the state of the manager after allocate_slots returned None, {what}")
        else:
            holds(got is not None, f"allocate_slots, {what}, should return the blocks {expected}; it returned None.")
            equal(got, expected, f"the list of new block ids from allocate_slots, {what},")

    def test_by_hand(self, code):
        manager = code.KVCacheManager(6, 4)
        sequence = code.PagedSequence("a", list(range(20)))
        self.allocate([0, 1], "for the first 5 tokens, in blocks of 4", manager, sequence, 5)
        equal(manager.block_table("a"), [0, 1], "the block table after that")
        sequence.num_computed_tokens = 5
        self.allocate([], "for 3 tokens after 5 computed ones (its 2 blocks of 4 hold 8)", manager, sequence, 3)
        sequence.num_computed_tokens = 8
        self.allocate([2], "for the ninth token, in blocks of 4", manager, sequence, 1)
        sequence.num_computed_tokens = 9
        self.allocate([3, 4], "for 8 more tokens, where 9 are computed, in blocks of 4", manager, sequence, 8)
        equal(manager.block_table("a"), [0, 1, 2, 3, 4], "the block table after 17 tokens")
        equal(manager.pool.num_free_blocks, 1, "num_free_blocks of 6, after 17 tokens in blocks of 4")

    def test_exact_multiple(self, code):
        manager = code.KVCacheManager(6, 4)
        self.allocate([0, 1], "for 8 tokens, in blocks of 4", manager, code.PagedSequence("a", [1] * 8), 8)

    def test_lookahead(self, code):
        manager = code.KVCacheManager(6, 4)
        sequence = code.PagedSequence("a", list(range(9)))
        self.allocate([0, 1], "for 3 tokens and 2 draft tokens, in blocks of 4", manager, sequence, 3, 2)
        sequence.num_computed_tokens = 3
        self.allocate([], "for the fourth token, where its 2 blocks of 4 hold 8", manager, sequence, 1)
        equal(manager.block_table("a"), [0, 1], "the block table, whose two blocks hold 8 tokens,")

    def test_lookahead_alone(self, code):
        manager = code.KVCacheManager(6, 4)
        sequence = code.PagedSequence("a", list(range(4)))
        self.allocate([0], "for 4 tokens, in blocks of 4", manager, sequence, 4)
        sequence.num_computed_tokens = 4
        manager.allocate_slots(sequence, 0, 3)
        what = "the block table after allocate_slots for no new token and 3 draft tokens, where 4 are computed"
        equal(manager.block_table("a"), [0, 1], what)

    def test_computed_tokens_are_not_counted_up(self, code):
        manager = code.KVCacheManager(6, 4)
        sequence = code.PagedSequence("a", list(range(9)), num_computed_tokens=0)
        manager.allocate_slots(sequence, 5, 2)
        what = "num_computed_tokens after allocate_slots, which reserves slots and computes nothing,"
        equal(sequence.num_computed_tokens, 0, what)

    def test_the_pool_is_too_full(self, code):
        manager = code.KVCacheManager(3, 4)
        first, second = code.PagedSequence("a", [1] * 7), code.PagedSequence("b", [2] * 8)
        self.allocate([0, 1], "for 7 tokens, in blocks of 4", manager, first, 7)
        self.allocate(None, "for 8 tokens in 2 blocks, where one block is free", manager, second, 8)
        self.allocate([2], "for 4 tokens, in the last free block", manager, second, 4)

    def test_computed_blocks(self, code):
        manager = code.KVCacheManager(5, 2)
        first = stored(code, manager, "a", [1, 2, 3, 4])
        second = code.PagedSequence("b", [1, 2, 3, 4, 5])
        computed, second.num_computed_tokens = manager.get_computed_blocks(second)
        what = "for 1 token after the computed blocks 0 and 1"
        self.allocate([2], what, manager, second, 1, computed_blocks=computed)
        equal(
            manager.block_table("b"), [0, 1, 2], "the block table, which is the computed blocks 0 and 1 and a new one,"
        )
        equal(
            ref_cnts(manager.pool), [2, 2, 1, 0, 0], "the list of ref_cnt, where two sequences hold the blocks 0 and 1,"
        )
        manager.free(first)
        equal(ref_cnts(manager.pool), [1, 1, 1, 0, 0], "the list of ref_cnt after the first sequence was freed")

    def test_a_computed_block_is_not_handed_out(self, code):
        manager = code.KVCacheManager(3, 2)
        first, other = stored(code, manager, "a", [1, 2]), stored(code, manager, "b", [7, 8, 9])
        manager.free(first)
        manager.free(other)  # free, the oldest first: 0 (which holds [1, 2]), 2, 1
        second = code.PagedSequence("c", [1, 2, 3])
        computed, second.num_computed_tokens = manager.get_computed_blocks(second)
        manager.allocate_slots(second, 1, computed_blocks=computed)
        what = "(the block table, the list of ref_cnt), where the computed block 0 is the oldest of the free blocks"
        equal((manager.block_table("c"), ref_cnts(manager.pool)), ([0, 2], [1, 0, 1]), what)

    def test_computed_blocks_count_as_free(self, code):
        manager = code.KVCacheManager(3, 2)
        manager.free(stored(code, manager, "a", [1, 2, 3, 4]))
        second = code.PagedSequence("b", [1, 2, 3, 4, 5, 6, 7])
        computed, second.num_computed_tokens = manager.get_computed_blocks(second)
        what = "for 2 blocks after the computed blocks 0 and 1, where 0, 1 and 2 are free"
        self.allocate(None, what, manager, second, 3, computed_blocks=computed)
        what = "for 1 block after the computed blocks 0 and 1, where 0, 1 and 2 are free"
        self.allocate([2], what, manager, second, 2, computed_blocks=computed)

    def test_computed_blocks_that_another_holds_take_nothing(self, code):
        manager = code.KVCacheManager(3, 2)
        stored(code, manager, "a", [1, 2, 3, 4])
        second = code.PagedSequence("b", [1, 2, 3, 4, 5])
        computed, second.num_computed_tokens = manager.get_computed_blocks(second)
        what = "for 1 block after the computed blocks 0 and 1, which another sequence holds, where only 2 is free"
        self.allocate([2], what, manager, second, 1, computed_blocks=computed)

    def forked(self, code, num_blocks):
        """Parent and child of 6 tokens that share the blocks 0 and 1, of 4 tokens each."""
        manager = code.KVCacheManager(num_blocks, 4)
        parent = stored(code, manager, "parent", [1, 2, 3, 4, 5, 6])
        child = code.PagedSequence("child", [1, 2, 3, 4, 5, 6])
        manager.fork(parent, child)
        return manager, parent, child

    def test_a_shared_block_is_copied(self, code):
        manager, parent, child = self.forked(code, 4)
        self.allocate([], "for a forked child's last token, whose slot is in a shared block", manager, child, 1)
        copies = [tuple(copy) for copy in manager.take_copies()]
        found = (copies, manager.block_table("parent"), manager.block_table("child"))
        what = (
            "(copies as (source, target, tokens), the parent's table, the child's) after allocate_slots for the child"
        )
        equal(found, ([(1, 2, 1)], [0, 1], [0, 2]), f"{what}, which has computed 5 of 6 tokens,")
        equal(ref_cnts(manager.pool), [2, 1, 1, 0], "the list of ref_cnt after the child's copy")
        self.allocate([], "for the parent's seventh token", manager, parent, 1)
        equal(
            [tuple(copy) for copy in manager.take_copies()],
            [],
            "the copies after allocate_slots for the parent, the last holder of its block,",
        )

    def test_no_free_block_for_the_copy(self, code):
        manager, _, child = self.forked(code, 2)
        self.allocate(None, "where a copy of a shared block is needed and no block is free", manager, child, 1)

    def test_one_free_block_for_a_copy_and_a_new_block(self, code):
        manager, _, child = self.forked(code, 3)
        self.allocate(
            None, "where a copy of a shared block and a new block are needed and one block is free", manager, child, 4
        )

    def test_more_blocks_held_than_needed(self, code):
        for num_shared in (3, 2):
            manager = code.KVCacheManager(num_shared + 2, 2)
            parent = stored(code, manager, "a", list(range(1, 2 * num_shared + 3)))
            child = code.PagedSequence("b", list(parent.all_token_ids))
            manager.fork(parent, child)
            child.num_computed_tokens = 3
            what = (
                f"where {num_shared} shared blocks need copies, the table is longer than needed, and one block is free"
            )
            self.allocate(None, what, manager, child, 1)


@exercise("4.7", points=2)
class TestFork:
    def parent(self, code, num_tokens=6):
        manager = code.KVCacheManager(6, 4)
        return manager, stored(code, manager, "parent", list(range(1, num_tokens + 1)))

    def forked(self, code, num_tokens, of=6):
        manager, parent = self.parent(code, of)
        child = code.PagedSequence("child", parent.all_token_ids[:num_tokens])
        manager.fork(parent, child)
        return manager, parent, child

    def test_by_hand(self, code):
        manager, _, child = self.forked(code, 6)
        what = "the table of a child of 6 tokens, whose parent has the table [0, 1],"
        equal(manager.block_table("child"), [0, 1], what)
        equal(ref_cnts(manager.pool), [2, 2, 0, 0, 0, 0], "the list of ref_cnt after the fork")
        what = "num_computed_tokens of a child of 6 tokens (it computes the last again for its logits)"
        equal(child.num_computed_tokens, 5, what)
        what = "(num_free_blocks of a pool of 6, number of copies) after the fork"
        equal((manager.pool.num_free_blocks, len(manager.copies)), (4, 0), what)

    def test_a_beginning_of_the_parent(self, code):
        manager, _, child = self.forked(code, 4, of=10)
        equal(
            (manager.block_table("child"), ref_cnts(manager.pool)[:3]),
            ([0], [2, 1, 1]),
            "(the child's table, the list of ref_cnt) for a child of 4 tokens, whose parent has 10 in [0, 1, 2]",
        )
        equal(
            manager.block_table("parent"),
            [0, 1, 2],
            "the parent's table after a child with 4 of its 10 tokens was forked",
        )
        equal(child.num_computed_tokens, 3, "num_computed_tokens of a child of 4 tokens")
        tables = [self.forked(code, num_tokens, of=10)[0].block_table("child") for num_tokens in (5, 6)]
        what = "the tables of a child of 5 tokens and of one of 6, in blocks of 4, whose parent has [0, 1, 2],"
        equal(tables, [[0, 1], [0, 1]], what)

    def test_a_table_of_its_own(self, code):
        manager, _, child = self.forked(code, 6)
        manager.allocate_slots(child, 1)
        tables = (manager.block_table("parent"), manager.block_table("child"))
        equal(tables, ([0, 1], [0, 2]), "(the parent's table, the child's) after allocate_slots for the child")
        manager, _, child = self.forked(code, 6)
        child.num_computed_tokens = 3
        manager.trim(child)
        tables = (manager.block_table("parent"), manager.block_table("child"))
        equal(tables, ([0, 1], [0]), "(the parent's table, the child's) after the child was trimmed to its first block")

    def test_hashes_of_its_own(self, code):
        manager, parent, child = self.forked(code, 6)
        for sequence, token_ids in ((child, [50, 51]), (parent, [7, 8])):
            sequence.all_token_ids = [*sequence.all_token_ids, *token_ids]
            manager.allocate_slots(sequence, 8 - sequence.num_computed_tokens)
            sequence.num_computed_tokens = 8
            manager.cache_blocks(sequence, 8)
        found = [
            ids(manager.get_computed_blocks(code.PagedSequence(f"new {rest}", [1, 2, 3, 4, 5, 6, *rest, 9]))[0])
            for rest in ([7, 8], [50, 51])
        ]
        tables = [manager.block_table("parent"), manager.block_table("child")]
        what = "the cached blocks of the parent's 8 tokens and of the child's, which differ in the last two,"
        equal(found, tables, what)

    def test_either_may_go(self, code):
        manager, parent, child = self.forked(code, 6)
        manager.free(parent)
        what = "(the child's table, the list of ref_cnt) after the parent was freed"
        equal((manager.block_table("child"), ref_cnts(manager.pool)[:2]), ([0, 1], [1, 1]), what)
        manager.free(child)
        equal(manager.pool.num_free_blocks, 6, "num_free_blocks of a pool of 6 after parent and child were freed")

    def test_the_parent_has_not_got_so_far(self, code):
        manager, parent = self.parent(code)
        parent.num_computed_tokens = 5
        child = code.PagedSequence("child", [1, 2, 3, 4, 5, 6])
        refused(
            lambda: manager.fork(parent, child),
            "fork of a child of 6 tokens, of which the parent has computed 5,",
            lambda: (f"it gave the child the table {manager.block_table('child')}", manager.block_table("child")),
        )
        what = "(the child's table, the list of ref_cnt) after fork raised ValueError"
        equal((manager.block_table("child"), ref_cnts(manager.pool)[:2]), ([], [1, 1]), what)


@exercise("4.8", points=2)
class TestCopyOnWrite:
    def forked(self, code, num_tokens=6, computed=None):
        """A parent and a child of `num_tokens` tokens, in blocks of 4; the parent holds 0, 1, ... ."""
        manager = code.KVCacheManager(7, 4)
        parent = stored(code, manager, "parent", list(range(1, num_tokens + 1)))
        child = code.PagedSequence("child", list(parent.all_token_ids))
        manager.fork(parent, child)
        child.num_computed_tokens = num_tokens - 1 if computed is None else computed
        return manager, parent, child

    def copies(self, manager):
        return [tuple(copy) for copy in manager.copies if copy.num_tokens != 0]

    def test_by_hand(self, code):
        manager, _, child = self.forked(code)
        manager.copy_on_write(child, [1])
        tables = (manager.block_table("parent"), manager.block_table("child"))
        what = "(the parent's table, the child's) after copy_on_write(child, [1]), where both had [0, 1]"
        equal(tables, ([0, 1], [0, 2]), what)
        what = "the copies (source, target, tokens) of a child that has computed 5 tokens, in blocks of 4,"
        equal(self.copies(manager), [(1, 2, 1)], what)
        equal(ref_cnts(manager.pool), [2, 1, 1, 0, 0, 0, 0], "the list of ref_cnt after copy_on_write(child, [1])")
        equal(list(manager.pool.free), [3, 4, 5, 6], "the ids in `free` after copy_on_write(child, [1])")

    def test_by_the_parent(self, code):
        manager, parent, _ = self.forked(code)
        manager.copy_on_write(parent, [1])
        tables = (manager.block_table("parent"), manager.block_table("child"))
        equal(tables, ([0, 2], [0, 1]), "(the parent's table, the child's) after copy_on_write(parent, [1])")
        what = "the copies (source, target, tokens) of a parent that has computed 6 tokens, in blocks of 4,"
        equal(self.copies(manager), [(1, 2, 2)], what)

    def test_several_places(self, code):
        manager, _, child = self.forked(code, 11)
        manager.copy_on_write(child, [0, 2])
        what = "the child's table, [0, 1, 2] before, after copy_on_write(child, [0, 2])"
        equal(manager.block_table("child"), [3, 1, 4], what)
        what = "the copies of copy_on_write(child, [0, 2]), where 10 tokens are computed,"
        equal(self.copies(manager), [(0, 3, 4), (2, 4, 2)], what)

    def test_nothing_is_filled(self, code):
        manager, _, child = self.forked(code, 5)
        manager.copy_on_write(child, [1])
        equal(manager.block_table("child"), [0, 2], "the child's table, [0, 1] before, after copy_on_write(child, [1])")
        what = "the copies of copy_on_write(child, [1]), where the child has computed no token of this block,"
        equal(self.copies(manager), [], what)

    def test_taken_back(self, code):
        manager, _, child = self.forked(code, 11, computed=2)
        manager.copy_on_write(child, [0, 2])
        what = "the copies of copy_on_write(child, [0, 2]), where the child has computed only 2 tokens,"
        equal(self.copies(manager), [(0, 3, 2)], what)

    def test_content_that_can_be_found(self, code):
        manager, _, child = self.forked(code, 4)
        manager.copy_on_write(child, [0])
        found = manager.pool.find(code.hash_block(None, [1, 2, 3, 4]))
        state = (None if found is None else found.block_id, manager.pool.blocks[1].block_hash is not None)
        what = "(the cached block of the parent's tokens, whether the new block has a hash) after copy_on_write"
        equal(state, (0, False), what)

    def test_earlier_copies_stay(self, code):
        manager, _, child = self.forked(code)
        manager.copies.append(code.BlockCopy(6, 5, 3))
        manager.copy_on_write(child, [1])
        what = "the copies after copy_on_write, where one copy was pending already,"
        equal(self.copies(manager), [(6, 5, 3), (1, 2, 1)], what)
        manager.copy_on_write(child, [])
        equal(self.copies(manager), [(6, 5, 3), (1, 2, 1)], "the copies after copy_on_write(child, [])")


@exercise("4.9")
class TestTrim:
    def trimmed(self, code, num_computed_tokens):
        manager = code.KVCacheManager(5, 4)
        sequence = code.PagedSequence("a", list(range(100, 112)))
        manager.allocate_slots(sequence, 12, 4)
        sequence.num_computed_tokens = num_computed_tokens
        manager.trim(sequence)
        return manager

    def where(self, num_tokens):
        return f"after a trim to {num_tokens} computed tokens, in blocks of 4"

    def test_by_hand(self, code):
        for num_tokens, expected in ((12, [0, 1, 2]), (8, [0, 1]), (16, [0, 1, 2, 3])):
            manager = self.trimmed(code, num_tokens)
            equal(manager.block_table("a"), expected, f"the table, [0, 1, 2, 3] before, {self.where(num_tokens)},")
            what = f"num_free_blocks of a pool of 5, {self.where(num_tokens)},"
            equal(manager.pool.num_free_blocks, 5 - len(expected), what)
        manager = self.trimmed(code, 4)
        what = "the ids in `free` after a trim to 4 tokens (the last block is freed first)"
        equal(list(manager.pool.free), [4, 3, 2, 1], what)

    def test_what_is_computed_is_kept(self, code):
        for num_tokens, expected in ((9, [0, 1, 2]), (7, [0, 1]), (1, [0])):
            manager = self.trimmed(code, num_tokens)
            equal(manager.block_table("a"), expected, f"the table, [0, 1, 2, 3] before, {self.where(num_tokens)},")

    def test_a_block_that_another_reads(self, code):
        manager = code.KVCacheManager(5, 4)
        parent = stored(code, manager, "parent", list(range(8)))
        child = code.PagedSequence("child", list(range(8)))
        manager.fork(parent, child)
        child.num_computed_tokens = 3
        manager.trim(child)
        state = (manager.block_table("child"), manager.block_table("parent"), ref_cnts(manager.pool))
        what = "(the child's table, the parent's, the list of ref_cnt) after a fork was trimmed from 8 tokens to 3"
        equal(state, ([0], [0, 1], [2, 1, 0, 0, 0]), what)


@exercise("4.10")
class TestUtilisation:
    def test_by_hand(self, code):
        close(code.utilisation([5, 3], 4), 8 / 12, "utilisation([5, 3], 4)")
        close(code.utilisation([8, 4], 4), 1.0, "utilisation([8, 4], 4)")
        close(code.utilisation([7, 2, 9], 1), 1.0, "utilisation([7, 2, 9], 1)")

    def test_contiguous(self, code):
        what = "utilisation([10, 30], 100), where each sequence fits into one block,"
        close(code.utilisation([10, 30], 100), 0.2, what)

    def test_many(self, code):
        lengths = [17, 1, 33, 64, 100]
        close(code.utilisation(lengths, 16), 215 / (32 + 16 + 48 + 64 + 112), f"utilisation({lengths}, 16)")


# --- Online softmax ---------------------------------------------------------------------------------------------------

LN2 = math.log(2)


def everything(rows: int, columns: int) -> torch.Tensor:
    return torch.ones(rows, columns, dtype=torch.bool)


@exercise("4.11", points=2)
class TestPartialAttention:
    def check(self, partial, expected, what):
        for name, actual, value in zip(("maximum", "total", "weighted"), partial, expected):
            close(actual, torch.tensor(value), f"{name} of {what}")

    def test_by_hand(self, code):
        # D is 4, so scores are halved: ln 2 and 0. Relative to the higher: 1 and 1/2.
        q = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
        k = torch.tensor([[LN2, 0.0, 0.0, 0.0], [0.0, 5.0, 5.0, 5.0]])
        v = torch.tensor([[10.0, 0.0, 0.0, 2.0], [4.0, 0.0, 6.0, 0.0]])
        self.check(
            code.partial_attention(q, k, v, everything(1, 2)),
            ([LN2], [1.5], [[12.0, 0.0, 3.0, 2.0]]),
            "partial_attention with scores ln 2 and 0, values [10, 0, 0, 2] and [4, 0, 6, 0]",
        )

    def test_the_mask(self, code):
        q, k = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [3.0], [LN2]])
        v = torch.tensor([[4.0], [100.0], [10.0]])
        mask = torch.tensor([[True, False, True], [True, False, False]])
        self.check(
            code.partial_attention(q, k, v, mask),
            ([LN2, 0.0], [1.5, 1.0], [[12.0], [4.0]]),
            "partial_attention with scores 0, 3, ln 2, where query 0 sees the keys 0 and 2 and query 1 only key 0",
        )

    def test_a_row_that_sees_nothing(self, code):
        mask = torch.tensor([[False, False], [False, True]])
        self.check(
            code.partial_attention(torch.ones(2, 1), torch.tensor([[0.0], [LN2]]), torch.tensor([[3.0], [7.0]]), mask),
            ([-math.inf, LN2], [0.0, 1.0], [[0.0], [7.0]]),
            "partial_attention with two keys, of which query 0 sees none and query 1 the second",
        )

    def test_large_scores(self, code):
        self.check(
            code.partial_attention(
                torch.tensor([[1.0]]), torch.tensor([[1000.0], [-1000.0]]), torch.ones(2, 1), everything(1, 2)
            ),
            ([1000.0], [1.0], [[1.0]]),
            "partial_attention with scores 1000 and -1000",
        )  # fmt: skip

    def test_beside_plain_loops(self, code):
        q, k, v = noise(2, 3, 4, 5, seed=1), noise(2, 3, 6, 5, seed=2), noise(2, 3, 6, 5, seed=3)
        mask = torch.rand(4, 6, generator=torch.Generator().manual_seed(4)) < 0.7
        mask[:, 2] = True
        maximum, total, weighted = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4, 5)
        for b in range(2):
            for h in range(3):
                for t in range(4):
                    seen = mask[t]
                    scores = k[b, h][seen] @ q[b, h, t] / math.sqrt(5)
                    maximum[b, h, t] = scores.max()
                    total[b, h, t] = (scores - scores.max()).exp().sum()
                    weighted[b, h, t] = (scores - scores.max()).exp() @ v[b, h][seen]
        got = code.partial_attention(q, k, v, mask)
        what = "partial_attention with q (2, 3, 4, 5), k and v (2, 3, 6, 5), mask (4, 6)"
        close(got.maximum, maximum, f"maximum of {what}")
        close(got.total, total, f"total of {what}")
        close(got.weighted, weighted, f"weighted of {what}")

    def test_very_low_scores(self, code):
        self.check(
            code.partial_attention(
                torch.tensor([[1.0]]), torch.tensor([[-1e6], [-1e6]]), torch.tensor([[2.0], [4.0]]), everything(1, 2)
            ),
            ([-1e6], [2.0], [[6.0]]),
            "partial_attention with two scores of -1,000,000, values 2 and 4",
        )  # fmt: skip

    def test_float64(self, code):
        q, k, v = (noise(3, 4, seed=seed).double() for seed in range(3))
        weights = ((q @ k.T / 2) - (q @ k.T / 2).amax(-1, keepdim=True)).exp()
        got = code.partial_attention(q, k, v, everything(3, 3))
        close(got.total, weights.sum(-1), "total of q, k and v in float64", rtol=1e-12)
        close(got.weighted, weights @ v, "weighted of q, k and v in float64", rtol=1e-12)

    def test_on_another_device(self, code):
        q, k, v = (noise(2, 4, seed=seed).to("meta") for seed in range(3))
        mask = everything(2, 2).to("meta")
        elsewhere(lambda: code.partial_attention(q, k, v, mask).weighted, "partial_attention", "`q.device`")

    def test_16_bits(self, code):
        q, k = torch.full((1, 2), 300.0).half(), torch.full((2, 2), 300.0).half()
        self.check(
            code.partial_attention(q, k, torch.tensor([[1.0, 3.0], [3.0, 5.0]]).half(), everything(1, 2)),
            ([180000 / math.sqrt(2)], [2.0], [[4.0, 8.0]]),
            "partial_attention with q and k of 300 in float16 (their product, 180000, is more than float16 can hold)",
        )


def naive_partial(code, scores: torch.Tensor, values: torch.Tensor):
    """Some keys' scores (R, n) and values (n, D) as a Partial, row by row. Rows without keys where n is 0."""
    if scores.shape[1] == 0:
        rows = scores.shape[0]
        return code.Partial(torch.full((rows,), -math.inf), torch.zeros(rows), torch.zeros(rows, values.shape[1]))
    maximum = scores.max(1).values
    weights = (scores - maximum[:, None]).exp()
    return code.Partial(maximum, weights.sum(1), weights @ values)


@exercise("4.12", points=3)
class TestMergePartials:
    def single(self, code, score: float, value: float):
        """What attention to one key gives, or to none where the score is -inf."""
        seen = 0.0 if score == -math.inf else 1.0
        return code.Partial(torch.tensor([score]), torch.tensor([seen]), torch.tensor([[seen * value]]))

    def check(self, merged, expected, what):
        for name, actual, value in zip(("maximum", "total", "weighted"), merged, expected):
            close(actual, torch.tensor(value), f"{name} of {what}")

    def test_by_hand(self, code):
        low, high = self.single(code, 0.0, 4.0), self.single(code, LN2, 10.0)
        expected = ([LN2], [1.5], [[12.0]])
        self.check(code.merge_partials(low, high), expected, "(score 0, value 4) merged with (score ln 2, value 10)")
        self.check(code.merge_partials(high, low), expected, "(score ln 2, value 10) merged with (score 0, value 4)")

    def test_one_has_seen_nothing(self, code):
        one, nothing = self.single(code, -3.0, 5.0), self.single(code, -math.inf, 0.0)
        expected = ([-3.0], [1.0], [[5.0]])
        self.check(
            code.merge_partials(one, nothing), expected, "(score -3, value 5) merged with a part that saw no key"
        )
        self.check(
            code.merge_partials(nothing, one), expected, "a part that saw no key, merged with (score -3, value 5)"
        )

    def test_neither_has_seen_anything(self, code):
        nothing = self.single(code, -math.inf, 0.0)
        self.check(
            code.merge_partials(nothing, nothing), ([-math.inf], [0.0], [[0.0]]), "two parts that saw no key, merged"
        )

    def test_large_scores(self, code):
        for a, b in ((1000.0, -1000.0), (-1000.0, 1000.0), (-1000.0, -1000.0 + LN2), (1000.0, 1000.0 + LN2)):
            first, second = self.single(code, a, 4.0), self.single(code, b, 10.0)
            scale = math.exp(min(a, b) - max(a, b))
            shares = (scale, 1.0) if b > a else (1.0, scale)
            expected = ([max(a, b)], [1 + scale], [[shares[0] * 4 + shares[1] * 10]])
            what = f"score {a:g} merged with {b:.2f}"
            merged = code.merge_partials(first, second)
            for name, actual, value in zip(("maximum", "total", "weighted"), merged, expected):
                close(actual, torch.tensor(value), f"{name} of {what}", rtol=1e-4)

    def test_very_low_scores(self, code):
        first, second = self.single(code, -1e6, 4.0), self.single(code, -1e6, 10.0)
        self.check(code.merge_partials(first, second), ([-1e6], [2.0], [[14.0]]), "two scores of -1,000,000, merged")

    def test_on_another_device(self, code):
        one = code.Partial(*(x.to("meta") for x in self.single(code, 1.0, 4.0)))
        elsewhere(lambda: code.merge_partials(one, one).weighted, "merge_partials", "the arguments' device")

    def test_axes(self, code):
        # All axes are 3 wide, so a scale that meets the wrong axis fits, and is wrong.
        scores, values = noise(3, 6, seed=1) * 3, noise(6, 3, seed=2)
        merged = code.merge_partials(
            naive_partial(code, scores[:, :2], values[:2]), naive_partial(code, scores[:, 2:], values[2:])
        )
        expected = naive_partial(code, scores, values)
        for name, actual, value in zip(("maximum", "total", "weighted"), merged, expected):
            close(actual, value, f"{name} of 2 keys merged with 4, three queries, D = 3")

    def test_any_order(self, code):
        scores, values = noise(4, 7, seed=3) * 5, noise(7, 2, seed=4)
        scores[1, 2:] = -math.inf  # row 1 sees nothing behind the second key
        expected = scores.softmax(1) @ values
        for cuts in ((0, 2, 5, 7), (0, 1, 1, 7), (0, 4, 6, 7)):
            parts = []
            for start, end in pairwise(cuts):
                part = naive_partial(code, scores[:, start:end], values[start:end])
                unseen = part.maximum == -math.inf
                total = part.total.masked_fill(unseen, 0.0)
                weighted = part.weighted.masked_fill(unseen[:, None], 0.0)
                parts.append(code.Partial(part.maximum, total, weighted))
            for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0)):
                a, b, c = (parts[i] for i in order)
                for how, merged in (
                    ("(a + b) + c", code.merge_partials(code.merge_partials(a, b), c)),
                    ("a + (b + c)", code.merge_partials(a, code.merge_partials(b, c))),
                ):
                    what = f"weighted / total of 7 keys cut at {cuts[1:3]}, merged in the order {order} as {how}"
                    close(merged.weighted / merged.total[:, None], expected, what)

    def test_its_arguments_are_left_alone(self, code):
        low, high = self.single(code, 0.0, 4.0), self.single(code, LN2, 10.0)
        code.merge_partials(low, high)
        left = [float(x.sum()) for x in (*low, *high)]
        close(torch.tensor(left), torch.tensor([0.0, 1.0, 4.0, LN2, 1.0, 10.0]), "the two arguments, after the merge")


def naive_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, position: int) -> torch.Tensor:
    """One query (H, D) at this position of a sequence with keys and values (S, K, D). Returns (H, D)."""
    out, group = torch.zeros_like(q), q.shape[0] // k.shape[1]
    for h in range(q.shape[0]):
        keys, values = k[: position + 1, h // group].float(), v[: position + 1, h // group].float()
        scores = keys @ q[h].float() / math.sqrt(q.shape[1])
        out[h] = (scores.softmax(0) @ values).to(q.dtype)
    return out


class Store:
    """Keys and values (B, S, K, D) that write down what was read of them, and end where they end."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        self.keys, self.values, self.reads = keys, values, []

    def read(self, start: int, end: int):
        num_keys = self.keys.shape[1]
        sentence = f"read({start}, {end}) was called, but end must be at most num_keys, {num_keys}."
        holds(end <= num_keys, sentence, actual=("to", end))
        holds(start < end, f"read({start}, {end}) was called, but end must be greater than start.")
        self.reads.append((start, end))
        return self.keys[:, start:end], self.values[:, start:end]


@exercise("4.13", points=3)
class TestBlockwiseAttention:
    def test_by_hand(self, code):
        # The query is 0, so every score is 0 and the result is the mean of the values that it sees.
        store = Store(torch.ones(1, 5, 1, 1), torch.tensor([3.0, 6.0, 9.0, 30.0, 50.0]).view(1, 5, 1, 1))
        q = torch.zeros(1, 1, 1, 1)
        for position, expected in ((4, 19.6), (3, 12.0), (1, 4.5), (0, 3.0)):
            close(
                code.blockwise_attention(q, torch.tensor([[position]]), 5, store.read, 2),
                torch.full((1, 1, 1, 1), expected),
                f"blockwise_attention with equal scores, values 3, 6, 9, 30, 50 and a query at position {position}",
            )

    def case(self):
        """Two sequences, three queries each at positions of their own, 4 query heads on 2 KV heads."""
        q, k, v = noise(2, 3, 4, 5, seed=1), noise(2, 11, 2, 5, seed=2), noise(2, 11, 2, 5, seed=3)
        positions = torch.tensor([[8, 9, 10], [2, 3, 4]])
        k[1, 5:], v[1, 5:] = 50.0, 1e4  # after the end of the shorter sequence
        expected = torch.stack(
            [
                torch.stack([naive_attention(q[b, t], k[b], v[b], int(positions[b, t])) for t in range(3)])
                for b in range(2)
            ]
        )
        return q, k, v, positions, expected

    @pytest.mark.parametrize("segment", [11, 1, 3, 7, 64])
    def test_segments(self, code, segment):
        q, k, v, positions, expected = self.case()
        store = Store(k, v)
        close(
            code.blockwise_attention(q, positions, 11, store.read, segment),
            expected,
            f"blockwise_attention with B=2, T=3, H=4, K=2, 11 keys, segments of {segment}",
            rtol=1e-4,
            atol=1e-5,
        )
        largest = max(end - start for start, end in store.reads)
        holds(
            largest <= segment,
            f"With segments of {segment}, `read` was called for {largest} keys at once.",
            actual=("at once", largest),
        )

    def test_16_bits(self, code):
        q, k = torch.full((1, 1, 2, 4), 200.0).half(), torch.full((1, 3, 1, 4), 200.0).half()
        v = torch.tensor([1.0, 3.0, 8.0]).view(1, 3, 1, 1).expand(1, 3, 1, 4).half()
        close(
            code.blockwise_attention(q, torch.tensor([[2]]), 3, Store(k, v).read, 2),
            torch.full((1, 1, 2, 4), 4.0).half(),
            "blockwise_attention in float16 with scores of 80000, more than float16 can hold, and values 1, 3, 8",
        )

    def test_on_another_device(self, code):
        q, k, v, positions, _ = (x.to("meta") for x in self.case())
        read = Store(k, v).read
        elsewhere(lambda: code.blockwise_attention(q, positions, 11, read, 3), "blockwise_attention", "`q.device`")


# --- The tensors ------------------------------------------------------------------------------------------------------


@exercise("4.14")
class TestSlotMapping:
    def test_by_hand(self, code):
        what = "slot_mapping([7, 2, 5], start=0, num_tokens=6, block_size=4)"
        equal(code.slot_mapping([7, 2, 5], 0, 6, 4), [28, 29, 30, 31, 8, 9], what)
        what = "slot_mapping([7, 2, 5], start=3, num_tokens=6, block_size=4)"
        equal(code.slot_mapping([7, 2, 5], 3, 6, 4), [31, 8, 9, 10, 11, 20], what)

    def test_small_cases(self, code):
        equal(code.slot_mapping([7, 2, 5], 11, 1, 4), [23], "slot_mapping([7, 2, 5], 11, 1, 4)")
        equal(code.slot_mapping([7, 2, 5], 1, 2, 1), [2, 5], "slot_mapping([7, 2, 5], 1, 2, 1)")
        equal(code.slot_mapping([7, 2, 5], 4, 0, 4), [], "slot_mapping([7, 2, 5], 4, 0, 4)")


def small_cache(
    code, num_blocks=5, block_size=3, num_layers=4, layers=None, num_kv_heads=2, head_dim=4, device="cpu", dtype=None
):
    """A cache for a model that has only what the cache asks of it."""
    attention = SimpleNamespace(k_proj=SimpleNamespace(out_features=num_kv_heads * head_dim), head_dim=head_dim)
    layer = SimpleNamespace(self_attn=attention)
    weight = torch.ones(8, dtype=dtype, device=device)
    inner = SimpleNamespace(layers=[layer] * num_layers, norm=SimpleNamespace(weight=weight))
    model = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=num_layers), model=inner)
    return code.PagedKVCache(model, num_blocks, block_size, layers=layers)


def filled(cache):
    """The cache with a number of its own in every place; values are the keys' negatives."""
    cache.keys.copy_(torch.arange(cache.keys.numel()).view(cache.keys.shape))
    cache.values.copy_(-cache.keys)
    return cache


@exercise("4.15")
class TestWrite:
    def check(self, code, layers, layer, index, slots, what):
        cache = filled(small_cache(code, layers=layers))
        expected_keys, expected_values = cache.keys.clone(), cache.values.clone()
        k, v = noise(len(slots), 2, 4, seed=1), noise(len(slots), 2, 4, seed=2)
        for row, slot in enumerate(slots):
            expected_keys[index, slot // 3, slot % 3] = k[row]
            expected_values[index, slot // 3, slot % 3] = v[row]
        cache.write(layer, torch.tensor(slots), k, v)
        close(cache.keys, expected_keys, f"`keys` (layer, block, offset, K, D) {what}")
        close(cache.values, expected_values, f"`values` (layer, block, offset, K, D) {what}")

    def test_slots(self, code):
        what = "after a write to the slots 13, 2, 3 and 7 of layer 0, in blocks of 3"
        self.check(code, None, 0, 0, [13, 2, 3, 7], what)

    def test_layers(self, code):
        self.check(code, None, 2, 2, [0, 4], "after a write to layer 2 of 4")
        what = "after a write to layer 1 of a cache that has the layers 1 and 2"
        self.check(code, range(1, 3), 1, 0, [0, 14], what)

    def test_one_token(self, code):
        self.check(code, None, 3, 3, [5], "after a write of one token to slot 5 of layer 3")

    def test_on_another_device(self, code):
        cache, slots = small_cache(code, device="meta"), torch.tensor([0, 4], device="meta")
        k, v = noise(2, 2, 4).to("meta"), noise(2, 2, 4).to("meta")

        def written():
            cache.write(0, slots, k, v)
            return cache.keys

        elsewhere(written, "write", "`self.keys.device`")


@exercise("4.16", points=2)
class TestGather:
    TABLES = [[4, 0, 2], [1, 3, 0]]

    def expected(self, cache, index, tables, start, end):
        found = torch.zeros(2, len(tables), end - start, *cache.keys.shape[3:])
        for b, table in enumerate(tables):
            for n, position in enumerate(range(start, end)):
                block = table[position // cache.block_size]
                found[0, b, n] = cache.keys[index, block, position % cache.block_size]
                found[1, b, n] = cache.values[index, block, position % cache.block_size]
        return found

    def check(self, cache, layer, index, tables, start, end, what):
        got = cache.gather(layer, torch.tensor(tables), start, end)
        for name, actual, value in zip(("keys", "values"), got, self.expected(cache, index, tables, start, end)):
            close(actual, value, f"{name} of {what}")

    def test_by_hand(self, code):
        cache = small_cache(code, num_kv_heads=1, head_dim=1)
        for block in range(5):
            for slot in range(3):
                cache.keys[0, block, slot] = 10 * block + slot
        keys, _ = cache.gather(0, torch.tensor([[4, 0, 2]]), 0, 7)
        what = "keys of positions 0 to 7, table [4, 0, 2], blocks of 3 (the key at offset 1 of block 4 is 41)"
        close(keys, torch.tensor([40.0, 41, 42, 0, 1, 2, 20]).view(1, 7, 1, 1), what)

    def test_several_sequences(self, code):
        cache = filled(small_cache(code))
        self.check(cache, 0, 0, self.TABLES, 0, 7, f"positions 0 to 7, tables {self.TABLES}, blocks of 3")
        self.check(cache, 2, 2, self.TABLES, 0, 9, "positions 0 to 9 of layer 2")

    def test_from_the_middle(self, code):
        cache = filled(small_cache(code))
        for start, end in ((2, 4), (4, 9), (3, 6), (5, 7)):
            self.check(cache, 1, 1, self.TABLES, start, end, f"positions {start} to {end}, blocks of 3")

    def test_within_one_block(self, code):
        cache = filled(small_cache(code))
        for start, end in ((4, 5), (0, 2), (7, 9)):
            self.check(cache, 1, 1, self.TABLES, start, end, f"positions {start} to {end}, blocks of 3")

    def test_layers_of_a_slice(self, code):
        cache = filled(small_cache(code, layers=range(1, 3)))
        self.check(cache, 1, 0, self.TABLES, 1, 5, "layer 1, positions 1 to 5, of a cache with layers 1 and 2")

    def test_nothing_else_is_touched(self, code):
        cache, touched = filled(small_cache(code)), []
        for name, tables in (("first", [[999, 3, 0], [999, 1, 0]]), ("third", [[0, 3, 999], [0, 1, 999]])):
            try:
                cache.gather(0, torch.tensor(tables), 3, 6)
            except (IndexError, RuntimeError):
                touched.append(name)
        holds(
            not touched,
            "gather of positions 3 to 6, in blocks of 3, must read only the second block of each table; it also reads "
            f"the {' and the '.join(touched)}.",
            actual=touched,
        )

    def test_another_dtype(self, code):
        cache = filled(small_cache(code, num_kv_heads=1, head_dim=1, dtype=torch.bfloat16))
        for start, end in ((0, 7), (1, 2)):
            keys, _ = cache.gather(0, torch.tensor([[4, 0, 2]]), start, end)
            expected = torch.tensor([12.0, 13, 14, 0, 1, 2, 6])[start:end].view(1, -1, 1, 1).bfloat16()
            close(keys, expected, f"keys of positions {start} to {end} of a cache in bfloat16, table [4, 0, 2]")

    def test_on_another_device(self, code):
        cache, tables = small_cache(code, device="meta"), torch.tensor(self.TABLES, device="meta")
        elsewhere(lambda: cache.gather(0, tables, 1, 5)[0], "gather", "`block_tables.device`")

    def test_one_long_block(self, code):
        cache = small_cache(code, num_blocks=2, block_size=400)
        for place, start in (("first", 0), ("second", 400)):
            keys, _ = cache.gather(0, torch.tensor([[1, 0]]), start, start + 5)
            made = keys.untyped_storage().nbytes() // keys.element_size()
            own = keys.untyped_storage().data_ptr() != cache.keys.untyped_storage().data_ptr()
            holds(
                not own or made < 10 * keys.numel(),
                f"gather of 5 slots in the {place} block of a table, in blocks of 400, copies {made} numbers; these 5 "
                f"slots have {keys.numel()}.",
                actual=made,
            )


@exercise("4.17", points=3)
class TestAttend:
    def metadata(self, code, block_size, requests):
        """requests: (block table, context, new tokens) of each; their tokens lie one after the other."""
        starts, slots = [0], []
        for table, context, new in requests:
            starts.append(starts[-1] + new)
            slots += [table[p // block_size] * block_size + p % block_size for p in range(context - new, context)]
        return code.AttentionMetadata(
            starts,
            [context for _, context, _ in requests],
            torch.tensor(slots),
            [list(table) for table, _, _ in requests],
        )

    def check(self, code, requests, histories, new, what, layer=1, num_heads=4):
        """histories: each request's keys and values, both (S, K, D); new: slots that this batch writes."""
        cache = small_cache(code, num_blocks=9)
        cache.keys.fill_(3.0)
        cache.values.fill_(1e3)
        for (table, context, num_new), (k, v) in zip(requests, histories):
            for p in range(context - num_new):
                if (table[p // 3], p % 3) not in new:
                    cache.keys[layer, table[p // 3], p % 3] = k[p]
                    cache.values[layer, table[p // 3], p % 3] = v[p]
        rows = [(r, p) for r, (_, context, num_new) in enumerate(requests) for p in range(context - num_new, context)]
        q = noise(len(rows), num_heads, 4, seed=9)
        k = torch.stack([histories[r][0][p] for r, p in rows])
        v = torch.stack([histories[r][1][p] for r, p in rows])
        given = q.clone()
        got = cache.attend(self.metadata(code, 3, requests))(layer, q, k, v)
        expected = torch.stack([naive_attention(q[i], *histories[r], p) for i, (r, p) in enumerate(rows)])
        close(got, expected, f"attend(layer={layer}, ...), {what}", rtol=1e-4, atol=1e-5)
        close(q, given, f"the argument q after attend, {what}")
        return cache, k, v

    def history(self, length, seed):
        return noise(length, 2, 4, seed=seed), noise(length, 2, 4, seed=seed + 100)

    def test_one_request(self, code):
        requests = [([4, 2], 5, 5)]
        cache, k, _ = self.check(code, requests, [self.history(5, 1)], (), "a prompt of 5 tokens in the blocks [4, 2]")
        stored = torch.cat([cache.keys[1, 4], cache.keys[1, 2, :2]])
        close(stored, k, "the keys in the blocks [4, 2], after a prompt of 5 tokens")

    def test_decoding(self, code):
        requests = [([4, 2], 5, 1)]
        self.check(code, requests, [self.history(5, 1)], (), "the fifth token of a sequence in the blocks [4, 2]")

    def test_a_chunk(self, code):
        requests = [([4, 2, 8], 7, 3)]
        self.check(code, requests, [self.history(7, 1)], (), "a chunk: tokens 4 to 6 of a sequence")

    def test_a_mixed_batch(self, code):
        requests = [([4, 2, 8], 7, 4), ([0], 2, 1), ([1, 3], 6, 1), ([5], 3, 3)]
        histories = [self.history(7, 1), self.history(2, 2), self.history(6, 3), self.history(3, 4)]
        self.check(code, requests, histories, (), "four requests with 4, 1, 1 and 3 new tokens of 7, 2, 6 and 3")

    def test_a_prefix_that_is_written_in_the_same_step(self, code):
        whole = self.history(6, 1)
        second = tuple(torch.cat([x[:3], y[3:]]) for x, y in zip(whole, self.history(5, 2)))
        requests = [([6, 2], 6, 6), ([6, 7], 5, 2)]  # both read block 6, which the first writes in this batch
        new = {(6, 0), (6, 1), (6, 2)}
        self.check(
            code,
            requests,
            [whole, second],
            new,
            "where a request reads a block that another request of the batch writes",
        )
        self.check(
            code,
            requests[::-1],
            [second, whole],
            new,
            "where a request reads a block that a later request of the batch writes",
        )

    def test_one_batch_after_another(self, code):
        cache, (k, v) = small_cache(code, num_blocks=9), self.history(5, 1)
        q = noise(5, 4, 4, seed=9)
        for start, end in ((0, 3), (3, 4), (4, 5)):
            attend = cache.attend(self.metadata(code, 3, [([4, 2], end, end - start)]))
            expected = torch.stack([naive_attention(q[t], k, v, t) for t in range(start, end)])
            what = f"attend for tokens {start} to {end}, one batch after another"
            close(attend(1, q[start:end], k[start:end], v[start:end]), expected, what, rtol=1e-4, atol=1e-5)

    def test_a_window(self, code):
        cache, (k, v), q = small_cache(code, num_blocks=9), self.history(5, 1), noise(5, 4, 4, seed=9)
        seen = [range(max(0, t - 1), t + 1) for t in range(5)]
        expected = torch.stack([naive_attention(q[t], k[s], v[s], len(s) - 1) for t, s in enumerate(seen)])
        got = cache.attend(self.metadata(code, 3, [([4, 2], 5, 5)]))(1, q, k, v, 2)
        close(
            got,
            expected,
            "attend(layer, q, k, v, window=2), where a token reads itself and one before,",
            rtol=1e-4,
            atol=1e-5,
        )

    def test_16_bits(self, code):
        cache, (k, v) = small_cache(code, num_blocks=9, dtype=torch.bfloat16), self.history(4, 1)
        q, k, v = noise(4, 4, 4, seed=9).bfloat16(), k.bfloat16(), v.bfloat16()
        expected = torch.stack([naive_attention(q[t], k, v, t) for t in range(4)])
        got = cache.attend(self.metadata(code, 3, [([4, 2], 4, 4)]))(1, q, k, v)
        close(got, expected, "attend of 4 tokens in bfloat16", rtol=2e-2, atol=2e-2)

    def test_on_another_device(self, code):
        cache = small_cache(code, num_blocks=9, device="meta")
        metadata = self.metadata(code, 3, [([4, 2], 5, 1), ([0], 2, 1)])
        metadata = code.AttentionMetadata(
            metadata.query_start, metadata.context_lens, metadata.slot_mapping.to("meta"), metadata.block_tables
        )
        q, k, v = (noise(2, heads, 4).to("meta") for heads in (4, 2, 2))
        elsewhere(lambda: cache.attend(metadata)(1, q, k, v), "attend", "`q.device`")

    def test_each_layer_its_own(self, code):
        cache = small_cache(code, num_blocks=9)
        attend = cache.attend(self.metadata(code, 3, [([4, 2], 4, 4)]))
        for layer in (0, 3):
            k, v, q = noise(4, 2, 4, seed=layer), noise(4, 2, 4, seed=layer + 10), noise(4, 2, 4, seed=layer + 20)
            expected = torch.stack([naive_attention(q[t], k, v, t) for t in range(4)])
            close(attend(layer, q, k, v), expected, f"the same attend, called for layer {layer}", rtol=1e-4, atol=1e-5)


@together()
class TestTogether:
    """Your whole file: real models of a few thousand weights, over shared memory."""

    def load(self, code, family):
        """A tiny checkpoint of this family, a prompt, and how transformers goes on with it."""
        checkpoint, expected = Checkpoint(SNAPSHOTS / family), load_file(SNAPSHOTS / family / "expected.safetensors")
        model = code.Llama(code.llama_pytorch.parse_config(checkpoint.config))
        code.llama_pytorch.load_weights(model, checkpoint)
        tokenizer = SimpleNamespace(eos_token_ids=frozenset(), token_bytes=lambda token_id: b".")
        return model.eval(), tokenizer, expected["token_ids"].tolist(), expected["continuation"].tolist()

    @pytest.mark.parametrize("family", ["llama-3", "qwen3"])
    @pytest.mark.parametrize("block_size", [1, 3, 16])
    def test_the_same_tokens(self, code, family, block_size):
        model, tokenizer, prompt, expected = self.load(code, family)
        num_blocks = -(-(len(prompt) + 6) // block_size) + 1
        cache = code.PagedKVCache(model, num_blocks, block_size)
        manager = code.KVCacheManager(num_blocks, block_size)
        for turn in ("first", "second"):
            params = code.SamplingParams(max_tokens=6, ignore_eos=True)
            output = code.generate(model, tokenizer, prompt, params, cache, manager)
            what = f"six greedy tokens of the tiny {family}, blocks of {block_size}, the {turn} time"
            equal(output.token_ids[: len(expected)], expected, what)
            equal(manager.pool.num_free_blocks, num_blocks, f"free blocks of {num_blocks} after {what}")

    def test_a_fork(self, code):
        model, _, prompt, _ = self.load(code, "llama-3")
        cache, manager = code.PagedKVCache(model, 24, 3), code.KVCacheManager(24, 3)
        parent = code.PagedSequence("parent", list(prompt))
        logits = code.compute(model, cache, manager, parent)
        children = [code.PagedSequence(f"child {i}", list(prompt)) for i in range(2)]
        for child in children:
            manager.fork(parent, child)
            close(code.compute(model, cache, manager, child), logits, "the logits of a forked child", atol=1e-4)
        for child, token in zip(children, (5, 9)):
            child.all_token_ids.append(token)
            alone = code.PagedSequence("alone", list(child.all_token_ids))
            fresh = code.PagedKVCache(model, 24, 3), code.KVCacheManager(24, 3)
            close(
                code.compute(model, cache, manager, child),
                code.compute(model, *fresh, alone),
                f"the logits of a child that goes on with token {token}, compared with a sequence of its own,",
                atol=1e-4,
            )
        for sequence in (parent, *children):
            manager.free(sequence)
        equal(manager.pool.num_free_blocks, 24, "free blocks of 24 after parent and children were freed")
