"""Lesson 4's optional module: named wrong answers, and other right ones."""

from __future__ import annotations

from common.course.catalogue import right, wrong, wrong_body

ANSWERS = [
    # ------------------------------------------------------------------------------------- 4.26 num_skipped_blocks
    wrong(
        "4.26",
        "the token itself not counted in its window",
        "num_computed_tokens - window + 1",
        "num_computed_tokens - window",
    ),
    wrong("4.26", "one key too many passed", "num_computed_tokens - window + 1", "num_computed_tokens - window + 2"),
    wrong(
        "4.26",
        "negative before the window is full",
        "max(0, num_computed_tokens - window + 1)",
        "num_computed_tokens - window + 1",
    ),
    wrong(
        "4.26", "the block of the first key given away too", "first_key // block_size", "-(-first_key // block_size)"
    ),
    wrong("4.26", "keys, and not blocks", "first_key // block_size", "first_key"),
    wrong_body(
        "4.26",
        "all blocks but those of a whole window, however it lies over them",
        """
        num_blocks = -(-num_computed_tokens // block_size)
        return max(0, num_blocks - -(-window // block_size))
        """,
    ),
    right(
        "4.26",
        "block after block",
        """
        num_skipped = 0
        while (num_skipped + 1) * block_size <= num_computed_tokens - window + 1:
            num_skipped += 1
        return num_skipped
        """,
    ),
    # -------------------------------------------------------------------------------------------- 4.27 longest_hit
    wrong_body(
        "4.27",
        "from the first block on, as without a window",
        """
        num_cached = 0
        while num_cached < len(is_cached) and is_cached[num_cached]:
            num_cached += 1
        return range(num_cached)
        """,
    ),
    wrong_body(
        "4.27",
        "the last cached block, whatever lies before it",
        """
        last = max((place for place, cached in enumerate(is_cached) if cached), default=-1)
        return range(last, last + 1) if last >= 0 else range(0)
        """,
    ),
    wrong_body(
        "4.27",
        "the first run that is long enough, and not the last",
        """
        num_needed = max(1, -(-(window - 1) // block_size))
        for place in range(len(is_cached) - num_needed + 1):
            if all(is_cached[place : place + num_needed]):
                return range(place, place + num_needed)
        return range(0)
        """,
    ),
    wrong(
        "4.27",
        "blocks for a whole window, one key too many",
        "-(-(window - 1) // block_size)",
        "-(-window // block_size)",
    ),
    wrong("4.27", "the needed blocks rounded down", "-(-(window - 1) // block_size)", "(window - 1) // block_size"),
    wrong("4.27", "gaps allowed", " if is_cached[place] else 0", " if is_cached[place] else num_in_a_row"),
    wrong("4.27", "a beginning shorter than the window not found", "return range(num_in_a_row)", "return range(0)"),
    wrong(
        "4.27",
        "all blocks up to the end, missing ones too",
        "return range(place, place + num_needed)",
        "return range(0, place + num_needed)",
    ),
    wrong(
        "4.27",
        "a window of one token needs no block, and so finds what is not there",
        "max(1, -(-(window - 1) // block_size))",
        "-(-(window - 1) // block_size)",
    ),
    right(
        "4.27",
        "every end tried, the last first",
        """
        num_needed = max(1, -(-(window - 1) // block_size))
        for stop in range(len(is_cached), 0, -1):
            start = max(0, stop - num_needed)
            if all(is_cached[start:stop]):
                return range(start, stop)
        return range(0)
        """,
    ),
]
