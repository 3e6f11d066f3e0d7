"""Carries a student's modules over from old skeletons into new ones. All functions take and return texts.

An exercise is identified by its id in the new version, where its function may have another name, or be in another
module. There are four steps:

1. The exercises of the old skeletons and of the student's modules get their new ids.
2. Each answer is taken out of the student's module, and the old skeleton's text put back in its place. What remains
   differs from the old skeleton only by what the student added or edited around the exercises.
3. `git merge-file` merges that with the new skeleton. Where both have changed the same lines, those of the new skeleton
   are taken; functions, constants and imports of the student's that were lost in this way are put back at the end.
4. Each answer replaces the new skeleton's lines from the exercise's `raise NotImplementedError` on.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.course import CourseError
from common.course.exercises import begins, unfinished, walk_functions
from common.grading.isolate import names_bound

Function = ast.FunctionDef | ast.AsyncFunctionDef
GONE = " in the old version"


@dataclass
class Carried:
    """A student's module in its new form."""

    text: str
    answers: list[str] = field(default_factory=list)  # the new ids of the exercises whose answers were put in
    remarks: list[str] = field(default_factory=list)  # what the student should look at


@dataclass
class Answer:
    """A student's answer to an exercise. lines: all lines after the given ones."""

    function: str  # qualified name
    declaration: str
    lines: list[str]
    indent: int


def carry(
    old: Mapping[str, str], mine: Mapping[str, str], new: Mapping[str, str], renumbered: Mapping[str, str]
) -> dict[str, Carried]:
    """Return, by path, the new version's modules that contain something of the student's.

    old, new: the skeletons of the two versions, by path. mine: those of the old version's modules that the student has
    edited. renumbered: the new id of every exercise of the old version that still exists. Raises CourseError if Python
    cannot read one of the student's modules.
    """
    old = {path: with_new_ids(text, renumbered) for path, text in old.items()}
    answers: dict[str, Answer] = {}
    remains: dict[str, str] = {}
    missing: list[str] = []
    for path, text in mine.items():
        try:
            compile(text, path, "exec", dont_inherit=True)
            taken, remains[path] = take_answers(old[path], with_new_ids(text, renumbered))
        except (SyntaxError, ValueError) as error:
            line = f":{error.lineno}" if getattr(error, "lineno", None) else ""
            raise CourseError(
                f"{path}{line}: Python cannot read this: {getattr(error, 'msg', error)}. Nothing was changed. Mend it, "
                "or start the lesson again with make reset-lesson-N, which keeps a copy; then make update again."
            ) from None
        missing += [id for id in unfinished(old[path]) if id not in taken]
        answers |= {id: answer for id, answer in taken.items() if answer}
    carried: dict[str, Carried] = {}
    for path, skeleton in new.items():
        ids, origin = unfinished(skeleton), origin_of(path, skeleton, old)
        if origin in remains or answers.keys() & ids:
            base, rest = (old[origin], remains[origin]) if origin in remains else (skeleton, skeleton)
            own = {id: answers.pop(id) for id in ids if id in answers}
            carried[path] = put_together(base, rest, skeleton, own)
            again = [id for id in ids if id in missing]
            carried[path].remarks += [f"{id} is to do again: your file has no function for it." for id in again]
    for id, answer in sorted(answers.items()):
        remark = f"{id.removesuffix(GONE)} {answer.function} is gone from the course. Your answer is in the backup."
        next(iter(carried.values())).remarks.append(remark)
    return carried


def with_new_ids(text: str, renumbered: Mapping[str, str]) -> str:
    """A module in which exercises have their new ids. GONE marks the id of an exercise that no longer exists."""
    return re.sub(r'(?<=[ "]TODO )\d+\.\d+(?=[:"])', lambda id: renumbered.get(id[0], id[0] + GONE), text)


