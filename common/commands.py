"""The table of commands: what `make help` lists, and which function runs each.

`common.__main__` reads it on a bare Python, before anything is installed: it uses only the standard library, and no
syntax that Python 3.8 would refuse. A command's options are described by click, where its function is.
"""

from __future__ import annotations

import difflib
import re
from collections import namedtuple

Command = namedtuple("Command", "name argument function help extra", defaults=[""])
"""One command.

- argument: what follows the name: `N` is a lesson, `N.M` an exercise, "" nothing.
- function: `module:name` below `common`, a click command.
- help: one line.
- extra: the extra of pyproject.toml that it needs; "" is the base. None means no package at all: the function is then a
  plain one, which takes a list of arguments.
"""

GROUPS = {
    "A model answers": (
        Command("run", "", "student.chat:run_command", "eight prompts at once; PROMPT='...' one of your own"),
        Command("chat", "", "student.chat:chat_command", "a conversation"),
        Command("watch-engine", "", "student.watch_engine:watch_engine", "record it: OUT=run.html replays each step"),
        Command("serve", "", "serving.command:serve", "an OpenAI-compatible server at PORT=8000, and a page", "serve"),
        Command("quantize", "", "student.quantize:quantize_command", "write a checkpoint with fewer bits"),
    ),
    "Your lessons": (
        Command("progress", "", "student.grade:progress", "how far you are, lesson by lesson"),
        Command("test-lesson", "N", "student.grade:test_lesson", "grade your lesson N"),
        Command("test-exercise", "N.M", "student.grade:test_exercise", "grade one exercise; PDB=1 stops in it"),
        Command("watch-exercise", "N.M", "student.watch_exercise:watch_exercise", "replay a check that fails (4, 5)"),
        Command("watch-lesson", "N", "student.watch:watch_lesson", "grade it again whenever you save it"),
        Command("hint", "N.M", "student.grade:hint", "a hint for it; LEVEL=2 and LEVEL=3 say more"),
        Command("diff-lesson", "N", "student.difference:diff_lesson", "your answers beside the reference's"),
        Command("diff-exercise", "N.M", "student.difference:diff_exercise", "your answer to one exercise so"),
        Command("reset-lesson", "N", "student.grade:reset_lesson", "start lesson N again; your file is kept beside it"),
        Command("lab", "", "authoring.notebooks:lab", "open the notebooks in JupyterLab", "lab"),
        Command("book", "", "authoring.book.command:book", "the course as a web site that needs no network", "book"),
        Command("update", "", "student.update:main", "a new version, your answers in it; FROM=a.zip: a download", None),
    ),
    "A class": (
        Command(
            "release", "", "instructor.release:release_course", "a copy for a class, LESSONS=0-3 without solutions"
        ),
        Command("grade", "", "instructor.classroom:grade_class", "grade what a class has handed in"),
    ),
    "The course itself": (
        Command("setup", "", "setup:main", "install the packages into .venv, as every target does", None),
        Command("test", "", "authoring.checks:test", "test the course; your unfinished work does not matter"),
        Command("test-all", "", "authoring.checks:test_all", "slow tests, real model and notebooks too", "dev"),
        Command("check", "", "authoring.checks:check", "lint, skeletons, READMEs, prose and spelling", "dev"),
        Command("lint", "", "authoring.checks:lint", "ruff: mistakes and formatting", "dev"),
        Command("skeletons", "", "authoring.checks:skeletons", "cut the lessons' skeletons from solutions/"),
        Command("prove-lesson", "N", "authoring.prove:prove_lesson", "try its checks on known right and wrong answers"),
        Command(
            "mutate-lesson", "N", "authoring.mutate:mutate_lesson", "try its checks on small changes of the answers"
        ),
        Command("mutate", "", "authoring.mutate:mutate_all", "the same for every lesson; takes some minutes"),
        Command("notebooks", "", "authoring.notebooks:notebooks_command", "run every notebook and save its outputs"),
        Command("test-notebooks", "", "authoring.notebooks:test_notebooks", "run every notebook, compare the outputs"),
        Command("figures", "", "bench.plots:figures", "draw the READMEs' figures"),
        Command("bench", "", "bench.cli:bench", "measure this machine and the engine on it"),
        Command(
            "gpu-check", "", "bench.gpu:gpu_check", "try and measure the kernels and the engine on a GPU", "triton"
        ),
        Command(
            "fuzz", "", "authoring.fuzz.command:fuzz_command", "damaged checkpoints: each loads or is refused clearly"
        ),
        Command("soak", "", "authoring.soak.command:soak_command", "random load on the engine, all answers compared"),
        Command("clean", "", "authoring.clean:main", "remove caches; .venv, the model and your work stay", None),
        Command("help", "", None, "this list", None),
    ),
}
BY_NAME = {command.name: command for commands in GROUPS.values() for command in commands}

