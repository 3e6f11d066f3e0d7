"""The format of the worker's events: JSON, signed with a key that only the worker and the runner know."""

from __future__ import annotations

import hmac
import json

MAX_EVENT = 1 << 20  # the most bytes of an event that is accepted
MAX_TEXT = 20_000  # the most characters of a failure's text that are sent


def readable(text: str, kept: str = "\n\t") -> str:
    """A text from the student's code, made safe for a terminal: cut to MAX_TEXT, with control characters escaped.

    kept: the control characters that are not escaped.
    """
    return "".join(
        each if each.isprintable() or each in kept else each.encode("unicode_escape", "backslashreplace").decode()
        for each in text[:MAX_TEXT]
    )


def sealed(event: tuple, key: bytes) -> bytes:
    """An event as signed bytes. The student's code may find the connection, but cannot sign what it writes there."""
    body = json.dumps(event).encode()
    return hmac.digest(key, body, "sha256") + body


def opened(message: bytes, key: bytes) -> list:
    """The event in a message. Raises ValueError if the worker has not signed it."""
    seal, body = message[:32], message[32:]
    if not hmac.compare_digest(seal, hmac.digest(key, body, "sha256")):
        raise ValueError("not sealed by the worker")
    return json.loads(body)
