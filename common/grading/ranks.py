"""Two processes for the checks of lesson 6, which communicate through torch.distributed.

They are started when a check first needs them, and serve all further checks. Each has one thread. After an error or a
timeout in one of them, both are ended, because the other one may still be waiting, and the next check starts new ones.
"""

from __future__ import annotations

import datetime
import functools
import importlib.util
import pickle
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from common.grading import isolate
from common.grading.compare import CheckFailed
from common.workers import Workers
from common.workers.failures import frame_outside_torch, is_consequence
from common.workers.rendezvous import meet_workers, report_for_work

NUM_RANKS = 2
TIMEOUT = 4.0  # seconds that a rank waits for the other one
BUILD_SECONDS = 60.0
SHAPES = "gloo does that where ranks add up or gather tensors that are not of the same shape."
MADE = "made"  # a rank sends this when it is ready to call, and receives it when both are ready


def on_ranks(code: ModuleType, function: Callable, *arguments: Any) -> list[Any]:
    """Call function(code, group, *arguments) on two ranks at once. Returns the two results, by rank.

    function: defined at the top of the checks' file. group: the module's own `Group` of the two ranks. Arguments and
    results are pickled. Raises CheckFailed, with the rank, if one of them raises an error or does not end.
    """
    call = pickle.dumps((code.__recipe__, function.__code__.co_filename, function.__name__, arguments))
    workers, _ = pool()
    connections = list(workers.connections.values())
    try:
        workers.send(call)
        for connection in connections:  # both make the module first, so that none waits for that within the call
            if not connection.poll(BUILD_SECONDS) or connection.recv() != MADE:
                raise EOFError
        workers.send(MADE)
    except (EOFError, OSError):
        end_pool()
        raise RuntimeError("a rank of the grader could not make the module.") from None
    results, deadline = [], time.monotonic() + 2 * TIMEOUT
    for rank, connection in enumerate(connections):
        try:
            if connection.poll(max(0.0, deadline - time.monotonic())):
                results.append(pickle.loads(connection.recv()))
            else:
                results.append(Problem(f"rank {rank} did not come to an end.", False))
        except (EOFError, OSError):
            results.append(Problem(f"rank {rank}'s process broke off: {SHAPES}", False))
    problems = [result for result in results if isinstance(result, Problem)]
    if problems:
        end_pool()
        problems.sort(key=lambda problem: problem.is_consequence)
        raise CheckFailed(problems[0].sentence, f"{function.__name__} on two ranks", None)
    return results


class Problem(NamedTuple):
    """An error on a rank. is_consequence: it was raised in communication with the other rank."""

    sentence: str
    is_consequence: bool


@functools.cache
def pool() -> tuple[Workers, dist.Store]:
    """Start the two processes. Returns them and the store in which they find each other.

    This process is none of the ranks: workers 1 and 2 are the ranks 0 and 1.
    """
    workers = Workers(range(1, NUM_RANKS + 1))
    store, _ = meet_workers(workers, "common.grading.ranks:serve")
    return workers, store


def end_pool() -> None:
    """End both processes, if they were started. The next check gets new ones."""
    if pool.cache_info().currsize:
        pool()[0].kill("a check has failed")
        pool.cache_clear()


def serve() -> None:
    """Runs in each of the two processes: receives calls, makes them and sends the results."""
    torch.set_num_threads(1)
    commands, store, number = report_for_work()
    rank, timeout = number - 1, datetime.timedelta(seconds=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=NUM_RANKS, timeout=timeout)
    while (received := commands.receive()) is not None:
        recipe, checks, function, arguments = pickle.loads(received)
        code = module(recipe)
        call = getattr(checks_module(checks), function)
        commands.send(MADE)
        commands.receive()
        group = code.Group(rank, range(NUM_RANKS))
        torch.manual_seed(0)
        try:
            result = call(code, group, *arguments)
        except BaseException as error:
            result = problem(error, rank, Path(code.__file__))
        commands.send(pickle.dumps(result))  # as bytes: torch would send tensors through shared memory
    commands.exit()


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
    """The error in a sentence, with the line of the student's file that raised it."""
    if isinstance(error, CheckFailed):
        return Problem(f"rank {rank}: {error.sentence}", False)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename) == file]
    frame = own[-1] if own else frame_outside_torch(frames)
    where = f" at {Path(frame.filename).name}:{frame.lineno}: `{frame.line}`"
    if is_consequence(error):
        return Problem(
            f"rank {rank} waited{where} for the other rank, in vain. Do all ranks make the same calls, in the same "
            "order, with tensors of the same shape?",
            True,
        )
    return Problem(f"rank {rank} raised {type(error).__name__}: {error}{where}", False)