SHORT = {"test-exercise": "test", "diff-exercise": "diff", "watch-exercise": "watch"}
"""How `make` calls a command that takes the number of an exercise, where the name differs: `test-1.4`."""


class UnknownTarget(Exception):
    """There is no such target, or its number is missing; the text says what to type instead."""


def target(command: Command) -> str:
    """What to type after `make`: `test-lesson-N`, `test-N.M`, `run`."""
    name = SHORT.get(command.name, command.name)
    return f"{name}-{command.argument}" if command.argument else name


TARGETS = {target(command): command for command in BY_NAME.values()}


def help_text() -> str:
    """All commands in their groups, as `make help` prints them."""
    width = max(map(len, TARGETS))
    lines = ["make TARGET, or, where there is no make, python -m common TARGET. N is a lesson, N.M an exercise."]
    for title, commands in GROUPS.items():
        lines += ["", title, *(f"  {target(command):<{width}}  {command.help}" for command in commands)]
    lines += [
        "",
        "Options follow as variables, as in make run TP=2 QUANT=int8; make help-run lists those of run, and so on.",
        "MINE=0-2, for most targets: your own modules of these lessons take the place of the reference's.",
    ]
    return "\n".join(lines)


def parse(words: list[str]) -> tuple[Command, list[str]]:
    """The command and the arguments after it. `test-lesson 2`, `test-lesson-2` and `test-1.4` are all understood, and
    `help-run` for `run --help`. Raises UnknownTarget with a sentence for the reader.
    """
    name, *rest = words or ["help"]
    if name in ("-h", "--help"):
        name = "help"
    if name.startswith("help-") or (name == "help" and rest):
        name, rest = name[len("help-") :] or rest[0], ["--help"]
        name = TARGETS[name].name if name in TARGETS else name
    numbered = "|".join([*(command.name for command in BY_NAME.values() if command.argument), *SHORT.values()])
    number = re.fullmatch(rf"({numbered})-(\d+(?:\.\d+)?|N|N\.M)", name)
    if number and name not in BY_NAME:
        long = {short: name for name, short in SHORT.items()}
        name, rest = long.get(number[1], number[1]), [number[2], *rest]
    if name not in BY_NAME:
        near = difflib.get_close_matches(re.sub(r"[\d.]+$", "N", name), TARGETS, n=2)
        meant = f"; did you mean {' or '.join(near)}?" if near else "."
        raise UnknownTarget(f"There is no target {name!r}{meant} `make help` lists them.")
    command = BY_NAME[name]
    if command.argument and "--help" not in rest:
        pattern, example = (r"\d+", "2") if command.argument == "N" else (r"\d+\.\d+", "1.4")
        if not re.fullmatch(pattern, rest[0] if rest else ""):
            what = "a lesson" if command.argument == "N" else "an exercise"
            wanted = target(command).replace(command.argument, example)
            raise UnknownTarget(f"{SHORT.get(name, name)} needs the number of {what}: make {wanted}")
    return command, rest
