"""Detects that an answer replaces a function that its checks use, such as `torch.isclose`, and restores it.

An answer runs in the process that judges it. Before the first one is imported, `remember` records the functions of
torch, of Python and of the grader that checks and comparisons use. `replaced` is called when an answer returns, before
each comparison of values, and when a check has ended.
"""

from __future__ import annotations

import builtins
import math
import sys
from collections.abc import Iterable
from operator import attrgetter, is_
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch

Owner = type | ModuleType
Names = dict[Owner, dict[str, Any]]
USED = (builtins, math, torch, torch.functional, torch.nn.functional, torch.Tensor)
KNOWN: Names = {}
FUNCTIONS: dict[FunctionType, tuple] = {}
IMPLEMENTED: set[str] = set()  # the operators of torch that are implemented in Python
FILES: set[Path] = set()
MODES = ("torch, by a TorchFunctionMode that stays on", "torch, by a TorchDispatchMode that stays on")
parts, missing = attrgetter("__code__", "__defaults__", "__kwdefaults__"), object()


def remember(checks: Path) -> None:
    """Record what the checks in this file use, if that has not been done."""
    if checks in FILES:
        return
    FILES.add(checks)
    IMPLEMENTED.update(torch.library._impls)
    modules = {each for each in sys.modules.values() if type(each) is ModuleType}
    ours = {each for each in modules if is_ours(each) or getattr(each, "__file__", None) == str(checks)}
    used = {value for each in ours for value in vars(each).values() if isinstance(value, Owner)}
    KNOWN.update(names_of({*USED, *ours, *used} - set(KNOWN)))
    for value in [value for names in KNOWN.values() for value in names.values() if type(value) is FunctionType]:
        FUNCTIONS.setdefault(value, parts(value))


def names_of(owners: Iterable[Owner]) -> Names:
    return {owner: dict(vars(owner)) for owner in owners}


def is_ours(owner: Owner) -> bool:
    """Whether this is a module of the grader, none of whose attributes may change."""
    return owner.__name__.startswith("common.grading.")


def shadows(owner: Owner, name: str) -> bool:
    """Whether a new name hides a built-in name, or one that a class inherits."""
    return name in vars(builtins) or (isinstance(owner, type) and any(name in vars(base) for base in owner.__mro__[1:]))


def replaced(known=KNOWN, functions=FUNCTIONS, all=all, map=map, len=len, list=list, is_=is_, parts=parts) -> list[str]:
    """Restore what has been replaced since it was recorded in `known`. Returns the names.

    The functions that this one calls are its defaults: an answer may have replaced them, too.
    """
    found = []
    for owner, before in known.items():
        now = vars(owner)
        if len(now) == len(before) and all(map(is_, now.values(), before.values())):
            continue
        for name in [*before, *(name for name in [*now] if name not in before)]:
            old = before.get(name, missing)
            if now.get(name, missing) is old or name == "manual_seed":  # torch replaces that when it compiles
                continue
            if old is missing and shadows(owner, name):
                delattr(owner, name)
            elif old is not missing and (callable(old) or is_ours(owner)):
                setattr(owner, name, old)
            else:
                continue
            found.append(f"{owner.__name__}.{name}")
        known[owner] = dict(vars(owner))
    if list(map(parts, functions)) != list(functions.values()):
        for function, before in functions.items():
            if parts(function) != before:
                function.__code__, function.__defaults__, function.__kwdefaults__ = before
                found.append(f"{function.__module__}.{function.__qualname__}")
    if len(torch.library._impls) != len(IMPLEMENTED):
        new = {*torch.library._impls} - IMPLEMENTED
        own = {each for each in new if each.startswith("aten/") and not each.endswith(("/Meta", "/CUDA", "/MPS"))}
        IMPLEMENTED.update(new - own)  # `own` cannot be restored, so every later check in this process fails
        found += sorted(own)
    return found


def settings() -> tuple:
    """torch's default dtype and the numbers of active modes, which affect everything that torch computes."""
    return torch.get_default_dtype(), torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()


def set_back(before: tuple) -> list[str]:
    """Restore the settings. Returns the names of those that were changed."""
    found = [name for name, old, new in zip(("torch's default dtype", *MODES), before, settings()) if old != new]
    torch.set_default_dtype(before[0])
    while torch._C._len_torch_function_stack() > before[1]:
        torch._C._pop_torch_function_stack()
    return found
