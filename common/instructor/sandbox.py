"""Runs a submission's checks in a sandbox: `SandboxedWorker` is the grader's worker inside it.

The sandbox is bubblewrap's (https://github.com/containers/bubblewrap; Linux, `apt install bubblewrap`): a file system
of its own with the course read-only and a small scratch disk, no network, and processes of its own. Without bubblewrap,
only limits on memory, processes and file sizes apply, and a submission could read and write what you can. `walls()`
says which of the two is the case. A thread of this process ends workers that exceed the limits.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from common.course import Lesson
from common.grading.runner import Worker
from common.workers import kill

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
SETTINGS = ("ld.so.cache", "ld.so.conf", "ld.so.conf.d", "alternatives", "hosts", "nsswitch.conf", "passwd")
SETTINGS += ("localtime",)
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Limits:
    """Limits for one worker and all processes that it starts together, or for each, if the system counts by process."""

    memory: int = 3 << 30  # bytes
    processes: int = 48
    disk: int = 128 << 20  # bytes, of the scratch disk and of any file
    seconds: float = 600.0  # of the clock, for all of a module's exercises


@functools.cache
def has_bubblewrap() -> bool:
    """Whether bubblewrap is installed and works: some systems forbid the namespaces that it needs."""
    if shutil.which("bwrap") is None:
        return False
    trial = [*bubblewrap(Path("/"), Limits()), "true"]
    return subprocess.run(trial, capture_output=True).returncode == 0


def walls() -> str:
    """A sentence that says how this machine is protected from submissions."""
    if has_bubblewrap():
        return "Each submission runs in a bubblewrap sandbox: no network, a file system of its own, its own processes."
    why = "bubblewrap may not make namespaces here" if shutil.which("bwrap") else "there is no bubblewrap"
    return (
        f"NO SANDBOX ({why}): time and memory are limited, but a submission could read and write what you can, and "
        "leave processes behind. On Linux: sudo apt install bubblewrap. Elsewhere, grade in a virtual machine or "
        "a container."
    )


def bubblewrap(course: Path, limits: Limits) -> list[str]:
    """The command that runs the command after it in the sandbox, with `course` and Python readable at their paths."""
    command = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv"]
    for path in SYSTEM:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            command += ["--ro-bind", path, path]
    for name in SETTINGS:
        command += ["--ro-bind-try", f"/etc/{name}", f"/etc/{name}"]
    command += ["--proc", "/proc", "--dev", "/dev"]
    for path in ("/tmp", "/dev/shm"):
        command += ["--size", str(limits.disk), "--tmpfs", path]
    for path in dict.fromkeys([sys.base_prefix, sys.prefix, os.path.dirname(os.path.realpath(sys.executable))]):
        if not path.startswith("/usr"):
            command += ["--ro-bind", path, path]
    if course != Path("/"):
        command += ["--ro-bind", str(course), str(course), "--chdir", str(course)]
    for name, value in environment("/tmp").items():
        command += ["--setenv", name, value]
    return [*command, "--"]


def environment(scratch: str) -> dict[str, str]:
    """All environment variables of a submission's process."""
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": scratch,
        "TMPDIR": scratch,
        "LANG": "C.UTF-8",
        "COURSE_PYTHON": "here",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }


class SandboxedWorker(Worker):
    """A worker in the sandbox, with a thread that enforces the limits."""

    patience = 3.0  # the factor on time limits: several workers run at once, and each also runs a wrong answer

    def __init__(self, course: Path, limits: Limits):
        self.course, self.limits = course, limits
        self.killed = ""
        self.scratch = tempfile.TemporaryDirectory(prefix="grading-")
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        walled = has_bubblewrap()
        with theirs:
            self.process = subprocess.Popen(
                [
                    *(bubblewrap(course, limits) if walled else ()),
                    *(sys.executable, "-m", "common.instructor.guard", str(theirs.fileno())),
                ],
                cwd=course,
                env=environment(self.scratch.name),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.over = threading.Event()
        threading.Thread(target=self.oversee, daemon=True).start()

    def begin(self, lesson: Lesson, file: Path, ids: list[str], show_prints: bool, key: bytes) -> None:
        limits = self.limits
        order = {"slug": lesson.slug, "file": str(file.relative_to(self.course)), "ids": ids, "key": key.hex()}
        ceilings = {"memory": limits.memory, "file_size": limits.disk, "processes": limits.processes + others()}
        self.connection.send_bytes(json.dumps({**order, "limits": ceilings}).encode())

    def oversee(self) -> None:
        """End the worker when it and the processes that it has started exceed the limits."""
        waited = 0.0
        while not self.over.wait(POLL_SECONDS):
            waited += POLL_SECONDS
            try:
                family = [psutil.Process(self.process.pid)]
                family += family[0].children(recursive=True)
            except psutil.NoSuchProcess:
                return
            if len(family) > self.limits.processes:
                return self.kill(f"started more than {self.limits.processes} processes")
            if sum(map(resident, family)) > self.limits.memory < sum(map(proportional, family)):
                return self.kill(f"took more than {self.limits.memory >> 30} GiB of memory")
            if folder_size(self.scratch.name) > self.limits.disk:
                return self.kill(f"wrote more than {self.limits.disk >> 20} MiB to disk")
            if waited > self.limits.seconds:
                return self.kill(f"kept the grader longer than {self.limits.seconds:g} s in all")

    def kill(self, why: str) -> None:
        self.killed = why
        self.end()

    def end(self) -> None:
        """Kill all processes. In the sandbox all end with the first; otherwise its group and children are killed."""
        try:
            family = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        kill(self.process)
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()

    def how_it_ended(self) -> str:
        how = super().how_it_ended()
        return f"by force: it {self.killed}," if self.killed else how

    def close(self) -> None:
        if self.over.is_set():
            return  # by now another process may have its number
        self.over.set()
        self.end()
        self.connection.close()
        self.scratch.cleanup()


def others() -> int:
    """The number of processes and threads that this user runs already, which the system's limit includes."""
    uid, total = os.getuid(), 0
    for each in psutil.process_iter(["uids", "num_threads"]):
        if each.info["uids"] and each.info["uids"].real == uid:
            total += each.info["num_threads"] or 1
    return total


def resident(process: psutil.Process) -> int:
    """Bytes of memory, in which shared pages count for each process; faster than `proportional`."""
    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def proportional(process: psutil.Process) -> int:
    """Bytes of memory, in which shared pages are divided among their processes, if the system counts them."""
    try:
        memory = process.memory_full_info()
    except psutil.Error:
        return 0
    return getattr(memory, "pss", memory.uss)


def folder_size(folder: str) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_size
    return total
