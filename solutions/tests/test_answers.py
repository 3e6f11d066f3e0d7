"""The references pass their own checks, and the catalogue holds: wrong answers fail by name, right ones pass."""

from __future__ import annotations

import pytest

from common.course import LESSONS, MODULES, ROOT, modules_of
from common.course.catalogue import apply, load_answers
from common.course.exercises import TOGETHER, exercises_of
from common.grading.runner import grade
from common.tests.zygote import typed_in


@pytest.mark.parametrize("lesson", MODULES, ids=lambda lesson: lesson.slug)
def test_reference_passes(lesson):
    if not lesson.is_importable:
        pytest.skip(f"{lesson.needs} is not installed (python -m common setup {lesson.needs})")
    results = grade(lesson, lesson.solution)
    assert {result.id: result.sentence for result in results if result.status != "passed"} == {}
    assert [result.id for result in results] == [*(exercise.id for exercise in exercises_of(lesson)), TOGETHER]


@pytest.mark.parametrize("lesson", [MODULES[1], modules_of(6)[0]], ids=lambda lesson: lesson.slug)
def test_a_wrong_answer_is_recognised(lesson, tmp_path):
    """One answer, graded as a student's exercise would be, also over ranks; the proof below has the whole catalogue."""
    exercises = {exercise.id: exercise for exercise in exercises_of(lesson)}
    answer = next(answer for answer in load_answers(lesson) if not answer.is_right and answer.recognised)
    file = tmp_path / f"{lesson.slug}.py"
    file.write_text(apply(answer, lesson.solution.read_text(), exercises[answer.exercise]))
    [result] = grade(lesson, file, only=[answer.exercise])
    assert (result.status, result.mistake) == ("wrong", answer.name)


@pytest.mark.slow(20)
@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_catalogue_holds(lesson):
    """Every wrong answer of the lesson is caught and recognised, and every right one passes."""
    result = typed_in(ROOT, "prove-lesson", str(lesson.number))
    assert result.returncode == 0, result.stdout
