"""Lesson 3: named wrong answers, and other right ones."""

from __future__ import annotations

from common.grading.catalogue import planted

ANSWERS = [
    # ----------------------------------------------------------------------------------------------- 3.12 resume
    planted("3.12", "matches counted anywhere, instead of up to the first difference", "break", "continue"),
]
