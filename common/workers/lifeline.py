"""Ends a process as soon as the process that started it is gone. It runs first, so it imports nothing slow."""

import os
import sys
import threading


def hold() -> None:
    """Watch standard input, which is a pipe from the parent process, and exit when the pipe is closed.

    It is closed however the parent ends, even by kill -9. After this call `input()` reads from an empty file.
    """
    pipe = os.dup(sys.stdin.fileno())
    with open(os.devnull, encoding="utf-8") as nothing:
        os.dup2(nothing.fileno(), sys.stdin.fileno())

    def watch() -> None:
        while os.read(pipe, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
