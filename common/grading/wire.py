"""How the worker's events travel to the runner: JSON, sealed with a key that only these two know."""

from __future__ import annotations

import hmac
import json

MAX_EVENT = 1 << 20
"""Bytes of the longest event that is listened to."""
MAX_TEXT = 20_000
"""Characters of a failure's text that travel."""


def readable(text: str, kept: str = "\n\t") -> str:
    """A text of the student's code that a terminal and a file can take: cut, control characters written out, but for
    those that are kept.
    """
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape", "backslashreplace").decode()
        for each in text[:MAX_TEXT]
    )


def sealed(event: tuple, key: bytes) -> bytes:
    """An event as it travels. The seal keeps out what a student's code writes into a file that it found open."""
    body = json.dumps(event).encode()
    return hmac.digest(key, body, "sha256") + body


def opened(message: bytes, key: bytes) -> list:
    """The event in a message. Raises ValueError if it is not the worker's."""
    seal, body = message[:32], message[32:]
    if not hmac.compare_digest(seal, hmac.digest(key, body, "sha256")):
        raise ValueError("not sealed by the worker")
    return json.loads(body)
