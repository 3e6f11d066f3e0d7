"""Part of `make check`: commands in READMEs, hints and notebooks exist, and each exercise is described and has hints.

In a fenced block of commands (bash, sh or console) each line that calls `make` or `python -m common` must name an
existing target, exercise, lesson and variables. The same holds for `make ...` between backticks in the text, where N
and N.M stand for any number. Commands that change nothing are also run. `commands.py` runs all others, unless a line
`<!-- not run: REASON -->` stands above the block. `figures.py` checks the numbers, and `make book` the links.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import click
from markdown_it import MarkdownIt

from common import options
from common.authoring.readmes.figures import check_figures
from common.commands import UnknownTarget, parse
from common.course import LESSONS, ROOT, CourseError, Lesson, lesson, modules_of, shown
from common.course.exercises import exercises_of, read_hints

SHELLS = ("bash", "sh", "console", "shell")
READ_ONLY = ("help", "progress")
NUM_HINTS = 3
MAX_LINE = 120  # of a fenced block; the book's column has this width


@dataclass(frozen=True)
class Block:
    """A fenced block: the number of its first line, its language, its lines, and the reason why it is not run."""

    line: int
    language: str
    lines: tuple[str, ...]
    not_run: str | None


def documents() -> list[Path]:
    others = ("", "common/", "common/instructor/", "common/models/")
    candidates = [
        *(ROOT / f"{folder}README.md" for folder in others),
        *(file for each in LESSONS for file in (each.readme, *each.second_pages, each.hints)),
    ]
    return [path for path in candidates if path.exists()]


def between_cells(notebook: Path) -> Iterator[tuple[int, str]]:
    """The Markdown cells of a notebook, each with its number, counted from 1."""
    for number, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"], start=1):
        if cell["cell_type"] == "markdown":
            yield number, "".join(cell["source"])


# --- Reading Markdown -------------------------------------------------------------------------------------------------


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a text. A mark applies to the block directly below it."""
    found: list[Block] = []
    reason: str | None = None
    for token in MarkdownIt().parse(text):
        if token.type == "fence":
            language, *_ = [*token.info.lower().split(), ""]
            found.append(Block(token.map[0] + 2, language, tuple(token.content.splitlines()), reason))
        mark = re.fullmatch(r"\s*<!--\s*not run:\s*(.*?)\s*-->\s*", token.content)
        reason = mark[1] if mark and token.type == "html_block" else None
    return found


def prose(text: str) -> str:
    """The text with its fenced blocks blanked out, line numbers unchanged."""
    lines = text.splitlines()
    for block in blocks(text):
        for number in range(block.line - 2, min(block.line + len(block.lines), len(lines))):
            lines[number] = ""
    return "\n".join(lines)


# --- Commands ---------------------------------------------------------------------------------------------------------


def check_target(words: list[str], variables: dict[str, str]) -> str | None:
    """What is wrong with a command, its arguments or its variables; None if nothing is."""
    try:
        command, rest = parse(words)
        if command.argument == "N":
            lesson(rest[0])
        elif command.argument == "N.M" and rest[0] not in exercise_ids(rest[0].partition(".")[0]):
            return f"there is no exercise {rest[0]}"
        if command.extra is not None:  # it has options
            function = options.find(command)
            options.check_variables(command, function, list(variables))
            with mock.patch.dict(os.environ, variables):
                function.make_context(command.name, list(rest))
    except click.exceptions.Exit:  # --help
        return None
    except click.ClickException as error:
        return options.sentence(command, error)
    except (UnknownTarget, CourseError) as error:
        return str(error)
    return None


