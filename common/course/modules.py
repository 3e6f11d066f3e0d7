"""Chooses the file of `solutions.<slug>`: the reference's or the student's.

By default `solutions.llm_basics` is the reference, solutions/llm_basics.py. With `MINE=0-2` it is the student's
lesson-1-llm-basics/llm_basics.py. The choice is in the environment, so that every process started from here has it:
spawned workers, torchrun, a notebook's kernel. `reference.llm_basics` is always the reference, for checks that need an
oracle. In a copy of the course that `make release` has made, some solutions are withheld, and the student's file takes
their place, whatever MINE says.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

from common.course.exercises import to_do
from common.course.lessons import LESSONS, MODULES, ROOT, CourseError, Lesson, lesson, modules_of, shown

MODULES_VARIABLE = "COURSE_MODULES"
"""The environment variable with `slug=file` pairs, separated like the entries of PATH."""


class UnfinishedModule(CourseError, ImportError):
    """A module of the student's was imported, and it has exercises that are still to do."""


class Waits(UnfinishedModule):
    """Something needs lessons whose solutions are withheld, and which the student has not finished.

    subject: what needs them, as the sentence begins. ids: the exercises that are still to do.
    """

    def __init__(self, subject: str, ids: list[str]):
        self.lessons = named([each for each in LESSONS if any(id.startswith(f"{each.number}.") for id in ids)])
        verb = "is" if len(ids) == 1 else "are"
        super().__init__(f"{subject} builds on your {self.lessons}: {listed(ids)} {verb} still to do.")


def listed(ids: list[str], at_most: int = 4) -> str:
    """1.1; 1.1 and 1.2; 1.1, 1.2, 1.3 and 9 more."""
    if len(ids) > at_most:
        ids = [*ids[: at_most - 1], f"{len(ids) - at_most + 1} more"]
    *first, last = ids
    return f"{', '.join(first)} and {last}" if first else last


def named(lessons: list[Lesson]) -> str:
    """lesson 3; lessons 0, 1, 2 and 3."""
    numbers = [str(each.number) for each in lessons]
    return f"lesson{'s' if len(lessons) > 1 else ''} {listed(numbers, len(LESSONS))}"


def parse_mine(mine: str, variable: str = "MINE") -> list[Lesson]:
    """The lessons that `MINE` names by numbers and ranges, such as `2`, `0-2` or `0,2-3`; [] for an empty text.

    variable: named in errors. Raises CourseError.
    """
    chosen: dict[int, Lesson] = {}
    for part in filter(None, (part.strip() for part in mine.split(","))):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal()) or int(first) > int(last):
            raise CourseError(
                f"{variable}={mine}: {part!r} is neither a lesson's number nor a range of them, such as 0-2."
            )
        for number in range(int(first), int(last) + 1):
            chosen[number] = lesson(number)
    return [chosen[number] for number in sorted(chosen)]


def check_finished(file: Path) -> None:
    """Raise UnfinishedModule if a module has exercises to do, CourseError if it is absent or cannot be read."""
    if ids := to_do(file):
        raise UnfinishedModule(
            f"{shown(file)} cannot be used yet: {', '.join(ids)} still to do. Finish them, or leave the lesson out "
            "of MINE."
        )


def activate(mine: str | None) -> None:
    """Use the student's files for these lessons of `solutions`, in this process and all that it starts.

    Call it before anything of `solutions` is imported. Raises CourseError if a module is unfinished; one whose solution
    is withheld is checked only when it is imported. For an unfinished optional module the reference stays in use.
    """
    modules = [module for each in parse_mine(mine or "") for module in modules_of(each.number)]
    modules = [each for each in modules if not (each.is_optional and to_do(each.module))]
    for each in modules:
        if not each.is_withheld:
            check_finished(each.module)
    os.environ[MODULES_VARIABLE] = os.pathsep.join(f"{each.slug}={each.module}" for each in modules)


def withheld() -> dict[str, Path]:
    """The student's file of each module whose solution is withheld in this copy of the course, by slug."""
    return {each.slug: each.module for each in MODULES if each.is_withheld}


def substitutes() -> dict[str, Path]:
    """The student's files that replace the reference, by slug: withheld ones, and those that the environment names."""
    pairs = (pair.partition("=") for pair in os.environ.get(MODULES_VARIABLE, "").split(os.pathsep) if pair)
    return withheld() | {slug: Path(file) for slug, _, file in pairs}


def whose(lessons: tuple[Lesson, ...]) -> str:
    """Whose code runs for these lessons, such as "your lesson 1, the reference's lessons 0 and 2"."""
    mine = substitutes()
    owned = {"your": [each for each in lessons if each.slug in mine]}
    owned["the reference's"] = [each for each in lessons if each.slug not in mine]
    return ", ".join(f"{owner} {named(own)}" for owner, own in owned.items() if own)


