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
HERE, THERE = "198.18.77.1", "198.18.77.2"  # of a range that is for tests
OPTIONS = ("--model", "tales", "--tensor-parallel", "2", "--dtype", "float64", "--threads", "1", "--timeout", "10")


def ip(*arguments: str) -> None:
    subprocess.run([IP, *arguments], check=True, capture_output=True)


@pytest.fixture
def second_machine() -> Iterator[str]:
    """A network namespace with one interface, `there`, whose other end is `here`. Yields its name."""
    name = f"there-{os.getpid()}"
    try:
        ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to make a network namespace (root), and ip from the package iproute2")
    try:
        ip("link", "add", "here", "type", "veth", "peer", "name", "there", "netns", name)
        ip("address", "add", f"{HERE}/30", "dev", "here")
        ip("-n", name, "address", "add", f"{THERE}/30", "dev", "there")
        ip("link", "set", "here", "up")
        for interface in ("lo", "there"):
            ip("-n", name, "link", "set", interface, "up")
        yield name
    finally:
        subprocess.run([IP, "link", "delete", "here"], capture_output=True)  # the cable; it may not be there yet
        ip("netns", "delete", name)


@contextlib.contextmanager
def worker(namespace: str, launcher: list[str]) -> Iterator[None]:
    """The second machine's rank. Its launcher ends it when it is ended itself."""
    command = [IP, "netns", "exec", namespace, *launcher, "--node-rank", "1", "-m", "common", "serve", *OPTIONS]
    environment = {**os.environ, "COURSE_PYTHON": "here", "GLOO_SOCKET_IFNAME": "there"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(40)


@pytest.mark.slow
def test_two_machines_serve_as_one_and_a_cable_that_is_pulled_ends_it(second_machine, monkeypatch) -> None:
    from solutions.llama_pytorch import SamplingParams

    with make_engine(dtype="float64") as engine:
        [expected] = engine.generate(["There was once a"], SamplingParams(max_tokens=24))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "here")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    launcher += ["--master-addr", HERE, "--master-port", "29511"]
    body = {"prompt": "There was once a", "max_tokens": 24, "temperature": 0}
    with (
        worker(second_machine, launcher),
        running_server(*OPTIONS, prefix=[*launcher, "--node-rank", "0"]) as server,
    ):
        assert asyncio.run(complete(server.port, body)).text == expected.text
        ip("link", "set", "here", "down")
        with pytest.raises(RuntimeError, match="the engine has stopped"):
            asyncio.run(asyncio.wait_for(complete(server.port, body), 60))
