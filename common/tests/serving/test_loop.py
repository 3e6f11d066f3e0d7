"""What happens when clients leave, too many come, a request fails, or the engine does."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from common.sampling import SamplingParams  # noqa: E402
from common.serving.errors import EngineDead  # noqa: E402
from common.serving.loop import Delta, EngineLoop, Stream, put_all  # noqa: E402
from common.tests.serving.conftest import accepts, eventually, held, is_empty, make_engine, serving  # noqa: E402

LONG = {"prompt": "There was once a", "max_tokens": 900, "ignore_eos": True, "temperature": 0}
SHORT = {**LONG, "max_tokens": 4}


def post(url: str, body: dict, **options):
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60, **options)


def test_the_engine_is_loaded_in_the_thread_that_steps():
    """Otherwise libgomp keeps two teams of threads, and puts them to sleep in each operator."""
    threads = []

    class OneStep:
        config = SimpleNamespace(max_num_seqs=1)

        def __init__(self):
            threads.append(threading.current_thread())

        @property
        def has_unfinished_requests(self):
            return len(threads) < 2

        def step(self):
            threads.append(threading.current_thread())
            return []

        def close(self):
            pass

    loop = EngineLoop(OneStep, "one step", 1)
    eventually(lambda: len(threads) == 2)
    assert threads == [loop.thread] * 2
    loop.close()
    with pytest.raises(ZeroDivisionError):
        EngineLoop(lambda: 1 / 0, "none", 1)


def test_the_next_step_may_begin_when_all_readers_have_run():
    """And what has arrived is read before the error that ends a stream."""

    async def read() -> None:
        streams = [Stream([[1]], [SamplingParams()], {}) for _ in range(3)]
        readers = [asyncio.create_task(stream.take()) for stream in streams]
        await asyncio.sleep(0)  # now all of them wait
        is_written, delta = threading.Event(), Delta(0, "text", [1], [], None, None)
        put_all({stream: [delta] for stream in streams}, is_written)
        assert not is_written.is_set()
        asyncio.get_running_loop().call_soon(lambda: seen.append((is_written.is_set(), [r.done() for r in readers])))
        await asyncio.sleep(0)
        assert seen == [(True, [True] * 3)]
        streams[0].put([delta])
        streams[0].fail(EngineDead("it has ended"))
        assert await streams[0].take() == [delta]
        with pytest.raises(EngineDead):
            await streams[0].take()

    seen: list[tuple[bool, list[bool]]] = []
    asyncio.run(read())


def test_a_request_that_is_cancelled_before_the_engine_takes_it_is_not_added(served, monkeypatch):
    loop, added, release = served[1].loop, [], threading.Event()
    monkeypatch.setattr(loop.engine, "add_request", lambda *given, **options: added.append(given) or "request-1")

    async def leave() -> None:
        loop.commands.put(release.wait)  # the engine's thread is busy
        asked = asyncio.create_task(loop.submit([[5, 6]], [SamplingParams()]))
        await asyncio.sleep(0)
        assert loop.num_sequences == 1
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        release.set()

    asyncio.run(leave())
    eventually(loop.commands.empty)
    loop.check()
    assert not added and not loop.streams and not loop.readers


def test_a_client_that_leaves_a_stream_is_aborted(served, url):
    engine = served[1].loop.engine
    steps = engine.totals.num_steps
    with held(engine):
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={**LONG, "stream": True, "n": 3}, timeout=60
        ) as response:
            lines = response.iter_lines()
            next(lines)
            assert len(engine.scheduler.requests) == 3
        eventually(lambda: not served[1].loop.streams)
    eventually(lambda: is_empty(engine))
    assert engine.totals.num_steps < steps + 5  # of 900: the one that was held, and what the prompt took


@pytest.mark.parametrize("more", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["", "after a second request"])
def test_a_client_that_leaves_before_its_answer_is_aborted(served, url, more):
    engine = served[1].loop.engine
    steps = engine.totals.num_steps
    with held(engine):
        asked = httpx.Request("POST", f"{url}/v1/completions", json={**LONG, "n": 2})
        with socket.create_connection((asked.url.host, asked.url.port)) as client:
            head = "".join(f"{name}: {value}\r\n" for name, value in asked.headers.items())
            client.sendall(f"POST {asked.url.path} HTTP/1.1\r\n{head}\r\n".encode() + asked.content)
            eventually(lambda: len(engine.scheduler.requests) == 2)
            client.sendall(more)
        eventually(lambda: not served[1].loop.streams)
    eventually(lambda: is_empty(engine))
    assert engine.totals.num_steps < steps + 5


def test_too_many_wait_and_are_told_when_to_come_back():
    with serving(make_engine(max_batch_size=1), max_waiting=1) as (url, server):
        long = {**LONG, "stream": True}
        with held(server.loop.engine), httpx.stream("POST", f"{url}/v1/completions", json=long, timeout=60) as first:
            lines = first.iter_lines()  # to be kept: httpx closes the response of an iterator that is gone
            next(lines)
            waiting = threading.Thread(target=post, args=(url, SHORT))
            waiting.start()
            eventually(lambda: server.loop.num_sequences == 2)
            refused = post(url, SHORT)
            assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
            assert refused.json()["error"]["code"] == "queue_full"
            assert httpx.get(f"{url}/health").status_code == 200
        waiting.join(120)
        assert post(url, SHORT).status_code == 200
        eventually(lambda: is_empty(server.loop.engine))


def test_a_request_that_fails_fails_alone():
    engine = make_engine()
    runner, choose = engine.executor.runner, engine.executor.runner.choose
    later = []  # seeds of requests that fail after their first token

    def failing(request, logits):
        if request.params.seed == 13 or (request.params.seed in later and request.sample_index):
            raise ArithmeticError("thirteen")
        return choose(request, logits)

    runner.choose, runner.draw = failing, lambda requests, logits: {}  # or kernels would choose
    with serving(engine) as (url, _):
        answers = {}
        threads = [
            threading.Thread(target=lambda seed=seed: answers.update({seed: post(url, {**SHORT, "seed": seed})}))
            for seed in (12, 13, 14)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert [answers[seed].status_code for seed in (12, 13, 14)] == [200, 500, 200]
        assert "thirteen" in answers[13].json()["error"]["message"]
        streamed = post(url, {**SHORT, "seed": 13, "stream": True})  # nothing was sent, so there is still a status
        assert streamed.status_code == 500 and "thirteen" in streamed.json()["error"]["message"]
        later.append(14)
        streamed = post(url, {**SHORT, "seed": 14, "stream": True}).text.split("\n\n")
        assert json.loads(streamed[0].removeprefix("data: "))["choices"]
        assert "thirteen" in json.loads(streamed[-3].removeprefix("data: "))["error"]["message"]
        assert streamed[-2] == "data: [DONE]" and httpx.get(f"{url}/health").status_code == 200
        eventually(lambda: is_empty(engine))


def test_a_dead_engine_answers_503_and_says_why(caplog):
    engine = make_engine()
    step = engine.step

    def dying():
        if engine.totals.num_steps >= 3:
            raise RuntimeError("the memory is on fire")
        return step()

    engine.step = dying
    with serving(engine) as (url, _):
        for answer in (post(url, LONG), post(url, SHORT), httpx.get(f"{url}/health")):
            assert answer.status_code == 503 and "the memory is on fire" in answer.json()["error"]["message"]
        assert post(url, {**SHORT, "stream": True}).status_code == 503
    assert "the memory is on fire" in caplog.text and "Traceback" in caplog.text


def test_shutting_down_lets_answers_end():
    engine, answers = make_engine(), []

    def hold_until_no_connection_is_accepted(begun):
        with held(engine):
            begun.set()
            eventually(lambda: not accepts(httpx.URL(url).port))

    with serving(engine) as (url, server):
        threading.Thread(target=hold_until_no_connection_is_accepted, args=(begun := threading.Event(),)).start()
        begun.wait()
        thread = threading.Thread(target=lambda: answers.append(post(url, {**LONG, "max_tokens": 20})))
        thread.start()
        eventually(lambda: server.loop.num_sequences == 1)
    thread.join(120)
    assert answers[0].status_code == 200 and answers[0].json()["usage"]["completion_tokens"] == 20
    assert not server.loop.thread.is_alive()


def test_an_answer_that_outlasts_the_drain_ends_with_an_error():
    answers, threads = [], []
    with serving(make_engine(), drain=0) as (url, server):
        for stream in (False, True):
            body = {**LONG, "n": 4, "stream": stream}
            threads.append(threading.Thread(target=lambda body=body: answers.append(post(url, body))))
            threads[-1].start()
        eventually(lambda: server.loop.num_sequences == 8)
    for thread in threads:
        thread.join(120)
    assert len(answers) == 2 and all("the server is shutting down" in answer.text for answer in answers)
    assert 503 in [answer.status_code for answer in answers]
