"""`make check` on the numbers in the texts: each is in a measurement that is committed here.

A comment says where the numbers below it come from. It holds up to the next such comment or the next heading.

    <!-- measured: preemption-smollm2-135m -->
    <!-- measured: ladder-smollm2-135m/one stream; = [INT8/tokens_per_second] / [engine, kernels/tokens_per_second] -->
    <!-- measured: intro.ipynb -->
    <!-- not measured: arithmetic -->

*Measured* names files: of bench/measurements, a path of the repository, or the lesson's own notebook, whose saved
outputs `make test-notebooks` compares. Every number below it is then in one of them, to the digits that are shown. A
path after the name narrows it to what lies below; `= FORMULA` adds what can be computed, with entries in brackets.
Entries are base units: seconds, bytes, shares of 1; the text's ms, MB and % are converted. A step of a path is a key
of the file or, in a list, what tells the item from others: a text in it (`INT8`), `key=value`, or its index. Steps may
be left out, but the last step of a bracket is the entry's own.

*Not measured* gives the reason why there is nothing to measure: arithmetic, a data sheet, a figure from a publication.

Where no comment holds, no number may look like a measurement: one with a unit of time or rate, or a share or ratio.

The check ignores fenced blocks (commands.py compares those that show what a command prints), code between backticks,
formulas between dollars, pictures, and references such as 5.4 or lesson 5. In tables it ignores the first row and the
first column, which say what is measured. The head of a column or row may give the unit for all its numbers.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
"""What an entry is multiplied by to be shown in this unit."""
NUMBER = r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?"
UNIT = rf"(?:{'|'.join(sorted('|'.join(UNITS).split('|'), key=len, reverse=True))})"
FIGURE = re.compile(rf"(?<![\w.,^-])({NUMBER})(?![\w^]|[.,]\d)(?:[ -]?({UNIT})(?![\w/]))?")
SHARES_A_UNIT = re.compile(rf"(?:,| to| and| or|,? and| to at most) {NUMBER}")
CLAIM = re.compile(
    rf"(?<![\w.,-]){NUMBER} ?(?:tokens/s|tokens a second|ms\b|(?:milli|micro)?seconds?\b|s\b|[GT]B/s|[GT]FLOP/s"
    r"|%|per cent|times (?:as|more|fewer|less|faster|quicker|sooner|slower)\b)"
)
RAW = {"rounds", "ratios", "timeline"}
"""Below these keys stands what was measured each time; a text gives the medians, which stand beside them."""
MAX_VALUES = 20_000  # of one formula: more would fit to any number


@dataclass(frozen=True)
class Entry:
    """A number of a measurement. path: for each step on the way to it, all names by which it may be called."""

    path: tuple[frozenset[str], ...]
    value: float


@dataclass(frozen=True)
class Figure:
    """A number of a text as it is written. scales: what an entry may be multiplied by, to be shown in its unit;
    may_be_condition: it says perhaps not what was measured, but with how many requests, or how long a prompt.
    """

    line: int
    text: str
    number: str
    scales: tuple[float, ...]
    may_be_condition: bool = False

    @property
    def value(self) -> float:
        return float(self.number.replace(",", ""))

    def fits(self, entry: float) -> bool:
        """Does this entry, in the figure's unit, round to what is written?"""
        decimals = len(self.number.partition(".")[2])
        return any(abs(entry * scale - self.value) <= 0.5 * 10**-decimals * (1 + 1e-6) for scale in self.scales)


# ---------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------


@lru_cache
def entries(file: Path) -> tuple[Entry, ...]:
    """Every number in a measurement, or in the saved outputs of a notebook."""
    content = json.loads(file.read_text(encoding="utf-8"))
    if file.suffix == ".ipynb":
        return tuple(printed(content))
    return tuple(walk(content, ()))


def walk(content: object, path: tuple[frozenset[str], ...]) -> Iterator[Entry]:
    if isinstance(content, dict):
        for key, value in content.items():
            if key.isdigit():
                yield Entry(path, int(key))
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


def printed(notebook: dict) -> Iterator[Entry]:
    """The numbers that a notebook's cells have printed, in base units. Their path is the line that was printed."""
    for cell in notebook["cells"]:
        for output in cell.get("outputs", ()):
            text = output.get("text") or output.get("data", {}).get("text/plain", "")
            for line in "".join(text).splitlines():
                for figure in figures(line, 0):
                    yield Entry((frozenset({line}),), figure.value / figure.scales[0])


def below(entry: Entry, steps: list[str]) -> bool:
    """Does the path to an entry pass these steps, in this order?"""
    names = iter(entry.path)
    return all(any(step in name for name in names) for step in steps)


