"""`PDB=1 make test-N.M`: the checks of one exercise in this process, with the debugger stopping in its function."""

from __future__ import annotations

import os
import pdb
from collections.abc import Callable
from pathlib import Path

import pytest

from common.course import Lesson
from common.grading.plugin import Grader
from common.grading.runner import todo_lines
from common.grading.subject import Failure, Subject
from common.skeleton import Exercise


class DebuggingGrader(Grader):
    """Runs each check under pdb, with a breakpoint where the student's function begins."""

    def __init__(self, subject: Subject, line: int):
        super().__init__(lambda lesson: subject)
        self.line = line

    def judge(self, subject: Subject, exercise_id: str, check: Callable) -> Failure | None:
        module = subject.module(exercise_id)
        debugger = pdb.Pdb()
        debugger.rcLines += [f"break {subject.file}:{self.line}", "continue"]
        debugger.runcall(check, module)
        return None


def debug(lesson: Lesson, file: Path, exercise: Exercise) -> int:
    """Debug one exercise. Returns pytest's exit code."""
    os.environ["KERNELS"] = "plain"
    grader = DebuggingGrader(Subject(lesson, file), todo_lines(file.read_text())[exercise.function])
    grader.pytest_collection_modifyitems = lambda items: items.__setitem__(
        slice(None), [item for item in items if (mark := item.get_closest_marker("exercise")) and mark.kwargs["id"] == exercise.id]
    )
    return int(pytest.main([str(lesson.checks), "-q", "--capture=no"], plugins=[grader]))
