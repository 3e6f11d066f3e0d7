"""Finds out which worker caused a failure, within two seconds.

One failure causes others: if rank 1 dies, rank 0 fails in an all_reduce. So the cause is looked for in this order:
ranks that report a failure of their own, ranks that were killed or have ended, ranks that are gone or do not answer.
Failures in communication with other ranks come last.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection

from common.workers.commands import REPORT_STATE, WorkerState
from common.workers.failures import Failure
from common.workers.processes import ending

ANSWER_SECONDS = 2.0
SILENT = "does not answer: its process or its machine was stopped"
GONE = "is gone"


def ask_states(connections: Mapping[int, Connection], failures: list[Failure]) -> dict[int, str]:
    """The state of each rank, as a phrase. A failure that has not been received yet is added to `failures`."""
    states = dict.fromkeys(connections, SILENT)
    for connection in connections.values():
        with contextlib.suppress(OSError):
            connection.send(REPORT_STATE)
    deadline = time.monotonic() + ANSWER_SECONDS
    for rank, connection in connections.items():
        try:
            while states[rank] is SILENT and connection.poll(max(0.0, deadline - time.monotonic())):
                message = connection.recv()
                if isinstance(message, Failure):
                    failures.append(message)
                if isinstance(message, WorkerState):
                    states[rank] = message.text
        except (EOFError, OSError):
            states[rank] = GONE
    return states


def explain(
    connections: Mapping[int, Connection], processes: Mapping[int, subprocess.Popen], failures: list[Failure]
) -> str:
    """One sentence that says which rank caused the failure, and how. failures: those received so far."""
    states = ask_states(connections, failures)
    dead = {}
    for rank, process in processes.items():
        if states.get(rank) == GONE:  # the socket may close a moment before the process has ended
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
        if process.poll():
            dead[rank] = f"rank {rank} {ending(process.returncode)}"
        elif process.returncode == 0:  # a worker does so only after a failure, whose message was missed
            states[rank] = "has given up"
    failed = {failure.rank: f"rank {failure.rank} failed: {failure.text}" for failure in failures}
    own = [failed[failure.rank] for failure in failures if not failure.is_consequence]
    others = {rank: f"rank {rank} {state}" for rank, state in states.items() if rank not in failed}
    others |= {rank: text for rank, text in dead.items() if rank not in failed}
    silent = [text for rank, text in others.items() if states.get(rank) in (GONE, SILENT)]
    causes = own or [text for rank, text in others.items() if rank in dead] or silent
    return "; ".join(causes or [*failed.values(), *others.values()]).removesuffix(".") + "."
