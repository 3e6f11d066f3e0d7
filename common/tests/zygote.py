"""Processes for tests that start in no time: forked from one that has imported torch, and done nothing else.

A process that imports torch spends one to two seconds of a processor on it. `start` takes the place of
`common.workers.processes.start` in the tests' process and in all that is forked for it: the same program, in a process
with the same environment, session, lifeline and output, and an object that can be asked what a `subprocess.Popen` can.
test_workers.py tests the real one. `typed_in` is `python -m common` in the same way, in any copy of the course.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import pickle
import pkgutil
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from common.course import MODULES_VARIABLE, ROOT
from common.workers import calls, workers

IS_SAFE = sys.platform == "linux"
"""On a Mac it is not safe to fork once torch is imported."""


class Zygote:
    """The process to fork from, started when it is needed first. What is forked from it knows it, too."""

    def __init__(self):
        self.address = ""

    def begin(self) -> None:
        """Start it, unless it runs."""
        if not self.address:
            self.room = tempfile.TemporaryDirectory()
            self.address = f"{self.room.name}/socket"
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(self.address)
                server.listen(64)
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "common.tests.zygote", str(server.fileno()), self.address],
                    pass_fds=[server.fileno()],
                    cwd=ROOT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            self.lifeline = self.connect()

    def connect(self) -> socket.socket:
        """A connection for one request."""
        self.begin()
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.address)
        return connection

    def close(self) -> None:
        if self.address:
            self.lifeline.close()
            self.process.wait()
            self.room.cleanup()
            self.address = ""


ZYGOTE = Zygote()
"""One for all tests of this process: common/tests/ and solutions/tests/ each have the fixture."""


def python() -> list[str]:
    """The words to put before the arguments of a Python that is to be forked: for a shell."""
    if not IS_SAFE:
        return [sys.executable]
    ZYGOTE.begin()
    return [sys.executable, "-SEI", str(Path(__file__).with_name("forked_python.py")), ZYGOTE.address, sys.executable]


def start(program: str, variables: Mapping[str, object] = MappingProxyType({})) -> Forked:
    """What `common.workers.processes.start` is."""
    environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
    stdin, lifeline = os.pipe()
    root = sys.modules["common.course"].ROOT  # of this process's copy of the course
    process = Forked((program, [], str(root), os.getcwd(), environment), [stdin, 1, 2])
    os.close(stdin)
    process.stdin = open(lifeline, "wb", buffering=0)
    return process


def typed_in(folder: Path, *words: str, stdin: str = "", **variables: str) -> subprocess.CompletedProcess:
    """Run `python -m common WORDS` in a copy of the course, with the packages of here. The result's `stdout` has all
    that was said, errors included. In a Python of its own, started by a shell, what the READMEs say to type is run.
    """
    own = (MODULES_VARIABLE, "PYTHONPATH", "MINE")
    environment = {name: value for name, value in os.environ.items() if name not in own}
    environment |= {"COURSE_PYTHON": "here", "COLUMNS": "120", "OMP_NUM_THREADS": "1", **variables}
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as said:
        given.write(stdin)
        given.seek(0)
        if not IS_SAFE:
            options = {"stdin": given, "stdout": said, "stderr": said, "cwd": folder, "env": environment}
            process = subprocess.Popen([sys.executable, "-m", "common", *words], **options)
        else:
            files = [given.fileno(), said.fileno(), said.fileno()]
            process = Forked(("common", list(words), str(folder), str(folder), environment), files)
        try:
            code = process.wait(900)
        finally:
            process.kill()
        said.seek(0)
        return subprocess.CompletedProcess(words, code, said.read())


class Forked:
    """A process that was forked: what `subprocess.Popen` offers of one, as far as it is asked for."""

    stdin = None

    def __init__(self, request: tuple, files: list[int]):
        self.connection = ZYGOTE.connect()
        text = pickle.dumps(request)
        socket.send_fds(self.connection, [struct.pack("!I", len(text))], files)
        self.connection.sendall(text)
        [self.pid] = struct.unpack("!I", self.connection.recv(4, socket.MSG_WAITALL))
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self.connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            [status] = struct.unpack("!I", self.connection.recv(4, socket.MSG_WAITALL))
            self.returncode = os.waitstatus_to_exitcode(status)
            self.connection.close()
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


def serve(server: socket.socket) -> None:
    """Fork a process for each request, and report how each ended, until the one that connected first hangs up."""
    import torch
    import torch.distributed

    import common.grading.worker  # noqa: F401

    torch.arange(2, device="meta") <= 1  # noqa: B015  (the first use of this device imports a second's worth)
    gc.freeze()  # or the first collection of each process would copy every page of what was imported
    tests, _ = server.accept()
    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    reports: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([server, woken, tests], [], [])
        if tests in ready:
            return
        if woken in ready:
            woken.recv(4096)
            with contextlib.suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                    with reports.pop(ended[0]) as report, contextlib.suppress(OSError):
                        report.sendall(struct.pack("!I", ended[1]))
        if server in ready:
            connection, _ = server.accept()
            head, files, _, _ = socket.recv_fds(connection, 4, 4)
            request = pickle.loads(connection.recv(struct.unpack("!I", head)[0], socket.MSG_WAITALL))
            process_id = os.fork()
            if not process_id:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (server, woken, wake, tests, connection, *reports.values()):
                    each.close()
                become(request, files)
            reports[process_id] = connection
            for each in files:
                os.close(each)
            connection.sendall(struct.pack("!I", process_id))


def become(request: tuple, files: list[int]) -> None:
    """Be the process that a Python of its own would have been. Never returns."""
    program, words, root, folder, environment = request
    status = 0
    try:
        atexit._clear()
        os.setsid()
        for number, file in enumerate(files):
            os.dup2(file, number)
        for file in files:
            os.close(file)
        sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # seekable or not, as it may be
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        random.seed()
        if root != str(ROOT):
            for name in [each for each in sys.modules if each.partition(".")[0] in ("common", "solutions")]:
                del sys.modules[name]
            sys.path[:] = [root, *(each for each in sys.path if each not in ("", str(ROOT)))]
        for each in ("common.workers.calls", "common.workers.workers"):
            importlib.import_module(each).start = start
        sys.argv[1:] = words
        if program == "common":
            status = importlib.import_module("common.__main__").main(words)
        elif program == "-c":
            exec(words[0], {"__name__": "__main__"})
        else:
            importlib.import_module("common.workers.lifeline").hold()
            pkgutil.resolve_name(program)()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        status = 1
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


@pytest.fixture(scope="session", autouse=True)
def quick_workers():
    """Every worker that a test starts is forked, where that is safe."""
    if not IS_SAFE:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "start", start)
        patch.setattr(workers, "start", start)
        yield
    ZYGOTE.close()


if __name__ == "__main__":
    sys.modules["common.tests.zygote"] = sys.modules["__main__"]
    ZYGOTE.address = sys.argv[2]
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)  # what takes apart all that was imported takes a second, and Triton complains
