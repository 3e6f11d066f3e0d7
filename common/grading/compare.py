"""Comparisons that explain a failure: first None, type, shape, dtype and NaN, then where values differ and how much."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from common.grading import intact


class CheckFailed(AssertionError):
    """A check has found a wrong value. sentence: for the student. what: names the value. actual: the value itself."""

    def __init__(self, sentence: str, what: str, actual: Any):
        super().__init__(sentence)
        self.sentence, self.what, self.actual = sentence.replace(",: ", ": "), what, actual


REPLACES = "replaces"


def refuse_replaced(found: Sequence[str] | None = None, replaced=intact.replaced) -> None:
    """Raise CheckFailed if an answer has replaced functions that the checks use. found: their names, if known."""
    if found := replaced() if found is None else found:
        names = ", ".join(dict.fromkeys(found[:3]))
        raise CheckFailed(f"{REPLACES} {names}, which the checks and all else in this process use.", REPLACES, None)


@contextmanager
def nothing_replaced(
    owners: Sequence[intact.Owner] = (), replaced=intact.replaced, set_back=intact.set_back, refuse=refuse_replaced
) -> Iterator[None]:
    """Raise CheckFailed if the block replaces functions that the checks use, or attributes of `owners`."""
    before, names = intact.settings(), intact.names_of(owners)
    try:
        yield
    finally:
        refuse([*replaced(), *replaced(names, {}), *set_back(before)])


def close(actual: Any, expected: Tensor | float, what: str, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """`actual` must be a tensor (or number) like `expected`: same shape, same dtype, values within the tolerance.

    what: names the value in the student's terms, such as "softmax([1000, 0])". Raises CheckFailed, as all of these do.
    """
    check_type(actual, expected, what)
    if not isinstance(expected, Tensor):
        if abs(actual - expected) > atol + rtol * abs(expected) or actual != actual:
            raise CheckFailed(f"{what} {be(what)} {number(actual)}, expected {number(expected)}.", what, actual)
        return
    if actual.shape != expected.shape:
        raise CheckFailed(f"{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}.", what, actual)
    if actual.dtype != expected.dtype:
        raise CheckFailed(f"{what} has dtype {dtype(actual)}, expected {dtype(expected)}.", what, actual)
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if actual.dtype == torch.bool or not actual.dtype.is_floating_point:
        wrong = actual != expected
    else:
        if (strange := actual.isnan() & ~expected.isnan()).any():
            which = f" at {index(strange)} ({int(strange.sum())} of {strange.numel()} values)" if strange.ndim else ""
            raise CheckFailed(f"{what} is NaN{which}, expected {number(expected[strange][0])}.", what, actual)
        wrong = ~torch.isclose(actual, expected, rtol=rtol, atol=atol, equal_nan=True)
    if not wrong.any():
        return
    first = tuple(wrong.nonzero()[0].tolist())
    found = f": first difference at {index(wrong)}:" if first else f" {be(what)}"
    sentence = f"{what}{found} {number(actual[first])}, expected {number(expected[first])}."
    if wrong.numel() > 1:
        sentence += f" {int(wrong.sum())} of {wrong.numel()} values differ"
        if actual.dtype.is_floating_point:
            errors = (actual.double() - expected.double()).abs()[wrong]
            sentence += f", the largest error is {number(errors.max())}"
        sentence += "."
    raise CheckFailed(sentence, what, actual)


def equal(actual: Any, expected: Any, what: str) -> None:
    """`actual` must equal `expected`: numbers, strings, lists, tuples, sets, mappings, None."""
    check_type(actual, expected, what)
    is_sequence = isinstance(expected, Sequence) and not isinstance(expected, str)
    if isinstance(expected, dict) or (is_sequence and len(actual) == len(expected)):
        found, wanted = (dict(enumerate(each)) if is_sequence else each for each in (actual, expected))
        for key in [key for key in [*wanted, *found] if key not in found or key not in wanted]:
            has = "has no" if key in wanted else "should have no"
            raise CheckFailed(f"{what}: it {has} {key!r}.", what, actual)
        for key, value in wanted.items():
            if found[key] != value:
                where = f"first difference at [{key!r}]"
                raise CheckFailed(f"{what}: {where}: {brief(found[key])}, expected {brief(value)}.", what, actual)
    if actual != expected:
        raise CheckFailed(f"{what} {be(what)} {brief(actual)}, expected {brief(expected)}.", what, actual)
    if others := types_in(actual) - types_in(expected) - {int, float, bool, Tensor}:
        names = ", ".join(sorted(each.__name__ for each in others))
        raise CheckFailed(
            f"{what} has objects of another class in it ({names}), expected {brief(expected)}.", what, actual
        )


def types_in(value: Any) -> set[type]:
    """The classes of all objects in a nested collection. An object of another class could claim to be equal."""
    if isinstance(value, dict):
        return types_in([*value, *value.values()])
    if isinstance(value, (list, tuple, set, frozenset)):
        return set().union(*map(types_in, value))
    return {type(value)}


def holds(condition: Any, sentence: str, actual: Any = None) -> None:
    """A condition must hold, where there is no single expected value. sentence: what is wrong if it does not.

    actual: the value that was judged, by which a known mistake can be recognised.
    """
    if not condition:
        raise CheckFailed(sentence, sentence, actual)


def refuses(error: type[Exception], call: Callable[[], Any], what: str, mentions: Sequence[str] = ()) -> None:
    """`call` must raise `error`, with a text that contains each of `mentions`."""
    try:
        result = call()
    except error as raised:
        for word in mentions:
            if word not in str(raised):
                sentence = f"{what}: the {error.__name__} should mention {word!r}; it says {str(raised)!r}."
                raise CheckFailed(sentence, what, str(raised)) from None
        return
    raise CheckFailed(f"{what} should raise {error.__name__}; it returned {brief(result)}.", what, result)


def elsewhere(call: Callable[[], Tensor], what: str, place: str, may_fetch: bool = True) -> None:
    """`call` must return a tensor on its inputs' device: here torch's `meta`, whose tensors have shapes but no numbers.

    place: the device to name in the error. may_fetch: whether an answer may copy numbers to the CPU. Then it passes,
    because it cannot be tested on `meta`.
    """
    try:
        on_cpu = call().device.type != "meta"
    except RuntimeError as error:
        if isinstance(error, NotImplementedError) and "TODO" in str(error):
            raise  # an exercise that is to do, where the whole file is the student's
        telling = ("expected device", "same device", *(() if may_fetch else ("copy out of meta",)))
        on_cpu = any(words in str(error) for words in telling)
    holds(
        not on_cpu,
        f"{what} makes a tensor on the CPU, where all others stand elsewhere (here on torch's `meta` device; it could "
        f"be a GPU). Tensors of two devices cannot be computed with: on a GPU this would stop. Make it on {place}.",
    )


def check_type(actual: Any, expected: Any, what: str) -> None:
    """Raise CheckFailed for None, and for a value of another kind than expected."""
    refuse_replaced()
    if actual is None and expected is not None:
        missing = "a `return`" if re.match(r"[\w.]+\(", what) else "a `return` or an assignment"
        raise CheckFailed(f"{what} is None: is {missing} missing?", what, actual)
    kinds = {
        Tensor: "a tensor", bool: "True or False", (int, float): "a number", str: "a string",
        list: "a list", tuple: "a tuple", dict: "a dictionary", set: "a set",
    }  # fmt: skip
    for kind, name in kinds.items():
        if isinstance(expected, kind):
            if isinstance(actual, kind) and is_plain(actual):
                return
            raise CheckFailed(f"{what} is {described(actual)}, expected {name}.", what, actual)


COMPARING = ("__eq__", "__ne__", "__lt__", "__gt__", "__sub__", "__rsub__", "__abs__")


def is_plain(value: Any) -> bool:
    """Whether a value has its kind's own comparison. A class of the student's could be equal to anything."""
    if isinstance(value, Tensor):
        return type(value) in (Tensor, torch.nn.Parameter)
    for kind in (int, float, str, list, tuple, dict, set):
        if isinstance(value, kind):
            own = any(getattr(type(value), name, None) is not getattr(kind, name, None) for name in COMPARING)
            parts = [*value, *value.values()] if kind is dict else value if kind in (list, tuple, set) else ()
            return not own and all(map(is_plain, parts))
    return True


def same(one: Any, other: Any) -> bool:
    """Whether two wrong values are the same, up to rounding."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (
            one.shape == other.shape
            and one.dtype == other.dtype
            and torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-6, equal_nan=True)
        )
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6) or (math.isnan(one) and math.isnan(other))
    try:
        return type(one) is type(other) and bool(one == other)
    except Exception:
        return False