def check_command(line: str) -> str | None:
    """What is wrong with one command line, if it is a call of `make` or `python -m common`; None otherwise."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError as error:
        return f"a shell cannot read this: {error}"
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0], re.DOTALL):
        del words[0]
    if not words:
        return None
    program = Path(words[0]).name
    if program == "make":
        targets = [word for word in words[1:] if "=" not in word]
        variables = dict(word.split("=", 1) for word in words[1:] if "=" in word)
        variables.pop("PYTHON", None)
        return next((problem for target in targets if (problem := check_target([target], variables))), None)
    if re.fullmatch(r"python[\d.]*", program) and words[1:3] == ["-m", "common"]:
        return check_target([word for word in words[3:] if word != "--here"], {})
    return None


def command_lines(block: Block) -> Iterator[tuple[int, str]]:
    """The commands of a block: in a console, what follows the prompt; in a script, every line that is no comment.
    Lines that a backslash joins come as one.
    """
    joined, start = "", 0
    for number, line in enumerate(block.lines, start=block.line):
        if not joined and block.language == "console" and not line.lstrip().startswith("$ "):
            continue
        start = start if joined else number
        joined += line.strip()
        if joined.endswith("\\"):
            joined = joined[:-1] + " "
            continue
        yield start, joined.removeprefix("$ ")
        joined = ""


def check_commands(path: Path, text: str, runnable: set[str]) -> Iterator[str]:
    """Complaints about the commands in a text. The commands that change nothing are added to `runnable`."""
    for block in blocks(text):
        if block.not_run == "":
            yield f"{shown(path)}:{block.line}: 'not run:' without a reason."
        for number, line in enumerate(block.lines if block.language != "mermaid" else (), start=block.line):
            if len(line) > MAX_LINE:
                yield f"{shown(path)}:{number}: this line has {len(line)} characters; at most {MAX_LINE} fit a page."
        if block.language not in SHELLS:
            continue
        for number, line in command_lines(block):
            if problem := check_command(line):
                yield f"{shown(path)}:{number}: `{line}`: {problem}"
            elif (match := re.fullmatch(r"make ([\w-]+)", line)) and match[1] in READ_ONLY:
                runnable.add(match[1])
    for number, line in enumerate(prose(text).splitlines(), start=1):
        for code in re.findall(r"`((?:make|python3? -m common) [^`]+)`", line):
            example = re.sub(r"(-|\s)N\.M\b", rf"\g<1>{exercise_ids(0)[0]}", code)
            example = re.sub(r"(-|\s)N\b", r"\g<1>0", example)
            example = re.sub(r"=(?=\s|$)|\s(\.{3}|…)$", "", example) if "make" in example else example
            if problem := check_command(example):
                yield f"{shown(path)}:{number}: `{code}`: {problem}"


def exercise_ids(number: int | str) -> list[str]:
    """The ids of the exercises of a lesson, in all its modules."""
    return [exercise.id for module in modules_of(number) for exercise in exercises_of(module)]


# --- Exercises and hints ----------------------------------------------------------------------------------------------


def check_lesson(each: Lesson) -> Iterator[str]:
    """Complaints about exercises whose number is not in the README or the second page, or that lack a hint."""
    ids, hints = exercise_ids(each.number), read_hints(each)
    text = "".join(page.read_text(encoding="utf-8") for page in [each.readme, *each.second_pages])
    for id in ids:
        if not re.search(rf"(?<![\d.]){re.escape(id)}(?!\d|\.\d)", text):
            yield f"{shown(each.readme)}: nothing is said of exercise {id}."
        given = hints.pop(id, [])
        if len(given) != NUM_HINTS or not all(given):
            yield f"{shown(each.hints)}: exercise {id} has {sum(map(bool, given))} hints; it needs {NUM_HINTS}."
    for id in hints:
        yield f"{shown(each.hints)}: hints for {id}, which is no exercise."


def complaints() -> list[str]:
    """A line for each fault of the texts."""
    found: list[str] = []
    runnable: set[str] = set()
    for path in documents():
        text = path.read_text(encoding="utf-8")
        found += check_commands(path, text, runnable)
        if path.name == "README.md":
            found += check_figures(path, prose(text))
    for each in LESSONS:
        found += check_lesson(each)
        for cell, text in between_cells(each.notebook):
            in_cell = check_commands(each.notebook, text, runnable)
            found += (f"cell {cell} of {complaint}" for complaint in in_cell)
    for name in sorted(runnable):
        command = [sys.executable, "-m", "common", name]
        result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode:
            found.append(f"make {name} fails with exit status {result.returncode}:\n{result.stdout[-2000:]}")
    return found
