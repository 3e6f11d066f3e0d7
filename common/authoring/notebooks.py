"""The lessons' notebooks: run and saved by `make notebooks`, compared by `make test-notebooks`, opened by `make lab`.

A saved notebook must not depend on the machine that ran it. It is run from top to bottom in a fresh kernel, with two
threads and a fixed hash seed. The machine's name and the times are removed. A notebook with an error is not saved.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import click
import nbformat

from common.course import LESSONS, MODULES_VARIABLE, ROOT, Lesson, activate, files_used, lesson, shown
from common.options import mine

CELL_SECONDS = 300
SANITIZE = Path(__file__).resolve().parent / "nbval_sanitize.cfg"


def environment() -> dict[str, str]:
    """The environment of a notebook's kernel."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait are far slower on a busy machine
        "TOKENIZERS_PARALLELISM": "false",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "COURSE_MODULES": "",  # an instructor's notebook runs the reference
    }


def notebooks(numbers: Iterable[str]) -> list[Lesson]:
    """The lessons with these numbers, or all."""
    return [lesson(number) for number in numbers] or list(LESSONS)


def normalise(notebook: nbformat.NotebookNode) -> None:
    """Remove everything that differs between machines or between runs."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
        }
    )
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata.pop("execution", None)


def execute(path: Path) -> None:
    """Run a notebook in its own folder, as editors and nbval do, and save it with its outputs.

    If a cell fails, nbclient's CellExecutionError is raised and nothing is saved.
    """
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}},
        coalesce_streams=True,  # where a stream's pieces were cut depends on timing
    )  # fmt: skip
    client.execute(env=environment())
    normalise(notebook)
    nbformat.validate(notebook)
    unfinished = path.with_suffix(".part")
    nbformat.write(notebook, unfinished)
    unfinished.replace(path)


numbers = click.argument("numbers", nargs=-1, metavar="[N]...")


@click.command("notebooks")
@numbers
def notebooks_command(numbers: tuple[str, ...]) -> int:
    """Run the notebooks of these lessons, or of all, and save their outputs."""
    from nbclient.exceptions import CellExecutionError, CellTimeoutError

    print(files_used())
    failed = False
    for each in notebooks(numbers):
        start = time.perf_counter()
        print(f"{shown(each.notebook)} ... ", end="", flush=True)
        try:
            execute(each.notebook)
        except (CellExecutionError, CellTimeoutError) as error:
            print(f"not saved:\n{error}")
            failed = True
        else:
            print(f"{time.perf_counter() - start:.0f} s")
    return int(failed)


def never_run(path: Path) -> list[int]:
    """Return the numbers, counted from 1 over all cells, of the code cells without an execution count, which nbval
    would not compare. Empty cells are left out, because no kernel runs them.
    """
    cells = nbformat.read(path, as_version=4).cells
    return [
        number
        for number, cell in enumerate(cells, start=1)
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None
    ]


@click.command()
@numbers
def test_notebooks(numbers: tuple[str, ...]) -> int:
    """Run the notebooks of these lessons, or of all: every output must equal the saved one."""
    paths = [each.notebook for each in notebooks(numbers)]
    failed = False
    for path in paths:
        if cells := never_run(path):
            print(f"{shown(path)}: cells {', '.join(map(str, cells))} were never run: make notebooks")
            failed = True
    command = [sys.executable, "-m", "pytest", "-q", "--nbval", "--nbval-current-env"]
    command += [f"--nbval-sanitize-with={SANITIZE}", f"--nbval-cell-timeout={CELL_SECONDS}", "--durations=5"]
    command += ["-n", str(min(len(paths), os.cpu_count() or 1)), "--dist", "loadfile"]  # one notebook, one process
    code = subprocess.run([*command, *map(str, paths)], cwd=ROOT, env=environment()).returncode
    return code or int(failed)


@click.command()
@mine()
def lab(mine: str) -> int:
    """Open the notebooks in JupyterLab."""
    activate(mine)
    variables = {**environment(), MODULES_VARIABLE: os.environ[MODULES_VARIABLE]}
    return subprocess.run([sys.executable, "-m", "jupyterlab"], cwd=ROOT, env=variables).returncode
