"""Part of `make check`: the numbers in the texts are those of committed measurements.

A comment names the source of the numbers below it, up to the next such comment or the next heading.

    <!-- measured: preemption-smollm2-135m -->
    <!-- measured: ladder-smollm2-135m/one stream; = [INT8/tokens_per_second] / [engine, kernels/tokens_per_second] -->
    <!-- measured: intro.ipynb -->
    <!-- not measured: arithmetic -->

*Measured* names files of bench/measurements, paths in the repository, or the lesson's own notebook, whose saved outputs
`make test-notebooks` compares. Then every number with a unit, and every number of a table, must be in one of them, to
the digits that are shown. A path after the name selects a part of the file. `= FORMULA` adds computed numbers; entries
stand in brackets. Entries are in base units: seconds, bytes, shares of 1. A step of a path is a key of the file or, in
a list, a text in the item (`INT8`), `key=value` or its index. Steps may be left out, except the last step of a bracket,
which is the entry's own.

*Not measured* gives the reason: arithmetic, a data sheet, a figure from a publication. Where no comment applies, no
number may have a unit of time or rate, or be a share or a ratio.

Fenced blocks, code between backticks, formulas between dollars and pictures are not checked. Neither are the first row
and the first column of a table, which may name the unit of all numbers in that column or row.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from common.course import ROOT, CourseError, shown

MEASUREMENTS = ROOT / "common" / "bench" / "measurements"

UNITS = {
    "microseconds?": 1e6,
    "ms|milliseconds?": 1e3,
    "s|seconds?": 1,
    "%|per cent": 100,
    "kB": 1e-3,
    "MB": 1e-6,
    "GB": 1e-9,
    "MiB": 2**-20,
    "GiB": 2**-30,
    "tokens/s|tokens a second|GB/s|GFLOP/s|times": 1,
}
"""The factor from an entry to its number in this unit."""
UNIT = rf"(?:{'|'.join(sorted('|'.join(UNITS).split('|'), key=len, reverse=True))})(?![\w/])"
NUMBER = r"(?<![\w.,^-])[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w^]|[.,]\d)"
FIGURE = re.compile(rf"({NUMBER})(?:[ -]?({UNIT}))?")
CLAIM = re.compile(
    rf"{NUMBER} ?(?:tokens/s|tokens a second|ms\b|(?:milli|micro)?seconds?\b|s\b|[GT]B/s|[GT]FLOP/s"
    r"|%|per cent|times (?:as|more|fewer|less|faster|quicker|sooner|slower)\b)"
)
NO_FIGURES = re.compile(
    r"<!--.*?-->|<[^<>\n]+>|(`+).+?\1|\$\$.+?\$\$|\$[^$\n]+\$|!\[[^\]]*\]\([^)]*\)|(?<=\])\([^)]*\)", re.DOTALL
)
"""Code, formulas, pictures, addresses and comments."""
RAW = {"rounds", "ratios", "timeline"}
"""Keys of the single measurements, which a text must not quote, since their medians stand beside them."""


@dataclass(frozen=True)
class Entry:
    """A number of a measurement. path: for each step of the way to it, all its names."""

    path: tuple[frozenset[str], ...]
    value: float

    def is_below(self, steps: list[str]) -> bool:
        """Whether the path contains these steps in this order."""
        names = iter(self.path)
        return all(any(step in name for name in names) for step in steps)


@dataclass(frozen=True)
class Figure:
    """A number of a text, as it is written."""

    line: int
    text: str
    number: str
    unit: str

    @property
    def scale(self) -> float:
        return next((scale for pattern, scale in UNITS.items() if re.fullmatch(pattern, self.unit)), 1)

    @property
    def value(self) -> float:
        return float(self.number.replace(",", ""))

    def is_in(self, values: list[float]) -> bool:
        """Whether one of these values, in the figure's unit, rounds to the written number."""
        margin = 0.5 * 10 ** -len(self.number.partition(".")[2]) * (1 + 1e-6)
        return any(abs(value * self.scale - self.value) <= margin for value in values)


# --- Measurements -----------------------------------------------------------------------------------------------------


@lru_cache
def entries(file: Path) -> list[Entry]:
    """Every number in a measurement, or in the outputs of a notebook."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if file.suffix != ".ipynb":
        return list(walk(content, ()))
    outputs = [output for cell in content["cells"] for output in cell.get("outputs", ())]
    texts = ["".join(each.get("text") or each.get("data", {}).get("text/plain", "")) for each in outputs]
    return [Entry((), figure.value / figure.scale) for figure in figures("\n".join(texts), 0)]


def walk(content: object, path: tuple[frozenset[str], ...]) -> Iterator[Entry]:
    if isinstance(content, dict):
        for key, value in content.items():
            if key not in RAW:
                yield from walk(value, (*path, frozenset({key})))
    elif isinstance(content, list):
        for index, item in enumerate(content):
            scalars = item.items() if isinstance(item, dict) else ()
            texts = {value for _, value in scalars if isinstance(value, str)}
            pairs = {f"{key}={value}" for key, value in scalars if not isinstance(value, (dict, list))}
            yield from walk(item, (*path, frozenset({str(index), *texts, *pairs})))
    elif isinstance(content, (int, float)) and not isinstance(content, bool):
        in_milliseconds = path and any(name.endswith("_ms") for name in path[-1])
        yield Entry(path, content / 1000 if in_milliseconds else content)


def allowed(document: Path, source: str) -> list[float]:
    """All values that a comment's `source` names. Raises CourseError if a part of it names none."""
    parts = [part.strip() for part in source.split(";")]
    chosen: list[Entry] = []
    for part in (part for part in parts if not part.startswith("=")):
        file, steps = find(document, part)
        below = [entry for entry in entries(file) if entry.is_below(steps)]
        if not below:
            raise CourseError(f"{shown(file)} has no {'/'.join(steps)}")
        chosen += below
    computed = (evaluate(part[1:].strip(), chosen) for part in parts if part.startswith("="))
    return [entry.value for entry in chosen] + list(itertools.chain.from_iterable(computed))


