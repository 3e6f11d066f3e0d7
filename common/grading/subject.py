"""The module of a lesson that is graded, and the modules in which its checks run."""

from __future__ import annotations

import ast
import functools
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch

from common.course import CourseError, Lesson, shown, unfinished
from common.course.catalogue import Answer, apply, load_answers
from common.course.exercises import TOGETHER, begins, exercises_of, read_source, walk_functions
from common.grading import isolate
from common.grading.arguments import watched_arguments
from common.grading.compare import REPLACES, CheckFailed, is_telling, nothing_replaced, same
from common.grading.intact import remember

Check = Callable[[ModuleType], None]  # a check, as a function of the module under test


@dataclass(frozen=True)
class Failure:
    """Why a check did not pass."""

    sentence: str
    traceback: str = ""
    what: str = ""
    actual: Any = None
    waits_for: str | None = None  # an exercise that the check called and that is still to do
    through: tuple[str, ...] = ()  # the student's other exercises that ran in the check, if the solution is withheld


class Subject:
    """One file, graded against the lesson's checks."""

    def __init__(self, lesson: Lesson, file: Path, source: str | None = None):
        self.lesson = lesson
        self.source = read_source(file) if source is None else source
        self.file = file if source is None else isolate.edited(file, source)
        self.exercises = {exercise.id: exercise for exercise in exercises_of(lesson)}
        self.todo = set(unfinished(self.source)) if "TODO " in self.source else set()
        self.judged: dict[str, list[tuple[Check, Failure | None]]] = {}  # by exercise: its checks and their failures

    @functools.lru_cache(maxsize=64)  # noqa: B019  to prove a check, it is run with many subjects in turn
    def module(self, exercise_id: str) -> ModuleType:
        """The reference with the student's function for this exercise; the student's whole module if it is withheld."""
        function = self.exercises[exercise_id].function
        if self.lesson.is_withheld:
            if function not in self.functions():
                raise CourseError(f"{shown(self.file)} has no function `{function}` any more: was it renamed?")
            return self.untouched()
        return isolate.composite(f"graded_{self.lesson.slug}", self.lesson.solution, self.source, self.file, function)

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def untouched(self) -> ModuleType:
        """The student's own module, whole."""
        return isolate.whole(f"graded_{self.lesson.slug}_whole", self.source, self.file)

    def complete(self) -> ModuleType:
        """The student's own module, whole, if the functions of all exercises are still there once it has run."""
        module = self.untouched()
        for name in sorted({exercise.function.partition(".")[0] for exercise in self.exercises.values()}):
            if not callable(getattr(module, name, None)):
                raise CourseError(
                    f"once all of {shown(self.file)} has run, `{name}` is no function any more: does a later line "
                    "delete it, or use its name for something else?"
                )
        return module

    def functions(self) -> dict[str, int]:
        """The qualified name of each function in the student's file, and the line on which it begins."""
        return {name: begins(node) for name, node in walk_functions(ast.parse(self.source))}

    def judge(self, exercise_id: str, check: Check) -> Failure | None:
        """Run one check of an exercise. Returns None if it passes.

        It must pass in the isolated module or in the untouched one: a student may have changed an internal
        representation in several functions. If the solution is withheld, there is only the untouched module.
        """
        if exercise_id == TOGETHER:
            return self.attempt(check, self.complete)
        failure = self.attempt(check, lambda: self.module(exercise_id), exercise_id)
        if failure is not None and self.lesson.is_withheld:
            return self.in_company(exercise_id, check, failure)
        is_retried = failure is not None and failure.what != REPLACES
        if is_retried and self.attempt(check, self.untouched, exercise_id) is None:
            failure = None
        self.note(exercise_id, check, failure)
        return failure

    def note(self, exercise_id: str, check: Check, failure: Failure | None) -> None:
        """Record the result of a check, by which `mistake` finds the known mistake."""
        self.judged.setdefault(exercise_id, []).append((check, failure))

    def attempt(self, check: Check, build: Callable[[], ModuleType], exercise_id: str = "") -> Failure | None:
        """Run the check once. Whatever the student's code raises becomes a Failure."""
        function = self.exercises[exercise_id].function if exercise_id else ""
        remember(self.lesson.checks)
        try:
            with nothing_replaced():
                module = build()
                sys.modules[module.__name__] = module  # where pickle looks for its classes
                if exercise_id and not self.lesson.is_withheld:
                    run_check(self.lesson, function, check, module)
                else:
                    seed()
                    check(module)
        except CheckFailed as failed:
            return Failure(failed.sentence, trace(failed), failed.what, failed.actual)
        except KeyboardInterrupt:
            raise
        except CourseError as error:
            return Failure(str(error))
        except BaseException as error:
            return Failure(self.describe(error, function), trace(error))
        return None

    def in_company(self, exercise_id: str, check: Check, failure: Failure) -> Failure:
        """The failure of a check in the student's whole module, with the other exercises that may be the cause."""
        unfinished_one = re.search(r"\bTODO (\d+\.\d+)", failure.sentence)
        if unfinished_one and unfinished_one[1] in self.todo:
            return replace(failure, waits_for=unfinished_one[1])
        begun: set[int] = set()

        def note(frame: FrameType, event: str, argument: Any) -> None:
            if event == "call" and frame.f_code.co_filename == str(self.file):
                begun.add(frame.f_code.co_firstlineno)

        sys.setprofile(note)
        try:
            self.attempt(check, self.untouched)
        finally:
            sys.setprofile(None)
        lines = self.functions()
        through = [each.id for each in self.exercises.values() if lines.get(each.function) in begun]
        return replace(failure, through=tuple(id for id in through if id != exercise_id))

    def mistake(
        self, exercise_id: str, outcome: Callable[[Lesson, Answer, Check], Failure | None] | None = None
    ) -> str | None:
        """The name of the known mistake with the same wrong values in all checks so far, if there is exactly one.

        Only a value identifies a mistake: NaN, an empty list or an exception may have any cause. outcome: returns the
        failure of an answer of the catalogue in a check; by default it runs the check.
        """
        outcome = outcome or outcome_of
        judged = self.judged.get(exercise_id, [])
        telling = [each for each in judged if each[1] is not None and is_telling(each[1].actual)]
        if not telling or self.lesson.is_withheld:
            return None
        others = [each for each in judged if each not in telling]
        names = [
            answer.name
            for answer in load_answers(self.lesson)
            if answer.exercise == exercise_id and not answer.is_right and not answer.is_planted
            if all(agrees(outcome(self.lesson, answer, check), failure) for check, failure in [*telling, *others])
        ]
        return names[0] if len(names) == 1 else None

    def describe(self, error: BaseException, function: str = "") -> str:
        """One sentence for an exception: the error, the line of the student's that raised it, and the check's call."""
        try:
            text = str(error).strip().partition("\n")[0][:500]
        except Exception:  # its own __str__ fails
            text = ""
        if isinstance(error, (OSError, EOFError)) and re.search("reading from stdin|reading a line", text):
            text = "it asks for input, and while a check runs nothing is typed"
        what = type(error).__name__ + (f": {text}" if text else "")
        if isinstance(error, SystemExit):
            what = "SystemExit (a call of exit)"
        if isinstance(error, SyntaxError):
            return f"{shown(error.filename or self.file)}:{error.lineno}: Python cannot read this line: {error.msg}."
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if Path(frame.filename) == self.file]
        if own:
            raised = text if isinstance(error, AssertionError) and text else f"raised {what}"
            asked = [frame for frame in frames if Path(frame.filename) == self.lesson.checks]
            check = f"\nThe check, {shown(self.lesson.checks)}:{asked[-1].lineno}: `{asked[-1].line}`" if asked else ""
            return f"{raised} at {shown(self.file)}:{own[-1].lineno}: `{own[-1].line}`{check}"
        if isinstance(error, TypeError) and function and f"{function.rpartition('.')[2]}()" in text:
            return f"cannot be called as the check calls it: {text}. Was its list of arguments changed?"
        if "NoneType" in text:
            return f"the check could not use what came back ({what}): is a `return` missing?"
        return f"the check could not use what came back: {what}"


