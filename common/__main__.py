"""`python -m common COMMAND`: everything that `make` can do, and all that it does.

This file and `common.setup` run on a bare Python, before anything is installed, and on one that is too old, in order
to say so: they use the standard library only, and no syntax that Python 3.8 would refuse.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections import namedtuple

Command = namedtuple("Command", "name argument module needs variables help")
"""name; what follows it (`N` a lesson, `N.M` an exercise, or nothing); the module whose `main` runs it; which extra of
pyproject.toml it needs ("" the base, None nothing at all); the variables that mean something to it; one line of help.
"""

COMMANDS = (
    Command("help", "", None, None, "", "this list"),
    Command("setup", "", "common.setup", None, "TORCH", "install what the course needs into .venv (every target does)"),
    Command(
        "run",
        "",
        "common.student.chat",
        "",
        "MODEL PROMPT MINE TP PP QUANT GROUP KV OFFLOAD SPEC THREADS",
        "a model answers",
    ),
    Command(
        "chat", "", "common.student.chat", "", "MODEL MINE TP PP QUANT GROUP KV OFFLOAD SPEC THREADS", "talk with it"
    ),
    Command("test-lesson", "N", "common.student.grade", "", "MINE SOLUTION FILE VERBOSE", "grade your lesson N"),
    Command("test-exercise", "N.M", "common.student.grade", "", "MINE SOLUTION FILE VERBOSE PDB", "grade one exercise"),
    Command("hint", "N.M", "common.student.grade", "", "LEVEL", "a hint for it; LEVEL=2 and LEVEL=3 say more"),
    Command("watch-lesson", "N", "common.student.watch", "", "MINE", "grade it again whenever you save it"),
    Command(
        "diff-lesson",
        "N",
        "common.student.difference",
        "",
        "FORCE",
        "your answers beside the reference's; FORCE=1: wrong ones too",
    ),
    Command("diff-exercise", "N.M", "common.student.difference", "", "FORCE", "your answer to one exercise so"),
    Command("progress", "", "common.student.grade", "", "", "how far you are, lesson by lesson"),
    Command(
        "reset-lesson", "N", "common.student.grade", "", "", "start lesson N again; what you have is kept beside it"
    ),
    Command(
        "update",
        "",
        "common.student.update",
        None,
        "FROM",
        "a new version of the course, your answers in it; FROM=a.zip: a download",
    ),
    Command(
        "test", "", "common.authoring.checks", "", "", "test the course itself; your unfinished work does not matter"
    ),
    Command(
        "test-all", "", "common.authoring.checks", "dev", "", "also the slow tests, the real model and the notebooks"
    ),
    Command(
        "check", "", "common.authoring.checks", "dev", "", "for those who change the course: lint, skeletons, READMEs"
    ),
    Command(
        "grade",
        "",
        "common.instructor.classroom",
        "",
        "SUBMISSIONS OUT LESSONS JOBS",
        "grade what a class has handed in",
    ),
    Command(
        "prove-lesson", "N", "common.authoring.prove", "", "", "try its checks on all known wrong and right answers"
    ),
    Command(
        "mutate-lesson",
        "N",
        "common.authoring.mutate",
        "",
        "JOBS",
        "try its checks on every small change of the answers",
    ),
    Command("mutate", "", "common.authoring.mutate", "", "JOBS", "the same for every lesson; takes most of an hour"),
    Command("lint", "", "common.authoring.checks", "dev", "", "ruff: mistakes and formatting"),
    Command("skeletons", "", "common.course.skeleton", "", "", "cut the lessons' skeletons from solutions/"),
    Command(
        "release",
        "",
        "common.instructor.release",
        "",
        "LESSONS OUT FORCE",
        "a copy for a class; LESSONS=0-3: their solutions stay here",
    ),
    Command("notebooks", "", "common.authoring.notebooks", "", "", "run every notebook and save its outputs"),
    Command(
        "test-notebooks", "", "common.authoring.notebooks", "", "", "run every notebook, compare with the saved outputs"
    ),
    Command("figures", "", "common.bench.plots", "", "", "draw the READMEs' figures"),
    Command("bench", "", "common.bench.cli", "", "THREADS", "measure this machine and the engine on it"),
    Command(
        "quantize",
        "",
        "common.student.quantize",
        "",
        "MODEL QUANT GROUP OUT MINE",
        "write a checkpoint with fewer bits",
    ),
    Command(
        "soak",
        "",
        "common.authoring.soak.command",
        "",
        "MINUTES SEED MINE",
        "random load on the whole engine, all answers compared",
    ),
    Command("book", "", "common.authoring.book.build", "book", "OUT", "the course as a web site that needs no network"),
    Command("lab", "", "common.authoring.notebooks", "lab", "", "open the notebooks in JupyterLab"),
    Command("clean", "", "common.authoring.checks", None, "", "remove caches; .venv, the model and your work stay"),
)
BY_NAME = {command.name: command for command in COMMANDS}

SHORT = {"test-exercise": "test", "diff-exercise": "diff"}
"""How `make` calls a command that takes a number, where the name differs: `test-1.4`."""


def target(command: Command) -> str:
    """What to type after `make`: `test-lesson-N`, `test-N.M`, `run`."""
    name = SHORT.get(command.name, command.name)
    return f"{name}-{command.argument}" if command.argument else name


def help_text() -> str:
    width = max(len(target(command)) for command in COMMANDS)
    lines = ["make TARGET, or, where there is no make, python -m common TARGET:", ""]
    for command in COMMANDS:
        note = "".join(f" {name}=" for name in command.variables.split() if name not in command.help)
        lines.append(f"  {target(command):<{width}}  {command.help}{'  [' + note.strip() + ']' if note else ''}")
    lines += ["", "MINE=0-2 puts your own modules of these lessons under the rest; SOLUTION=1 grades the reference;"]
    lines += ["VERBOSE=1 shows tracebacks; PDB=1 stops in your function. N is a lesson, N.M an exercise."]
    lines += [
        "TP=2 cuts each layer over two processes, PP=2 the stack of layers; QUANT is int8, w8a8 or int4 (GROUP=64),"
    ]
    lines += ["KV=int8 shrinks the cache, OFFLOAD=300 keeps 300 MB of weights in memory and reads the rest each step."]
    lines += ["SPEC=ngram guesses from the text itself, SPEC=tales-draft with a small model (for MODEL=tales)."]
    return "\n".join(lines)


def parse(argv: list[str]) -> tuple[Command, list[str]]:
    """The command and the arguments after it. `test-lesson 2`, `test-lesson-2` and `test-1.4` are all understood."""
    name, *rest = argv or ["help"]
    if name in ("-h", "--help"):
        name = "help"
    command = BY_NAME.get(name)
    numbered = "|".join([*(each.name for each in COMMANDS if each.argument), *SHORT.values()])
    number = re.fullmatch(rf"({numbered})-(\d+(?:\.\d+)?)", name)
    if command is None and number:
        name = next((long for long, short in SHORT.items() if short == number[1]), number[1])
        command, rest = BY_NAME[name], [number[2], *rest]
    if command is None:
        raise LookupError(f"There is no target {name!r}; `make help` lists them.")
    if command.argument and not set(rest) & {"-h", "--help"}:
        given = rest[0] if rest else ""
        pattern, example = (r"\d+", "2") if command.argument == "N" else (r"\d+\.\d+", "1.4")
        if not re.fullmatch(pattern, given):
            what = "a lesson" if command.argument == "N" else "an exercise"
            wanted = target(command).replace(command.argument, example)
            raise LookupError(f"{SHORT.get(command.name, command.name)} needs the number of {what}: make {wanted}")
    return command, rest


def main(argv: list[str]) -> int:
    try:
        return dispatch(argv)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `make help | head`: the reader has left, and there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def dispatch(argv: list[str]) -> int:
    try:
        command, rest = parse(argv)
    except LookupError as error:
        print(error, file=sys.stderr)
        return 2
    if command.name == "help":
        print(help_text(), flush=True)
        return 0
    from common import setup

    if "--here" in rest:
        rest = [each for each in rest if each != "--here"]
        os.environ["COURSE_PYTHON"] = "here"
    try:
        if command.needs is not None:
            setup.ensure(command.needs, [command.name, *rest])
        elif command.name != "setup" and sys.version_info < setup.OLDEST:  # no package, but a Python of our time
            return subprocess.run([setup.suitable_python(), "-m", "common", command.name, *rest]).returncode
    except setup.SetupError as error:
        print(error, file=sys.stderr)
        return 2
    from common.course import CourseError

    # One module may serve several commands; it then wants to know which.
    shared = sum(command.module == other.module for other in COMMANDS) > 1
    try:
        module = importlib.import_module(command.module)
        return module.main([command.name, *rest] if shared else rest)
    except CourseError as error:  # a lesson that is withheld and not finished was imported
        print(error, file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if os.environ.get("COURSE_PYTHON") != "here":
            raise
        print(f"{error}. With COURSE_PYTHON=here your own environment needs: pip install -e '.[dev]'", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
