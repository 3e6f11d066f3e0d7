"""`make prove-lesson-N`: tests a lesson's checks with the wrong and the right answers of its catalogue.

Every right answer must pass. Every wrong one must fail the checks of its exercise because of a wrong value, not because
it crashes. Unless it is marked otherwise, the grader must recognise it, and it must not be taken for another one.
Every exercise must have at least three wrong answers and a right one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import click

from common import course
from common.course import Lesson, counted
from common.course.catalogue import Answer, apply, describe, load_answers
from common.course.exercises import TOGETHER, exercises_of
from common.course.modules import check_solution
from common.grading.plugin import Grader, run_checks
from common.grading.subject import Failure, Subject
from common.options import lesson_number

WRONG_AT_LEAST = 3
RIGHT_AT_LEAST = 1


class ProvingGrader(Grader):
    """Runs each check with the reference and with every answer to its exercise, and keeps the failures."""

    def __init__(self, lesson: Lesson):
        self.reference = Subject(lesson, lesson.solution)
        super().__init__(self.reference)
        self.subjects = {
            answer: Subject(lesson, lesson.solution, apply(answer, self.reference.source, exercise))
            for answer in load_answers(lesson)
            for exercise in [self.reference.exercises[answer.exercise]]
        }
        self.failures: dict[Answer, list[Failure]] = {answer: [] for answer in self.subjects}
        self.num_checks: Counter[str] = Counter()

    def judge(self, subject: Subject, exercise_id: str, check: Callable) -> Failure | None:
        self.num_checks[exercise_id] += 1
        for answer, of_answer in self.subjects.items():
            if answer.exercise == exercise_id or (answer.is_right and exercise_id == TOGETHER):
                failure = self.judge_answer(of_answer, answer, exercise_id, check)
                if failure is not None:
                    self.failures[answer].append(failure)
        return super().judge(subject, exercise_id, check)

    def judge_answer(self, subject: Subject, answer: Answer, exercise_id: str, check: Callable) -> Failure | None:
        """Judge an answer as a student's. A wrong one is not tried again in the untouched module, since that module is
        the reference in both cases.
        """
        if answer.is_right:
            return subject.judge(exercise_id, check)
        failure = subject.attempt(check, lambda: subject.module(exercise_id), exercise_id)
        subject.note(exercise_id, check, failure)
        return failure

    def outcome(self, lesson: Lesson, answer: Answer, check: Callable) -> Failure | None:
        """The result of an answer in a check that was run before."""
        return dict(self.subjects[answer].judged[answer.exercise])[check]


def complaints(lesson: Lesson, grader: ProvingGrader) -> list[str]:
    """A sentence for each fault of the checks or of the catalogue."""
    found = []
    for exercise in exercises_of(lesson):
        answers = [answer for answer in grader.subjects if answer.exercise == exercise.id]
        rights = sum(answer.is_right for answer in answers)
        if not grader.num_checks[exercise.id]:
            found.append(f"{exercise.id} {exercise.function} has no checks.")
        if len(answers) - rights < WRONG_AT_LEAST or rights < RIGHT_AT_LEAST:
            found.append(
                f"{exercise.id} {exercise.function} has {len(answers) - rights} wrong and {rights} right answers; "
                f"{WRONG_AT_LEAST} and {RIGHT_AT_LEAST} are asked."
            )
    for answer, failures in grader.failures.items():
        name = describe(answer, lesson)
        mistake = None if answer.is_right else grader.subjects[answer].mistake(answer.exercise, grader.outcome)
        crashes = [failure for failure in failures if not failure.what]
        if answer.is_right:
            found.extend(f"{name} fails: {failure.sentence}" for failure in failures)
        elif not failures:
            found.append(f"{name} passes.")
        elif crashes:
            found.append(f"{name} crashes: {crashes[0].sentence}")
        elif mistake not in (None, answer.name):
            found.append(f"{name} is taken for {mistake}.")
        elif answer.recognised and mistake is None:
            found.append(f"{name} is not recognised; it fails with: {failures[0].sentence}")
    return found


@click.command()
@lesson_number
def prove_lesson(lesson_number: int) -> int:
    """Try a lesson's checks on all known wrong and right answers."""
    failed = False
    for lesson in course.modules_of(lesson_number):
        check_solution(lesson)
        if not lesson.is_importable:
            print(f"Lesson {lesson.number}, {lesson.slug}: left out, since it needs the package {lesson.needs}.")
            continue
        grader = ProvingGrader(lesson)
        code = run_checks(lesson.checks, grader, "-q")
        found = complaints(lesson, grader)
        print(*found, sep="\n")
        print(
            f"Lesson {lesson.number}, {lesson.slug}: {len(grader.subjects)} answers to "
            f"{counted(len(grader.num_checks), 'exercise')}, {counted(len(found), 'complaint')}."
        )
        failed |= bool(found) or code != 0
    return int(failed)
