"""Starts and ends Python processes, for the engine and for the grader."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from types import MappingProxyType

from common.course.lessons import ROOT

PATIENCE_SECONDS = 5.0  # how long a worker may take to end before it is killed


def start(program: str, variables: Mapping[str, object] = MappingProxyType({})) -> subprocess.Popen:
    """Start a Python process that calls `program`, written "package.module:function".

    variables: added to its environment. It exits when this process is gone (`common.workers.lifeline`). It is in a new
    session: the terminal's Ctrl-C does not reach it, and `kill` ends all that it has started.
    """
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.Popen(
        [sys.executable, "-m", "common.workers", program],
        stdin=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths, **{name: str(value) for name, value in variables.items()}},
        start_new_session=True,
    )


def kill(process: subprocess.Popen) -> None:
    """Kill a process and everything that it has started, and wait until it is gone."""
    if process.returncode is None:  # not waited for yet, so its id cannot belong to another process
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()


def end(
    processes: Mapping[int, subprocess.Popen], connections: Mapping[int, Connection], at_end: Callable[[], None]
) -> None:
    """Ask workers to end by sending None, kill those that have not ended after five seconds, and call `at_end`."""
    for connection in connections.values():
        with contextlib.suppress(OSError):
            connection.send(None)
    deadline = time.monotonic() + PATIENCE_SECONDS
    for rank, process in processes.items():
        if rank in connections:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        kill(process)
    for connection in connections.values():
        connection.close()
    at_end()


def ending(code: int) -> str:
    """How a process ended, as a phrase: "was killed by SIGKILL", "ended with exit code 3"."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
