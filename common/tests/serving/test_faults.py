"""Clients that behave badly, and a rank that is killed: whoever asks properly is served, or told why not."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import psutil
import pytest

pytest.importorskip("fastapi")

from common.bench.serving import complete, request, running_server
from common.tests.serving.conftest import begin, eventually, is_empty

pytestmark = pytest.mark.slow
BODY = {"prompt": "There was once a", "max_tokens": 8, "ignore_eos": True, "temperature": 0}
LONG = {**BODY, "max_tokens": 400}


@pytest.fixture
def port(url) -> int:
    return int(url.rpartition(":")[2])


def connect(port: int, data: bytes = b"", receive_buffer: int | None = None) -> socket.socket:
    client = socket.socket()
    if receive_buffer:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect(("127.0.0.1", port))
    client.sendall(data)
    return client


def head(body: bytes, extra: str = "") -> bytes:
    lines = f"Host: x\r\n{extra}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return f"POST /v1/completions HTTP/1.1\r\n{lines}".encode()


def assert_serves(port: int) -> None:
    """A proper request is answered."""
    answer = asyncio.run(asyncio.wait_for(complete(port, BODY), 120))
    assert answer.usage["completion_tokens"] == 8 and answer.finish_reason == "length"


def test_a_client_that_reads_a_byte_a_second_holds_nobody_up(served, port) -> None:
    engine = served[1].loop.engine
    data = json.dumps({**LONG, "n": 4, "stream": True}).encode()
    with connect(port, head(data) + data, receive_buffer=1024) as client:
        for _ in range(2):
            assert len(client.recv(1)) == 1
            assert_serves(port)
            time.sleep(1)
        # The engine does not wait for it: it has finished, or goes on, but the answer ends.
        eventually(lambda: is_empty(engine))
    eventually(lambda: not served[1].loop.streams)
    assert_serves(port)


@pytest.mark.parametrize("part", ["head", "body"])
def test_half_a_request_takes_no_place(served, port, part) -> None:
    data = json.dumps(BODY).encode()
    half = head(data)[:40] if part == "head" else head(data) + data[:10]
    with connect(port, half):
        assert_serves(port)
        eventually(lambda: is_empty(served[1].loop.engine) and not served[1].loop.streams)
    assert_serves(port)


def test_a_header_of_a_megabyte_is_refused(port) -> None:
    with connect(port) as client:
        client.settimeout(120)
        received = b""
        try:
            client.sendall(head(b"", f"X: {'x' * 2**20}\r\n"))
            received = client.recv(100)
        except ConnectionError:
            pass  # it was cut off in the middle of sending
        assert received == b"" or received.startswith(b"HTTP/1.1 4"), received
    assert_serves(port)


def test_a_thousand_idle_connections_hold_nobody_up(port) -> None:
    clients = []
    try:
        for _ in range(1000):
            clients.append(connect(port))
        assert_serves(port)
    finally:
        for client in clients:
            client.close()
    assert_serves(port)


def test_a_killed_rank_ends_answers_with_a_reason() -> None:
    """kill -9 of a rank in mid-answer: the stream ends with an error, and from then on the status is 503."""

    async def ask_and_kill(server) -> None:
        ranks = psutil.Process(server.process.pid).children(recursive=True)  # all but the first, which serves
        assert ranks
        asked = await begin(server.port, {**LONG, "max_tokens": 900})
        ranks[-1].kill()
        with pytest.raises(RuntimeError, match="the engine has stopped"):
            await asyncio.wait_for(asked, 120)
        for path, body in (("/health", None), ("/v1/completions", BODY)):
            status, reader, writer = await asyncio.wait_for(request(server.port, path, body), 120)
            assert status == 503
            assert "the engine has stopped" in (await reader.read()).decode()
            writer.close()

    with running_server("--model", "tales", "--tensor-parallel", "2", "--timeout", "60", "--threads", "1") as server:
        asyncio.run(ask_and_kill(server))
    assert server.process.returncode is not None
