"""Workers for tests that start in no time: forked from a process that has imported torch, and done nothing else.

A worker of the engine's or the grader's spends two seconds of a processor on `import torch`. `Zygote.start` takes the
place of `common.workers.processes.start`: the same program, in a process with the same environment, session, lifeline
and output, and an object that can be asked what a `subprocess.Popen` can. test_workers.py tests the real one.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import traceback
from collections.abc import Mapping
from types import MappingProxyType

import pytest

from common.course import ROOT
from common.workers import calls, workers
from common.workers.calls import find
from common.workers.lifeline import hold


class Zygote:
    """The process to fork from, started when it is needed first."""

    def __init__(self):
        self.socket: socket.socket | None = None

    def start(self, program: str, variables: Mapping[str, object] = MappingProxyType({})) -> Forked:
        if self.socket is None:
            self.socket, theirs = socket.socketpair()
            with theirs:
                number = theirs.fileno()
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "common.tests.zygote", str(number)],
                    pass_fds=[number],
                    cwd=ROOT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        request = pickle.dumps((program, environment, os.getcwd()))
        stdin, lifeline = os.pipe()
        status, report = os.pipe()
        socket.send_fds(self.socket, [struct.pack("!I", len(request))], [stdin, 1, 2, report])
        self.socket.sendall(request)
        os.close(stdin)
        os.close(report)
        [process_id] = struct.unpack("!I", self.socket.recv(4, socket.MSG_WAITALL))
        return Forked(process_id, lifeline, status)

    def close(self) -> None:
        if self.socket is not None:
            self.socket.close()
            self.process.wait()
            self.socket = None


ZYGOTE = Zygote()
"""One for all tests of this process: common/tests/ and solutions/tests/ each have the fixture."""


class Forked:
    """A worker that was forked: what `subprocess.Popen` offers of a process, as far as it is asked for."""

    def __init__(self, process_id: int, lifeline: int, status: int):
        self.pid, self.status = process_id, status
        self.stdin = open(lifeline, "wb", buffering=0)
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            self.returncode = os.waitstatus_to_exitcode(*struct.unpack("!I", os.read(self.status, 4)))
            os.close(self.status)
        return self.returncode

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def serve(requests: socket.socket) -> None:
    """Fork a process for each request, and report how each ended, until the tests' process hangs up."""
    import torch
    import torch.distributed

    import common.grading.worker  # noqa: F401

    torch.arange(2, device="meta") <= 1  # noqa: B015  (the first use of this device imports a second's worth)
    gc.freeze()  # or the first collection of each process would copy every page of what was imported
    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    reports: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([requests, woken], [], [])
        if woken in ready:
            woken.recv(4096)
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    report = reports.pop(ended[0])
                    with contextlib.suppress(BrokenPipeError):
                        os.write(report, struct.pack("!I", ended[1]))
                    os.close(report)
        if requests in ready:
            head, files, _, _ = socket.recv_fds(requests, 4, 4)
            if not head:
                return
            program, environment, folder = pickle.loads(requests.recv(struct.unpack("!I", head)[0], socket.MSG_WAITALL))
            process_id = os.fork()
            if not process_id:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (requests, woken, wake):
                    each.close()
                become(program, environment, folder, files)
            reports[process_id] = files[3]
            for each in files[:3]:
                os.close(each)
            requests.sendall(struct.pack("!I", process_id))


def become(program: str, environment: dict[str, str], folder: str, files: list[int]) -> None:
    """Be the process that `common.workers.processes.start` would have started. Never returns."""
    status = 1
    try:
        os.setsid()
        for number, file in enumerate(files[:3]):
            os.dup2(file, number)
        for file in files:
            os.close(file)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.argv[1:] = []
        random.seed()
        hold()
        find(program)()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


@pytest.fixture(scope="session", autouse=True)
def quick_workers():
    """Every worker that a test starts is forked, where that is safe: on a Mac it is not once torch is imported."""
    if sys.platform != "linux":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "start", ZYGOTE.start)
        patch.setattr(workers, "start", ZYGOTE.start)
        yield
    ZYGOTE.close()


if __name__ == "__main__":
    sys.modules["common.tests.zygote"] = sys.modules["__main__"]
    serve(socket.socket(fileno=int(sys.argv[1])))