def is_telling(actual: Any) -> bool:
    """Whether a wrong value can identify a mistake: it is not None, not empty, and not NaN."""
    if isinstance(actual, Tensor):
        return actual.numel() > 0 and not actual.isnan().any()
    if isinstance(actual, float):
        return not math.isnan(actual)
    if isinstance(actual, (list, tuple)):
        return len(actual) > 0 and any(map(is_telling, actual))
    return actual is not None and actual != "" and actual != {} and actual != set()


def be(what: str) -> str:
    """The verb for a value's name: "the ids of the blocks" are, "the number of blocks" is."""
    nouns = r"the ((?!of |and |argument )\S+ ){0,2}?(?!status|class|bias|loss|most )\w+s"
    then = r"(?=,|$| \(| (of|from|after|in|for|wh\w+|with|that|to|scheduled|admitted|sent)\b)"
    return "are" if re.match(nouns + then, what) else "is"


def number(value: Any) -> str:
    value = value.item() if isinstance(value, Tensor) else value
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def index(mask: Tensor) -> str:
    """The index of the first True, as it is written after a tensor's name: "[0, 2]"."""
    return "[" + ", ".join(map(str, mask.nonzero()[0].tolist())) + "]"


def brief(value: Any) -> str:
    text = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return text if len(text) <= 160 else text[:157] + "..."


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        return brief(value)
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name} ({brief(value)})"
