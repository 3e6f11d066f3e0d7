"""Where the commanding process and its workers find each other: a socket, and a secret key that only they know."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge

from common.workers.failures import WorkerLost

ADDRESS_VARIABLE = "WORKER_RECEPTION"
"""The environment variable that tells a worker where to report."""
START_SECONDS = 120.0
"""How long workers may take to report: on a busy machine importing torch alone can take half a minute."""


class Reception:
    """A socket that workers connect to. `address` is what a worker needs to know: host, port and key."""

    def __init__(self, host: str = "127.0.0.1"):
        self.key = secrets.token_bytes(16)
        self.server = socket.create_server((host, 0))
        self.server.settimeout(0.1)
        self.address = f"{host} {self.server.getsockname()[1]} {self.key.hex()}"

    def __enter__(self) -> Reception:
        return self

    def __exit__(self, *exception) -> None:
        self.server.close()

    def admit(
        self, ranks: Iterable[int], processes: Mapping[int, subprocess.Popen], seconds: float
    ) -> dict[int, Connection]:
        """Wait until every rank has reported. Returns the connections by rank.

        processes: those workers that this process has started. Raises WorkerLost if one of them ends before all have
        reported, or if a rank has not reported after so many seconds.
        """
        connections: dict[int, Connection] = {}
        deadline = time.monotonic() + seconds
        while missing := [rank for rank in ranks if rank not in connections]:
            if any(process.poll() is not None for process in processes.values()):
                raise WorkerLost("a worker ended before all had reported")
            if time.monotonic() > deadline:
                raise WorkerLost(f"rank {missing[0]} has not reported within {seconds:g} s")
            with contextlib.suppress(TimeoutError, AuthenticationError, EOFError, OSError):
                connection = Connection(self.server.accept()[0].detach())
                deliver_challenge(connection, self.key)
                answer_challenge(connection, self.key)
                connections[connection.recv()] = connection
        return {rank: connections[rank] for rank in ranks}


def report(rank: int, address: str | None = None) -> Connection:
    """In a worker: connect to the reception at `address`, by default the one that the environment names."""
    host, port, key = (address or os.environ.pop(ADDRESS_VARIABLE)).split()
    connection = Client((host, int(port)), authkey=bytes.fromhex(key))
    connection.send(rank)
    return connection
