"""Grades the grader once more: changes the reference one small thing at a time, and counts what the checks let through.

    make mutate-lesson-1
    make mutate            every lesson; what came of it is kept in common/bench/measurements/mutants.json

Each comparison, constant, axis, sign, operator, index, dtype, call and statement of an exercise's answer is changed by
itself; each such mutant faces the checks of its own exercise, and one that passes them all has survived. A survivor is
either a gap in the checks, or it does the same as the reference: then the lesson's catalogue says so, with the reason
(`equivalent` in `common.course.catalogue`). The method is DeMillo, Lipton and Sayward's (1978); the operators are
those of mutmut and cosmic-ray, and some for tensors.

The other side is tried along with it: the same answer in other clothes (other names, its work done by a helper) must
pass. Right answers that go about it in another way stand in the catalogue.
"""

from __future__ import annotations

import ast
import json
import os
import signal
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from common.course import MODULES, ROOT, CourseError, Lesson, modules_of, shown
from common.course.catalogue import load_equivalents
from common.course.exercises import Exercise, exercises_of, walk_functions
from common.course.modules import check_solution
from common.grading.runner import START_SECONDS, begin, end
from common.options import jobs, lesson_number

SUMMARY = ROOT / "common" / "bench" / "measurements" / "mutants.json"
ASKED = 0.95
"""The share of the mutants that are not equivalent which a lesson's checks have to catch."""
UNCHANGED, RENAMED, BY_HELPER = "(unchanged)", "(own names renamed)", "(done by a helper)"
STYLES = (UNCHANGED, RENAMED, BY_HELPER)
"""What must pass, among the mutants: else the checks are too narrow, or catching mutants means nothing."""
STALLED = 60.0
"""Seconds without a word from the worker: then the mutant at hand counts as caught, and another worker goes on."""


@dataclass(frozen=True)
class Mutant:
    """The reference with one change in one answer. `change` tells it from all others of its exercise."""

    exercise: str
    line: int
    change: str  # 'x.sum(-1) -> x.sum(-2)'
    source: str  # the whole module

    def __str__(self) -> str:
        return f"{self.exercise} line {self.line}: {self.change}"


# ---------------------------------------------------------------------------------------------------------------
# Changes
# ---------------------------------------------------------------------------------------------------------------

OPERATORS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Div, ast.Mult),
    ast.Mod: (ast.FloorDiv,),
    ast.Pow: (ast.Mult,),
    ast.MatMult: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.LShift: (ast.RShift,),
    ast.RShift: (ast.LShift,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
}
OPPOSITES = (
    ("min", "max"),
    ("amin", "amax"),
    ("argmin", "argmax"),
    ("any", "all"),
    ("zeros", "ones"),
    ("zeros_like", "ones_like"),
    ("floor", "ceil"),
    ("sum", "mean"),
    ("sin", "cos"),
    ("log", "exp"),
    ("append", "appendleft"),
    ("pop", "popleft"),
    ("repeat_interleave", "repeat"),
    ("triu", "tril"),
    ("startswith", "endswith"),
    ("float32", "float16"),
    ("float64", "float32"),
    ("int64", "int32"),
    ("long", "int"),
    ("int8", "int16"),
    ("uint8", "int8"),
)
NAMES: dict[str, str] = dict([*OPPOSITES, *((new, old) for old, new in reversed(OPPOSITES))])
NOT_VALUES = {"torch", "math", "dist", "F", "functional", "nn", "ast", "json", "time", "np"}
"""Modules: `torch.exp(x)` without its call is x, not torch."""
SYMMETRIC = ("transpose", "min", "max", "minimum", "maximum", "equal")
"""Calls that do not mind the order of their arguments."""


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in this node's place, one small change each."""
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


