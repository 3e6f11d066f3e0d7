"""A pytest plugin: `make test-all` after `make test` runs only the tests that have not passed yet.

Those are the slow tests, and tests that were skipped because transformers or the real model was missing. `--record`
writes down which tests passed in a run without failures, and `--remaining` leaves these out. If a file of the
repository was written after that run began, or the run failed, `--remaining` leaves out none.
Tests marked `slow(seconds)` begin first, so that no worker is still running a long one when the others have finished.
"""

from __future__ import annotations

import json
import os
import sys
import time

import pytest

from common.course import ROOT

RECORD = ROOT / ".course" / "tested.json"
IGNORED = {".git", ".venv", ".course", "__pycache__", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints"}
IGNORED |= {".hypothesis", "inference_course.egg-info"}


def last_change() -> float:
    """When a file of the repository was last written, in seconds since the epoch."""
    latest = 0.0
    for folder, folders, files in os.walk(ROOT):
        folders[:] = set(folders) - IGNORED
        latest = max([latest, *(os.lstat(os.path.join(folder, name)).st_mtime for name in files)])
    return latest


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write down which tests passed")
    parser.addoption("--remaining", action="store_true", help="leave out the tests that the record says have passed")


def pytest_configure(config):
    if config.getoption("--record") and not hasattr(config, "workerinput"):  # not in pytest-xdist's workers
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
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    if config.getoption("--remaining") and record.get("python") == sys.version and last_change() < record["started"]:
        passed = set(record["passed"])
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]
    items[:] = longest_first(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def longest_first(items: list[pytest.Item], num_workers: int) -> list[pytest.Item]:
    """Let each worker begin with its share of the long tests; pytest-xdist gives each an equal part of the list."""
    seconds = {item: sum(mark.args[0] for mark in item.iter_markers("slow") if mark.args) for item in items}
    long = sorted(filter(seconds.get, items), key=seconds.get, reverse=True)
    others = [item for item in items if not seconds[item]]
    found: list[pytest.Item] = []
    for worker in range(num_workers):
        share = (len(items) - len(found)) // (num_workers - worker) - len(long[worker::num_workers])
        found += long[worker::num_workers] + others[: max(0, share)]
        del others[: max(0, share)]
    return found
