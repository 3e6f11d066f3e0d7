"""Starts and ends worker processes, and explains their failures: lesson 6's ranks, and the processes of the grader.

One process sends commands, the others carry them out. The commanding process has `Workers`, each worker a
`CommandSocket`.

    lifeline     a worker exits when the process that started it is gone
    processes    start a Python process, end it, kill it with everything that it started
    reception    the socket to which workers connect, and how a worker connects
    calls        calls one function in a process of its own, for the grader
    failures     a worker's message when it fails, and the description of an error in one line
    commands     a worker's side: receives commands, sends results, reports its state
    workers      the commanding side: sends, receives, completes steps in spite of Ctrl-C
    explain      finds out which worker caused a failure
    rendezvous   the same under torchrun, and torch.distributed's store. Only this module imports torch.

Read them in this order. Nothing here knows a lesson: commands and results are any objects that can be pickled.
"""

from common.workers.calls import call
from common.workers.commands import CommandSocket
from common.workers.failures import Failure, WorkerError, WorkerLost, describe, is_consequence
from common.workers.processes import kill, start
from common.workers.reception import Reception, report
from common.workers.workers import Workers, guarded