def evaluate(formula: str, given: tuple[Entry, ...]) -> list[float]:
    """All values of a formula, one for each choice of entries that its brackets fit.

    Raises CourseError if it is no arithmetic, or a bracket fits nothing.
    """
    brackets = list(dict.fromkeys(re.findall(r"\[([^\]]*)\]", formula)))
    choices = []
    for bracket in brackets:
        steps = [step.strip() for step in bracket.split("/")]
        found = [entry.value for entry in given if below(entry, steps) and steps[-1] in entry.path[-1]]
        if not found:
            raise CourseError(f"there is no entry [{bracket}]")
        choices.append(found)
    if math.prod(map(len, choices)) > MAX_VALUES:
        raise CourseError(f"{formula!r} fits too many entries to say anything")
    expression = formula
    for number, bracket in enumerate(brackets):
        expression = expression.replace(f"[{bracket}]", f"entry_{number}")
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        return [
            compute(tree, {f"entry_{n}": v for n, v in enumerate(chosen)}) for chosen in itertools.product(*choices)
        ]
    except (SyntaxError, LookupError) as error:
        raise CourseError(f"{formula!r} is no arithmetic on entries") from error


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def compute(node: ast.AST, names: dict[str, float]) -> float:
    if isinstance(node, ast.BinOp):
        right = compute(node.right, names)
        if isinstance(node.op, ast.Div) and not right:
            return math.nan
        return OPERATORS[type(node.op)](compute(node.left, names), right)
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return node.value
    return names[getattr(node, "id", "")]


# ---------------------------------------------------------------------------------------------------------------
# Texts
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """What one comment allows. values: what it names; conditions: whatever stands in the files that it names; printed:
    of notebooks, the numbers of each line of output.
    """

    label: str
    values: tuple[float, ...]
    conditions: tuple[float, ...]
    printed: tuple[tuple[float, ...], ...]

    @classmethod
    def read(cls, document: Path, clauses: str) -> Source:
        """Raises CourseError if a file, a path or a formula leads to nothing."""
        parts = [part.strip() for part in clauses.split(";")]
        allowed: list[Entry] = []
        conditions: list[float] = []
        lines: dict[frozenset[str], list[float]] = {}
        for part in (part for part in parts if not part.startswith("=")):
            file, steps = find(document, part)
            chosen = [entry for entry in entries(file) if below(entry, steps)]
            if not chosen:
                raise CourseError(f"{shown(file)} has no {'/'.join(steps)}")
            allowed += chosen
            conditions += (entry.value for entry in entries(file))
            for entry in chosen if file.suffix == ".ipynb" else ():
                lines.setdefault(entry.path[0], []).append(entry.value)
        values = [entry.value for entry in allowed]
        for part in (part for part in parts if part.startswith("=")):
            values += evaluate(part[1:], tuple(allowed))
        label = " and ".join(part for part in parts if not part.startswith("="))
        return cls(label, tuple(values), tuple(conditions), tuple(map(tuple, lines.values())))

    def has(self, figure: Figure) -> bool:
        return any(map(figure.fits, self.values)) or (
            figure.may_be_condition and any(map(figure.fits, self.conditions))
        )

    def prints(self, row: list[Figure]) -> bool:
        """Are these numbers in one line of a notebook's output, in this order?"""
        for line in self.printed:
            values = iter(line)
            if all(any(figure.fits(value) for value in values) for figure in row):
                return True
        return not self.printed


def find(document: Path, source: str) -> tuple[Path, list[str]]:
    """The file that a source names, and the path within it. The file's own name has slashes only if it is a path."""
    steps = source.split("/")
    for length in range(len(steps), 0, -1):
        name = "/".join(steps[:length])
        for file in (MEASUREMENTS / f"{name}.json", document.parent / name, ROOT / name):
            if file.is_file():
                return file, [step.strip() for step in steps[length:]]
    raise CourseError(f"there is no measurement {source!r}")


def figures(text: str, line: int) -> list[Figure]:
    """The numbers of a text that begins on this line. One that is joined to the next (`2 to 5 ms`, `2 and 5 ms`) may
    have the next one's unit.
    """
    found: list[Figure] = []
    following: re.Match | None = None
    for match in reversed(list(FIGURE.finditer(text))):
        scales = (scale_of(match[2]),) if match[2] else (1,)
        if not match[2] and following and SHARES_A_UNIT.fullmatch(text[match.end() : following.end(1)]):
            scales = (*found[-1].scales, *scales)
        found.append(Figure(line + text.count("\n", 0, match.start()), match[0], match[1], scales))
        following = match
    return found[::-1]


