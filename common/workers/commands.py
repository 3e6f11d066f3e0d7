"""A worker's end of the socket: it receives commands, sends results, and says on request what it is busy with."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

from common.workers.failures import frame_outside_torch

REPORT_STATE = "report your state"
"""A command that the listening thread answers at once, with a WorkerState."""


@dataclass(frozen=True)
class WorkerState:
    """What a worker is doing, to complete the sentence "rank 1 ..."."""

    text: str


class CommandSocket:
    """A worker's connection to the process that commands it. A thread listens to it, whatever the worker is busy with.

    So the worker can report its state while it waits for another rank, and it notices at once when the commanding
    process is gone: then it exits.
    """

    def __init__(self, connection: Connection):
        self.connection = connection
        self.commands: SimpleQueue = SimpleQueue()
        self.current: str | None = None  # the command that is being carried out, and since when
        self.lock = threading.Lock()
        threading.Thread(target=self.listen, daemon=True).start()

    def listen(self) -> None:
        try:
            while (command := self.connection.recv()) is not None:
                if command == REPORT_STATE:
                    self.send(self.state())
                else:
                    self.commands.put(command)
        except (EOFError, OSError):
            os._exit(1)
        self.commands.put(None)

    def receive(self) -> object:
        """The next command, waiting for it as long as it takes. None: there are no more."""
        return self.commands.get()

    def send(self, message: object) -> None:
        with self.lock:
            self.connection.send(message)

    def noting_state(self, run: Callable[[object], object]) -> Callable[[object], object]:
        """`run`, made to note which command it is busy with."""

        def noted(command: object) -> object:
            step_id = getattr(command, "step_id", None)
            name = type(command).__name__ if step_id is None else f"step {step_id}"
            self.current = f"{name} since {time.strftime('%X')}"
            result = run(command)
            self.current = None
            return result

        return noted

    def state(self) -> WorkerState:
        """What the worker is doing now, with the line of the program that its main thread has reached."""
        current = self.current  # the main thread may set it at any time
        if current is None:
            return WorkerState("waits for a command")
        stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
        frame = frame_outside_torch(stack)
        where = f"{frame.name} ({Path(frame.filename).name}:{frame.lineno})"
        return WorkerState(f"is busy with {current}, in {where}")

    def exit(self) -> None:
        """End the process at once, without waiting for anything that a broken group of ranks might still wait for."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
