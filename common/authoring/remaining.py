"""A pytest plugin, so that `make test-all` right after `make test` repeats nothing: it runs what was left out.

Left out were the slow tests, and those that skipped themselves because transformers or the real model was not there.
`--record` writes down what a whole run has passed; `--remaining` runs the rest. The record counts only while no file of
the repository is younger than that run; otherwise, or if that run failed, `--remaining` runs everything.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from common.course import ROOT

RECORD = ROOT / ".course" / "tested.json"
IGNORED = {".git", ".venv", ".course", "__pycache__", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints"}
IGNORED |= {".hypothesis", "inference_course.egg-info"}


def last_change(root: Path = ROOT) -> float:
    """When a file of the repository was written last, in seconds since the epoch."""
    latest = 0.0
    for folder, folders, files in os.walk(root):
        folders[:] = set(folders) - IGNORED
        latest = max([latest, *(os.lstat(os.path.join(folder, name)).st_mtime for name in files)])
    return latest


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write down which tests passed")
    parser.addoption("--remaining", action="store_true", help="leave out the tests that the record says have passed")


def pytest_configure(config):
    if config.getoption("--record") and not hasattr(config, "workerinput"):  # pytest-xdist's workers report to one
        config.pluginmanager.register(Recorder(), "course-recorder")


class Recorder:
    def __init__(self):
        self.record = {"python": sys.version, "started": time.time(), "passed": []}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.record["passed"].append(report.nodeid)

    def pytest_sessionfinish(self, session, exitstatus):
        RECORD.unlink(missing_ok=True)
        if exitstatus == 0:
            RECORD.parent.mkdir(exist_ok=True)
            RECORD.write_text(json.dumps(self.record, indent=0), encoding="utf-8")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    if not config.getoption("--remaining") or not RECORD.exists():
        return
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    if record["python"] == sys.version and last_change() < record["started"]:
        passed = set(record["passed"])
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]