def seed() -> None:
    """Seed torch's generators. `torch.manual_seed` takes 2 ms, because it records its caller."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


def trace(error: BaseException) -> str:
    """The traceback without the grader's own frames."""
    frames = traceback.extract_tb(error.__traceback__)
    others = [frame for frame in frames if Path(frame.filename).parent != Path(__file__).parent]
    return "".join([*traceback.format_list(others), *traceback.format_exception_only(error)])


def run_check(lesson: Lesson, function: str, check: Check, module: ModuleType) -> None:
    """Run a check. Raises what it raises, and CheckFailed if the answer changes an argument; the reference may."""
    seed()
    classes = [each for each in vars(module).values() if isinstance(each, type) and each.__module__ == module.__name__]
    is_whole = module.__recipe__[0] == "whole"  # the student's whole module
    with nothing_replaced(() if is_whole else [module, *classes]), watched_arguments(module, function) as changes:
        check(module)
    if not changes:
        return
    seed()
    reference = isolate.whole(f"reference_{lesson.slug}", lesson.solution.read_text(encoding="utf-8"), lesson.solution)
    with watched_arguments(reference, function) as allowed:
        check(reference)
    for name, value in changes.items():
        if name not in allowed:
            what = f"`{function.rpartition('.')[2]}` changed its argument `{name}`"
            raise CheckFailed(f"{what}, which belongs to the caller: work on a copy.", what, value)


def outcome_of(lesson: Lesson, answer: Answer, check: Check) -> Failure | None:
    """The failure of an answer of the catalogue, in the reference, in a check; None if it passes."""
    known = variant(lesson, answer)
    return known.attempt(check, known.untouched, answer.exercise)


def agrees(known: Failure | None, failure: Failure | None) -> bool:
    """Whether an answer of the catalogue and the student's have the same result in a check."""
    if known is None or failure is None:
        return known is failure
    if not is_telling(failure.actual):
        return True  # both failed
    return known.what == failure.what and same(known.actual, failure.actual)


@functools.lru_cache(maxsize=64)
def variant(lesson: Lesson, answer: Answer) -> Subject:
    """The reference with one answer of the catalogue in it."""
    exercise = {each.id: each for each in exercises_of(lesson)}[answer.exercise]
    source = apply(answer, lesson.solution.read_text(encoding="utf-8"), exercise)
    return Subject(lesson, lesson.solution, source)
