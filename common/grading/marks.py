"""How a check says which exercise it belongs to."""

from __future__ import annotations

import pytest

from common.course.exercises import TOGETHER


def exercise(id: str, points: int = 1, seconds: float = 10.0):
    """Class decorator: the checks in it belong to this exercise, which is worth so many points.

    seconds: how long all its checks may take before the grader ends them; generous, since machines differ.
    """
    return pytest.mark.exercise(id=id, points=points, seconds=seconds)


def together(seconds: float = 30.0):
    """Class decorator: these checks run in the student's untouched module, after all exercises have passed."""
    return pytest.mark.exercise(id=TOGETHER, points=0, seconds=seconds)
