"""Connects ranks that also use torch.distributed: a store for torch, and a socket for commands.

The ranks may be started by this process, by torchrun on this machine, or by torchrun on several machines.
"""

from __future__ import annotations

import datetime
import functools
import gc
import os
import signal
import socket
import sys
from collections.abc import Sequence

import torch
from torch import distributed as dist

from common.machine import choose_device
from common.workers.commands import CommandSocket
from common.workers.reception import ADDRESS_VARIABLE, START_SECONDS, report
from common.workers.workers import Workers

TIMEOUT = datetime.timedelta(seconds=START_SECONDS)


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_worker() -> bool:
    """Whether torchrun or `meet_workers` has started this process as a rank other than rank 0."""
    return os.environ.get("RANK", "0") != "0" and (under_torchrun() or ADDRESS_VARIABLE in os.environ)


def meet_workers(workers: Workers, program: str) -> tuple[dist.Store, int]:
    """Start the workers of this process, or find those that torchrun has started, and connect to them.

    program: the function that a worker calls, "package.module:function". Returns the store in which the ranks find each
    other for torch.distributed, and the number of ranks on this machine, including this one.
    """
    if under_torchrun():
        store, _, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        num_local = int(os.environ["LOCAL_WORLD_SIZE"])
        host = "127.0.0.1" if num_local == world_size else address_towards(os.environ["MASTER_ADDR"])
        workers.find(host, lambda address: store.set("reception", address))
        return store, num_local
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    world_size = workers.ranks.stop
    workers.start(program, {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "WORLD_SIZE": world_size})
    return store, world_size


def start_ranks(size: int, program: str) -> tuple[Workers, dist.Store, int]:
    """Make this process rank 0 of `size` ranks, and start or find the others.

    Returns the workers and the results of `meet_workers`. Raises ValueError if this process has another parallel
    engine, or if torchrun has started another number of processes.
    """
    if dist.is_initialized():
        gc.collect()  # closes an engine that was dropped without `close`
    if dist.is_initialized():
        raise ValueError(
            "Another parallel engine is open in this process, and torch.distributed allows one at a time. Call its "
            "close(), or use it in a `with` statement."
        )
    if under_torchrun() and int(os.environ["WORLD_SIZE"]) != size:
        raise ValueError(
            f"torchrun has started {os.environ['WORLD_SIZE']} processes; tensor_parallel times pipeline_parallel is "
            f"{size}."
        )
    workers = Workers(range(1, size), functools.partial(leave_ranks, torch.get_num_threads()))
    try:
        with workers.guard():
            return workers, *meet_workers(workers, program)
    except BaseException:
        workers.close()
        raise


def join_ranks(
    store: dist.Store, rank: int, grid: Sequence[Sequence[int]], device: str | None, timeout: float
) -> list[dist.ProcessGroup]:
    """Connect this rank to the others through torch.distributed. Returns a group for each row of the grid of ranks.

    timeout: seconds that a rank waits for another one. Every rank must call this.
    """
    on_gpu = (device or choose_device(None)).startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    excepthook, limit, size = sys.excepthook, datetime.timedelta(seconds=timeout), sum(map(len, grid))
    own, backend = dist.PrefixStore("ranks", store), "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=limit)
    sys.excepthook = excepthook  # torch's own would put "[rank0]:" before every line of every traceback
    # Every rank must create every group. A group without its own timeout would wait for half an hour.
    return [dist.new_group(list(ranks), limit) for ranks in grid]


def leave_ranks(num_threads: int) -> None:
    """Disconnect this process from the other ranks, and restore its number of threads."""
    if dist.is_initialized():
        dist.destroy_process_group()
    # Groups are named by a count. A failed start has increased it here, and new processes would then use other names
    # than this one.
    dist.distributed_c10d._world.group_count = 0
    torch.set_num_threads(num_threads)


def report_for_work() -> tuple[CommandSocket, dist.Store, int]:
    """Connect a worker to the commanding process. Returns the socket, the store and this process's rank."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the commanding process handles Ctrl-C
    store, rank, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    address = os.environ.pop(ADDRESS_VARIABLE, None) or store.get("reception").decode()
    return CommandSocket(report(rank, address)), store, rank


def address_towards(host: str) -> str:
    """The address of this machine in the network of `host`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing: it only chooses a route
        return probe.getsockname()[0]
