"""What a reader types, in this process."""

from __future__ import annotations

from common.commands import parse
from common.options import call


def typed(*words: str) -> int:
    """The exit status of `python -m common WORDS`."""
    return call(*parse(list(words)))
