"""Which lessons there are, where their files lie, and which file `solutions.<slug>` means.

By default `solutions.llm_basics` is the reference, solutions/llm_basics.py. With `MINE=0-2` it is the student's
lesson-1-llm-basics/llm_basics.py. The choice travels in the environment, so that every process started from here
agrees: spawned workers, torchrun, a notebook's kernel. `reference.llm_basics` is always the reference, for a check
that needs an oracle which is not the student's. In a copy of the course that `make release` has made, some solutions
are withheld: the student's file then stands for them, whatever MINE says.

Imports nothing but the standard library.
"""

from __future__ import annotations

import ast
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES_VARIABLE = "COURSE_MODULES"
"""The environment variable with `slug=file` pairs, separated like the entries of PATH."""
WITHHELD = "# Withheld in this copy of the course: yours to write, in the lesson's own folder, not here.\n"
"""The first line of a solution that `make release` has emptied."""


class CourseError(Exception):
    """Something that the person at the keyboard can mend; its text says what is wrong, where, and what to do."""


class UnfinishedModule(CourseError, ImportError):
    """A module of the student's was imported in which exercises are still to do."""


@dataclass(frozen=True)
class Lesson:
    """One lesson; its files are all named by the slug: `llm-basics` for the folder, `llm_basics` for the modules.

    The last lesson has a second module, the assembly: the same lesson with `part` set, which is then the slug of its
    module, checks and answers. Text, hints and notebook are the lesson's.
    """

    number: int
    name: str
    title: str
    hours: int
    part: str = ""

    @property
    def slug(self) -> str:
        return self.part or self.name.replace("-", "_")

    @property
    def folder(self) -> Path:
        return ROOT / f"lesson-{self.number}-{self.name}"

    @property
    def module(self) -> Path:
        """The skeleton, which the student fills in."""
        return self.folder / f"{self.slug}.py"

    @property
    def solution(self) -> Path:
        return ROOT / "solutions" / f"{self.slug}.py"

    @property
    def is_withheld(self) -> bool:
        """Whether this copy of the course came without the solution: see common/instructor/release.py."""
        return first_line(self.solution) == WITHHELD

    @property
    def checks(self) -> Path:
        return self.folder / f"test_{self.slug}.py"

    @property
    def answers(self) -> Path:
        """The catalogue of named wrong answers and other right ones."""
        return ROOT / "solutions" / "tests" / "answers" / f"{self.slug}.py"

    @property
    def hints(self) -> Path:
        return self.folder / "hints.md"

    @property
    def readme(self) -> Path:
        return self.folder / "README.md"

    @property
    def notebook(self) -> Path:
        return self.folder / f"{self.name.replace('-', '_')}.ipynb"


LESSONS = (
    Lesson(0, "intro", "Introduction", 2),
    Lesson(1, "llm-basics", "LLM basics", 5),
    Lesson(2, "llama-pytorch", "Llama in PyTorch", 7),
    Lesson(3, "kv-cache", "The KV cache", 4),
    Lesson(4, "paged-attention", "Paged attention", 6),
    Lesson(5, "batching", "Continuous batching", 9),
    Lesson(6, "parallelism", "Parallelism", 9),
    Lesson(7, "quantization", "Quantization", 7),
    Lesson(8, "speculative", "Speculative decoding, and the engine", 6),
)
GAINS = {
    0: "You can say how fast an engine can be before it is written.",
    1: "Plain functions of yours read a text and know what may come next.",
    2: "A Llama of your own reads its weights from disk and tells a story.",
    3: "It remembers: every token is computed once.",
    4: "Its memory is cut into blocks, and what begins alike is kept once.",
    5: "It serves many people at once, and no request waits for the others.",
    6: "One model runs on several processes, none of which holds all of it.",
    7: "The same model takes a quarter of the memory, and hardly gets worse.",
    8: "It drafts tokens ahead and says the same, in fewer steps; and it is whole.",
}
"""What each lesson makes possible."""
MODULES = (*LESSONS, replace(LESSONS[8], part="engine"))
"""All that can be filled in and graded: a module for each lesson, and the assembly."""


