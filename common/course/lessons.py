"""The lessons of the course, and the paths of their files. Imports only the standard library."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WITHHELD = "# Withheld in this copy of the course: yours to write, in the lesson's own folder, not here.\n"
"""The first line of a solution that `make release` has emptied."""


class CourseError(Exception):
    """An error that the user can mend. The text says what is wrong, where, and what to do."""


@functools.cache
def first_line(file: Path) -> str:
    """The first line of a file, "" if there is no file. It is read once and then kept."""
    try:
        with file.open(encoding="utf-8") as lines:
            return lines.readline()
    except FileNotFoundError:
        return ""


@dataclass(frozen=True)
class Lesson:
    """A lesson, or a further module of one. Its files are named by the slug: folder `llm-basics`, module `llm_basics`.

    A further module of a lesson, such as `engine` of the last one, has the same number and name, and `part` is the slug
    of its module, checks and answers. Text, hints and notebook are the lesson's. An optional module has its own title
    and is worth no points: the lesson is complete without it, and no other module needs the student's version.
    """

    number: int
    name: str
    title: str
    hours: int
    part: str = ""
    is_optional: bool = False
    needs: str = ""  # a package, and the extra of pyproject.toml with it, without which the module cannot be imported

    @property
    def is_importable(self) -> bool:
        """Whether the package that it needs is installed."""
        return not self.needs or importlib.util.find_spec(self.needs) is not None

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
        """Whether `make release` has removed the solution from this copy (common/instructor/release.py)."""
        return first_line(self.solution) == WITHHELD

    @property
    def checks(self) -> Path:
        return self.folder / f"test_{self.slug}.py"

    @property
    def answers(self) -> Path:
        """The catalogue of wrong answers and other right answers."""
        return ROOT / "solutions" / "tests" / "answers" / f"{self.slug}.py"

    @property
    def hints(self) -> Path:
        return self.folder / "hints.md"

    @property
    def readme(self) -> Path:
        return self.folder / "README.md"

    @property
    def second_pages(self) -> list[Path]:
        """`more.md`, which the exercises do not need, if the lesson has one."""
        return sorted(self.folder.glob("more.md"))

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
MODULES = (
    *LESSONS[:2],
    replace(LESSONS[2], part="mixture_of_experts", title="A mixture of experts", is_optional=True),
    *LESSONS[2:4],
    replace(LESSONS[4], part="sliding_window", title="Blocks beside a sliding window", is_optional=True),
    LESSONS[4],
    replace(LESSONS[4], part="triton_kernels", title="Kernels for a GPU", is_optional=True, needs="triton"),
    replace(LESSONS[5], part="scheduler"),
    *LESSONS[5:8],
    replace(LESSONS[7], part="triton_int4", title="Four bits on a GPU", is_optional=True, needs="triton"),
    LESSONS[8],
    replace(LESSONS[8], part="engine"),
)
"""All modules with exercises, each after the modules that it builds on: one or more for each lesson."""


def lesson(number: int | str) -> Lesson:
    """The lesson with this number. Raises CourseError if there is none."""
    for candidate in LESSONS:
        if str(candidate.number) == str(number):
            return candidate
    raise CourseError(f"There is no lesson {number}: those that are written are 0 to {LESSONS[-1].number}.")


def modules_of(number: int | str) -> list[Lesson]:
    """The modules of the lesson with this number, the optional ones last."""
    return sorted((each for each in MODULES if each.number == lesson(number).number), key=lambda each: each.is_optional)


def shown(path: Path | str) -> str:
    """A path as the user would type it: relative to the working directory if it is below that."""
    try:
        return str(Path(path).resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def counted(number: int, noun: str) -> str:
    """ "1 test", "2 tests"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