def sites(node: ast.AST) -> Iterator[tuple[list[ast.AST], str, int | None, ast.AST]]:
    """Every place under a node that holds another: (the nodes above, outermost first; field; index or None; node).

    What is said in an error's message, and annotations, are left alone: they are for people.
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


def changes(source: str, function: ast.FunctionDef, exercise: Exercise) -> Iterator[tuple[int, str, str]]:
    """(line, what changed, source of the module) for each change of one answer."""
    lines = source.splitlines()
    first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
    above_it, below_it = "\n".join(lines[: first - 1]), "\n".join(lines[function.end_lineno :])

    def module() -> str:
        text = textwrap.indent(ast.unparse(ast.fix_missing_locations(function)), " " * function.col_offset)
        return f"{above_it}\n{text}\n{below_it}\n"

    yield exercise.first_answer_line, UNCHANGED, module()
    yield exercise.first_answer_line, RENAMED, renamed(source, exercise.function)
    if "super()" not in ast.unparse(function):  # which a plain function cannot call
        yield exercise.first_answer_line, BY_HELPER, by_helper(source, exercise.function)
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


def renamed(source: str, name: str) -> str:
    """The module with every variable of one function called otherwise."""
    tree = ast.parse(source)
    function = dict(walk_functions(tree))[name]
    parts = list(ast.walk(function))
    own = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    own -= {part.arg for part in parts if isinstance(part, ast.arg)}
    for part in parts:
        if isinstance(part, ast.Name) and part.id in own:
            part.id = f"my_{part.id}"
    return ast.unparse(tree)


def by_helper(source: str, name: str) -> str:
    """The module with one function's work done by a new one at the top of the file."""
    tree = ast.parse(source)
    function = dict(walk_functions(tree))[name]
    given = function.args
    names = [
        each.arg for each in (*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg) if each
    ]
    first = bool(ast.get_docstring(function))
    body, function.body = function.body[first:], function.body[:first]
    helper = ast.parse(f"def my_helper({', '.join(names)}):\n    pass").body[0]
    helper.body = body
    function.body += ast.parse(f"return my_helper({', '.join(names)})").body
    place = next(i for i, each in enumerate(tree.body) if isinstance(each, (ast.FunctionDef, ast.ClassDef)))
    tree.body.insert(place, helper)
    return ast.unparse(ast.fix_missing_locations(tree))


def put(parent: ast.AST, field: str, index: int | None, node: ast.AST) -> None:
    if index is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[index] = node


def told(path: list[ast.AST], like: tuple[int, str] | None = None) -> tuple[int, str]:
    """How much of the code to show for a change at the end of this path: the least that a reader can place.

    Returns how many nodes above the end that is, and its text, one line. like: show as much as was shown there.
    """
    for height, node in enumerate(reversed(path)):
        if like is not None and height < like[0]:
            continue
        if isinstance(node, (ast.expr, ast.stmt)) or like is not None:
            text = ast.unparse(node).strip().partition("\n")[0]
            if like is not None or len(text) >= 12 or isinstance(node, ast.stmt):
                return height, text
    raise AssertionError("a statement ends the search")


# ---------------------------------------------------------------------------------------------------------------
# Trying them
# ---------------------------------------------------------------------------------------------------------------


class Overtime(BaseException):
    """A mutant takes far longer than the reference."""


