"""One server over two machines: ranks in two network namespaces, with a cable between them, started by torchrun."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")

from common.bench.serving import complete, running_server
from common.course import ROOT
from common.tests.serving.conftest import make_engine

IP = shutil.which("ip") or "/usr/sbin/ip"
NUMBER = os.getpid() % 10_000  # another run of this test may be beside this one: its names, addresses and port differ
HERE, THERE = (f"198.18.{NUMBER // 64}.{NUMBER % 64 * 4 + host}" for host in (1, 2))  # of a range that is for tests
PORT = 20_000 + NUMBER  # below those that Linux hands out
CABLE = f"here-{NUMBER}"
OPTIONS = ("--model", "tales", "--dtype", "float64", "--threads", "1", "--timeout", "10")


def ip(*arguments: str) -> None:
    subprocess.run([IP, *arguments], check=True, capture_output=True)


@pytest.fixture
def second_machine() -> Iterator[str]:
    """A network namespace with one interface, `there`, whose other end is CABLE. Yields its name."""
    name = f"there-{os.getpid()}"
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to make a network namespace (root), and ip from the package iproute2")
    try:
        ip("link", "add", CABLE, "type", "veth", "peer", "name", "there", "netns", name)
        ip("address", "add", f"{HERE}/30", "dev", CABLE)
        ip("-n", name, "address", "add", f"{THERE}/30", "dev", "there")
        ip("link", "set", CABLE, "up")
        for interface in ("lo", "there"):
            ip("-n", name, "link", "set", interface, "up")
        yield name
    finally:
        subprocess.run([IP, "link", "delete", CABLE], capture_output=True)  # the cable; it may not be there yet
        ip("netns", "delete", name)


@contextlib.contextmanager
def worker(namespace: str, launcher: list[str], options: tuple[str, ...]) -> Iterator[None]:
    """The second machine's rank. Its launcher ends it when it is ended itself."""
    command = [IP, "netns", "exec", namespace, *launcher, "--node-rank", "1", "-m", "common", "serve", *options]
    environment = {**os.environ, "COURSE_PYTHON": "here", "GLOO_SOCKET_IFNAME": "there"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(120)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["--tensor-parallel", "--pipeline-parallel"])
def test_two_machines_serve_as_one_and_a_cable_that_is_pulled_ends_it(second_machine, monkeypatch, parallel) -> None:
    from solutions.llama_pytorch import SamplingParams

    with make_engine(dtype="float64") as engine:
        [expected] = engine.generate(["There was once a"], SamplingParams(max_tokens=24))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", CABLE)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--master-addr", HERE, "--master-port", str(PORT)]
    options = (*OPTIONS, parallel, "2")
    body = {"prompt": "There was once a", "max_tokens": 24, "temperature": 0}
    with (
        worker(second_machine, launcher, options),
        running_server(*options, prefix=[*launcher, "--node-rank", "0"]) as server,
    ):
        assert asyncio.run(complete(server.port, body)).text == expected.text
        ip("link", "set", CABLE, "down")
        with pytest.raises(RuntimeError, match="the engine has stopped"):
            asyncio.run(asyncio.wait_for(complete(server.port, body), 180))
