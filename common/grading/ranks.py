"""Two processes for the checks of lesson 6, which talk to each other through torch.distributed.

They are started when a check first needs them, hold torch, and stay warm from check to check. Each has one thread.
When something is raised in one of them, or they do not come to an end, both are ended and the next check gets new
ones: nobody knows what the other was still waiting for.
"""

from __future__ import annotations

import atexit
import datetime
import functools
import importlib.util
import os
import pickle
import secrets
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from common.course import ROOT
from common.grading import isolate
from common.grading.compare import CheckFailed

NUM_RANKS = 2
TIMEOUT = 4.0
"""Seconds that a rank waits for the other one."""
BUILD_SECONDS = 60.0
SHAPES = "gloo does that where ranks add up or gather tensors that are not of the same shape."
MADE = b"made"
"""A rank says it when it is ready to call, and is told it when the other one is too."""


def on_ranks(code: ModuleType, function: Callable, *arguments: Any) -> list[Any]:
    """Call function(code, group, *arguments) on each of two ranks at once. Returns what it gave, in the order of ranks.

    function: defined at the top of the checks' file. group: the module's own `Group` of the two ranks. Arguments and
    results travel by pickle. Raises CheckFailed, with the rank, if one of them raised something or waits in vain.
    """
    call = pickle.dumps((code.__recipe__, function.__code__.co_filename, function.__name__, arguments))
    connections = pool()
    try:
        for connection in connections:
            connection.send_bytes(call)
        for connection in connections:  # making the module takes a rank its time, and no other one should wait for that
            if not connection.poll(BUILD_SECONDS) or connection.recv_bytes() != MADE:
                raise EOFError
        for connection in connections:
            connection.send_bytes(MADE)
    except (EOFError, OSError):
        end_pool()
        raise RuntimeError("a rank of the grader could not make the module.") from None
    results, deadline = [], time.monotonic() + 2 * TIMEOUT
    for rank, connection in enumerate(connections):
        try:
            if connection.poll(max(0.0, deadline - time.monotonic())):
                results.append(pickle.loads(connection.recv_bytes()))
            else:
                results.append(Problem(f"rank {rank} did not come to an end.", False))
        except (EOFError, OSError):
            results.append(Problem(f"rank {rank}'s process broke off: {SHAPES}", False))
    problems = [each for each in results if isinstance(each, Problem)]
    if problems:
        end_pool()
        problems.sort(key=lambda problem: problem.is_consequence)
        raise CheckFailed(problems[0].sentence, f"{function.__name__} on two ranks", None)
    return results


class Problem:
    """What was raised on a rank. is_consequence: while it was talking to the other one."""

    def __init__(self, sentence: str, is_consequence: bool):
        self.sentence, self.is_consequence = sentence, is_consequence


@functools.cache
def pool() -> list[Connection]:
    """The sockets to the two ranks, which are started for it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    key = secrets.token_hex(16)
    with Listener(("127.0.0.1", 0), backlog=NUM_RANKS, authkey=bytes.fromhex(key)) as listener:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", "from common.grading.ranks import serve; serve()"],
                stdin=subprocess.PIPE,
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT),
                    "OMP_NUM_THREADS": "1",
                    "RANK_POOL": f"{rank} {store.port} {listener.address[1]} {key}",
                },
            )
            for rank in range(NUM_RANKS)
        ]
        pool.processes, pool.store = processes, store  # the ranks need the store until they have met
        atexit.register(end_pool)
        while not store.check([f"joined/{rank}" for rank in range(NUM_RANKS)]):
            if any(process.poll() is not None for process in processes):
                raise RuntimeError("a rank of the grader has ended before it joined.")
            time.sleep(0.01)
        connections = [listener.accept() for _ in range(NUM_RANKS)]
    by_rank = {connection.recv(): connection for connection in connections}
    return [by_rank[rank] for rank in range(NUM_RANKS)]


def end_pool() -> None:
    for process in getattr(pool, "processes", ()):
        process.kill()
        process.wait()
    pool.processes, pool.store = [], None
    pool.cache_clear()


def serve() -> None:
    """A rank's life: take a call, make it, send back what came of it."""
    from common.lifeline import hold

    hold()
    torch.set_num_threads(1)
    rank, store_port, port, key = os.environ["RANK_POOL"].split()
    store = dist.TCPStore("127.0.0.1", int(store_port), is_master=False)
    store.set(f"joined/{rank}", "")
    connection = Client(("127.0.0.1", int(port)), authkey=bytes.fromhex(key))
    connection.send(int(rank))
    timeout = datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=NUM_RANKS, timeout=timeout)
    while True:
        recipe, checks, function, arguments = pickle.loads(connection.recv_bytes())
        code = module(recipe)
        call = getattr(checks_module(checks), function)
        connection.send_bytes(MADE)
        connection.recv_bytes()
        group = code.Group(int(rank), range(NUM_RANKS))
        torch.manual_seed(0)
        try:
            result = call(code, group, *arguments)
        except BaseException as error:
            result = problem(error, int(rank), Path(code.__file__))
        connection.send_bytes(pickle.dumps(result))


@functools.lru_cache(maxsize=16)
def module(recipe: tuple) -> ModuleType:
    kind, *arguments = recipe
    return getattr(isolate, kind)(*arguments)


@functools.cache
def checks_module(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("checks", file)
    checks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checks)
    return checks


def problem(error: BaseException, rank: int, file: Path) -> Problem:
    """What was raised, in a sentence, with the line of the student's file that is to blame."""
    if isinstance(error, CheckFailed):
        return Problem(f"rank {rank}: {error.sentence}", False)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename) == file]
    where = f" at {file.name}:{own[-1].lineno}: `{own[-1].line}`" if own else ""
    if any(Path(dist.__file__).parent in Path(frame.filename).parents for frame in frames):
        return Problem(
            f"rank {rank} waited{where} for the other rank, in vain. Do all ranks make the same calls, in the same "
            "order, with tensors of the same shape?",
            True,
        )
    return Problem(f"rank {rank} raised {type(error).__name__}: {error}{where}", False)
