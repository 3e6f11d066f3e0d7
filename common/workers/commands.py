"""A worker's side of the socket: it receives commands, sends results, and reports its state on request."""

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

REPORT_STATE = "report your state"  # a command that the listening thread answers immediately, with a WorkerState


@dataclass(frozen=True)
class WorkerState:
    """What a worker is doing. text: completes the sentence "rank 1 ..."."""

    text: str


class CommandSocket:
    """A worker's connection to the commanding process. A thread of its own reads from it.

    So the worker can report its state while it waits for another rank, and it exits as soon as the commanding process
    is gone.
    """

    def __init__(self, connection: Connection):
        self.connection = connection
        self.commands: SimpleQueue = SimpleQueue()
        self.current: str | None = None  # the command that is being carried out, and its start time
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
        """Wait for the next command and return it. None means that the worker must end."""
        return self.commands.get()

    def send(self, message: object) -> None:
        with self.lock:
            self.connection.send(message)

    def noting_state(self, run: Callable[[object], object]) -> Callable[[object], object]:
        """`run`, extended to set `current` while it carries out a command."""

        def noted(command: object) -> object:
            step_id = getattr(command, "step_id", None)
            name = type(command).__name__ if step_id is None else f"step {step_id}"
            self.current = f"{name} since {time.strftime('%X')}"
            result = run(command)
            self.current = None
            return result

        return noted

    def state(self) -> WorkerState:
        """The worker's state, with the line of the program that its main thread has reached."""
        current = self.current  # the main thread may set it at any time
        if current is None:
            return WorkerState("waits for a command")
        stack = traceback.extract_stack(sys._current_frames()[threading.main_thread().ident])
        frame = frame_outside_torch(stack)
        where = f"{frame.name} ({Path(frame.filename).name}:{frame.lineno})"
        return WorkerState(f"is busy with {current}, in {where}")

    def exit(self) -> None:
        """End the process immediately. A normal exit could wait for other ranks of a broken group."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