def origin_of(path: str, skeleton: str, old: Mapping[str, str]) -> str | None:
    """The old version's module that a new one was made from: that of the same path, or with most of its exercises."""
    if path in old:
        return path
    shared = {each: len({*unfinished(skeleton)}.intersection(unfinished(text))) for each, text in old.items()}
    likeliest = max(shared, key=shared.__getitem__, default=None)
    return likeliest if likeliest and shared[likeliest] else None


# --- Taking answers out -----------------------------------------------------------------------------------------------


def take_answers(old: str, mine: str) -> tuple[dict[str, Answer | None], str]:
    """Return the answers in a student's module by id, None for an exercise without one, and the module without them.

    Exercises whose function the module no longer has are left out.
    """
    functions = dict(walk_functions(ast.parse(mine)))
    answers: dict[str, Answer | None] = {}
    replaced = []
    for id, (name, given) in exercises(old).items():
        if name in functions:
            former, present = source_of(old, given), source_of(mine, functions[name])
            answers[id] = None if former == present else answer_in(name, given, former, functions[name], present)
            replaced.append((functions[name], former))
    lines = mine.splitlines(keepends=True)
    for node, former in sorted(replaced, key=lambda pair: -pair[0].lineno):
        lines[first_line(node) : node.end_lineno] = former
    return answers, "".join(lines)


def exercises(skeleton: str) -> dict[str, tuple[str, Function]]:
    """Each exercise's function in a skeleton, by id: its qualified name and its node."""
    functions = walk_functions(ast.parse(skeleton))
    return {id: (name, node) for name, node in functions for id in unfinished(ast.unparse(node))}


def answer_in(name: str, given: Function, old: list[str], node: Function, mine: list[str]) -> Answer | None:
    """Return the student's answer to an exercise, or None if the function has only the given lines.

    given, old: the skeleton's function and its lines. node, mine: the student's.
    """
    head = given.body[: next(i for i, each in enumerate(given.body) if unfinished(ast.unparse(each)))]
    stub = given.body[len(head)].lineno - 1 - first_line(given)
    body, begin = node.body, first_line(node.body[0]) - first_line(node)
    if body[0].lineno == node.lineno:  # `def f(x): return x`
        return Answer(name, declaration(given), [f"    {ast.unparse(each)}\n" for each in body], 4)
    while mine[begin - 1].strip().startswith("#"):
        begin -= 1  # comments above the first statement
    for statement in body:
        if ast.dump(statement) not in map(ast.dump, head) and not (statement is body[0] and ast.get_docstring(node)):
            break
        begin = statement.end_lineno - first_line(node)
    known = {line.strip() for line in old[:stub]} | {""}
    while begin < len(mine) and mine[begin].strip() in known:
        begin += 1
    if [line.strip() for line in mine[begin:]] == [line.strip() for line in old[stub:]]:
        return None
    return Answer(name, declaration(given), mine[begin:], body[-1].col_offset)


def source_of(text: str, node: Function) -> list[str]:
    """A function's lines, its decorators included."""
    return text.splitlines(keepends=True)[first_line(node) : node.end_lineno]


def first_line(node: ast.stmt) -> int:
    """Of a statement with its decorators; lines count from 0."""
    return begins(node) - 1


def declaration(node: Function) -> str:
    """A function's arguments and what it returns."""
    return f"({ast.unparse(node.args)})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


# --- Putting them in --------------------------------------------------------------------------------------------------


def put_together(old: str, mine: str, new: str, answers: Mapping[str, Answer]) -> Carried:
    """Return the new skeleton with the student's additions and answers. mine: the student's module without answers,
    made from `old`. answers: by their new ids.
    """
    merged, num_conflicts = merge(mine, old, new)
    both = ["Where both you and the course have edited given code, the course's is in. Yours is in the backup."]
    attempts = [  # the first whose result is a valid module with the right exercises counts
        (lambda: with_lost(old, mine, merged), both if num_conflicts else []),
        (lambda: with_lost(old, mine, new), both),
        (lambda: new, ["What you have added to the given code does not fit the new version. It is in the backup."]),
    ]
    for make, remarks in attempts:
        try:
            text, told = with_answers(make(), answers)
            compile(text, "the new module", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, LookupError):
            continue
        todo = {id for id, each in answers.items() if f'"TODO {id}"' in "".join(each.lines)}
        if set(unfinished(text)) == (set(unfinished(new)) - set(answers)) | todo:
            return Carried(text, [id for id in answers if id not in todo], remarks + told)
    return Carried(new, [], ["Your code and the new version do not go together by themselves. Yours is in the backup."])


