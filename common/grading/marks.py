"""The decorators that assign checks to an exercise."""

from __future__ import annotations

import pytest

from common.course.exercises import TOGETHER


def exercise(id: str, points: int = 1, seconds: float = 10.0):
    """Class decorator: the checks of this class belong to an exercise, which is worth `points`.

    seconds: the time limit of all its checks together; it is generous, since machines differ.
    """
    return pytest.mark.exercise(id=id, points=points, seconds=seconds)


def together(seconds: float = 30.0):
    """Class decorator: these checks run in the student's whole module, after all exercises have passed."""
    return pytest.mark.exercise(id=TOGETHER, points=0, seconds=seconds)
