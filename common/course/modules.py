"""Which file `solutions.<slug>` means: the reference, or the student's own.

By default `solutions.llm_basics` is the reference, solutions/llm_basics.py. With `MINE=0-2` it is the student's
lesson-1-llm-basics/llm_basics.py. The choice travels in the environment, so that every process started from here
agrees: spawned workers, torchrun, a notebook's kernel. `reference.llm_basics` is always the reference, for a check
that needs an oracle which is not the student's. In a copy of the course that `make release` has made, some solutions
are withheld: the student's file then stands for them, whatever MINE says.
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
    """A module of the student's was imported in which exercises are still to do."""


class Waits(UnfinishedModule):
    """Something builds on lessons whose solutions are withheld, and which the student has not finished."""

    def __init__(self, who: str, ids: list[str]):
        self.lessons = named([each for each in LESSONS if any(id.startswith(f"{each.number}.") for id in ids)])
        verb = "is" if len(ids) == 1 else "are"
        super().__init__(f"{who} builds on your {self.lessons}: {listed(ids)} {verb} still to do.")


def listed(ids: list[str], at_most: int = 4) -> str:
    """1.1; 1.1 and 1.2; 1.1, 1.2, 1.3 and 9 more."""
    if len(ids) > at_most:
        ids = [*ids[: at_most - 1], f"{len(ids) - at_most + 1} more"]
    *first, last = ids
    return f"{', '.join(first)} and {last}" if first else last


def named(lessons: list[Lesson]) -> str:
    """lesson 3; lessons 0, 1, 2 and 3."""
    return ("lessons " if len(lessons) > 1 else "lesson ") + listed(
        [str(each.number) for each in lessons], len(LESSONS)
    )


def parse_mine(mine: str, variable: str = "MINE") -> list[Lesson]:
    """Read `MINE`: numbers and ranges, such as `2`, `0-2` or `0,2-3`. Empty means none."""
    chosen: dict[int, Lesson] = {}
    for part in filter(None, (part.strip() for part in mine.split(","))):
        first, dash, last = part.partition("-")
        last = last if dash else first
        if not (first.isdigit() and last.isdigit()) or int(first) > int(last):
            raise CourseError(
                f"{variable}={mine}: {part!r} is neither a lesson's number nor a range of them, such as 0-2."
            )
        for number in range(int(first), int(last) + 1):
            chosen[number] = lesson(number)
    return [chosen[number] for number in sorted(chosen)]


def check_finished(file: Path) -> None:
    """Refuse a module that cannot stand under others: absent, unreadable to Python, or with exercises to do."""
    if ids := to_do(file):
        raise CourseError(
            f"{shown(file)} cannot be used yet: {', '.join(ids)} still to do. Finish them, or leave the lesson out "
            "of MINE."
        )


def activate(mine: str | None) -> None:
    """From now on, here and in all processes started from here, these lessons of `solutions` are the student's files.

    Call it before anything of `solutions` is imported. Raises CourseError if a module is unfinished. Where a solution
    is withheld the module is the student's in any case, and only what needs it finds out. An unfinished optional module
    stays the reference's.
    """
    modules = [module for each in parse_mine(mine or "") for module in modules_of(each.number)]
    modules = [each for each in modules if not (each.is_optional and to_do(each.module))]
    for each in modules:
        if not each.is_withheld:
            check_finished(each.module)
    os.environ[MODULES_VARIABLE] = os.pathsep.join(f"{each.slug}={each.module}" for each in modules)


def withheld() -> dict[str, Path]:
    """The student's file of each module whose solution this copy of the course came without, by slug."""
    return {each.slug: each.module for each in MODULES if each.is_withheld}


def substitutes() -> dict[str, Path]:
    """Which slugs stand for a file other than the reference: what is withheld, and as the environment says."""
    pairs = (pair.partition("=") for pair in os.environ.get(MODULES_VARIABLE, "").split(os.pathsep) if pair)
    return withheld() | {slug: Path(file) for slug, _, file in pairs}


