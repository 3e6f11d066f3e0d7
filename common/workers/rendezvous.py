"""How ranks meet that also use torch.distributed: a store for torch, and a socket for commands.

The ranks may be started by this process, by torchrun on this machine, or by torchrun on several.
"""

from __future__ import annotations

import datetime
import os
import signal
import socket

from torch import distributed as dist

from common.workers.commands import CommandSocket
from common.workers.reception import ADDRESS_VARIABLE, START_SECONDS, report
from common.workers.workers import Workers

TIMEOUT = datetime.timedelta(seconds=START_SECONDS)


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_worker() -> bool:
    """Whether this process was started, by torchrun or by `meet_workers`, to be a rank other than rank 0."""
    return os.environ.get("RANK", "0") != "0" and (under_torchrun() or ADDRESS_VARIABLE in os.environ)


def meet_workers(workers: Workers, program: str) -> tuple[dist.Store, int]:
    """In the commanding process: start the workers, or find those that torchrun has started, and connect to them.

    program: what a worker calls, "package.module:function". Returns the store in which the ranks find each other for
    torch.distributed, and the number of ranks on this machine, itself included.
    """
    if under_torchrun():
        store, _, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        num_local = int(os.environ["LOCAL_WORLD_SIZE"])
        host = "127.0.0.1" if num_local == world_size else address_towards(os.environ["MASTER_ADDR"])
        workers.find(host, lambda address: store.set("reception", address))
        return store, num_local
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    world_size = workers.ranks.stop
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": world_size}
    workers.start(program, variables)
    return store, world_size


def report_for_work() -> tuple[CommandSocket, dist.Store, int]:
    """In a worker: connect to the commanding process. Returns the socket, the store and this process's rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the commanding process to handle
    store, rank, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    address = os.environ.get(ADDRESS_VARIABLE) or store.get("reception").decode()
    os.environ.pop(ADDRESS_VARIABLE, None)
    return CommandSocket(report(rank, address)), store, rank


def address_towards(host: str) -> str:
    """This machine's address as seen by machines that know `host`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing: it only chooses a route
        return probe.getsockname()[0]
