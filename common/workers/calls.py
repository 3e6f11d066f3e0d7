"""Calls one function in a process of its own, with a connection to this one. The grader runs its checks in this way."""

from __future__ import annotations

import subprocess
from multiprocessing.connection import Connection
from pkgutil import resolve_name

from common.workers.processes import start
from common.workers.reception import ADDRESS_VARIABLE, START_SECONDS, Reception, report


def call(program: str, *arguments) -> tuple[subprocess.Popen, Connection]:
    """Start a process that calls program(connection, *arguments). Returns it, and this side of the connection.

    program: "package.module:function". The arguments are pickled. End the process with `kill`.
    """
    with Reception() as reception:
        process = start("common.workers.calls:answer", {ADDRESS_VARIABLE: reception.address})
        connection = reception.admit([0], {0: process}, START_SECONDS)[0]
    connection.send((program, arguments))
    return process, connection


def answer() -> None:
    """Runs in the new process: receives the call and makes it."""
    connection = report(0)
    program, arguments = connection.recv()
    resolve_name(program)(connection, *arguments)
