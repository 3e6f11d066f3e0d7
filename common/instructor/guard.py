"""The worker in the sandbox, which runs the checks on a submission and restricts itself.

    python -m common.instructor.guard FD      started by `common.instructor.sandbox` only

It adds three things to the worker of `make test-lesson-N`:

- Limits on memory, files and processes.
- An audit hook (PEP 578), which cannot be removed, refuses what no answer needs: reading the files with answers and
  checks, starting processes, looking at the grader's own frames.
- An answer that replaces the code that compares it is reported, and the exercises after it get a new process.

A process cannot be fully protected from code that runs in it, so everything that was refused is reported to the
instructor.
"""

from __future__ import annotations

import json
import linecache
import os
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType

from common import course
from common.course import MODULES, ROOT, Lesson
from common.grading.compare import REPLACES
from common.grading.subject import Failure, Subject
from common.grading.worker import ReportingGrader, work

INTROSPECTION = {"gc.get_objects", "gc.get_referrers", "gc.get_referents"}
INTROSPECTION |= {"sys._current_frames", "sys.settrace", "sys.setprofile"}
PROCESSES = {"subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn"}


class WatchfulGrader(ReportingGrader):
    """A grader that reports an answer which replaces the code that compares it, and then ends the process."""

    replaced = ""

    def judge(self, subject: Subject, exercise_id: str, check: Callable) -> Failure | None:
        failure = super().judge(subject, exercise_id, check)
        if failure is not None and failure.what == REPLACES:
            self.replaced = failure.sentence
        return failure

    def finish(self) -> None:
        if self.replaced:
            self.send("note", self.replaced)
            os._exit(1)  # the next exercises get a process in which nothing was replaced
        super().finish()


def watch(lesson: Lesson, file: Path, note: Callable[[str], None]) -> None:
    """From now on refuse what no answer needs to code from `file`, and call `note` with a description of it."""
    later = MODULES[MODULES.index(lesson) :]
    modules = {
        "reference",
        *(f"reference.{each.slug}" for each in MODULES),
        *(f"solutions.{each.slug}" for each in later),
    }
    files = {str(path) for each in later for path in (each.solution, each.hints)}
    files |= {str(path) for each in MODULES for path in (each.checks, each.answers)}
    student, told = str(file), set()

    def refuse(what: str) -> None:
        if what not in told:
            told.add(what)
            note(what)
        raise PermissionError(f"{what}: an answer has no need of that")

    def by_student(frame: FrameType | None, through: str = "") -> bool:
        """Whether the student's code is on the stack, and not only below given code in the folder `through`."""
        while frame is not None:
            if frame.f_code.co_filename == student:
                return True
            if through and frame.f_code.co_filename.startswith(through):
                return False
            frame = frame.f_back
        return False

    if lesson.needs:  # Triton reads a kernel's source when it is first called, perhaps by the student's code
        linecache.getlines(str(lesson.solution))
    course.substitutes()  # the grader reads all solutions once, to find withheld ones: now, before the hook
    getframe = sys._getframe
    workers = str(ROOT / "common" / "workers") + os.sep

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path = arguments[0]
            if isinstance(path, (str, os.PathLike)) and os.path.realpath(path) in files and by_student(getframe(1)):
                refuse(f"opens {Path(path).name}")
        elif event == "import":
            if arguments[0] in modules and by_student(getframe(1)):
                refuse(f"imports {arguments[0]}")
        elif event in INTROSPECTION:
            if getframe(1).f_code.co_filename == student:
                refuse(f"calls {event}")
        elif event in PROCESSES and by_student(getframe(1), through=workers):
            refuse("starts a process")
        elif event == "socket.connect" and by_student(getframe(1), through=workers):
            refuse("connects to the network")

    sys.addaudithook(hook)


def limit(memory: int, file_size: int, processes: int) -> None:
    """Set limits for this process and all that it starts. None of them can raise the limits again."""
    import resource

    for name, value in (
        ("RLIMIT_DATA", memory),
        ("RLIMIT_FSIZE", file_size),
        ("RLIMIT_NOFILE", 512),
        ("RLIMIT_NPROC", processes),
        ("RLIMIT_CORE", 0),
    ):
        _, most = resource.getrlimit(getattr(resource, name))
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(getattr(resource, name), (value, value))


def main(argv: list[str]) -> None:
    """Read the order from the connection, and run as the worker."""
    connection = Connection(int(argv[0]))
    order = json.loads(connection.recv_bytes())
    lesson = next(each for each in MODULES if each.slug == order["slug"])
    key, file = bytes.fromhex(order["key"]), ROOT / order["file"]
    limit(**order["limits"])

    def make_grader(subject: Subject, ids: list[str], send: Callable[..., None]) -> WatchfulGrader:
        watch(lesson, file, lambda what: send("note", what))
        return WatchfulGrader(subject, ids, send)

    work(connection, lesson, file, order["ids"], False, key, make_grader)


if __name__ == "__main__":
    main(sys.argv[1:])
