"""Finds the exercises of a solution, and the exercises that are still to do in a student's file.

A solution reads as finished code. One comment opens an exercise,

    # Exercise 1.4: average the squares in float32.

and everything after it, to the end of that function, is the answer. `find_exercises` checks the rules of this form.
"""

from __future__ import annotations

import ast
import functools
import io
import re
import tokenize
from dataclasses import dataclass
from pathlib import Path

from common.course.lessons import CourseError, Lesson, modules_of, shown

MAX_ANSWER_LINES = 25
TOGETHER = "together"
"""Used as the id of the checks that run in the student's whole module, once every exercise has passed."""


@dataclass(frozen=True)
class Exercise:
    """One exercise of a solution. Lines count from 1; the answer is the lines first_answer_line to last_line."""

    id: str
    function: str  # qualified name: `softmax`, `Attention.forward`
    comment_line: int
    first_answer_line: int
    last_line: int
    indent: int


def comments(source: str):
    """Yields (line, column, text) of every comment. A `#` within a string is not one."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield *token.start, token.string


def walk_functions(node: ast.AST, prefix: str = ""):
    """Yields (qualified name, node) of every function and method, including functions within functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + child.name, child
            yield from walk_functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.ClassDef):
            yield from walk_functions(child, f"{prefix}{child.name}.")
        else:
            yield from walk_functions(child, prefix)


def begins(node: ast.stmt) -> int:
    """The first line of a statement, or of its first decorator; lines count from 1."""
    return min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])


def find_exercises(source: str, file: str, number: int | None = None) -> list[Exercise]:
    """The exercises of a solution, in the order of the file.

    file: named in errors. number: the lesson that all ids must belong to. Raises CourseError, with file and line, for
    an exercise that breaks a rule.
    """
    tree = ast.parse(source, file)
    lines = source.splitlines()
    functions = list(walk_functions(tree))
    found: list[Exercise] = []

    def refuse(line: int, why: str) -> None:
        raise CourseError(f"{file}:{line}: {why}")

    for line, column, text in comments(source):
        if not re.match(r"#\s*exercise\b", text, re.IGNORECASE):
            continue
        match = re.match(r"# Exercise (\d+)\.(\d+): \S", text)
        if not match:
            refuse(line, f"an exercise opens with '# Exercise N.M: what to do'; this is {text!r}.")
        exercise_id = f"{match[1]}.{match[2]}"
        if number is not None and int(match[1]) != number:
            refuse(line, f"exercise {exercise_id} stands in lesson {number}.")
        around = [(name, node) for name, node in functions if node.lineno <= line <= node.end_lineno]
        if not around:
            refuse(line, f"exercise {exercise_id} stands in no function.")
        if len(around) > 1:
            refuse(line, f"exercise {exercise_id} stands in a function within a function.")
        name, node = around[0]
        for other in found:
            if other.id == exercise_id:
                refuse(line, f"exercise {exercise_id} is there already, on line {other.comment_line}.")
            if other.function == name:
                refuse(line, f"{name} has exercise {other.id} already; one for a function.")
        if not ast.get_docstring(node):
            refuse(node.lineno, f"{name} has no docstring to tell the student what it does.")
        if column != node.body[0].col_offset or any(s.lineno <= line <= s.end_lineno for s in node.body):
            refuse(line, f"exercise {exercise_id} does not stand at the top indentation of {name}'s body.")

        first = line
        while first < len(lines) and lines[first].strip().startswith("#"):
            first += 1
        answer = [statement for statement in node.body if statement.lineno > line]
        if not answer:
            refuse(line, f"exercise {exercise_id} has no answer: nothing follows it in {name}.")
        last = node.end_lineno
        while last < len(lines) and re.match(rf" {{{column}}}\s*#", lines[last]):
            last += 1  # a comment after the last statement still belongs to the function
        length = sum(1 for text in lines[first:last] if text.strip() and not text.strip().startswith("#"))
        if length > MAX_ANSWER_LINES:
            refuse(line, f"the answer of {exercise_id} has {length} lines; {MAX_ANSWER_LINES} are allowed: split it.")
        found.append(Exercise(exercise_id, name, line, first + 1, last, column))
    return found


