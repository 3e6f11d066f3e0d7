"""Ends a process as soon as the process that started it is gone. Imports nothing slow, so it can run first."""

import os
import sys
import threading


def hold() -> None:
    """Watch standard input, a pipe from the process that started this one, and exit when it ends.

    The pipe ends however that process ended, kill -9 included. Afterwards `input()` finds an empty file here.
    """
    pipe = os.dup(sys.stdin.fileno())
    with open(os.devnull, encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())

    def watch() -> None:
        while os.read(pipe, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
