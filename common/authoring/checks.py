"""`make test`, `make test-all`, `make check`, `make lint`, `make clean`: what keeps the course itself right."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

from common import course
from common.course import LESSONS, ROOT
from common.course.modules import named

FOLDERS = ("common/tests", "solutions/tests")


def call(*command: str, **environment: str) -> int:
    """Run a Python program in the repository's root; returns its exit status."""
    variables = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=variables).returncode


def pytest(*arguments: str, **environment: str) -> int:
    # Whoever has MINE or the like in their environment gets the course judged, and not their own modules.
    variables = ("COURSE_MODULES", "MINE", "SOLUTION", "FILE", "VERBOSE", "PDB", "MODEL")
    clean = dict.fromkeys([*variables, "TP", "PP", "QUANT", "GROUP", "KV", "OFFLOAD", "SPEC"], "")
    # Small tensors gain nothing from a second thread; the second core runs tests of its own.
    spread = ["-n", str(os.cpu_count() or 1), "--dist", "worksteal"]
    options = ["-q", "-p", "common.authoring.remaining", *spread, *arguments]
    return call("-m", "pytest", *options, *FOLDERS, **{**clean, "OMP_NUM_THREADS": "1", **environment})


def test() -> int:
    return pytest("-m", "not slow", "--record")


def test_all() -> int:
    """Every test there is, and the notebooks; what `make test` has passed just now is not repeated."""
    from common.checkpoints import CheckpointError, find_checkpoint

    try:
        find_checkpoint("smollm2-135m")
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 2
    tests = pytest("--remaining", "--durations=5", COURSE_REAL_MODEL="1")
    return tests or call("-m", "common", "test-notebooks", COURSE_PYTHON="here")


def lint() -> int:
    code = call("-m", "ruff", "check", ".")
    if formatting := call("-m", "ruff", "format", "--check", "."):
        print("To format: .venv/bin/ruff format .")
    return code or formatting


def check() -> int:
    """Every part runs, so that one look shows all there is to mend."""
    from common.authoring.readmes import checks as readme_checks
    from common.course import skeleton

    parts: dict[str, Callable[[], int]] = {
        "lint": lint,
        "skeletons": lambda: skeleton.main(["--check"]),
        "READMEs": lambda: readme_checks.main([]),
    }
    failed = []
    for name, part in parts.items():
        start = time.perf_counter()
        code = part()
        print(f"{name}: {'failed' if code else 'ok'} ({time.perf_counter() - start:.1f} s)", flush=True)
        failed += [name] if code else []
    return int(bool(failed))


def clean() -> int:
    """Remove what can be made again in seconds. The environment, models and a student's work are not of that kind."""
    roots = [ROOT / "common", ROOT / "solutions", *(lesson.folder for lesson in LESSONS)]
    caches = [ROOT / name for name in (".pytest_cache", ".ruff_cache", ".hypothesis", "__pycache__")]
    for root in roots:
        for name in ("__pycache__", ".pytest_cache", ".ipynb_checkpoints"):
            caches += root.rglob(name)
    for cache in caches:
        shutil.rmtree(cache, ignore_errors=True)
    return 0


def main(argv: list[str]) -> int:
    command, *rest = argv
    if rest:
        print(f"{command} takes no argument: {' '.join(rest)}", file=sys.stderr)
        return 2
    if command in ("test", "test-all") and course.withheld():
        lessons = [each for each in LESSONS if each.slug in course.withheld()]
        print(
            f"This copy of the course came without the solutions of {named(lessons)}, and without the "
            "course's own tests, which test those. Yours are tested by make test-lesson-N; make progress shows all.",
            file=sys.stderr,
        )
        return 2
    return {"test": test, "test-all": test_all, "lint": lint, "check": check, "clean": clean}[command]()
