"""`make test`, `make test-all`, `make check`, `make lint`, `make skeletons`: tests and checks of the course."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable

import click

from common import course
from common.course import LESSONS, MODULES, ROOT, CourseError, shown, skeleton
from common.course.modules import named

FOLDERS = ("common/tests", "solutions/tests")


def call(*command: str, **environment: str) -> int:
    """Run a Python program in the repository's root; returns its exit status."""
    variables = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=variables).returncode


def pytest(*arguments: str, **environment: str) -> int:
    # The course is tested, not the user's own modules, even if MINE or another option is set in the environment.
    variables = ("COURSE_MODULES", "MINE", "SOLUTION", "FILE", "VERBOSE", "PDB", "MODEL")
    clean = dict.fromkeys([*variables, "TP", "PP", "QUANT", "GROUP", "KV", "OFFLOAD", "SPEC"], "")
    # Small tensors gain nothing from a second thread; the second core runs tests of its own.
    spread = ["-n", str(os.cpu_count() or 1), "--dist", "worksteal", "-p", "xdist.plugin"]
    spread.append("--disable-plugin-autoload")  # no other plugin is used, and each process would import them all
    options = ["-q", "-p", "common.authoring.remaining", *spread, *arguments]
    code = call("-m", "pytest", *options, *FOLDERS, **{**clean, "OMP_NUM_THREADS": "1", **environment})
    for each in MODULES:
        if not each.is_importable:
            print(f"Left out: {shown(each.module)}, which needs the package {each.needs}.")
    return code


@click.command()
def test() -> int:
    """Test the course itself; a student's unfinished work does not matter."""
    check_that_nothing_is_withheld()
    return pytest("-m", "not slow", "--record")


@click.command()
def test_all() -> int:
    """Run all tests and notebooks, except the tests that have passed in `make test` since the last change."""
    from common.checkpoints import find_checkpoint

    check_that_nothing_is_withheld()
    find_checkpoint("smollm2-135m")
    tests = pytest("--remaining", "--durations=5", COURSE_REAL_MODEL="1")
    return tests or call("-m", "common", "test-notebooks", COURSE_PYTHON="here")


def check_that_nothing_is_withheld() -> None:
    if course.withheld():
        lessons = [each for each in LESSONS if each.slug in course.withheld()]
        raise CourseError(
            f"This copy of the course came without the solutions of {named(lessons)}, and without the "
            "course's own tests, which test those. Yours are tested by make test-lesson-N; make progress shows all."
        )


@click.command()
def lint() -> int:
    """Check the code and its formatting with ruff."""
    code = call("-m", "ruff", "check", ".")
    if formatting := call("-m", "ruff", "format", "--check", "."):
        print("To format: .venv/bin/ruff format .")
    return code or formatting


@click.command()
@click.option("--check", is_flag=True, help="change nothing; fail where a skeleton is out of step")
def skeletons(check: bool) -> int:
    """Cut the lessons' skeletons from solutions/."""
    failed = False
    for lesson in MODULES:
        try:
            if not check:
                print(f"{shown(lesson.module)}: {skeleton.generate(lesson)}")
            elif text := skeleton.difference(lesson):
                print(text, f"{shown(lesson.module)} is out of step: run `make skeletons`.", sep="\n")
                failed = True
        except CourseError as error:
            print(error)
            failed = True
    return int(failed)


@click.command()
def check() -> int:
    """Lint, compare the skeletons, and check READMEs, prose and spelling. Every part runs, even after a failure."""
    from common.authoring import prose
    from common.authoring.readmes import checks as readme_checks

    def told(found: list[str]) -> int:
        print(*found, sep="\n", end="\n" if found else "")
        return len(found)

    parts: dict[str, Callable[[], int]] = {
        "lint": lint.callback,
        "skeletons": lambda: skeletons.callback(check=True),
        "READMEs": lambda: told(readme_checks.complaints()),
        "prose": lambda: told(prose.all_complaints()),
        "spelling": lambda: call("-m", "codespell_lib"),
    }
    failed = []
    for name, part in parts.items():
        start = time.perf_counter()
        code = part()
        print(f"{name}: {'failed' if code else 'ok'} ({time.perf_counter() - start:.1f} s)", flush=True)
        failed += [name] if code else []
    return int(bool(failed))
