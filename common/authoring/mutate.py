"""Tests a lesson's checks by mutation: changes the reference in one place, and counts the changes that are not noticed.

    make mutate-lesson-1
    make mutate            every lesson; the results are kept in common/bench/measurements/mutants.json

Each change of an exercise's answer (`mutants.py`) is a mutant, and is tried in the checks of its own exercise. A mutant
that passes them all has survived. Either the checks have a gap, or the mutant does the same as the reference; then the
lesson's catalogue says so, with the reason (`equivalent` in `common.course.catalogue`).
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection

import click
from rich.console import Console

from common.authoring.mutants import Mutant, mutants_of
from common.course import MODULES, ROOT, CourseError, Lesson, modules_of, shown
from common.course.catalogue import load_equivalents
from common.course.exercises import exercises_of
from common.course.modules import check_solution
from common.grading.runner import START_SECONDS
from common.options import jobs, lesson_number
from common.progress import progress_bar
from common.workers import call, kill

SUMMARY = ROOT / "common" / "bench" / "measurements" / "mutants.json"
ASKED = 0.95
"""The smallest share of a lesson's mutants, except the equivalent ones, that its checks must catch."""
STALLED = 60.0
"""Seconds without a message from the worker after which its current mutant counts as caught and a new worker starts."""


# --- Trying them ------------------------------------------------------------------------------------------------------


class Overtime(BaseException):
    """A mutant needs far more processor time than the reference."""


def work(connection: Connection, lesson: Lesson, mutants: list[Mutant]) -> None:
    """In the worker: run the lesson's checks, each on those mutants of its exercise that no check has caught yet.

    Sends (index, None) before it tries a mutant, (index, why) when one is caught, and None at the end.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    import torch

    from common.grading import ranks
    from common.grading.plugin import QUIET, Grader, run_checks
    from common.grading.subject import Failure, Subject

    torch.set_num_threads(1)

    def stop(*_) -> None:
        ranks.end_pool()  # the ranks may still be waiting for a message
        raise Overtime

    signal.signal(signal.SIGPROF, stop)  # it counts processor time, so that a busy machine catches no mutant

    class MutatingGrader(Grader):
        def __init__(self):
            self.reference = Subject(lesson, lesson.solution)
            super().__init__(self.reference, {each.exercise for each in mutants})
            self.left = {index: Subject(lesson, lesson.solution, each.source) for index, each in enumerate(mutants)}

        def judge(self, subject: Subject, exercise_id: str, check: Callable) -> Failure | None:
            start = time.process_time()
            failure = super().judge(subject, exercise_id, check)
            limit = 2.0 + 5 * (time.process_time() - start)
            for index in [each for each in self.left if mutants[each].exercise == exercise_id]:
                connection.send((index, None))
                if why := why_caught(self.left[index], check, limit):
                    del self.left[index]
                    connection.send((index, why))
            return failure

    def why_caught(subject: Subject, check: Callable, limit: float) -> str | None:
        try:
            signal.setitimer(signal.ITIMER_PROF, limit)
            failure = subject.attempt(check, subject.untouched)
        except BaseException as error:
            return f"{type(error).__name__} when imported"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        return failure and failure.sentence

    run_checks(lesson.checks, MutatingGrader(), *QUIET)
    connection.send(None)


class Trial:
    """Some mutants of a lesson and their worker. If it stalls or ends, its current mutant counts as caught."""

    def __init__(self, lesson: Lesson, mutants: list[Mutant]):
        self.lesson, self.mutants = lesson, mutants
        self.caught: dict[Mutant, str] = {}
        self.start()

    def start(self) -> None:
        self.left = [each for each in self.mutants if each not in self.caught]
        self.current, self.last_word = None, time.monotonic()
        self.process, self.connection = call("common.authoring.mutate:work", self.lesson, self.left)

    def step(self) -> bool:
        """Read the worker's messages. Returns whether more will come."""
        try:
            while self.connection.poll():
                event, self.last_word = self.connection.recv(), time.monotonic()
                if event is None:
                    kill(self.process)
                    return False
                self.current = self.left[event[0]]
                if event[1] is not None:
                    self.caught[self.current] = event[1]
        except EOFError:
            self.blame("ended the process")
        if time.monotonic() - self.last_word > (STALLED if self.current else 5 * START_SECONDS):
            self.blame("brought the checks to a halt")
        return True

    def blame(self, why: str) -> None:
        kill(self.process)
        if self.current is None:
            raise CourseError(f"The worker for {shown(self.lesson.checks)} did not come to its first mutant.")
        self.caught[self.current] = why
        self.start()


