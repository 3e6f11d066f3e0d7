"""Runs Jinja templates that are not trusted, such as a checkpoint's chat template, within limits of time and size.

Jinja's own sandbox forbids attributes that start with an underscore, changes of the inputs, and ranges above 100,000.
What it leaves open is checked here: everything that may take long or grow.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

LONGEST_TEXT = 10_000_000  # characters that a template may write, or join to one text
LONGEST_TIME = 4.0  # seconds that a template may run
ITEM_SIZE = 40  # characters that an item of a list counts as, in addition to its own
LARGEST_ARGUMENT = 1000  # number, such as a width, that a filter or a string's method may get
LARGEST_POWER = 64  # exponent
LARGEST_NUMBER = 4096  # bits of a whole number


def render(template: str, values: Mapping[str, Any]) -> str:
    """Returns what the template writes. Raises a `jinja2.TemplateError`, or whatever the template raises."""
    sandbox, pieces, length = Sandbox(), [], 0
    for piece in sandbox.from_string(Limits().visit(sandbox.parse(template))).generate(values):
        pieces.append(piece)
        length += len(piece)
        if length > LONGEST_TEXT:
            raise TemplateError(f"it wrote more than {LONGEST_TEXT:,} characters")
    return "".join(pieces)


# --- What templates have besides Jinja's own, as in transformers ------------------------------------------------------


class Generation(Extension):
    """`{% generation %}`, which marks the model's own text for training. Its content is written as it is."""

    tags = {"generation"}

    def parse(self, parser):
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class Namespace(jinja2.utils.Namespace):
    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}.")
        super().__setitem__(name, value)


def namespace(*args, **kwargs) -> Namespace:
    """Jinja's `namespace`, without names that begin with an underscore."""
    made = Namespace()
    for name, item in dict(*args, **kwargs).items():
        made[name] = item
    return made


def raise_exception(message: str) -> None:
    raise TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes < and > for web pages.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# --- Limits -----------------------------------------------------------------------------------------------------------


class Limits(NodeTransformer):
    """Puts a check of the time into each loop and macro, and a check of the size around each `~` and literal."""

    @staticmethod
    def call(method: str, arguments: list[nodes.Expr], lineno: int) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None, lineno=lineno)

    def visit_For(self, node):
        node.body.insert(0, nodes.ExprStmt(self.call("tick", [], node.lineno), lineno=node.lineno))
        return self.generic_visit(node)

    visit_Macro = visit_CallBlock = visit_For

    def visit_List(self, node):
        return self.call("checked_size", [self.generic_visit(node)], node.lineno)

    visit_Dict = visit_Concat = visit_List

    def visit_Tuple(self, node):
        return self.visit_List(node) if node.ctx == "load" else self.generic_visit(node)


class Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
        self.end = time.monotonic() + LONGEST_TIME
        self.filters["tojson"] = tojson
        self.globals |= {"raise_exception": raise_exception, "namespace": namespace}
        self.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        self.globals["dict"] = lambda *args, **kwargs: checked_size(dict(*args, **kwargs))
        del self.globals["lipsum"]
        self.filters = {name: guarded(name, each) for name, each in self.filters.items()}
        self.checked_size = checked_size

    def tick(self) -> None:
        if time.monotonic() > self.end:
            raise TemplateError(f"it ran for more than {LONGEST_TIME:g} seconds")

    def call(self, context, called, *args, **kwargs):
        method = getattr(called, "__wrapped__", called)  # Jinja wraps str.format
        if isinstance(getattr(method, "__self__", None), str):
            check_growth(method.__name__, method.__self__, args, kwargs)
        return super().call(context, called, *args, **kwargs)

    def call_binop(self, context, operator, left, right):
        if operator == "%" and isinstance(left, str):
            check_growth("%", left, right if isinstance(right, tuple) else [right], {})
        if operator == "**" and not abs(right) <= LARGEST_POWER:
            raise TemplateError(f"it computes a power of {right!r:.20}")
        sized, times = (left, right) if hasattr(left, "__len__") else (right, left)
        if operator == "*" and hasattr(sized, "__len__") and len(sized) * times > LONGEST_TEXT:
            raise TemplateError(f"it repeats something {times!r:.20} times")
        return checked_size(super().call_binop(context, operator, left, right))


def guarded(name: str, apply: Callable) -> Callable:
    """The filter with a check of its arguments. One that Jinja adds, such as the environment, is not checked."""

    @functools.wraps(apply)
    def filter(*args, **kwargs):
        values = args[1:] if hasattr(apply, "jinja_pass_arg") else args
        if values:
            text = values[0]
            check_growth(name, text if hasattr(text, "__len__") else "", values[1:], kwargs)
        return apply(*args, **kwargs)

    return filter


def check_growth(name: str, text: Any, args, kwargs: Mapping[str, Any]) -> None:
    """Refuse a filter, or a string's method, whose result may be far larger than its arguments."""
    values = [*args, *kwargs.values()]
    for value in values:
        if isinstance(value, int) and abs(value) > LARGEST_ARGUMENT:
            raise TemplateError(f"{name} has an argument of {value!r:.20}; {LARGEST_ARGUMENT} is allowed")
    times = 0
    if name in ("%", "format", "format_map"):
        times = text.count("%") + text.count("{")
        if any(int(width) > LARGEST_ARGUMENT for width in re.findall(r"\d{1,9}", text)) or "*" in text:
            raise TemplateError(f"{name} has a width; {LARGEST_ARGUMENT} is allowed")
    elif name in ("replace", "translate", "wordwrap"):
        times = len(text) + 1
    elif name == "join":  # a method of the separator, or a filter of the items
        items, *values = (text, *values) if not isinstance(text, str) else (*values, text)
        times = len(items) if hasattr(items, "__len__") else 1
    if (size := times * max(map(written_size, values), default=0)) > LONGEST_TEXT:
        raise TemplateError(f"it made a value of size {size:,}")


def checked_size(value: Any) -> Any:
    """Returns the value. Raises TemplateError if it is too large to go on with."""
    bits = value.bit_length() if isinstance(value, int) else 0
    if bits > LARGEST_NUMBER or (size := written_size(value)) > LONGEST_TEXT:
        raise TemplateError(f"it made a value of size {bits or size:,}")
    return value


def written_size(value: Any) -> int:
    """About how many characters a value has when it is written. Counting stops above `LONGEST_TEXT`.

    A list that contains another one twice, which contains another one twice, and so on, is small in memory, and its
    text is endless.
    """
    size, left = 0, [value]
    while left and size <= LONGEST_TEXT:
        item = left.pop()
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, (dict, list, tuple)):
            size += ITEM_SIZE * len(item)
            if size <= LONGEST_TEXT:
                left += [*item.keys(), *item.values()] if isinstance(item, dict) else item
    return size
