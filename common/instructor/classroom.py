"""`make grade SUBMISSIONS=folder OUT=grades`: grades the submissions of a class.

Each module of each submission is graded alone, in a fresh copy of the course, by a worker in a sandbox. Each result is
written to OUT/state at once, so an interrupted grading continues where it stopped, and a second one grades only what
has changed. The reports are made from the results: OUT/index.html for the instructor, OUT/grades.csv and
OUT/exercises.csv for a spreadsheet, and for each student a page to hand back and Gradescope's results.json.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from common import course
from common.course import MODULES, ROOT, CourseError, Lesson, counted, shown
from common.course.exercises import exercises_of
from common.course.modules import check_solution
from common.course.skeleton import cut_lesson
from common.grading.results import Result, fingerprint
from common.grading.runner import grade
from common.grading.wire import readable
from common.instructor import report, sandbox
from common.instructor.report import Graded
from common.instructor.submissions import Submission, find_submissions, plain
from common.options import folder, jobs, option

COPIED = ("common", "solutions", *(lesson.folder.name for lesson in MODULES), "pyproject.toml")
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.ipynb", "figures", "*.md", ".*", "book")


class Classroom:
    """A grading: the submissions, the lessons, and the results so far."""

    def __init__(self, submissions: list[Submission], lessons: list[Lesson], out: Path):
        self.submissions = submissions
        self.lessons = lessons
        self.out = out
        self.graded: dict[tuple[str, str], Graded] = {}
        self.skeletons = {lesson: cut_lesson(lesson) for lesson in MODULES}
        self.stopping = threading.Event()
        self.workers: set[sandbox.SandboxedWorker] = set()
        self.state_of_course = {lesson.slug: fingerprint(lesson, lesson.solution) for lesson in lessons}

    def to_grade(self) -> list[tuple[Submission, Lesson]]:
        """Return the modules without a result in OUT/state; the results there are put into `graded`."""
        left = []
        for submission in self.submissions:
            for lesson in self.lessons:
                if lesson.slug not in submission.modules:
                    if not lesson.is_optional:
                        self.graded[submission.student, lesson.slug] = self.without(submission, lesson, "not handed in")
                elif (known := self.kept(submission, lesson)) is not None:
                    self.graded[submission.student, lesson.slug] = known
                else:
                    left.append((submission, lesson))
        return left

    def without(self, submission: Submission, lesson: Lesson, problem: str) -> Graded:
        """The result of a module that could not be graded."""
        worth = points_of(lesson)
        results = [Result(each.id, each.function, points=worth[each.id]) for each in exercises_of(lesson)]
        return Graded(submission.student, lesson, results, problem)

    # --- one module ----------------------------------------------------------------------------------------------

    def grade_one(self, submission: Submission, lesson: Lesson) -> Graded | None:
        """Grade one module. Returns None if the grading was interrupted in the meantime."""
        content = submission.modules[lesson.slug]
        with tempfile.TemporaryDirectory(prefix="course-") as folder:
            base = Path(folder, "course")
            copy_course(base, self.skeletons)
            file = base / lesson.module.relative_to(ROOT)
            file.write_bytes(content)

            def start() -> sandbox.SandboxedWorker:
                if self.stopping.is_set():
                    raise CourseError("The grading was interrupted.")
                worker = sandbox.SandboxedWorker(base, sandbox.Limits())
                self.workers.add(worker)
                return worker

            try:
                found = Graded(submission.student, lesson, grade(lesson, file, start=start))
            except (RecursionError, MemoryError) as error:
                found = self.without(submission, lesson, readable(f"Python cannot read it: {error}"))
            except CourseError as error:
                found = self.without(submission, lesson, readable(str(error).replace(f"{base}{os.sep}", "")))
        found.review += [f"{result.id}: {note}" for result in found.results for note in result.notes]
        if self.stopping.is_set():
            return None
        self.keep(submission, found)
        return found

    # --- results that are kept -----------------------------------------------------------------------------------

    def state(self, submission: Submission, lesson: Lesson) -> Path:
        """The file of a module's result, for exactly this text and this state of the course."""
        digest = hashlib.sha256(submission.modules[lesson.slug] + self.state_of_course[lesson.slug].encode())
        return self.out / "state" / submission.student / f"{lesson.slug}-{digest.hexdigest()[:32]}.json"

    def keep(self, submission: Submission, found: Graded) -> None:
        path = self.state(submission, found.lesson)
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f"{found.lesson.slug}-*.json"):
            old.unlink()
        record = {"results": [asdict(each) for each in found.results], "problem": found.problem, "review": found.review}
        path.write_text(json.dumps(record, indent=1), encoding="utf-8")

    def kept(self, submission: Submission, lesson: Lesson) -> Graded | None:
        try:
            record = json.loads(self.state(submission, lesson).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # ValueError: the grading ended while it was written
            return None
        results = [Result(**each) for each in record["results"]]
        return Graded(submission.student, lesson, results, record["problem"], record["review"])

    # --- all of them ---------------------------------------------------------------------------------------------

    def run(self, left: list[tuple[Submission, Lesson]], jobs: int, on_graded: Callable[[Graded], None]) -> None:
        """Grade these modules. After a KeyboardInterrupt all workers are ended, and all results are kept."""
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(self.grade_one, *each) for each in left]
            try:
                for future in as_completed(futures):
                    if found := future.result():
                        self.graded[found.student, found.lesson.slug] = found
                        on_graded(found)
            finally:
                self.stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in self.workers:
                    worker.close()


