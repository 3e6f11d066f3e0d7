"""What in a submission asks for a second look, read from its syntax tree before any of it runs.

A screen, not a wall: it names the lines that an answer has no use for and an attack on the grader has, so that a person
looks at them. What the skeleton itself contains is never named.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from common.course import MODULES, Lesson

HARMLESS = {
    *("__future__", "abc", "bisect", "collections", "contextlib", "copy", "dataclasses", "enum", "fractions"),
    *("functools", "heapq", "itertools", "json", "math", "numbers", "operator", "random", "re", "statistics"),
    *("string", "struct", "textwrap", "time", "types", "typing", "warnings", "numpy", "torch", "safetensors"),
}
"""What an answer may import without being looked at; and whatever the skeleton imports."""
CALLS = {"__import__", "breakpoint", "compile", "eval", "exec", "exit", "globals", "input", "open", "quit", "vars"}
METHODS = {"__bool__", "__class__", "__eq__", "__getattribute__", "__ne__", "__torch_dispatch__", "__torch_function__"}
ATTRIBUTES = {
    *("__builtins__", "__bases__", "__closure__", "__code__", "__globals__", "__mro__", "__subclasses__"),
    *("_getframe", "cr_frame", "f_back", "f_builtins", "f_globals", "f_locals", "gi_frame", "tb_frame", "tb_next"),
    *("modules", "meta_path", "settrace", "setprofile"),
}


def findings(lesson: Lesson, source: str, skeleton: str) -> list[str]:
    """'line 12: calls exec', for each thing worth a look. The source must be valid Python."""
    given = {what for _, what in suspicions(lesson, ast.parse(skeleton))}
    found = sorted(suspicions(lesson, ast.parse(source)))
    return [f"line {line}: {what}" for line, what in found if what not in given]


def suspicions(lesson: Lesson, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that is not plainly an answer."""
    imported = {alias.asname or alias.name for node in ast.walk(tree) for alias in getattr(node, "names", ())}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from looked_at(lesson, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            for name in (
                [node.module or "."] if node.module != "solutions" else [f"solutions.{a.name}" for a in node.names]
            ):
                yield from looked_at(lesson, node.lineno, name)
        elif isinstance(node, ast.Call):
            name = getattr(node.func, "id", None)
            if name in CALLS:
                yield node.lineno, f"calls {name}"
            if name == "getattr" and not is_literal(node.args[1:2]):
                yield node.lineno, "calls getattr with a name that is computed"
            if name in ("setattr", "delattr") and getattr(node.args[0] if node.args else None, "id", None) in imported:
                yield node.lineno, f"changes {node.args[0].id}, which is not the submission's own"
        elif isinstance(node, ast.FunctionDef) and node.name in METHODS:
            yield node.lineno, f"defines {node.name}"
        elif isinstance(node, ast.Attribute):
            if node.attr in ATTRIBUTES:
                yield node.lineno, f"uses .{node.attr}"
            if isinstance(node.ctx, (ast.Store, ast.Del)) and getattr(node.value, "id", None) in imported:
                yield node.lineno, f"changes {ast.unparse(node)}, which is not the submission's own"


def is_literal(arguments: list[ast.expr]) -> bool:
    return bool(arguments) and isinstance(arguments[0], ast.Constant) and arguments[0].value not in ATTRIBUTES


def looked_at(lesson: Lesson, line: int, name: str) -> Iterator[tuple[int, str]]:
    """An import of what is neither harmless nor an earlier lesson."""
    package, _, rest = name.partition(".")
    if package == "solutions" and rest in [each.slug for each in MODULES[: MODULES.index(lesson)]]:
        return
    if package == "solutions" and rest == lesson.slug:
        yield line, "imports the reference of this very lesson"
    elif package not in HARMLESS:
        yield line, f"imports {name}"
