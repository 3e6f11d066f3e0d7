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


def copy_with(node: ast.AST, **fields) -> ast.AST:
    return type(node)(**{**dict(ast.iter_fields(node)), **fields})


def one_less(nodes: list) -> Iterator[list]:
    return (nodes[:i] + nodes[i + 1 :] for i in range(len(nodes)))


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
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            for other in OPERATORS.get(type(operator), ()):
                yield copy_with(node, ops=[*node.ops[:i], other(), *node.ops[i + 1 :]])
    elif isinstance(node, (ast.BinOp, ast.AugAssign)):
        for other in OPERATORS.get(type(node.op), ()):
            yield copy_with(node, op=other())
    elif isinstance(node, ast.BoolOp):
        yield copy_with(node, op=OPERATORS[type(node.op)][0]())
        for left in one_less(node.values):
            yield left[0] if len(left) == 1 else copy_with(node, values=left)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
        if isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):  # -1 is a constant, often an axis
            yield from (ast.UnaryOp(ast.USub(), value) for value in variants(node.operand))
    elif isinstance(node, ast.Constant):
        yield from (ast.Constant(value) for value in other_values(node.value))
    elif isinstance(node, ast.Slice):
        for part in ("lower", "upper", "step"):
            if getattr(node, part) is not None:
                yield copy_with(node, **{part: None})
    elif isinstance(node, ast.Subscript):
        if isinstance(node.slice, (ast.Name, ast.Attribute, ast.BinOp, ast.Call)):
            yield copy_with(node, slice=ast.BinOp(node.slice, ast.Sub(), ast.Constant(1)))
    elif isinstance(node, ast.Attribute):
        if node.attr in NAMES:
            yield copy_with(node, attr=NAMES[node.attr])
    elif isinstance(node, ast.Name):
        if node.id in ("min", "max", "any", "all"):
            yield copy_with(node, id=NAMES[node.id])
    elif isinstance(node, ast.Call):
        yield from without_call(node)
        if len(node.args) > 1:
            yield copy_with(node, args=node.args[:-1])
            if ast.unparse(node.func).rpartition(".")[2] not in SYMMETRIC:
                yield copy_with(node, args=[node.args[1], node.args[0], *node.args[2:]])
        yield from (copy_with(node, keywords=left) for left in one_less(node.keywords))
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.comprehension):
        yield from (copy_with(node, ifs=left) for left in one_less(node.ifs))
    elif isinstance(node, (ast.If, ast.While)):
        yield copy_with(node, test=ast.Constant(False))
        if isinstance(node, ast.If):
            yield copy_with(node, test=ast.Constant(True))
    if isinstance(node, (ast.Expr, ast.AugAssign, ast.Delete, ast.Continue, ast.Break, ast.Raise, ast.Return)) or (
        isinstance(node, ast.Assign) and not any(isinstance(part, ast.Name) for part in node.targets)
    ):
        yield ast.Pass()


def sites(node: ast.AST) -> Iterator[tuple[list[ast.AST], list | dict, int | str]]:
    """Every node below this one as (the path to it, from this node to itself; what holds it; its index or name there).

    The messages of errors and annotations are left out, since no check depends on them.
    """
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns") or isinstance(node, ast.JoinedStr):
            continue
        if isinstance(node, ast.Raise) and field == "exc":
            continue
        holder, keys = (value, range(len(value))) if isinstance(value, list) else (vars(node), [field])
        for key in keys:
            if isinstance(child := holder[key], ast.AST):
                yield [node, child], holder, key
                if not (isinstance(child, ast.UnaryOp) and isinstance(child.operand, ast.Constant)):
                    yield from (([node, *path], *place) for path, *place in sites(child))


def first_line(node: ast.AST) -> str:
    return ast.unparse(node).strip().partition("\n")[0]


def recognisable(path: list[ast.AST]) -> int:
    """The place in the path, from its end, of the smallest node by whose code a reader recognises the last one."""
    for place in range(-1, -len(path) - 1, -1):
        is_long = isinstance(path[place], ast.expr) and len(first_line(path[place])) >= 12
        if is_long or isinstance(path[place], ast.stmt):
            return place
    raise AssertionError("a statement ends the search")


def changes(source: str, function: ast.FunctionDef, exercise: Exercise) -> Iterator[tuple[int, str, str]]:
    """(line, what changed, source of the module) for each change of one answer."""
    lines = source.splitlines()
    above_it, below_it = "\n".join(lines[: begins(function) - 1]), "\n".join(lines[function.end_lineno :])
    for path, holder, key in list(sites(function)):
        node, outermost = path[-1], next((each for each in path[1:] if isinstance(each, ast.stmt)), None)
        if outermost is None or outermost.lineno < exercise.first_answer_line:
            continue
        line = next(each.lineno for each in reversed(path) if hasattr(each, "lineno"))
        place = recognisable(path)
        before = first_line(path[place])
        for other in variants(node):
            if ast.dump(other) == ast.dump(node):
                continue
            holder[key] = other
            after = first_line([*path[:-1], other][place])
            text = textwrap.indent(ast.unparse(ast.fix_missing_locations(function)), " " * function.col_offset)
            holder[key] = node
            yield line, f"{before} -> {after}", f"{above_it}\n{text}\n{below_it}\n"


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
