"""Notices when a function changes its arguments in place."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from common.grading.compare import CheckFailed, nothing_replaced

PLAIN = (int, float, str, bytes)
FIRST_CALLS = 30  # the number of calls, at the start of each check, after which replaced names are searched for


@contextmanager
def watched_arguments(module: ModuleType, function: str) -> Iterator[dict[str, Any]]:
    """Yields a dict that receives, by name, the new value of each argument that a call of `function` changes in place.

    function: a qualified name. Tensors, collections and frozen dataclasses are watched, but not objects with a state,
    such as `self`. A call raises CheckFailed if it returns a float where its annotation says int.
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

    calls = itertools.count()

    @functools.wraps(original)
    def watched(*positional, **named):
        names = original.__code__.co_varnames
        arguments = {names[i] if i < len(names) else str(i): value for i, value in enumerate(positional)} | named
        before = {argument: snapshot(value) for argument, value in arguments.items()}
        with nothing_replaced() if next(calls) < FIRST_CALLS else nullcontext():
            result = original(*positional, **named)
        if type(result) is float and original.__annotations__.get("return") == "int":
            sentence = f"`{name}` returned {result!r}, a float: it must return a whole number, an int."
            raise CheckFailed(sentence, f"the type of what `{name}` returns", "float")
        for argument, value in arguments.items():
            if not unchanged(before[argument], value):
                changes[argument] = snapshot(value)
        return result

    setattr(scope, name, watched)
    try:
        yield changes
    finally:
        setattr(scope, name, original)


def parts(value: Any) -> list | tuple | None:
    """The items of a list or tuple, or the values of a frozen dataclass; None for anything else."""
    if isinstance(value, (list, tuple)):
        return value
    settings = getattr(type(value), "__dataclass_params__", None)
    return [getattr(value, name) for name in value.__dataclass_fields__] if settings and settings.frozen else None


def snapshot(value: Any) -> Any:
    """A deep copy of a tensor, a collection or a frozen dataclass; any other object itself."""
    if value is None or isinstance(value, PLAIN):  # the usual case; some functions are called thousands of times
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: snapshot(each) for key, each in value.items()}
    if isinstance(value, set):
        return set(value)
    found = parts(value)
    return value if found is None else [snapshot(each) for each in found]


def unchanged(before: Any, value: Any) -> bool:
    """Whether a value still equals its snapshot. Objects with a state are compared by identity."""
    if before is value and isinstance(value, PLAIN):
        return True
    if isinstance(before, Tensor) and isinstance(value, Tensor):
        if before.shape != value.shape or before.dtype != value.dtype or before.device != value.device:
            return False
        same = before.is_meta or torch.equal(before, value)
        return same or torch.equal(before.nan_to_num(0.5), value.nan_to_num(0.5))
    if isinstance(before, dict) and isinstance(value, dict):
        return list(before) == list(value) and all(unchanged(before[key], value[key]) for key in before)
    if isinstance(before, (set, *PLAIN)):
        return before == value or before != before
    if isinstance(before, list) and (found := parts(value)) is not None:
        return len(before) == len(found) and all(map(unchanged, before, found))
    return before is value
