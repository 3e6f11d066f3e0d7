"""Runs what the READMEs say to type, in a copy of the course whose lessons are finished.

`make test-all` runs every line of a block of commands (bash, sh, console, shell) and every Python block, from top to
bottom. Blocks below `<!-- not run: REASON -->` are left out, or only one line of the block, if the reason begins with
it. A command must end with exit status 0. Commands that another one covers are left out too:

- a line that occurred in an earlier text;
- all but the first `make test-lesson-N`, because test_student.py runs it for every N;
- all but the first `make test-N.M` and the like, because `make check` looks their numbers up;
- the commands that `make check` runs itself;
- a `make run` or `make chat` whose options are among those of another one.

MODEL=tales is set in the environment, so the small model answers, unless a command names another. `make chat` gets
hello and then goodbye as its input.

If a fold that begins with 'What you see' follows a block, the block must print what is shown in it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.authoring.readmes.checks import READ_ONLY, SHELLS, Block, blocks, command_lines, documents
from common.course import MODULES, MODULES_VARIABLE, ROOT, CourseError, shown

SECONDS = 240
CHAT = "Hello!\n/quit\n"
NOT_COPIED = (".git", ".venv", ".course", "__pycache__", ".pytest_cache", ".ruff_cache", ".hypothesis", "*.egg-info")


@dataclass(frozen=True)
class Command:
    """A shell line or a Python program of a text. prints: its output, if the text shows it."""

    path: Path
    line: int
    text: str
    is_python: bool
    prints: str | None = None

    def __str__(self) -> str:
        first, *others = self.text.splitlines()
        return f"{shown(self.path)}:{self.line}: `{first}{' ...' if others else ''}`"


def commands_of(path: Path) -> Iterator[Command]:
    """The commands of a text, in its order. Raises CourseError if it is not clear which one prints a shown output."""
    text = path.read_text(encoding="utf-8")
    for block in blocks(text):
        if block.language == "python" and block.not_run is None:
            yield Command(path, block.line, "\n".join(block.lines), True, shown_output(text, block))
        elif block.language in SHELLS:
            lines = to_run(block)
            output = shown_output(text, block)
            if output is not None and len(lines) > 1:
                raise CourseError(f"{shown(path)}:{block.line}: which of these lines prints what is shown below?")
            for number, line in lines:
                yield Command(path, number, line, False, output)


def to_run(block: Block) -> list[tuple[int, str]]:
    """The commands of a block, without those that are marked as not run."""
    lines = list(command_lines(block))
    if block.not_run is None:
        return lines
    others = [(number, line) for number, line in lines if not block.not_run.startswith(re.sub(r"\s+#.*", "", line))]
    return others if len(others) < len(lines) else []


def shown_output(text: str, block: Block) -> str | None:
    """The code at the beginning of a fold 'What you see' directly below the block: a block or a span; or None."""
    behind = "\n".join(text.splitlines()[block.line + len(block.lines) :])
    fold = re.match(r"\s*<details><summary>What you see[^<]*</summary>\s*(?:<!--.*?-->\s*)?", behind)
    if not fold:
        return None
    code = re.compile(r"```\n(.*?)\n```|`([^`\n]+)`", re.DOTALL).match(behind, fold.end())
    return code and (code[1] or code[2])


def texts() -> list[Path]:
    return [path for path in documents() if path.name in ("README.md", "more.md")]


def all_commands() -> dict[Path, list[Command]]:
    """Return the commands to run of each text."""
    commands = {path: list(commands_of(path)) for path in texts()}
    everything = [words_of(command) for found in commands.values() for command in found]
    seen = {("make", name) for name in READ_ONLY}

    def is_new(command: Command) -> bool:
        words = words_of(command)
        if words in seen or any(is_part_of(words, others) for others in everything):
            return False
        seen.add(words)
        return True

    return {path: list(filter(is_new, found)) for path, found in commands.items()}


def words_of(command: Command) -> tuple[str, ...]:
    """The words of a command, without the number of a lesson or of an exercise and without the prompt. Of two commands
    with the same words, only one is run.
    """
    if command.is_python:
        return (command.text,)
    words = shlex.split(command.text, comments=True)
    return tuple(re.sub(r"^([a-z-]+-)\d+(?:\.\d+)?$|^(PROMPT=).*", r"\1\2", word, flags=re.DOTALL) for word in words)


def is_part_of(words: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Whether these are a `make run` or `make chat` with fewer options than the others."""
    return words[:2] in (("make", "run"), ("make", "chat")) and words[:2] == others[:2] and set(words) < set(others)


# --- Running them -----------------------------------------------------------------------------------------------------


def finished_copy(folder: Path, python: Sequence[str] = (sys.executable,)) -> Path:
    """A copy of the course in which every lesson is finished, with a `.venv` whose Python is this one."""
    copy = folder / "course"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*NOT_COPIED))
    for lesson in MODULES:
        shutil.copyfile(lesson.solution, copy / lesson.module.relative_to(ROOT))
    scripts = copy / ".venv" / "bin"
    scripts.mkdir(parents=True)
    for name in ("python", "python3"):
        (scripts / name).write_text(f'#!/bin/sh\nexec {shlex.join(python)} "$@"\n', encoding="utf-8")
        (scripts / name).chmod(0o755)
    return copy


def run(command: Command, copy: Path) -> str | None:
    """Run a command. Returns a complaint, or None."""
    python = copy / ".venv" / "bin" / "python"
    kept = {name: value for name, value in os.environ.items() if name not in (MODULES_VARIABLE, "MINE", "PYTHONPATH")}
    path = os.pathsep.join([str(python.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    process = subprocess.Popen(
        [str(python), "-c", command.text] if command.is_python else ["sh", "-c", command.text],
        cwd=copy,
        env={**kept, "PATH": path, "COURSE_PYTHON": "here", "MODEL": "tales", "COLUMNS": "120"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        start_new_session=True,  # so that what it has started can be ended with it
    )
    try:
        output, _ = process.communicate(CHAT, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return f"{command} takes more than {SECONDS} seconds:\n{output[-2000:]}"
    if process.returncode:
        return f"{command} ended with exit status {process.returncode}:\n{output[-2000:]}"
    if command.prints and " ".join(command.prints.split()) not in " ".join(output.split()):
        return f"{command} prints\n{output[-2000:]}\nand the text shows\n{command.prints}"
    return None
