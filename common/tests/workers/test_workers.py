"""Worker processes: they start, answer, and end; what goes wrong is explained; nothing is left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Client
from types import SimpleNamespace

import pytest
import torch

from common.course.lessons import ROOT
from common.workers import Reception, WorkerError, WorkerLost, Workers, guarded, kill, start
from common.workers.reception import START_SECONDS
from common.workers.rendezvous import join_ranks, leave_ranks

WORK = "common.tests.workers.work"


@pytest.fixture(autouse=True)
def really(monkeypatch):
    """A worker is a Python of its own. Elsewhere it is forked from a process that has torch: see zygote.py."""
    monkeypatch.setattr("common.workers.calls.start", start)
    monkeypatch.setattr("common.workers.workers.start", start)


@pytest.fixture
def pair():
    workers = Workers(range(1, 3))
    workers.start(f"{WORK}:serve", {})
    yield workers
    workers.close()


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8") as status:
            return "\nState:\tZ" not in status.read()
    except OSError:
        return False


def all_gone(pids: list[int], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(is_alive, pids))


def test_commands_and_results(pair):
    with pair.guard():
        pair.send(21)
        assert sorted(pair.receive() for _ in range(2)) == [(1, 42), (2, 42)]
    pids = [process.pid for process in pair.processes.values()]
    pair.close()
    assert [process.returncode for process in pair.processes.values()] == [0, 0]
    assert all_gone(pids, 0.0)
    with pytest.raises(WorkerError, match="is down: it was closed"), pair.guard():
        pass


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("raise", "rank 1 failed: ValueError at work.py:"),
        ("exit", "rank 1 ended with exit code 3"),
        ("sleep", "rank 1 is busy with str since"),
    ],
)
def test_what_a_worker_does_wrong_is_said(pair, what, says):
    with pytest.raises(WorkerError) as error, pair.guard():
        pair.connections[1].send(what)
        assert what != "sleep" or pair.receive() == "asleep"  # only then it cannot be found before or after its sleep
        pair.receive(timeout=0.5 if what == "sleep" else 60)
    assert says in str(error.value)
    assert not str(error.value).endswith("..")
    assert "rank 2" not in str(error.value) or what == "sleep"
    assert what != "sleep" or "in run (work.py:" in str(error.value)
    assert all_gone([process.pid for process in pair.processes.values()])


@pytest.mark.parametrize(("sent", "says"), [(signal.SIGKILL, "was killed by SIGKILL"), (signal.SIGSTOP, "not answer")])
def test_killed_or_stopped(pair, sent, says):
    with pytest.raises(WorkerError, match=f"^rank 2 .*{says}"), pair.guard():
        pair.processes[2].send_signal(sent)
        pair.receive(timeout=0.5 if sent == signal.SIGSTOP else 60)
    assert all_gone([process.pid for process in pair.processes.values()])


def test_our_own_error_is_ours(pair):
    with pytest.raises(WorkerError, match=r"^rank 0 failed: ValueError at test_workers.py:\d+"), pair.guard():
        int("one")


def test_dropped_workers_end():
    told = []
    workers = Workers(range(1, 2), at_end=lambda: told.append("ended"))
    workers.start(f"{WORK}:serve", {})
    pid = workers.processes[1].pid
    del workers
    gc.collect()
    assert all_gone([pid]) and told == ["ended"]


def test_a_worker_that_ends_before_it_reports():
    workers = Workers(range(1, 2))
    with pytest.raises(WorkerLost, match="ended before"):
        workers.start("os:abort", {})
    workers.close()


def test_a_stranger_is_not_admitted():
    with Reception() as reception:
        host, port, _ = reception.address.split()

        def visit():
            with pytest.raises(Exception):  # noqa: B017  (EOFError, or a digest that was rejected)
                Client((host, int(port)), authkey=b"guessed")

        stranger = threading.Thread(target=visit)
        stranger.start()
        turned_away = SimpleNamespace(poll=lambda: None if stranger.is_alive() else 1)
        with pytest.raises(WorkerLost, match="ended before"):
            reception.admit([1], {1: turned_away}, 60)
        with pytest.raises(WorkerLost, match=r"rank 1 has not reported within 0.2 s"):
            reception.admit([1], {}, 0.2)


def test_everything_that_a_process_started_is_killed():
    with Reception() as reception:
        process = start(f"{WORK}:start_a_child", {"WORKER_RECEPTION": reception.address})
        child = reception.admit([0], {0: process}, START_SECONDS)[0].recv()
    assert is_alive(child)
    kill(process)
    assert all_gone([child, process.pid])
    kill(process)  # a second time does nothing


def test_a_worker_ends_with_the_process_that_started_it():
    script = f"from common.workers import Workers; w = Workers(range(1, 2)); w.start('{WORK}:serve', {{}})"
    script += "; print(w.processes[1].pid, flush=True); import time; time.sleep(3600)"
    starter = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    pid = int(starter.stdout.readline())
    assert is_alive(pid)
    starter.kill()
    starter.wait()
    assert all_gone([pid])


class Steps:
    """Two methods as lesson 6's executor has them."""

    def __init__(self, workers: Workers):
        self.workers = workers
        self.is_done = False

    @guarded
    def submit(self, presses: int = 0):
        for _ in range(presses):
            os.kill(os.getpid(), signal.SIGINT)
        self.workers.send(4)
        self.is_done = True

    @guarded
    def collect(self, presses: int = 0):
        for _ in range(presses):
            os.kill(os.getpid(), signal.SIGINT)
        return self.workers.receive(60)


def test_ctrl_c_waits_for_the_end_of_a_step(pair):
    steps = Steps(pair)
    with pytest.raises(KeyboardInterrupt):
        steps.submit(presses=1)
    assert steps.is_done
    assert sorted(steps.collect() for _ in range(2)) == [(1, 8), (2, 8)]  # nothing was lost
    steps.submit()
    with pytest.raises(KeyboardInterrupt):
        steps.collect(presses=1)
    assert sorted(steps.collect() for _ in range(2)) == [(1, 8), (2, 8)]


def test_a_second_ctrl_c_does_not_wait(pair):
    steps = Steps(pair)
    with pytest.raises(KeyboardInterrupt):
        steps.submit(presses=2)
    assert not steps.is_done
    with pytest.raises(WorkerError, match="interrupted in the middle of a step"):
        steps.submit()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_nothing_here_is_slow_to_import():
    script = "import sys, common.workers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_ctrl_c_when_a_step_is_done_is_not_left_to_the_next_one(monkeypatch):
    """While the handler is put back, it may still be called."""
    workers, put = object.__new__(Workers), signal.signal
    workers.is_down, workers.interrupts = None, 0

    def put_back(number, handler):
        if handler is signal.default_int_handler:
            signal.raise_signal(signal.SIGINT)
        return put(number, handler)

    monkeypatch.setattr(signal, "signal", put_back)
    with pytest.raises(KeyboardInterrupt), workers.guard():
        pass
    assert workers.interrupts == 0 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(signal, "signal", put)
    with workers.guard():
        pass


def test_a_start_of_ranks_that_failed_leaves_no_trace():
    """torch counts it, and names the groups of the next start by the count: new processes would wait for others."""
    dist, threads = torch.distributed, torch.get_num_threads()
    with pytest.raises(RuntimeError):
        join_ranks(dist.HashStore(), 0, [[0, 1]], "cpu", timeout=0.001)
    leave_ranks(threads)
    join_ranks(dist.HashStore(), 0, [[0]], "cpu", timeout=60)
    try:
        assert dist.group.WORLD.group_name == "0"
    finally:
        leave_ranks(threads)
