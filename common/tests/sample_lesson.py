"""A lesson of three-line exercises in a folder of its own, and a worker without a process, for tests of the grader."""

from __future__ import annotations

import multiprocessing
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.course import Lesson
from common.grading.wire import sealed


class Scripted:
    """A worker that tells these events, of the exercises that it is to run, and ends."""

    patience = 1.0

    def __init__(self, events_of: Callable[[list[str]], list[tuple]]):
        self.events_of = events_of

    def begin(self, lesson: Lesson, file: Path, ids: list[str], show_prints: bool, key: bytes) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        with theirs:
            for event in self.events_of(list(ids)):
                theirs.send_bytes(sealed(event, key))

    def how_it_ended(self) -> str:
        return "by signal 9"

    def close(self) -> None:
        self.connection.close()


@dataclass(frozen=True)
class SampleLesson(Lesson):
    """Like any lesson, but its files lie in `base`."""

    base: Path = Path()

    @property
    def folder(self) -> Path:
        return self.base

    @property
    def solution(self) -> Path:
        return self.base / "solution.py"

    @property
    def answers(self) -> Path:
        return self.base / "answers.py"


def write_lesson(base: Path, names: list[str]) -> SampleLesson:
    """A lesson whose exercises 9.1, 9.2, ... are functions with these names, each doubling a tensor."""
    solution = '"""A sample."""\n\nimport torch\n\n\ndef helper(x):\n    return 2 * x\n'
    checks = "import torch\nfrom common.grading import close, equal, exercise, holds, refuses, together\n"
    for i, name in enumerate(names, 1):
        solution += textwrap.dedent(f'''

            def {name}(x):
                """Twice x."""
                # Exercise 9.{i}: double it.
                return 2 * x
            ''')
        checks += textwrap.dedent(f'''

            @exercise("9.{i}", points={i}, seconds=1.5)
            class Test{name.title()}:
                def test_doubles(self, code):
                    close(code.{name}(torch.tensor([1.0, 2.0])), torch.tensor([2.0, 4.0]), "{name}([1, 2])")

                def test_zero(self, code):
                    close(code.{name}(torch.zeros(3)), torch.zeros(3), "{name}([0, 0, 0])")
            ''')
    checks += textwrap.dedent(f"""

        @together()
        class TestTogether:
            def test_helper(self, code):
                close(code.helper(code.{names[0]}(torch.ones(2))), torch.full((2,), 4.0), "helper({names[0]}([1, 1]))")
        """)
    lesson = SampleLesson(9, "sample", "A sample", 1, base=base)
    lesson.solution.write_text(solution)
    lesson.checks.write_text(checks)
    return lesson