def work(connection: Connection, lesson: Lesson, mutants: list[Mutant]) -> None:
    """The worker's life: run the lesson's checks; each faces those mutants of its exercise that are still uncaught.

    Sends (index, None) when it turns to a mutant, (index, why) when one is caught, and None at the end.
    """
    os.setsid()
    os.environ["KERNELS"] = "plain"
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    import pytest
    import torch

    from common.grading import ranks
    from common.grading.plugin import Grader
    from common.grading.subject import Failure, Subject

    torch.set_num_threads(1)

    def stop(*_) -> None:
        ranks.end_pool()  # nobody knows what the ranks were still waiting for
        raise Overtime

    signal.signal(signal.SIGPROF, stop)  # processor time: a busy machine catches no mutant

    class MutatingGrader(Grader):
        def __init__(self):
            self.reference = Subject(lesson, lesson.solution)
            super().__init__(lambda _: self.reference)
            self.left = {index: Subject(lesson, lesson.solution, each.source) for index, each in enumerate(mutants)}

        def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
            wanted = {each.exercise for each in mutants}
            marks = [item.get_closest_marker("exercise") for item in items]
            items[:] = [item for item, mark in zip(items, marks) if mark and mark.kwargs["id"] in wanted]

        def lesson_of(self, checks: Path) -> Lesson | None:
            return lesson if checks == lesson.checks else None

        def judge(self, subject: Subject, exercise_id: str, check: Callable) -> Failure | None:
            start = time.process_time()
            failure = super().judge(subject, exercise_id, check)
            limit = 2.0 + 5 * (time.process_time() - start)
            for index in [each for each in self.left if mutants[each].exercise == exercise_id]:
                connection.send((index, None))
                judge = why_wrong if mutants[index].change in STYLES else why_caught
                if why := judge(self.left[index], exercise_id, check, limit):
                    del self.left[index]
                    connection.send((index, why))
            return failure

    def why_wrong(subject: Subject, exercise_id: str, check: Callable, limit: float) -> str | None:
        failure = subject.judge(exercise_id, check)
        return failure and failure.sentence

    def why_caught(subject: Subject, exercise_id: str, check: Callable, limit: float) -> str | None:
        try:
            signal.setitimer(signal.ITIMER_PROF, limit)
            module = subject.untouched()
            sys.modules[module.__name__] = module  # pickle looks for the mutant's classes there
            failure = subject.attempt(check, lambda: module)
        except BaseException as error:
            return f"{type(error).__name__} when imported"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        return failure and failure.sentence

    options = [str(lesson.checks), "-o", "addopts=", "-p", "no:terminal", "-p", "no:cacheprovider"]
    pytest.main([*options, "-p", "no:faulthandler"], plugins=[MutatingGrader()])
    connection.send(None)


class Trial:
    """Some mutants of a lesson and the worker that tries them. When it stalls or dies, the mutant at hand did that."""

    def __init__(self, lesson: Lesson, mutants: list[Mutant]):
        self.lesson = lesson
        self.left = mutants
        self.caught: list[tuple[Mutant, str]] = []
        self.start()

    def start(self) -> None:
        self.mutants, self.current, self.last_word = list(self.left), None, time.monotonic()
        self.process, self.connection = begin(work, self.lesson, self.mutants)

    def step(self) -> bool:
        """Take in what the worker has said. Returns whether there is more to come."""
        try:
            while self.connection.poll():
                self.last_word = time.monotonic()
                event = self.connection.recv()
                if event is None:
                    end(self.process)
                    return False
                self.current = self.mutants[event[0]]
                if event[1] is not None:
                    self.catch(event[1])
        except EOFError:
            self.blame("ended the process")
        if time.monotonic() - self.last_word > (STALLED if self.current else 5 * START_SECONDS):
            self.blame("brought the checks to a halt")
        return True

    def catch(self, why: str) -> None:
        self.caught.append((self.current, why))
        self.left = [each for each in self.left if each is not self.current]

    def blame(self, why: str) -> None:
        end(self.process)
        if self.current is None:
            raise CourseError(f"The worker for {shown(self.lesson.checks)} did not come to its first mutant.")
        self.catch(why)
        self.start()


def try_all(
    lesson: Lesson, mutants: list[Mutant], jobs: int, on_word: Callable[[int], None]
) -> tuple[list[tuple[Mutant, str]], list[Mutant]]:
    """The mutants that were caught, each with why, and the survivors. on_word: told how many are caught so far."""
    ids = list(dict.fromkeys(each.exercise for each in mutants))
    shares = [[each for each in mutants if ids.index(each.exercise) % jobs == job] for job in range(jobs)]
    trials = [Trial(lesson, share) for share in shares if share]
    running = list(trials)
    try:
        while running:
            running = [trial for trial in running if trial.step()]
            on_word(sum(len(trial.caught) for trial in trials))
            time.sleep(0.05)
    finally:
        for trial in running:
            end(trial.process)
    caught = [each for trial in trials for each in trial.caught]
    return caught, [each for trial in trials for each in trial.left]


