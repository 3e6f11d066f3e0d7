"""A server over `tales`, which has been given a chat template, at a free port of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time

import pytest

TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] There was once{% endif %}"
)


@contextlib.contextmanager
def serving(engine, tenants=None, template: str | None = TEMPLATE, drain: int = 20, max_waiting: int = 256):
    """Serve an engine as `make serve` does; yields (base URL, Server). When it ends, the engine is closed."""
    import uvicorn

    from common.serving.api import create_app
    from common.serving.generation import Server
    from common.serving.loop import EngineLoop
    from common.serving.tenants import Tenants

    engine.tokenizer.chat_template = template
    server = Server(EngineLoop(lambda: engine, "tales", max_waiting), "tales", tenants or Tenants([]))
    config = uvicorn.Config(
        create_app(server), "127.0.0.1", 0, log_level="warning", access_log=False, timeout_graceful_shutdown=drain
    )
    listening = config.bind_socket()
    runner = uvicorn.Server(config)
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    eventually(lambda: runner.started or not thread.is_alive())
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", server
    finally:
        runner.should_exit = True
        thread.join(120)
        listening.close()


def make_engine(**options):
    from solutions.engine import InferenceEngine

    return InferenceEngine("tales", **{"num_blocks": 256, "max_batch_size": 8, **options})


@pytest.fixture(scope="package")
def served():
    """(base URL, Server), one for all tests that leave it as it was."""
    pytest.importorskip("fastapi")
    with serving(make_engine(), max_waiting=64) as found:
        yield found


@pytest.fixture(scope="package")
def url(served) -> str:
    return served[0]


@pytest.fixture(scope="package")
def client(url):
    """The official client."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as found:
        yield found


def eventually(condition, seconds: float = 120.0) -> None:
    """Wait until a condition holds; fail if it does not within these seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@contextlib.contextmanager
def held(engine):
    """The engine takes one step, and the next one only after the block: no request ends within it."""
    step, release, has_begun = engine.step, threading.Event(), threading.Event()

    def waiting():
        if has_begun.is_set():
            release.wait(600)
        has_begun.set()
        return step()

    engine.step = waiting
    try:
        yield
    finally:
        engine.step = step
        release.set()


def accepts(port: int) -> bool:
    """Whether a connection to this port of this machine is accepted."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


async def begin(port: int, body: dict):
    """Ask for a streamed completion. Returns once its first event has come, with the task that reads the rest."""
    from common.bench.serving import Answer, complete

    asked = asyncio.create_task(complete(port, body, answer=(answer := Answer())))
    while not answer.received:
        await asyncio.sleep(0.001)
        if asked.done():
            asked.result()
    return asked


def is_empty(engine) -> bool:
    """Whether nothing of any request is left: no block is held, no request is known."""
    pool = engine.manager.pool
    scheduler = engine.scheduler
    return pool.num_free_blocks == len(pool.blocks) and not scheduler.requests and not engine.processor.states
