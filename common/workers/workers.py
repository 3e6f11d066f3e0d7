"""The commanding side: sends commands to all workers, receives results, and ends all workers when one fails."""

from __future__ import annotations

import contextlib
import functools
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait

from common.workers.explain import explain
from common.workers.failures import Failure, WorkerError, WorkerLost, describe, is_consequence
from common.workers.processes import end, kill, start
from common.workers.reception import ADDRESS_VARIABLE, START_SECONDS, Reception


class Workers:
    """The worker processes with these ranks. They all end when this object is closed or garbage collected.

    at_end: called after the workers have ended; it must not refer to the object that has this one. `processes` and
    `connections` are by rank; a worker that torchrun has started is not in `processes`.
    """

    def __init__(self, ranks: range, at_end: Callable[[], None] = lambda: None):
        self.ranks = ranks
        self.processes: dict[int, subprocess.Popen] = {}
        self.connections: dict[int, Connection] = {}
        self.failures: list[Failure] = []
        self.is_down: str | None = None  # the reason, once the workers have ended
        self.interrupts = 0  # how often Ctrl-C was pressed within `guard` without being raised yet
        self.finalizer = weakref.finalize(self, end, self.processes, self.connections, at_end)

    def start(self, program: str, variables: Mapping[str, object]) -> None:
        """Start a process for each rank, and wait until all have connected.

        program: the function that each calls, "package.module:function". variables: for their environment. Raises
        WorkerLost.
        """
        with Reception() as reception:
            for rank in self.ranks:
                own = {"RANK": rank, "LOCAL_RANK": rank, ADDRESS_VARIABLE: reception.address}
                self.processes[rank] = start(program, {**variables, **own})
            self.connections |= reception.admit(self.ranks, self.processes, START_SECONDS)

    def find(self, host: str, publish: Callable[[str], None]) -> None:
        """Wait until workers that another program has started have connected.

        host: this machine's address. publish: sends the reception's address to them. Raises WorkerLost.
        """
        with Reception(host) as reception:
            publish(reception.address)
            self.connections |= reception.admit(self.ranks, {}, START_SECONDS)

    # Commands and results ---------------------------------------------------------------------------------------

    def send(self, command: object) -> None:
        """Send a command to every worker."""
        for connection in self.connections.values():
            connection.send(command)

    def receive(self, timeout: float | None = None) -> object:
        """Wait for the next message from any worker and return it.

        timeout: in seconds; None: no limit. Raises WorkerLost if the message is a Failure or none came in time,
        EOFError if a worker is gone, and KeyboardInterrupt, before anything is received, if Ctrl-C was pressed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            ready = wait(list(self.connections.values()), 0.1)
            if self.interrupts:
                raise KeyboardInterrupt
            if ready:
                message = ready[0].recv()
                if isinstance(message, Failure):
                    self.failures.append(message)
                    raise WorkerLost(message.text)
                return message
            if deadline is not None and time.monotonic() > deadline:
                raise WorkerLost(f"no result came within {timeout:g} s")

    def run_everywhere(self, command: object, run: Callable[[object], object]) -> list:
        """Send a command to all workers and run it here as well. Returns all results, this process's own first.

        If that fails, all workers end, and WorkerError is raised. A ValueError of this process is raised unchanged: it
        says what is wrong with an option or a file, and workers are not its cause.
        """
        try:
            with self.guard():
                self.send(command)
                return [run(command), *(self.receive() for _ in self.ranks)]
        except WorkerError as error:
            if isinstance(error.__cause__, ValueError):
                raise error.__cause__ from None
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End all workers."""
        self.is_down = self.is_down or "it was closed."
        self.finalizer()

    # When something goes wrong ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Run the block, a step of all ranks, completely or not at all: ranks cannot continue after half a step.

        An error in the block ends all workers, and WorkerError says which one caused it. Ctrl-C is raised at the end of
        the block, or by `receive`, and the workers stay. A second Ctrl-C interrupts the step and ends all workers.
        """
        if self.is_down:
            raise WorkerError(f"This engine is down: {self.is_down}")
        in_main_thread = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, self.interrupt) if in_main_thread else None
        try:
            yield
            if self.interrupts:
                raise KeyboardInterrupt
        except Exception as error:
            if not isinstance(error, (WorkerLost, EOFError, OSError)):
                self.failures.append(Failure(0, describe(error), is_consequence(error)))
            self.kill(explain(self.connections, self.processes, self.failures))
            self.interrupts = 0
            raise WorkerError(self.is_down) from error
        except BaseException:
            if self.interrupts != 1:
                self.kill("it was interrupted in the middle of a step.")
            self.interrupts = 0
            raise
        finally:
            if in_main_thread:
                signal.signal(signal.SIGINT, before)
            if self.interrupts:  # it came after the block; otherwise the next step would raise it
                self.interrupts = 0
                raise KeyboardInterrupt

    def interrupt(self, *_) -> None:
        """Handles Ctrl-C within `guard`."""
        self.interrupts += 1
        if self.interrupts > 1:
            raise KeyboardInterrupt

    def kill(self, why: str) -> None:
        self.is_down = why
        for process in self.processes.values():
            kill(process)
        self.close()


def guarded(method: Callable) -> Callable:
    """Decorator that runs a method within `self.workers.guard()`."""

    @functools.wraps(method)
    def call(self, *arguments, **options):
        with self.workers.guard():
            return method(self, *arguments, **options)

    return call
