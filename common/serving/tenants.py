"""Tenants, their keys and their limits: a file with one table for each tenant.

    [alice]
    key = "a long random text"
    max_concurrent_requests = 8
    tokens_per_minute = 20000
    isolate_prefix_cache = true

Only the key must be there. A tenant's tokens are those of its prompts and answers. With `isolate_prefix_cache`, which
is the default, no other tenant's requests share blocks with this one's: the time to the first token would tell whether
another tenant has asked the same.
"""

from __future__ import annotations

import hmac
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from hashlib import sha256
from pathlib import Path

from common.course import counted
from common.serving.errors import QueueFull
from common.start import OptionError


@dataclass
class Tenant:
    """One tenant, and what it has used. Limits that are None do not bind."""

    name: str = "default"
    key: str = field(default="", repr=False)
    max_concurrent_requests: int | None = None
    tokens_per_minute: int | None = None
    isolate_prefix_cache: bool = True
    clock: Callable[[], float] = field(default=time.monotonic, repr=False)
    num_requests: int = 0  # that are not finished
    tokens_left: float = 0.0  # below zero after an answer that was longer than what was left
    counted_at: float = 0.0

    def __post_init__(self):
        self.tokens_left, self.counted_at = float(self.tokens_per_minute or 0), self.clock()

    def spend(self, num_tokens: int) -> None:
        """Count tokens of a prompt or an answer. What is used comes back evenly, all of it within a minute."""
        if self.tokens_per_minute is not None:
            now = self.clock()
            regained = (now - self.counted_at) * self.tokens_per_minute / 60
            self.tokens_left = min(self.tokens_per_minute, self.tokens_left + regained) - num_tokens
            self.counted_at = now

    def admit(self) -> None:
        """Count a request that begins. Raises QueueFull if this tenant must wait; `leave` ends what was admitted."""
        self.spend(0)
        if self.max_concurrent_requests is not None and self.num_requests >= self.max_concurrent_requests:
            number = counted(self.num_requests, "request")
            raise QueueFull(f"{self.name} has {number} at once already; more are not allowed.")
        if self.tokens_per_minute is not None and self.tokens_left <= 0:
            seconds = max(1.0, 60 * -self.tokens_left / self.tokens_per_minute)
            message = (
                f"{self.name} has used its {self.tokens_per_minute} tokens a minute; try again in {seconds:.0f} s."
            )
            raise QueueFull(message, seconds)
        self.num_requests += 1

    def leave(self) -> None:
        self.num_requests -= 1

    def salt(self, asked: str | None) -> str:
        """What is hashed into the first block of its requests. asked: the request's own cache_salt."""
        return f"{self.name if self.isolate_prefix_cache and self.key else ''}/{asked or ''}".strip("/")


class Tenants:
    """All tenants. Without any, every request is the tenant `default`'s, and it has no limits."""

    def __init__(self, tenants: list[Tenant]):
        self.tenants = tenants
        self.anyone = None if tenants else Tenant()

    def find(self, authorization: str | None) -> Tenant | None:
        """The tenant of an Authorization header, or None. Takes the same time whichever key is nearly right."""
        if self.anyone is not None:
            return self.anyone
        scheme, _, key = (authorization or "").partition(" ")
        given, found = sha256(key.strip().encode()).digest(), None
        for tenant in self.tenants:
            if hmac.compare_digest(sha256(tenant.key.encode()).digest(), given) and scheme.lower() == "bearer":
                found = tenant
        return found


def load_tenants(file: str | Path | None) -> Tenants:
    """Read a file of keys; None: no tenants. Raises OptionError, naming the tenant and the field."""
    if file is None:
        return Tenants([])
    try:
        tables = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"{file}: {getattr(error, 'strerror', error)}") from None
    tenants = [make_tenant(file, name, table) for name, table in tables.items()]
    if not tenants:
        raise OptionError(f'{file}: no tenant is in it. Write [alice] and, below it, key = "...".')
    if len({tenant.key for tenant in tenants}) < len(tenants):
        raise OptionError(f"{file}: two tenants have the same key.")
    return Tenants(tenants)


def make_tenant(file: str | Path, name: str, table: object) -> Tenant:
    kinds = {"key": str, "max_concurrent_requests": int, "tokens_per_minute": int, "isolate_prefix_cache": bool}
    assert kinds.keys() < {each.name for each in fields(Tenant)}
    if not isinstance(table, dict):
        raise OptionError(f"{file}: {name} stands outside of a table; write [{name}] and its fields below.")
    for key, value in table.items():
        if key not in kinds:
            raise OptionError(f"{file}: [{name}] has the field {key}; the fields are {', '.join(kinds)}.")
        if type(value) is not kinds[key] or (kinds[key] is int and value < 1) or value == "":
            rule = {str: "a text that is not empty", int: "a whole number of at least 1", bool: "true or false"}
            raise OptionError(f"{file}: [{name}] {key} must be {rule[kinds[key]]}; it is {value!r}.")
    if "key" not in table:
        raise OptionError(f"{file}: [{name}] has no key.")
    return Tenant(name, **table)
