"""Lesson 5: named wrong answers, and other right ones."""

from __future__ import annotations

from common.grading.catalogue import planted

ANSWERS = [
    # ------------------------------------------------------------------------------------------ 5.15 Scheduler.finish
    planted(
        "5.15",
        "the host's blocks of a swapped request never freed",
        "self.host_pool.free_blocks(self.swapped.pop(request.request_id, ()))",
        "self.swapped.pop(request.request_id, ())",
    ),
]
