"""Lesson 4: named wrong answers, and other right ones."""

from __future__ import annotations

from common.grading.catalogue import planted

ANSWERS = [
    # ------------------------------------------------------------------------------------- 4.15 KVCacheManager.trim
    planted(
        "4.15",
        "the block that is partly filled given up too",
        "-(-request.num_computed_tokens // self.block_size)",
        "request.num_computed_tokens // self.block_size",
    ),
]
