"""The checks of lesson 4's optional module: small cases by hand, and all that there are by a plain search."""

from __future__ import annotations

from itertools import product

from common.grading import equal, exercise, together


@exercise("4.26", points=0)
class TestNumSkippedBlocks:
    def check(self, code, num_computed, window, block_size, expected):
        what = f"num_skipped_blocks({num_computed}, window={window}, block_size={block_size})"
        equal(code.num_skipped_blocks(num_computed, window, block_size), expected, what)

    def test_by_hand(self, code):
        # The next token is at position 10 and reads keys 5 to 10: block 0 of 4 slots is skipped.
        self.check(code, 10, 6, 4, 1)
        self.check(code, 9, 2, 4, 2)
        self.check(code, 9, 3, 4, 1)
        self.check(code, 0, 6, 4, 0)
        self.check(code, 100, 1, 4, 25)

    def test_nothing_is_passed_yet(self, code):
        for num_computed in range(9):
            self.check(code, num_computed, 8, 2, 0)

    def test_every_position(self, code):
        for num_computed, window, block_size in product(range(14), (1, 2, 3, 5, 8), (1, 2, 3, 4)):
            read = [key // block_size for key in range(num_computed + 1) if num_computed - key < window]
            self.check(code, num_computed, window, block_size, read[0])


def longest(is_cached: list[bool], window: int, block_size: int) -> range:
    """The longest prefix of which the next token's keys are cached, by trying all of them, and its fewest blocks."""
    for stop in range(len(is_cached), 0, -1):
        position = stop * block_size
        keys = [key for key in range(position) if position - key < window] or [position - 1]
        blocks = range(keys[0] // block_size, stop)
        if all(is_cached[block] for block in blocks):
            return blocks
    return range(0)


def shown(is_cached) -> str:
    return "".join("x" if each else "." for each in is_cached)


@exercise("4.27", points=0)
class TestLongestHit:
    def check(self, code, is_cached, window, block_size, expected):
        found = code.longest_hit(list(is_cached), window, block_size)
        what = f"longest_hit of {shown(is_cached)} (x: cached, .: not), window={window}, block_size={block_size},"
        equal(found, expected, what)

    def test_by_hand(self, code):
        # A window of 6 reads 5 keys before the next token: two blocks of 4.
        self.check(code, [False, False, True, True, False], 6, 4, range(2, 4))
        self.check(code, [True, True, True, True, True], 6, 4, range(3, 5))
        self.check(code, [False, True, False, True], 6, 4, range(0))

    def test_a_beginning_shorter_than_the_window(self, code):
        self.check(code, [True, False, False, True], 100, 4, range(0, 1))
        self.check(code, [True, True, False], 100, 4, range(0, 2))
        self.check(code, [False, True, True], 100, 4, range(0))

    def test_nothing(self, code):
        self.check(code, [], 6, 4, range(0))
        self.check(code, [False, False], 6, 4, range(0))

    def test_a_window_of_one_token(self, code):
        self.check(code, [False, True, False, False], 1, 4, range(1, 2))

    def test_every_pattern(self, code):
        for window, block_size in ((2, 2), (3, 2), (4, 2), (5, 2), (6, 4)):
            for is_cached in product((False, True), repeat=5):
                self.check(code, is_cached, window, block_size, longest(list(is_cached), window, block_size))


@together()
class TestTogether:
    """Your whole file: what a hit takes is what a running sequence would keep."""

    def test_a_hit_is_what_is_kept(self, code):
        for window, block_size, num_blocks in product((2, 3, 6, 9), (1, 2, 4), (1, 3, 7)):
            hit = code.longest_hit([True] * num_blocks, window, block_size)
            skipped = code.num_skipped_blocks(num_blocks * block_size, window, block_size)
            what = f"longest_hit of {num_blocks} cached blocks of {block_size}, window={window},"
            equal(hit, range(min(skipped, num_blocks - 1), num_blocks), what)