def files_used() -> str:
    """A sentence that says whose code runs. Every command prints it first."""
    text = whose(LESSONS)
    return f"{text[0].upper()}{text[1:]}."


def choose_modules(mine: str) -> None:
    """Choose the lessons of a notebook, in its first cell, and print the choice.

    mine: as MINE; "" keeps the choice with which the kernel was started. Raises CourseError if other files have been
    imported already, since a kernel keeps them until it restarts.
    """
    if mine:
        activate(mine)
    for each in MODULES:
        imported = sys.modules.get(f"solutions.{each.slug}")
        if imported and Path(imported.__file__) != substitutes().get(each.slug, each.solution):
            raise CourseError(f"This kernel has imported {shown(Path(imported.__file__))} already: restart it.")
    mine = [each for each in LESSONS if any(module.slug in substitutes() for module in modules_of(each.number))]
    print(f"Yours: {named(mine)}. All others run the reference." if mine else "All lessons run the reference.")


# --- Where solutions are withheld -------------------------------------------------------------------------------------


def check_solution(lesson: Lesson) -> None:
    """Raise CourseError if the lesson's solution is withheld."""
    if lesson.is_withheld:
        raise CourseError(f"The solution of lesson {lesson.number} is withheld in this copy of the course.")


def slugs(node: ast.ImportFrom) -> set[str]:
    """The slugs of the modules that a statement imports from `solutions`, in either form of `from ... import`."""
    package, _, slug = (node.module or "").partition(".")
    if package != "solutions":
        return set()
    return {slug} if slug else {alias.name for alias in node.names}


def below(lesson: Lesson) -> list[Lesson]:
    """The modules of `solutions` that a lesson's solution imports at its top, directly or through others."""
    found: set[str] = set()
    waiting = [lesson]
    while waiting:
        tree = ast.parse(waiting.pop().solution.read_text(encoding="utf-8"))
        names = {name for node in tree.body if isinstance(node, ast.ImportFrom) for name in slugs(node)} - found
        found |= names
        waiting += [each for each in MODULES if each.slug in names]
    return [each for each in MODULES if each.slug in found]


def still_to_do_below(lesson: Lesson) -> list[str]:
    """The ids of the exercises that are to do in modules which this lesson imports and whose solutions are withheld.

    Optional modules may stay unfinished. Raises CourseError if a module cannot be read.
    """
    if not withheld():
        return []
    return [id for each in below(lesson) if each.is_withheld and not each.is_optional for id in to_do(each.module)]


def check_written(slug: str) -> None:
    """Raise Waits, which names what is to do here and in the modules below, for an unfinished withheld module."""
    lesson = next(each for each in MODULES if each.slug == slug)
    if (ids := to_do(lesson.module)) and not lesson.is_optional:
        raise Waits("This", [*still_to_do_below(lesson), *ids])


# --- Importing --------------------------------------------------------------------------------------------------------


class StudentLoader(importlib.machinery.SourceFileLoader):
    """Loads a student's module from its source. Python would take a cached .pyc file for current if the source was
    changed within a second and kept its length.
    """

    def get_code(self, fullname):
        return compile(self.get_data(self.path), self.path, "exec", dont_inherit=True)


class ReferenceLoader(importlib.machinery.SourceFileLoader):
    """Loads a reference module so that what it imports from `solutions` is the reference too."""

    def get_code(self, fullname):
        tree = ast.parse(self.get_data(self.path), self.path)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "solutions":
                node.module = "reference" + node.module.removeprefix("solutions")
        return compile(tree, self.path, "exec")


class ModuleFinder(importlib.abc.MetaPathFinder):
    """Finds `solutions.<slug>` where it is the student's file (`substitutes`), and `reference.<slug>` in solutions/."""

    def find_spec(self, fullname, path=None, target=None):
        package, _, slug = fullname.partition(".")
        if package == "solutions" and slug in substitutes():
            file = substitutes()[slug]
            if slug in withheld():
                check_written(slug)
            else:
                check_finished(file)
            return importlib.util.spec_from_file_location(fullname, file, loader=StudentLoader(fullname, str(file)))
        if fullname == "reference":
            spec = importlib.machinery.ModuleSpec("reference", None, is_package=True)
            spec.submodule_search_locations = []
            return spec
        if package == "reference" and (file := ROOT / "solutions" / f"{slug}.py").is_file():
            return importlib.util.spec_from_file_location(fullname, file, loader=ReferenceLoader(fullname, str(file)))
        return None


def install_finder() -> None:
    """Let imports use `ModuleFinder`. `solutions/__init__.py` calls this."""
    if not any(isinstance(finder, ModuleFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, ModuleFinder())
