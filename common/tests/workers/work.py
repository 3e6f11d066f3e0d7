"""What the workers of these tests do. It imports no torch, so that a Python of its own begins with it at once."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from common.workers import CommandSocket, Failure, describe, is_consequence, report


def serve() -> None:
    """A worker that doubles numbers, and does something else for some words."""
    rank = int(os.environ["RANK"])
    commands = CommandSocket(report(rank))

    def run(command):
        if command == "raise":
            raise ValueError("too warm.")
        if command == "exit":
            os._exit(3)
        if command == "sleep":
            commands.send("asleep")
            time.sleep(3600)
        return rank, 2 * command

    run = commands.noting_state(run)
    while (command := commands.receive()) is not None:
        try:
            commands.send(run(command))
        except ValueError as error:
            commands.send(Failure(rank, describe(error), is_consequence(error)))
            break
    commands.exit()


def start_a_child() -> None:
    """A worker that has started a process of its own, and says which."""
    connection = report(0)
    connection.send(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]).pid)
    time.sleep(3600)