# ---------------------------------------------------------------------------------------------------------------
# What came of it
# ---------------------------------------------------------------------------------------------------------------


def summary(lesson: Lesson, mutants: list[Mutant], survivors: list[Mutant]) -> dict:
    """Counts for a lesson, and the survivors by name."""
    reasons = load_equivalents(lesson)
    equivalent = [each for each in mutants if (each.exercise, each.change) in reasons]
    gaps = [each for each in survivors if each not in equivalent]
    different = len(mutants) - len(equivalent)
    return {
        "mutants": len(mutants),
        "equivalent": len(equivalent),
        "caught": different - len(gaps),
        "caught_share": round((different - len(gaps)) / different, 4),
        "survived": [str(each) for each in gaps],
    }


def unknown_equivalents(lesson: Lesson, mutants: list[Mutant]) -> list[str]:
    """The catalogue's equivalent changes that no mutant makes: the reference has moved on."""
    known = {(each.exercise, each.change) for each in mutants}
    return [f"{id}: {change}" for id, change in load_equivalents(lesson) if (id, change) not in known]


def mutate(lesson: Lesson, only: str | None, jobs: int, console: Console) -> dict:
    """Try a lesson's mutants, or those of one exercise, and tell what survived."""
    everything = [each for each in mutants_of(lesson) if only in (None, each.exercise)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(f"lesson {lesson.number}, {lesson.slug}", total=len(everything))
        caught, survivors = try_all(lesson, everything, jobs, lambda count: progress.update(task, completed=count))
    if broken := [f"{each.exercise} {each.change} fails: {why}" for each, why in caught if each.change in STYLES]:
        raise CourseError("\n".join(broken))
    mutants = [each for each in everything if each.change not in STYLES]
    survivors = [each for each in survivors if each.change not in STYLES]
    found = summary(lesson, mutants, survivors)
    reasons = load_equivalents(lesson)
    wrongly = [each for each, _ in caught if (each.exercise, each.change) in reasons]
    for each in found["survived"]:
        console.print(f"survived  {each}", markup=False)
    for each in wrongly:
        console.print(f"caught, though the catalogue calls it equivalent:  {each}", markup=False)
    if only is None:
        for each in unknown_equivalents(lesson, mutants):
            console.print(f"equivalent by the catalogue, but no such mutant:  {each}", markup=False)
    console.print(
        f"Lesson {lesson.number}, {lesson.slug}: {found['caught']} of {found['mutants'] - found['equivalent']} caught "
        f"({found['caught_share']:.1%}); {found['equivalent']} are equivalent."
    )
    return found


@click.command()
@lesson_number
@click.option("--exercise", metavar="N.M", help="only this one")
@jobs
def mutate_lesson(lesson_number: int, exercise: str | None, jobs: int) -> int:
    """Try a lesson's checks on every small change of its answers."""
    return mutate_modules(modules_of(lesson_number), exercise, jobs)


@click.command()
@jobs
def mutate_all(jobs: int) -> int:
    """Try the checks of every lesson on every small change of its answers."""
    return mutate_modules(list(MODULES), None, jobs)


def mutate_modules(modules: list[Lesson], exercise: str | None, jobs: int) -> int:
    """Returns 1 if too small a share of a module's mutants is caught. Whole modules are written to the summary."""
    console = Console(highlight=False, soft_wrap=True)
    failed = False
    for lesson in modules:
        if exercise and exercise not in {each.id for each in exercises_of(lesson)}:
            continue
        check_solution(lesson)
        found = mutate(lesson, exercise, jobs, console)
        failed |= found["caught_share"] < ASKED
        if not exercise:
            known = json.loads(SUMMARY.read_text(encoding="utf-8")) if SUMMARY.exists() else {}
            known[lesson.slug] = found
            ordered = {each.slug: known[each.slug] for each in MODULES if each.slug in known}
            SUMMARY.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    return int(failed)
