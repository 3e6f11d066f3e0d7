"""`python -m common COMMAND`: runs a command of the course. `make` does nothing else.

This file, `common.commands` and `common.setup` run before any package is installed, and on a Python that is too old, in
order to say so. They use only the standard library, and only syntax that Python 3.8 accepts.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

from common import commands, setup


def main(words: list[str]) -> int:
    """Run the command that the words name. Returns its exit status."""
    try:
        command, rest = commands.parse(words)
        if command.function is None:
            print(commands.help_text(), flush=True)
            return 0
        return run(command, rest)
    except (commands.UnknownTarget, setup.SetupError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `make help | head`: the reader has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


SHORT_SPIN = {"GOMP_SPINCOUNT": "500", "KMP_BLOCKTIME": "1"}
"""How long an OpenMP thread waits actively for others before it sleeps: turns of a loop for GNU's OpenMP (Linux),
milliseconds for LLVM's and Intel's (macOS, Windows). By default, beside other busy processes, the waiting thread keeps
the core that the other one needs. All layers of a step are one call, so threads wait only briefly, and a longer wait is
no faster on an idle machine."""


def run(command: commands.Command, rest: list[str]) -> int:
    """Run a command, with the packages that it needs installed; returns its exit status. Raises SetupError."""
    for name, value in SHORT_SPIN.items():
        os.environ.setdefault(name, value)  # before torch is imported: OpenMP reads them once
    if "--here" in rest:
        rest = [word for word in rest if word != "--here"]
        os.environ["COURSE_PYTHON"] = "here"
    if command.extra is None:
        return run_bare(command, rest)
    setup.ensure(command.extra, [command.name, *rest])
    try:
        from common import options

        return options.call(command, rest)
    except ModuleNotFoundError as error:
        if os.environ.get("COURSE_PYTHON") != "here":
            raise
        print(f"{error}. With COURSE_PYTHON=here your own environment needs: pip install -e '.[dev]'", file=sys.stderr)
        return 2


def run_bare(command: commands.Command, rest: list[str]) -> int:
    """Run a command that needs no package, but, except for `setup`, a Python that the course supports."""
    module, _, name = command.function.partition(":")
    if command.name != "setup" and sys.version_info[:2] < setup.OLDEST:
        return subprocess.run([setup.suitable_python(), "-m", "common", command.name, *rest]).returncode
    return getattr(importlib.import_module("common." + module), name)(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
