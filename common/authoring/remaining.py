"""A pytest plugin, so that `make test-all` right after `make test` repeats nothing: it runs what was left out.

Left out were the slow tests, and those that skipped themselves because transformers or the real model was not there.
`--record` writes down what a whole run has passed; `--remaining` runs the rest. The record counts only while every
file of the repository is as it was then; otherwise, or if that run failed, `--remaining` runs everything.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest

from common.course import ROOT

RECORD = ROOT / ".course" / "tested.json"
IGNORED = {
    ".git",
    ".venv",
    ".course",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
    ".ipynb_checkpoints",
    ".hypothesis",
}


def fingerprint(root: Path = ROOT) -> str:
    """Of every file's place, size and time of change, and of the Python that runs."""
    digest = hashlib.sha256(sys.version.encode())
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in IGNORED and not name.endswith(".egg-info"))
        for name in sorted(files):
            file = Path(folder, name)
            state = file.lstat()
            digest.update(f"{file}\0{state.st_size}\0{state.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write down which tests passed")
    parser.addoption("--remaining", action="store_true", help="leave out the tests that the record says have passed")


def pytest_configure(config):
    if config.getoption("--record") and not hasattr(config, "workerinput"):  # pytest-xdist's workers report to one
        config.pluginmanager.register(Recorder(), "course-recorder")


class Recorder:
    def __init__(self):
        self.start = fingerprint()
        self.passed: set[str] = set()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.passed.add(report.nodeid)

    def pytest_sessionfinish(self, session, exitstatus):
        RECORD.unlink(missing_ok=True)
        if exitstatus == 0 and fingerprint() == self.start:
            RECORD.parent.mkdir(exist_ok=True)
            record = {"fingerprint": self.start, "passed": sorted(self.passed)}
            RECORD.write_text(json.dumps(record, indent=0), encoding="utf-8")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if not config.getoption("--remaining"):
        return
    try:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if record.get("fingerprint") != fingerprint():
        return
    passed = set(record["passed"])
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = [item for item in items if item.nodeid not in passed]
