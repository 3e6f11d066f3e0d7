"""All mutants of the reference: in each, one comparison, constant, axis, operator, index, dtype, call or statement is
changed. The method is DeMillo, Lipton and Sayward's (1978); the changes are those of mutmut and cosmic-ray, and some
for tensors.
"""

from __future__ import annotations

import ast
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from common.course import Lesson
from common.course.exercises import Exercise, begins, exercises_of, walk_functions


@dataclass(frozen=True)
class Mutant:
    """The reference with one change in one answer. No two mutants of an exercise have the same `change`."""

    exercise: str
    line: int
    change: str  # 'x.sum(-1) -> x.sum(-2)'
    source: str  # the whole module

    def __str__(self) -> str:
        return f"{self.exercise} line {self.line}: {self.change}"


OPERATORS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE), ast.LtE: (ast.Lt, ast.Gt), ast.Gt: (ast.GtE, ast.LtE), ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,), ast.NotEq: (ast.Eq,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,), ast.NotIn: (ast.In,), ast.And: (ast.Or,), ast.Or: (ast.And,),
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Div,), ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Div, ast.Mult), ast.Mod: (ast.FloorDiv,), ast.Pow: (ast.Mult,), ast.MatMult: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,), ast.BitOr: (ast.BitAnd,), ast.LShift: (ast.RShift,), ast.RShift: (ast.LShift,),
}  # fmt: skip
OPPOSITES = (
    ("min", "max"), ("amin", "amax"), ("argmin", "argmax"), ("any", "all"), ("zeros", "ones"),
    ("zeros_like", "ones_like"), ("floor", "ceil"), ("sum", "mean"), ("sin", "cos"), ("log", "exp"),
    ("append", "appendleft"), ("pop", "popleft"), ("repeat_interleave", "repeat"), ("triu", "tril"),
    ("startswith", "endswith"), ("float32", "float16"), ("float64", "float32"), ("int64", "int32"), ("long", "int"),
    ("int8", "int16"), ("uint8", "int8"),
)  # fmt: skip
NAMES: dict[str, str] = dict([*OPPOSITES, *((new, old) for old, new in reversed(OPPOSITES))])
NOT_VALUES = {"torch", "math", "dist", "F", "functional", "nn", "ast", "json", "time", "np"}
"""Names of modules: `torch.exp(x)` without its call is x, not torch."""
SYMMETRIC = ("transpose", "min", "max", "minimum", "maximum", "equal")
"""Calls whose result does not depend on the order of their arguments."""


def replaced(node: ast.AST, **fields) -> ast.AST:
    """A copy of the node with other fields."""
    return type(node)(**{**{name: value for name, value in ast.iter_fields(node)}, **fields})


def other_values(value: object) -> tuple:
    if isinstance(value, bool):
        return (not value,)
    if isinstance(value, int):
        return (value + 1, value - 1)
    if isinstance(value, float):
        return (2 * value, -value) if value else (1.0,)
    return (value + "_",) if isinstance(value, str) else ()


