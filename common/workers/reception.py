"""Connects the commanding process and its workers: a socket, and a secret key that only they know."""

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

ADDRESS_VARIABLE = "WORKER_RECEPTION"  # the environment variable with the address to which a worker connects
START_SECONDS = 120.0  # how long workers may take to connect: on a busy machine importing torch can take half a minute


class Reception:
    """A socket to which workers connect. address: host, port and key, as text for `report`."""

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
        """Wait until every rank has connected. Returns the connections by rank.

        processes: of the workers that this process has started. Raises WorkerLost if one of them ends before all have
        connected, or if a rank has not connected within `seconds`.
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
    """Connect a worker to the reception at `address`, by default the environment's, and send its rank."""
    host, port, key = (address or os.environ.pop(ADDRESS_VARIABLE)).split()
    connection = Client((host, int(port)), authkey=bytes.fromhex(key))
    connection.send(rank)
    return connection
