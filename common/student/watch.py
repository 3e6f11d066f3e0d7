"""`make watch-lesson-N`: grades a lesson's file each time it is saved, and reports what has changed.

It grades the exercises whose functions have changed and those that were wrong, or all if anything else has changed. A
spare worker imports torch before the next save.
"""

from __future__ import annotations

import ast
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
from rich.text import Text

from common import course
from common.course import CourseError, Lesson, shown
from common.course.exercises import TOGETHER, exercises_of, is_begun, read_source, walk_functions
from common.grading.results import Result, kept, next_step
from common.grading.runner import Worker, grade, grade_and_keep, todo_lines
from common.options import lesson_number, mine
from common.student.board import SIGNS, bar, score
from common.student.grade import congratulate, console, heading, report

PAUSE = 0.2
"""Seconds between two looks at the files."""


# --- What a save may have changed -------------------------------------------------------------------------------------


def edited(lesson: Lesson, before: str, after: str) -> list[str] | None:
    """The ids of the exercises whose functions differ; None if other code differs, which may affect all exercises."""
    functions = {each.id: each.function for each in exercises_of(lesson)}
    (old, old_rest), (new, new_rest) = parts(before, functions), parts(after, functions)
    if old_rest != new_rest:
        return None
    return [id for id in functions if old.get(id) != new.get(id)]


def parts(source: str, functions: dict[str, str]) -> tuple[dict[str, str], str]:
    """Each exercise's function, and all other code, as dumps of the syntax tree, without comments and layout."""
    tree = ast.parse(source)
    nodes = dict(walk_functions(tree))
    own = {id: nodes[name] for id, name in functions.items() if name in nodes}
    dumps = {id: ast.dump(node) for id, node in own.items()}
    for node in own.values():
        node.args, node.body, node.decorator_list, node.returns = None, [], [], None
    return dumps, ast.dump(tree)


def stamp(file: Path) -> tuple[int, int, int] | None:
    """A value that changes when a file is written or replaced; None while there is no file."""
    try:
        state = file.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size, state.st_ino


# watchfiles sees a save sooner, but none in a folder that a network or a virtual machine shares, unless it polls too.
def saves(known: dict[Path, tuple[int, int, int] | None]) -> Iterator[Path]:
    """Yield each file whose stamp differs from `known`, which is updated; never ends."""
    while True:
        time.sleep(PAUSE)
        for file in known:
            if stamp(file) != known[file]:
                time.sleep(PAUSE)  # an editor may need several steps
                known[file] = stamp(file)
                yield file


def take(spare: list[Worker]) -> Worker:
    """A worker that was started in advance, or a new one where there is none or it has ended."""
    worker = spare.pop() if spare else Worker()
    return worker if worker.process.poll() is None else Worker()


# --- The command ------------------------------------------------------------------------------------------------------


class Watched:
    """A module, its source when it was last graded, and its results. start: starts a worker."""

    def __init__(self, lesson: Lesson, start: Callable[[], Worker]):
        self.lesson, self.file = lesson, lesson.module
        self.start = start
        self.source = ""
        self.is_readable = True
        self.results: dict[str, Result] = {}

    def begin(self) -> None:
        """Grade the whole module, unless its results are kept, and report as `make test-lesson-N` does."""
        heading(self.lesson, self.file)
        self.source = read_source(self.file)
        show = partial(report, self.lesson, self.file, verbose=False)
        if known := kept(self.lesson, self.file):
            self.take(known)
            for result in known:
                show(result)
        else:
            self.grade_all(on_result=show)

    def take(self, results: list[Result]) -> None:
        self.results.update({result.id: result for result in results})

    def grade_all(self, **options) -> None:
        self.take(grade_and_keep(self.lesson, self.file, start=self.start, **options))

    def look(self) -> None:
        """After a save: grade what may have changed, and report it. Raises CourseError if the file cannot be read."""
        was_readable, self.is_readable = self.is_readable, False
        source = read_source(self.file)
        self.is_readable = True
        if not self.results:
            return self.begin()
        ids = [] if source == self.source else edited(self.lesson, self.source, source)
        before = dict(self.results)
        with console.status("grading ..."):
            self.grade_again(ids)
        for place, line in todo_lines(source).items():
            if place in self.results:
                self.results[place].line = line
        if source != self.source or not was_readable:
            self.source = source
            self.tell(before, ids)

    def grade_again(self, ids: list[str] | None) -> None:
        """ids: the exercises that were edited; None if all may have changed."""
        if ids is None or (ids and self.lesson.is_withheld):
            self.grade_all()
        elif ids:
            wrong = [id for id, result in self.results.items() if result.status == "wrong" and id != TOGETHER]
            self.take(grade(self.lesson, self.file, only=sorted({*ids, *wrong}), start=self.start))
            if all(result.status == "passed" for id, result in self.results.items() if id != TOGETHER):
                self.grade_all()
            else:
                self.results[TOGETHER] = Result(TOGETHER, TOGETHER, status="waiting")

    def tell(self, before: dict[str, Result], ids: list[str] | None) -> None:
        told = Text()
        for id, result in self.results.items():
            was, is_edited = before[id].status, id in (ids or ())
            verb = f"{was} ->" if was != result.status else "still" if is_edited else ""
            if verb and id != TOGETHER:
                told.append(f"{result}: {verb} ").append(result.status, SIGNS[result.status][1]).append("   ")
        console.print(Text(time.strftime("\n%H:%M:%S  "), "dim") + (told or Text("No exercise has changed.", "dim")))
        wrong = [result for id, result in self.results.items() if result.status == "wrong"]
        new = [each for each in wrong if each.id in (ids or ()) or before[each.id].status != "wrong"]
        if new:
            report(self.lesson, self.file, new[0], verbose=False)
        elif told:
            results = list(self.results.values())
            line = Text("          ") + bar(results) + f"  {score(results)}."
            if (step := next_step(results)) and step.id != TOGETHER:
                line.append(f"  Next: {step}").append(f"   {shown(self.file)}:{step.line}   make hint-{step.id}", "dim")
            console.print(line)


@click.command()
@lesson_number
@mine()
def watch_lesson(lesson_number: int, mine: str) -> int:
    """Grade a lesson's file again whenever it is saved, until Ctrl-C."""
    course.activate(mine)
    spare = [Worker()]
    modules = [
        Watched(each, partial(take, spare))
        for each in course.modules_of(lesson_number)
        if not each.is_optional or is_begun(each, each.module)
    ]
    try:
        return watch(modules, spare)
    finally:
        for each in spare:
            each.close()


def watch(modules: list[Watched], spare: list[Worker]) -> int:
    """Grade these modules, then again after each save, until Ctrl-C. spare: filled whenever its worker was taken."""
    known = {each.file: stamp(each.file) for each in modules}

    def attempt(action: Callable[[], None]) -> None:
        try:
            action()
        except CourseError as error:
            console.print(Text(f"\n{error}", "red"))
        if not spare:
            spare.append(Worker())

    try:
        for each in modules:
            attempt(each.begin)
        console.print("\nFrom now on the file is graded whenever you save it; Ctrl-C ends this.")
        is_complete = False
        for file in saves(known):
            attempt(next(each.look for each in modules if each.file == file))
            was_complete = is_complete
            results = [result for each in modules for result in each.results.values()]
            is_complete = all(each.results for each in modules) and next_step(results) is None
            if is_complete and not was_complete:
                congratulate(modules[0].lesson)
                console.print("Still watching; Ctrl-C ends this.")
    except KeyboardInterrupt:
        console.print("\nStopped.")
    return 0