def scale_of(unit: str) -> float:
    return next(scale for pattern, scale in UNITS.items() if re.fullmatch(pattern, unit))


def strip(text: str) -> str:
    """The text without what is no figure: code, formulas, pictures, addresses, comments, references."""
    for pattern in (
        r"<!--.*?-->",
        r"<[^<>\n]+>",
        r"(`+).+?\1",
        r"\$\$.+?\$\$|\$[^$\n]+\$",
        r"!\[[^\]]*\]\([^)]*\)",
        r"(?<=\])\([^)]*\)",
        r"\b(?:lessons?|exercises?|sections?|figures?|Python|torch) \d[\d.]*(?:(?:,| to| and) \d[\d.]*)*",
        r"(?<![\w,.])(?:19|20)\d\d(?![\w,.]*\d)",  # a year: from a thousand on, numbers have commas
    ):
        text = re.sub(pattern, lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.DOTALL | re.IGNORECASE)
    return text


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def rows(paragraph: str, line: int) -> Iterator[list[Figure]]:
    """The numbers of a paragraph, one by one; those of a table, row by row, without its first row and first column,
    which may name a unit.
    """
    lines = paragraph.split("\n")
    if len(lines) < 3 or not re.fullmatch(r"[\s|:-]+", lines[1]):
        for figure in figures(paragraph, line):
            yield [replace(figure, may_be_condition=figure.text.replace(",", "").isdigit())]
        return
    head = cells(lines[0])
    for number, row in enumerate(lines[2:], start=line + 2):
        found: list[Figure] = []
        first, *others = cells(row)
        for column, cell in enumerate(others, start=1):
            labels = [*head[column : column + 1], first]
            unit = next(filter(None, (re.search(rf"(?<!\w){UNIT}(?![\w/])", label) for label in labels)), None)
            for figure in figures(cell, number):
                if figure.number == figure.text and unit:
                    figure = replace(figure, text=f"{figure.text} {unit[0]}", scales=(scale_of(unit[0]),))
                found.append(figure)
        yield found


def paragraphs(text: str) -> Iterator[tuple[int, list[str]]]:
    """Runs of lines that are not empty; a heading and a comment are each one by itself. With their line numbers."""
    run: list[str] = []
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        alone = re.match(r"#{1,6}\s|\s*<!--", line)
        if run and (alone or not line.strip()):
            yield number - len(run), run
            run = []
        if alone:
            yield number, [line]
        elif line.strip():
            run.append(line)


def sourced(document: Path, text: str) -> Iterator[tuple[int, str, Source | str | None]]:
    """The paragraphs of a text, each with its line and what the comment above it says: where its numbers were measured,
    why they were not, or None. Raises CourseError, with the line, for a comment that says nothing.
    """
    said: Source | str | None = None
    for line, lines in paragraphs(text):
        paragraph = "\n".join(lines)
        if re.match(r"#{1,6}\s", paragraph):
            said = None
        if comment := re.fullmatch(r"\s*<!--\s*(not )?measured:\s*(.*?)\s*-->\s*", paragraph):
            try:
                said = comment[2] if comment[1] else Source.read(document, comment[2])
            except CourseError as error:
                raise CourseError(f"{shown(document)}:{line}: {error}.") from None
            if not said:
                raise CourseError(f"{shown(document)}:{line}: 'not measured:' without a reason.")
        else:
            yield line, strip(paragraph), said


def check_figures(document: Path, text: str, own_ids: frozenset[str] = frozenset()) -> Iterator[str]:
    """Complaints about the numbers of a text, whose fenced blocks are blanked out. own_ids: its lesson's exercises."""
    try:
        for line, paragraph, said in sourced(document, text):
            if isinstance(said, Source):
                for at, complaint in check_measured(said, paragraph, line, own_ids):
                    yield f"{shown(document)}:{at}: {complaint}"
            elif said is None:
                for match in CLAIM.finditer(paragraph):
                    at = line + paragraph.count("\n", 0, match.start())
                    yield f"{shown(document)}:{at}: where was {match[0]} measured? See {shown(__file__)}."
    except CourseError as error:
        yield str(error)


def check_measured(source: Source, paragraph: str, line: int, own_ids: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Complaints about a paragraph below a comment that names its source, each with its line. A number that is an
    exercise's, without a unit, means the exercise.
    """
    for row in rows(paragraph, line):
        missing = [figure for figure in row if figure.text not in own_ids and not source.has(figure)]
        yield from ((figure.line, f"{figure.text} is not in {source.label}.") for figure in missing)
        if len(row) > 1 and not missing and not source.prints(row):
            yield row[0].line, f"no line of {source.label} has all numbers of this row."