def whose(lessons: tuple[Lesson, ...]) -> str:
    """Whose code of these lessons runs: "your lesson 1, the reference's lessons 0 and 2"."""
    mine = substitutes()
    owned = {"your": [each for each in lessons if each.slug in mine]}
    owned["the reference's"] = [each for each in lessons if each.slug not in mine]
    return ", ".join(f"{owner} {named(own)}" for owner, own in owned.items() if own)


def files_used() -> str:
    """A sentence that says whose code runs, for the first output of every command."""
    text = whose(LESSONS)
    return f"{text[0].upper()}{text[1:]}."


def choose_modules(mine: str) -> None:
    """The first cell of a notebook: `mine` is written as MINE is; "" keeps what the kernel was started with. Prints
    whose files run. Raises CourseError if others are imported already, since a kernel keeps them until it restarts.
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
    """Refuse what needs the reference of a lesson where there is none."""
    if lesson.is_withheld:
        raise CourseError(f"The solution of lesson {lesson.number} is withheld in this copy of the course.")


def slugs(node: ast.ImportFrom) -> set[str]:
    """`from solutions.kv_cache import prefill` and `from solutions import kv_cache` both bring in `kv_cache`."""
    package, _, slug = (node.module or "").partition(".")
    if package != "solutions":
        return set()
    return {slug} if slug else {alias.name for alias in node.names}


def below(lesson: Lesson) -> list[Lesson]:
    """The modules that a lesson's imports at its top, directly or through others."""
    found: set[str] = set()
    waiting = [lesson]
    while waiting:
        tree = ast.parse(waiting.pop().solution.read_text(encoding="utf-8"))
        names = {name for node in tree.body if isinstance(node, ast.ImportFrom) for name in slugs(node)} - found
        found |= names
        waiting += [each for each in MODULES if each.slug in names]
    return [each for each in MODULES if each.slug in found]


def still_to_do_below(lesson: Lesson) -> list[str]:
    """The ids of the exercises that are to do in the student's modules which this lesson stands on, because their
    solutions are withheld. Optional ones may stay unfinished. Raises CourseError where there is no reading a module.
    """
    if not withheld():
        return []
    return [id for each in below(lesson) if each.is_withheld and not each.is_optional for id in to_do(each.module)]


def check_written(slug: str) -> None:
    """Refuse to import an unfinished module of the student's that stands for a withheld one; name those below too."""
    lesson = next(each for each in MODULES if each.slug == slug)
    if (ids := to_do(lesson.module)) and not lesson.is_optional:
        raise Waits("This", [*still_to_do_below(lesson), *ids])


# --- Imports that obey ------------------------------------------------------------------------------------------------


class StudentLoader(importlib.machinery.SourceFileLoader):
    """Loads a student's module from its text. What Python keeps of a compiled file is taken for current if the file is
    changed within a second and keeps its length.
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
    """Finds `solutions.<slug>` in the student's file where the environment says so, and `reference.<slug>` always in
    solutions/.
    """

    def find_spec(self, fullname, path=None, target=None):
        package, _, slug = fullname.partition(".")
        if package == "solutions" and slug in substitutes():
            file = substitutes()[slug]
            if slug in withheld():
                check_written(slug)
            else:
                try:
                    check_finished(file)
                except CourseError as error:
                    raise UnfinishedModule(str(error)) from None
            return importlib.util.spec_from_file_location(fullname, file, loader=StudentLoader(fullname, str(file)))
        if fullname == "reference":
            spec = importlib.machinery.ModuleSpec("reference", None, is_package=True)
            spec.submodule_search_locations = []
            return spec
        if package == "reference" and (file := ROOT / "solutions" / f"{slug}.py").is_file():
            return importlib.util.spec_from_file_location(fullname, file, loader=ReferenceLoader(fullname, str(file)))
        return None


def install_finder() -> None:
    """Let imports obey the environment. `solutions/__init__.py` calls this."""
    if not any(isinstance(finder, ModuleFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, ModuleFinder())
