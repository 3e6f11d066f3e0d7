"""`PDB=1 make test-N.M`: runs the checks of one exercise in this process, in the debugger."""

from __future__ import annotations

import ast
import pdb
from collections.abc import Callable
from pathlib import Path

from common.course import Lesson
from common.course.exercises import Exercise, walk_functions
from common.grading.plugin import Grader, run_checks
from common.grading.subject import Failure, Subject


class DebuggingGrader(Grader):
    """Runs each check of one exercise under pdb, with a breakpoint where the student's function begins."""

    def __init__(self, subject: Subject, exercise: Exercise, line: int):
        super().__init__(subject, [exercise.id])
        self.line = line

    def judge(self, subject: Subject, exercise_id: str, check: Callable) -> Failure | None:
        debugger = pdb.Pdb()
        debugger.rcLines += [f"break {subject.file}:{self.line}", "continue"]

        def run(code) -> None:
            if debugger.runcall(lambda: check(code) or True) is None:  # it was left with q
                raise KeyboardInterrupt

        return subject.attempt(run, lambda: subject.module(exercise_id))


def debug(lesson: Lesson, file: Path, exercise: Exercise) -> int:
    """Debug one exercise. Returns pytest's exit code."""
    subject = Subject(lesson, file)
    print(f"It stops where {exercise.function} begins: n is the next line, p x prints x, c goes on, q leaves.\n")
    function = dict(walk_functions(ast.parse(subject.source)))[exercise.function]
    has_docstring = ast.get_docstring(function) is not None and len(function.body) > 1
    grader = DebuggingGrader(subject, exercise, function.body[has_docstring].lineno)
    return run_checks(lesson.checks, grader, "-q", "--capture=no", "--disable-warnings", "-rN")