def copy_course(base: Path, skeletons: dict[Lesson, str]) -> None:
    """Copy the files that grading needs into `base`, with each lesson's module as an empty skeleton."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, base / name, ignore=LEFT_OUT, dirs_exist_ok=True)
        else:
            shutil.copy2(ROOT / name, base / name)
    for lesson, skeleton in skeletons.items():
        (base / lesson.module.relative_to(ROOT)).write_text(skeleton, encoding="utf-8")


def points_of(lesson: Lesson) -> dict[str, int]:
    """The points of each exercise, read from the checks without running them."""
    points: dict[str, int] = {}
    for node in ast.walk(ast.parse(lesson.checks.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "exercise":
            given = [keyword.value.value for keyword in node.keywords if keyword.arg == "points"]
            points[node.args[0].value] = given[0] if given else 1
    return points


@click.command()
@option("--submissions", "SUBMISSIONS", required=True, metavar="FOLDER", help="what the students have handed in")
@option("--out", "OUT", type=folder, default="grades", metavar="FOLDER", help="where the grades go")
@option("--lessons", "LESSONS", default="", metavar="0-3", help="only these; default: all")
@jobs
def grade_class(submissions: str, out: Path, lessons: str, jobs: int) -> int:
    """Grade the submissions of a class, and write a report for each student and for the class."""
    course.activate("")
    chosen = {each.number for each in course.parse_mine(lessons, "LESSONS")}
    modules = [each for each in MODULES if each.number in chosen or not chosen]
    for each in modules:
        check_solution(each)
    found, ignored = find_submissions(Path(submissions))
    room = Classroom(found, modules, out.resolve())
    return grade_all(room, ignored, jobs, Console(highlight=False, soft_wrap=True))


def grade_all(room: Classroom, ignored: list[str], jobs: int, console: Console) -> int:
    """Grade with a progress bar, and write the reports, even if it is interrupted. Returns the exit status."""
    console.print(Text(sandbox.walls(), "" if sandbox.has_bubblewrap() else "yellow bold"))
    for each in ignored:
        console.print(Text(f"Not graded: {each}.", "yellow"))
    left = room.to_grade()
    handed_in = sum(lesson.slug in submission.modules for submission in room.submissions for lesson in room.lessons)
    handed = f"{counted(len(room.submissions), 'submission')}, {counted(handed_in, 'module')}"
    console.print(f"{handed}; already graded: {handed_in - len(left)}.")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("modules", total=len(left))

        def tell(found: Graded) -> None:
            progress.advance(task)
            text = f"{found.points} of {sum(result.points for result in found.results)} points"
            text += f"\n    {found.problem}" if found.problem else ""
            line = Text.assemble(f"{plain(found.student, 24):<24} {found.lesson.slug:<16} ", text)
            line.append("".join(f"\n    look at it: {each}" for each in found.review), "yellow")
            progress.console.print(line)

        with contextlib.suppress(KeyboardInterrupt):
            room.run(left, jobs, tell)
    report.write(room.out, room.lessons, room.submissions, room.graded)
    if num_left := sum((submission.student, lesson.slug) not in room.graded for submission, lesson in left):
        todo = counted(num_left, "module")
        console.print(f"\nStopped. Still to grade: {todo}; nothing is lost: the same command goes on from here.")
        return 130
    console.print(f"The class: {shown(room.out / 'index.html')}   for a spreadsheet: {shown(room.out / 'grades.csv')}")
    return 0