def try_all(lesson: Lesson, mutants: list[Mutant], jobs: int, on_word: Callable[[int], None]) -> dict[Mutant, str]:
    """Return the mutants that were caught, each with the reason.

    on_word: is called with the number of mutants that are caught so far.
    """
    ids = list(dict.fromkeys(each.exercise for each in mutants))
    shares = [[each for each in mutants if ids.index(each.exercise) % jobs == job] for job in range(jobs)]
    trials = [Trial(lesson, share) for share in shares if share]
    running = list(trials)
    try:
        while running:
            running = [trial for trial in running if trial.step()]
            on_word(sum(len(trial.caught) for trial in trials))
            time.sleep(0.05)
    finally:
        for trial in running:
            kill(trial.process)
    return {mutant: why for trial in trials for mutant, why in trial.caught.items()}


# --- Results ----------------------------------------------------------------------------------------------------------


def summary(lesson: Lesson, mutants: list[Mutant], caught: Collection[Mutant]) -> dict:
    """Return the numbers of a lesson's mutants by result, and the names of the survivors."""
    equivalents = load_equivalents(lesson)
    different = [each for each in mutants if (each.exercise, each.change) not in equivalents]
    survived = [str(each) for each in different if each not in caught]
    num_caught = len(different) - len(survived)
    return {
        "mutants": len(mutants),
        "equivalent": len(mutants) - len(different),
        "caught": num_caught,
        "caught_share": round(num_caught / len(different), 4),
        "survived": survived,
    }


def unknown_equivalents(lesson: Lesson, mutants: list[Mutant]) -> list[str]:
    """The catalogue's equivalent changes that no mutant makes, because the reference has changed."""
    known = {(each.exercise, each.change) for each in mutants}
    return [f"{id}: {change}" for id, change in load_equivalents(lesson) if (id, change) not in known]


def mutate(lesson: Lesson, only: str | None, jobs: int, console: Console) -> dict:
    """Try a lesson's mutants, or those of one exercise, and print the survivors."""
    mutants = [each for each in mutants_of(lesson) if only in (None, each.exercise)]
    with progress_bar(f"lesson {lesson.number}, {lesson.slug}", len(mutants), console.is_terminal) as update:
        caught = try_all(lesson, mutants, jobs, lambda count: update(count, ""))
    found, equivalents = summary(lesson, mutants, caught), load_equivalents(lesson)
    told = {
        "survived": found["survived"],
        "caught, though the catalogue calls it equivalent:": [
            each for each in caught if (each.exercise, each.change) in equivalents
        ],
        "equivalent by the catalogue, but no such mutant:": [] if only else unknown_equivalents(lesson, mutants),
    }
    for what, those in told.items():
        for each in those:
            console.print(f"{what}  {each}", markup=False)
    console.print(
        f"Lesson {lesson.number}, {lesson.slug}: {found['caught']} of {found['mutants'] - found['equivalent']} caught "
        f"({found['caught_share']:.1%}); {found['equivalent']} are equivalent."
    )
    return found


@click.command()
@lesson_number
@click.option("--exercise", metavar="N.M", help="only this one")
@jobs
def mutate_lesson(lesson_number: int, exercise: str | None, jobs: int) -> int:
    """Try a lesson's checks on every small change of its answers."""
    return mutate_modules(modules_of(lesson_number), exercise, jobs)


@click.command()
@jobs
def mutate_all(jobs: int) -> int:
    """Try the checks of every lesson on every small change of its answers."""
    return mutate_modules(list(MODULES), None, jobs)


def mutate_modules(modules: list[Lesson], exercise: str | None, jobs: int) -> int:
    """Try the mutants of these modules, or of one exercise. Results of whole modules are written to the summary.

    Returns the exit status: 1 if too small a share of a module's mutants is caught.
    """
    console = Console(highlight=False, soft_wrap=True)
    failed = False
    for lesson in modules:
        if exercise and exercise not in {each.id for each in exercises_of(lesson)}:
            continue
        check_solution(lesson)
        if not lesson.is_importable:
            console.print(f"{lesson.slug}: left out, since it needs the package {lesson.needs}.")
            continue
        found = mutate(lesson, exercise, jobs, console)
        failed |= found["caught_share"] < ASKED
        if not exercise:
            known = json.loads(SUMMARY.read_text(encoding="utf-8")) if SUMMARY.exists() else {}
            known[lesson.slug] = found
            ordered = {each.slug: known[each.slug] for each in MODULES if each.slug in known}
            SUMMARY.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")
    return int(failed)
