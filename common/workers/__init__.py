"""Starts, watches, explains and ends worker processes: lesson 6's ranks, and the processes of the grader.

One process commands, the others work. The commanding process holds `Workers`; each worker holds a `CommandSocket`.

    lifeline     a worker exits when the process that started it is gone
    processes    start a Python process, end it, kill it with everything that it started
    reception    the socket at which workers report, and how a worker reports there
    calls        one function in a process of its own: what the grader needs
    failures     what a worker says when it fails, and how an error is described in one line
    commands     a worker's end: receives commands, sends results, says what it is busy with
    workers      the commanding end: sends, receives, guards against Ctrl-C and against half-finished steps
    explain      after a failure: which worker caused it
    rendezvous   the same under torchrun, and torch.distributed's store. Imports torch, the others do not.

Read them in this order. Nothing here knows a lesson: commands and results are any objects that can be pickled.
"""

from common.workers.calls import call
from common.workers.commands import CommandSocket
from common.workers.failures import Failure, WorkerError, WorkerLost, describe, is_consequence
from common.workers.processes import kill, start
from common.workers.reception import Reception, report
from common.workers.workers import Workers, guarded
