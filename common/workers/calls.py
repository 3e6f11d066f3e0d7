"""One function, called in a process of its own that keeps a connection to this one: what the grader needs."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Callable
from multiprocessing.connection import Connection

from common.workers.processes import start
from common.workers.reception import ADDRESS_VARIABLE, START_SECONDS, Reception, report


def find(program: str) -> Callable:
    """The function that "package.module:function" names."""
    module, _, function = program.partition(":")
    return getattr(importlib.import_module(module), function)


def call(program: str, *arguments) -> tuple[subprocess.Popen, Connection]:
    """Start a process that calls program(connection, *arguments). Returns it, and this end of the connection.

    The arguments travel by pickle. End the process with `kill`.
    """
    with Reception() as reception:
        process = start("common.workers.calls:answer", {ADDRESS_VARIABLE: reception.address})
        connection = reception.admit([0], {0: process}, START_SECONDS)[0]
    connection.send((program, arguments))
    return process, connection


def answer() -> None:
    """In the new process."""
    connection = report(0)
    program, arguments = connection.recv()
    find(program)(connection, *arguments)
