"""Notices when a function changes its arguments in place."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor


@contextmanager
def watched_arguments(module: ModuleType, function: str) -> Iterator[dict[str, Any]]:
    """Yields a dictionary that gets the new value, by its name, of each argument that a call of `function` changes.

    function: a qualified name. Only tensors, collections and frozen dataclasses are watched, not objects with a state
    of their own, such as `self`.
    """
    changes: dict[str, Any] = {}
    *classes, name = function.split(".")
    scope: Any = module
    for each in classes:
        scope = getattr(scope, each, None)
    original = vars(scope).get(name) if scope is not None else None
    if not isinstance(original, FunctionType) or inspect.isgeneratorfunction(original):
        yield changes
        return

    @functools.wraps(original)
    def watched(*positional, **named):
        names = original.__code__.co_varnames
        arguments = {names[i] if i < len(names) else str(i): value for i, value in enumerate(positional)} | named
        before = {argument: snapshot(value) for argument, value in arguments.items()}
        result = original(*positional, **named)
        for argument, value in arguments.items():
            if not unchanged(before[argument], after := snapshot(value)):
                changes[argument] = after
        return result

    setattr(scope, name, watched)
    try:
        yield changes
    finally:
        setattr(scope, name, original)


def snapshot(value: Any) -> Any:
    """A copy of a tensor, a collection or a frozen dataclass, with all that is in it; anything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: snapshot(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [snapshot(each) for each in value]
    if isinstance(value, set):
        return set(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and value.__dataclass_params__.frozen:
        return [snapshot(getattr(value, field.name)) for field in dataclasses.fields(value)]
    return value


def unchanged(before: Any, after: Any) -> bool:
    """Whether two snapshots are equal. Objects are compared by identity."""
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        if before.shape != after.shape or before.dtype != after.dtype or before.device != after.device:
            return False
        return before.is_meta or torch.equal(before.nan_to_num(0.5), after.nan_to_num(0.5))
    if isinstance(before, dict) and isinstance(after, dict):
        return list(before) == list(after) and all(unchanged(before[key], after[key]) for key in before)
    if isinstance(before, list) and isinstance(after, list):
        return len(before) == len(after) and all(map(unchanged, before, after))
    if isinstance(before, (set, int, float, str, bytes)):
        return before == after or before != before
    return before is after
