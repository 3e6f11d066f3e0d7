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
        before = {argument: state(value) for argument, value in arguments.items()}
        with nothing_replaced() if next(calls) < FIRST_CALLS else nullcontext():
            result = original(*positional, **named)
        if type(result) is float and original.__annotations__.get("return") == "int":
            sentence = f"`{name}` returned {result!r}, a float: it must return a whole number, an int."
            raise CheckFailed(sentence, f"the type of what `{name}` returns", "float")
        for argument, value in arguments.items():
            if state(value) != before[argument]:
                changes[argument] = value
        return result

    setattr(scope, name, watched)
    try:
        yield changes
    finally:
        setattr(scope, name, original)


def state(value: Any) -> Any:
    """What a value holds: the numbers of a tensor, the items of a collection, the values of a frozen dataclass, and the
    identity of any other object. The state of the same value later is equal, unless it has changed.
    """
    if value is None or isinstance(value, PLAIN):  # the usual case; some functions are called thousands of times
        return value if value == value else repr(value)  # NaN does not equal itself
    if isinstance(value, Tensor):
        flat = value.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).view(-1)
        numbers = b"" if flat.is_meta else flat.view(torch.uint8).cpu().numpy().tobytes()
        return value.shape, value.dtype, value.device, numbers
    if isinstance(value, dict):
        return [(state(key), state(each)) for key, each in value.items()]
    if isinstance(value, set):
        return set(value)
    if isinstance(value, (list, tuple)):
        return list(map(state, value))
    settings = getattr(type(value), "__dataclass_params__", None)
    if settings and settings.frozen:
        return [state(getattr(value, name)) for name in value.__dataclass_fields__]
    return id(value), value  # with the value, whose id could otherwise become that of another object