def merge(mine: str, old: str, new: str) -> tuple[str, int]:
    """Merge three texts. Where both have changed the same lines, the new version's are taken.

    Returns the merged text and the number of such places. Raises CourseError if there is no git.
    """
    with tempfile.TemporaryDirectory() as folder:
        names = ("mine", "old", "new")
        for name, text in zip(names, (mine, old, new)):
            Path(folder, name).write_text(text, encoding="utf-8", newline="")
        command = ["git", "merge-file", "-p", *names]
        try:
            tried = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
            if tried.returncode:
                command.insert(3, "--theirs")
                theirs = subprocess.run(command, cwd=folder, capture_output=True, encoding="utf-8")
                return theirs.stdout, tried.returncode
        except FileNotFoundError:
            raise CourseError("make update needs git, which merges texts. Install it: https://git-scm.com") from None
    return tried.stdout, 0


def with_lost(old: str, mine: str, merged: str) -> str:
    """Add the student's definitions that the merge has lost at the end of their class or of the module."""
    scopes, before = dict(scopes_of(ast.parse(merged))), dict(scopes_of(ast.parse(old)))
    lines = merged.splitlines(keepends=True)
    added: dict[int, str] = {}
    for scope, node in scopes_of(ast.parse(mine)):
        if scope not in before or scope not in scopes:
            continue
        known = set().union(*map(names_bound, [*before[scope].body, *scopes[scope].body]))
        for statement in node.body:
            if (bound := names_bound(statement)) and not bound & known:
                text = "".join(mine.splitlines(keepends=True)[first_line(statement) : statement.end_lineno])
                if isinstance(statement, (ast.Import, ast.ImportFrom)):  # after the last import
                    imports = [each for each in scopes[scope].body if isinstance(each, (ast.Import, ast.ImportFrom))]
                    gap, place = "", imports[-1].end_lineno if imports else 0
                else:
                    gap, place = "\n" if scope else "\n\n", scopes[scope].body[-1].end_lineno
                added[place] = added.get(place, "") + gap + text
    for place in sorted(added, reverse=True):
        lines.insert(place, added[place])
    return "".join(lines)


def scopes_of(tree: ast.Module) -> Iterator[tuple[str, ast.Module | ast.ClassDef]]:
    """The module, and its classes by name."""
    yield "", tree
    yield from ((node.name, node) for node in tree.body if isinstance(node, ast.ClassDef))


def with_answers(text: str, answers: Mapping[str, Answer]) -> tuple[str, list[str]]:
    """Replace the lines from each exercise's `raise` to the end of its function by its answer. Returns the text, and
    remarks on functions whose declaration has changed.
    """
    places, lines, remarks = exercises(text), text.splitlines(keepends=True), []
    for id, answer in sorted(answers.items(), key=lambda pair: -places[pair[0]][1].lineno):
        name, node = places[id]
        stub = next(each for each in node.body if unfinished(ast.unparse(each)))
        shift = stub.col_offset - answer.indent
        moved = [" " * shift + line if line.strip() else line for line in answer.lines]
        moved = moved if shift >= 0 else [line.removeprefix(" " * -shift) for line in answer.lines]
        lines[stub.lineno - 1 : node.end_lineno] = moved
        before, now = f"{answer.function}{answer.declaration}", f"{name}{declaration(node)}"
        if before != now:
            told = f"{id} is declared differently now: see whether your answer fits."
            remarks.insert(0, f"{told}\n    was: {before}\n    now: {now}")
    return "".join(lines), remarks