def lesson(number: int | str) -> Lesson:
    """The lesson with this number."""
    for candidate in LESSONS:
        if str(candidate.number) == str(number):
            return candidate
    raise CourseError(f"There is no lesson {number}: those that are written are 0 to {LESSONS[-1].number}.")


def modules_of(number: int | str) -> list[Lesson]:
    """The modules of the lesson with this number: one, but for the last."""
    return [each for each in MODULES if each.number == lesson(number).number]


def shown(path: Path | str) -> str:
    """A path as a person would type it: relative to where they stand, if it lies below."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


# ---------------------------------------------------------------------------------------------------------------
# Whose code
# ---------------------------------------------------------------------------------------------------------------


@functools.cache
def first_line(file: Path) -> str:
    """The first line of a file, as it was when it was first asked for; empty if there is no file."""
    try:
        with file.open(encoding="utf-8") as lines:
            return lines.readline()
    except FileNotFoundError:
        return ""


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


def unfinished(source: str) -> list[str]:
    """The ids of the exercises in this source that still raise their `NotImplementedError("TODO 1.4")`, in order."""
    raised = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Raise)]
    return [
        node.exc.args[0].value.removeprefix("TODO ")
        for node in sorted(raised, key=lambda node: node.lineno)
        if isinstance(node.exc, ast.Call)
        and getattr(node.exc.func, "id", None) == "NotImplementedError"
        and node.exc.args
        and isinstance(node.exc.args[0], ast.Constant)
        and str(node.exc.args[0].value).startswith("TODO ")
    ]


def to_do(file: Path) -> list[str]:
    """The ids of the exercises that are still to do in a file. Raises CourseError if there is none to be read."""
    if not file.is_file():
        raise CourseError(f"{shown(file)} does not exist.")
    try:
        return unfinished(file.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise CourseError(f"{shown(file)}:{error.lineno}: Python cannot read this line: {error.msg}.") from None


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
    is withheld the module is the student's in any case, and only what needs it finds out.
    """
    modules = [module for each in parse_mine(mine or "") for module in modules_of(each.number)]
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


def files_used(lessons: tuple[Lesson, ...] = LESSONS) -> str:
    """One line that says whose code runs, for the first output of every command."""
    mine = substitutes()
    return ", ".join(f"lesson {each.number} {'yours' if each.slug in mine else 'reference'}" for each in lessons) + "."


class ModuleFinder(importlib.abc.MetaPathFinder):
    """Finds `solutions.<slug>` in the student's file where the environment says so, and `reference.<slug>` always in
    solutions/.
    """

    def find_spec(self, fullname, path=None, target=None):
        package, _, slug = fullname.partition(".")
        if package == "solutions" and slug in substitutes():
            file = substitutes()[slug]
            if slug in withheld():
                from common.instructor.release import check_written  # which imports this module

                check_written(slug)
            try:
                check_finished(file)
            except CourseError as error:
                raise UnfinishedModule(str(error)) from None
            return importlib.util.spec_from_file_location(fullname, file)
        if fullname == "reference":
            spec = importlib.machinery.ModuleSpec("reference", None, is_package=True)
            spec.submodule_search_locations = []
            return spec
        if package == "reference" and (file := ROOT / "solutions" / f"{slug}.py").is_file():
            return importlib.util.spec_from_file_location(fullname, file, loader=ReferenceLoader(fullname, str(file)))
        return None


class ReferenceLoader(importlib.machinery.SourceFileLoader):
    """Loads a reference module so that what it imports from `solutions` is the reference too."""

    def get_code(self, fullname):
        tree = ast.parse(self.get_data(self.path), self.path)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "solutions":
                node.module = "reference" + node.module.removeprefix("solutions")
        return compile(tree, self.path, "exec")


def install_finder() -> None:
    """Let imports obey the environment. `solutions/__init__.py` calls this."""
    if not any(isinstance(finder, ModuleFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, ModuleFinder())
