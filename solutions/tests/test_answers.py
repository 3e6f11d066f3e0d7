"""The references pass their own checks, and the catalogue holds: wrong answers fail by name, right ones pass."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from common.course import LESSONS, MODULES, ROOT
from common.grading.catalogue import apply, load_answers
from common.grading.runner import grade
from common.skeleton import TOGETHER, exercises_of


@pytest.mark.parametrize("lesson", MODULES, ids=lambda lesson: lesson.slug)
def test_reference_passes(lesson):
    results = grade(lesson, lesson.solution)
    assert {result.id: result.sentence for result in results if result.status != "passed"} == {}
    assert [result.id for result in results] == [*(exercise.id for exercise in exercises_of(lesson)), TOGETHER]


@pytest.mark.parametrize("lesson", MODULES, ids=lambda lesson: lesson.slug)
def test_wrong_answer_fails_in_its_exercise_only(lesson, tmp_path):
    """One answer a lesson, graded as a student's file would be; the catalogue's proof below has them all."""
    exercises = {exercise.id: exercise for exercise in exercises_of(lesson)}
    answer = next(answer for answer in load_answers(lesson) if not answer.is_right and answer.recognised)
    file = tmp_path / f"{lesson.slug}.py"
    file.write_text(apply(answer, lesson.solution.read_text(), exercises[answer.exercise]))
    results = {result.id: result for result in grade(lesson, file)}
    assert [id for id, result in results.items() if result.status == "wrong"] == [answer.exercise]
    assert results[answer.exercise].mistake == answer.name


@pytest.fixture(scope="module")
def proofs():
    """The proof of every lesson, all begun at once: each is one process on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = {
        lesson: subprocess.Popen(
            [sys.executable, "-m", "common.grading.prove", str(lesson.number)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for lesson in LESSONS
    }
    yield running
    for process in running.values():
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_catalogue_holds(lesson, proofs):
    """Every wrong answer of the lesson is caught and recognised, and every right one passes."""
    output, _ = proofs[lesson].communicate(timeout=900)
    assert proofs[lesson].returncode == 0, output