def exercises_of(lesson: Lesson) -> list[Exercise]:
    """The lesson's exercises, in the order of the file, which is the order to work in."""
    return list(read_exercises(lesson.solution.read_text(encoding="utf-8"), shown(lesson.solution), lesson.number))


@functools.lru_cache(maxsize=32)  # the grader asks before every check
def read_exercises(source: str, file: str, number: int) -> tuple[Exercise, ...]:
    return tuple(find_exercises(source, file, number))


def unfinished(source: str) -> list[str]:
    """The ids of the exercises in this source that still raise their `NotImplementedError("TODO 1.4")`, in order."""
    raised = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
    return [
        node.exc.args[0].value.removeprefix("TODO ")
        for node in sorted(raised, key=lambda node: node.lineno)
        if isinstance(node.exc, ast.Call)
        and getattr(node.exc.func, "id", None) == "NotImplementedError"
        and node.exc.args
        and isinstance(node.exc.args[0], ast.Constant)
        and str(node.exc.args[0].value).startswith("TODO ")
    ]


def read_source(file: Path) -> str:
    """The text of a file that Python can read, decoded as Python does it: by its byte order mark or declared encoding,
    else as UTF-8. Raises CourseError, with file and line, for any other file.
    """
    if not file.is_file():
        raise CourseError(f"{shown(file)} does not exist.")
    try:
        with tokenize.open(file) as text:
            source = text.read()
    except (UnicodeDecodeError, SyntaxError) as error:
        reason = getattr(error, "reason", "it may be UTF-16")
        raise CourseError(f"{shown(file)} is not UTF-8 text: {reason}. Save it as UTF-8.") from None
    try:
        compile(source, str(file), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:  # up to Python 3.11.3, a ValueError for a null byte
        if getattr(error, "lineno", None) is None:
            raise CourseError(f"{shown(file)}: Python cannot read it: {getattr(error, 'msg', error)}.") from None
        line = f"\n    {error.text.strip()}" if error.text and error.text.strip() else ""
        raise CourseError(f"{shown(file)}:{error.lineno}: Python cannot read this line: {error.msg}.{line}") from None
    return source


def to_do(file: Path) -> list[str]:
    """The ids of the exercises that are still to do in a file. Raises CourseError if the file cannot be read."""
    return unfinished(read_source(file))


def is_begun(lesson: Lesson, file: Path) -> bool:
    """Whether the student has written at least one exercise of a module in a file."""
    return len(to_do(file)) < len(exercises_of(lesson))


def read_hints(lesson: Lesson) -> dict[str, list[str]]:
    """The hints of a lesson's exercises: a heading `## 1.4 rms_norm` each, with `### 1`, `### 2`, `### 3` below."""
    if not lesson.hints.exists():
        raise CourseError(f"{shown(lesson.hints)} does not exist.")
    parts = re.split(r"^## (\d+\.\d+)\b.*$", lesson.hints.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {
        id: [text.strip() for text in re.split(r"^### \d\b.*$", body, flags=re.MULTILINE)[1:]]
        for id, body in zip(parts[1::2], parts[2::2])
    }


def find_exercise(which: str) -> tuple[Lesson, Exercise]:
    """The exercise with this id, and its module. Raises CourseError if there is none."""
    number = which.partition(".")[0]
    exercises = {exercise.id: (lesson, exercise) for lesson in modules_of(number) for exercise in exercises_of(lesson)}
    if which not in exercises:
        raise CourseError(f"Lesson {number} has no exercise {which}; it has {', '.join(exercises)}.")
    return exercises[which]