def without_call(node: ast.Call) -> Iterator[ast.expr]:
    """f(x, y) becomes x; x.f(y) becomes x."""
    if isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", None) not in NOT_VALUES:
        yield node.func.value
    elif node.args and not isinstance(node.args[0], ast.Starred):
        yield node.args[0]


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that may replace this one, each with one small change."""
    new = replaced
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            for other in OPERATORS.get(type(operator), ()):
                yield new(node, ops=[*node.ops[:i], other(), *node.ops[i + 1 :]])
    elif isinstance(node, (ast.BinOp, ast.AugAssign)):
        for other in OPERATORS.get(type(node.op), ()):
            yield new(node, op=other())
    elif isinstance(node, ast.BoolOp):
        yield new(node, op=OPERATORS[type(node.op)][0]())
        for i in range(len(node.values)):
            left = node.values[:i] + node.values[i + 1 :]
            yield left[0] if len(left) == 1 else new(node, values=left)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
        if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):  # -1 is a constant, often an axis
            yield from (ast.UnaryOp(ast.USub(), value) for value in variants(node.operand))
    elif isinstance(node, ast.Constant):
        yield from (ast.Constant(value) for value in other_values(node.value))
    elif isinstance(node, ast.Slice):
        for part in ("lower", "upper", "step"):
            if getattr(node, part) is not None:
                yield new(node, **{part: None})
    elif isinstance(node, ast.Subscript):
        if isinstance(node.slice, (ast.Name, ast.Attribute, ast.BinOp, ast.Call)):
            yield new(node, slice=ast.BinOp(node.slice, ast.Sub(), ast.Constant(1)))
    elif isinstance(node, ast.Attribute):
        if node.attr in NAMES:
            yield new(node, attr=NAMES[node.attr])
    elif isinstance(node, ast.Name):
        if node.id in ("min", "max", "any", "all"):
            yield new(node, id=NAMES[node.id])
    elif isinstance(node, ast.Call):
        yield from without_call(node)
        if len(node.args) > 1:
            yield new(node, args=node.args[:-1])
            if ast.unparse(node.func).rpartition(".")[2] not in SYMMETRIC:
                yield new(node, args=[node.args[1], node.args[0], *node.args[2:]])
        for i in range(len(node.keywords)):
            yield new(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.comprehension):
        for i in range(len(node.ifs)):
            yield new(node, ifs=node.ifs[:i] + node.ifs[i + 1 :])
    elif isinstance(node, (ast.If, ast.While)):
        yield new(node, test=ast.Constant(False))
        if isinstance(node, ast.If):
            yield new(node, test=ast.Constant(True))
    if isinstance(node, (ast.Expr, ast.AugAssign, ast.Delete, ast.Continue, ast.Break, ast.Raise, ast.Return)) or (
        isinstance(node, ast.Assign) and not any(isinstance(part, ast.Name) for part in node.targets)
    ):
        yield ast.Pass()


def sites(node: ast.AST) -> Iterator[tuple[list[ast.AST], str, int | None, ast.AST]]:
    """Every node below this one as (the nodes above it, outermost first; its field; its index or None; the node).

    The messages of errors and annotations are left out, since no check depends on them.
    """
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns") or isinstance(node, ast.JoinedStr):
            continue
        if isinstance(node, ast.Raise) and field == "exc":
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if isinstance(child, ast.AST):
                yield [node], field, index, child
                if not (isinstance(child, ast.UnaryOp) and isinstance(child.operand, ast.Constant)):
                    yield from (([node, *above], f, i, each) for above, f, i, each in sites(child))


def put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def told(path: list[ast.AST], like: tuple[int, str] | None = None) -> tuple[int, str]:
    """Choose how much of the code to show for a change at the end of this path: the least that a reader recognises.

    Returns how many nodes above the end that is, and its text in one line. like: an earlier result; the same node is
    shown.
    """
    for height, node in enumerate(reversed(path)):
        if like is not None and height < like[0]:
            continue
        if isinstance(node, (ast.expr, ast.stmt)) or like is not None:
            text = ast.unparse(node).strip().partition("\n")[0]
            if like is not None or len(text) >= 12 or isinstance(node, ast.stmt):
                return height, text
    raise AssertionError("a statement ends the search")


def changes(source: str, function: ast.FunctionDef, exercise: Exercise) -> Iterator[tuple[int, str, str]]:
    """(line, what changed, source of the module) for each change of one answer."""
    lines = source.splitlines()
    above_it, below_it = "\n".join(lines[: begins(function) - 1]), "\n".join(lines[function.end_lineno :])

    def module() -> str:
        text = textwrap.indent(ast.unparse(ast.fix_missing_locations(function)), " " * function.col_offset)
        return f"{above_it}\n{text}\n{below_it}\n"

    for above, field, index, node in list(sites(function)):
        outermost = next((each for each in [*above[1:], node] if isinstance(each, ast.stmt)), None)
        if outermost is None or outermost.lineno < exercise.first_answer_line:
            continue
        before = told([*above, node])
        for other in variants(node):
            if ast.dump(other) == ast.dump(node):
                continue
            put(above[-1], field, index, other)
            try:
                changed, after = module(), told([*above, other], like=before)
            finally:
                put(above[-1], field, index, node)
            line = next(each.lineno for each in reversed([*above, node]) if hasattr(each, "lineno"))
            yield line, f"{before[1]} -> {after[1]}", changed


def mutants_of(lesson: Lesson) -> list[Mutant]:
    """All mutants of a lesson's answers, in the order of the file."""
    source = lesson.solution.read_text(encoding="utf-8")
    functions = dict(walk_functions(ast.parse(source)))
    found = []
    for exercise in exercises_of(lesson):
        seen: Counter[str] = Counter()
        for line, change, changed in changes(source, functions[exercise.function], exercise):
            seen[change] += 1
            label = change if seen[change] == 1 else f"{change}  #{seen[change]}"
            found.append(Mutant(exercise.id, line, label, changed))
    return found