def find(document: Path, source: str) -> tuple[Path, list[str]]:
    """The file that a source names, and the path within it. Raises CourseError if there is no such file."""
    steps = source.split("/")
    for length in range(len(steps), 0, -1):
        name = "/".join(steps[:length])
        for file in (MEASUREMENTS / f"{name}.json", document.parent / name, ROOT / name):
            if file.is_file():
                return file, [step.strip() for step in steps[length:]]
    raise CourseError(f"there is no measurement {source!r}")


def evaluate(formula: str, given: list[Entry]) -> Iterator[float]:
    """All values of a formula, one for each choice of entries that its brackets name. Raises CourseError if a bracket
    names none, or the formula is no arithmetic.
    """
    brackets = list(dict.fromkeys(re.findall(r"\[([^\]]*)\]", formula)))
    choices = []
    for bracket in brackets:
        steps = [step.strip() for step in bracket.split("/")]
        choices.append([entry.value for entry in given if entry.is_below(steps) and steps[-1] in entry.path[-1]])
        if not choices[-1]:
            raise CourseError(f"there is no entry [{bracket}]")
    for number, bracket in enumerate(brackets):
        formula = formula.replace(f"[{bracket}]", f"entry[{number}]")
    for entry in itertools.product(*choices):
        try:
            yield eval(formula, {"__builtins__": {}}, {"entry": entry})
        except ZeroDivisionError:
            continue
        except (SyntaxError, NameError) as error:
            raise CourseError(f"{formula!r} is no arithmetic on entries") from error


# --- Texts ------------------------------------------------------------------------------------------------------------


def figures(text: str, line: int) -> list[Figure]:
    """The numbers of a text whose first line has this number."""
    found = FIGURE.finditer(text)
    return [Figure(line + text.count("\n", 0, each.start()), each[0], each[1], each[2] or "") for each in found]


def to_check(paragraph: str, line: int) -> Iterator[Figure]:
    """The numbers of a paragraph that have a unit; of a table, all but those in its first row and first column."""
    lines = paragraph.split("\n")
    if len(lines) < 3 or not re.fullmatch(r"[\s|:-]+", lines[1]):
        yield from (figure for figure in figures(paragraph, line) if figure.unit)
        return
    head, _, *rows = ([cell.strip() for cell in row.strip().strip("|").split("|")] for row in lines)
    for number, (first, *others) in enumerate(rows, start=line + 2):
        for column, cell in enumerate(others, start=1):
            labels = " ".join([*head[column : column + 1], first])
            unit = re.search(rf"(?<!\w){UNIT}", labels)
            for each in figures(cell, number):
                yield each if each.unit or not unit else Figure(number, f"{each.text} {unit[0]}", each.number, unit[0])


def paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """The paragraphs of a text, each with the number of its first line. Headings and comments are paragraphs of their
    own. Code, formulas, pictures and addresses are blanked out.
    """
    alone = re.compile(r"#{1,6}\s|\s*<!--")

    def which(numbered: tuple[int, str]) -> object:
        """Consecutive lines with the same key are one paragraph."""
        number, line = numbered
        return (number,) if alone.match(line) else bool(line.strip())

    for is_text, lines in itertools.groupby(enumerate(text.splitlines(), start=1), which):
        if is_text:
            numbers, run = zip(*lines)
            is_comment = run[0].lstrip().startswith("<!--")
            yield numbers[0], run[0] if is_comment else NO_FIGURES.sub(blank, "\n".join(run))


def blank(match: re.Match) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def sourced(document: Path, text: str) -> Iterator[tuple[int, str, list[float] | str | None]]:
    """The paragraphs of a text, each with its line and the comment that applies to it: the values that it allows, the
    reason why nothing was measured, or None. Raises CourseError for a comment that names nothing or gives no reason.
    """
    said: list[float] | str | None = None
    for line, paragraph in paragraphs(text):
        if re.match(r"#{1,6}\s", paragraph):
            said = None
        if comment := re.fullmatch(r"\s*<!--\s*(not )?measured:\s*(.*?)\s*-->\s*", paragraph):
            try:
                said = comment[2] if comment[1] else allowed(document, comment[2])
            except CourseError as error:
                raise CourseError(f"{shown(document)}:{line}: {error}.") from None
            if not said:
                raise CourseError(f"{shown(document)}:{line}: 'not measured:' without a reason.")
        else:
            yield line, paragraph, said


def check_figures(document: Path, text: str) -> Iterator[str]:
    """Complaints about the numbers of a text, whose fenced blocks are blanked out."""
    try:
        for line, paragraph, said in sourced(document, text):
            if said is None:
                for match in CLAIM.finditer(paragraph):
                    at = line + paragraph.count("\n", 0, match.start())
                    yield f"{shown(document)}:{at}: where was {match[0]} measured? See {shown(__file__)}."
            elif not isinstance(said, str):
                for figure in to_check(paragraph, line):
                    if not figure.is_in(said):
                        yield f"{shown(document)}:{figure.line}: {figure.text} is not in what the comment above names."
    except CourseError as error:
        yield str(error)
