"""Builds the module that a check tests, so that one mistake fails one exercise.

For exercise n.m that is the reference with one function replaced by the student's, and with the student's additions:
top-level names, imports, and methods of that function's class, which the reference does not have. Everything else that
a check uses is right, whatever state the student's other exercises are in.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import linecache
import sys
from pathlib import Path
from types import CodeType, ModuleType

from common.course import CourseError, shown

FAR = 1_000_000  # added to the line numbers of the reference's code, to distinguish it from the student's


def composite(name: str, reference: Path, student_source: str, student_file: Path, function: str) -> ModuleType:
    """The reference with the student's `function` (a qualified name), as a new module called `name`.

    Tracebacks and breakpoints in the student's code have the student's file and lines, and those in the reference's
    code the reference's. Raises CourseError if the student's file has no such function.
    """
    tree = scope = opened(far_away(reference, reference.read_text(encoding="utf-8")))
    student = student_scope = ast.parse(student_source, str(student_file))
    *classes, function_name = function.split(".")
    for class_name in classes:
        student_scope = find(student_scope, class_name)
        if student_scope is None:
            raise CourseError(f"{shown(student_file)} has no class `{class_name}` any more: was it renamed?")
        place = scope.body.index(find(scope, class_name))
        scope.body[place] = scope = opened(scope.body[place])
    answer = find(student_scope, function_name)
    if not isinstance(answer, (ast.FunctionDef, ast.AsyncFunctionDef)):
        raise CourseError(f"{shown(student_file)} has no function `{function}` any more: was it renamed?")

    scope.body[scope.body.index(find(scope, function_name))] = answer
    add_missing(tree, student)
    if scope is not tree:
        add_missing(scope, student_scope)
    module = execute(name, relocate(compile(tree, str(student_file), "exec"), str(reference)), student_file)
    module.__recipe__ = ("composite", name, reference, student_source, student_file, function)
    return module


@functools.lru_cache(maxsize=4)  # the same reference is used for many answers
def far_away(reference: Path, source: str) -> ast.Module:
    """The reference's tree, with FAR added to its lines. It is cached, so only `opened` copies may be changed."""
    tree = ast.parse(source, str(reference))
    for node in ast.walk(tree):
        if hasattr(node, "lineno"):
            node.lineno += FAR
            node.end_lineno += FAR
    return tree


def opened(node: ast.Module | ast.ClassDef) -> ast.Module | ast.ClassDef:
    """A copy with its own list of statements."""
    node = copy.copy(node)
    node.body = [*node.body]
    return node


def whole(name: str, source: str, file: Path) -> ModuleType:
    """The student's module as it is, or any other source, as a new module called `name`."""
    module = execute(name, compile(source, str(file), "exec"), file)
    module.__recipe__ = ("whole", name, source, file)
    return module


def edited(file: Path, source: str) -> Path:
    """A file name for a source that is in no file. Tracebacks, and Triton, find its lines under this name."""
    name = file.with_name(f"{file.stem}-{hashlib.sha256(source.encode()).hexdigest()[:16]}.py")
    linecache.cache[str(name)] = (len(source), None, source.splitlines(keepends=True), str(name))
    return name


def find(scope: ast.Module | ast.ClassDef, name: str) -> ast.stmt | None:
    """The last definition of a function or class with this name in the scope's body: the one that counts."""
    found = [node for node in scope.body if name == getattr(node, "name", None)]
    return found[-1] if found else None


def names_bound(node: ast.stmt) -> set[str]:
    """The names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}


def add_missing(scope: ast.Module | ast.ClassDef, student: ast.Module | ast.ClassDef) -> None:
    """Insert the student's additions into the scope, each before the definition that follows it in their file."""
    known = set().union(*map(names_bound, scope.body))
    waiting: list[ast.stmt] = []
    for node in student.body:
        bound = names_bound(node)
        if bound and not bound & known and getattr(node, "module", "") != "__future__":
            waiting.append(node)
        elif waiting and (anchor := find(scope, getattr(node, "name", ""))) is not None:
            place = scope.body.index(anchor)
            scope.body[place:place] = waiting
            waiting = []
    scope.body.extend(waiting)


def relocate(code: CodeType, reference: str) -> CodeType:
    """Restore file and lines of the functions that come from the reference."""
    constants = tuple(relocate(each, reference) if isinstance(each, CodeType) else each for each in code.co_consts)
    code = code.replace(co_consts=constants)
    if code.co_firstlineno > FAR:
        code = code.replace(co_firstlineno=code.co_firstlineno - FAR, co_filename=reference)
    return code


def execute(name: str, code: CodeType, file: Path) -> ModuleType:
    """Run a module's code. The module is put into sys.modules first, where dataclasses and pickle look for it.

    The caller sets `__recipe__`, the arguments by which another process can make the same module.
    """
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module
    exec(code, module.__dict__)
    return module
