"""`make serve REPLICAS=2` on Ray Serve: one address, replicas that die, and nothing that is left behind."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from urllib.request import urlopen

import psutil
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("ray")

from fastapi.testclient import TestClient
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from common.bench.serving import RunningServer, complete, request, running_server
from common.serving.errors import EngineDead
from common.serving.replicas import Replica, connect, create_door
from common.serving.tenants import Tenant, Tenants
from common.start import OptionError
from common.tests.serving.conftest import begin, eventually

BODY = {"prompt": [7] * 64, "max_tokens": 8, "ignore_eos": True, "temperature": 0}
LONG = {**BODY, "max_tokens": 900}


# ---------------------------------------------------------------------------------------------------------------
# The door alone
# ---------------------------------------------------------------------------------------------------------------

START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}


class Replicas:
    """Stands for a deployment's handle. Each call yields the next list of messages; an error in it is raised."""

    def __init__(self, *answers: list):
        self.answers, self.calls = list(answers), []
        self.answer = self

    def options(self, stream: bool) -> Replicas:
        return self

    def remote(self, *prefix, **call) -> Answer:
        self.calls.append(([each.prompt for each in prefix], call))
        return Answer(self.answers.pop(0))


class Answer:
    def __init__(self, messages: list):
        self.messages = iter(messages)

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> dict:
        message = next(self.messages, None)
        if message is None:
            raise StopAsyncIteration
        if isinstance(message, Exception):
            raise message
        return message

    def cancel(self) -> None:
        pass


def through_the_door(replicas: Replicas, tenants: Tenants | None = None, prompt: str = "Once", **options):
    client = TestClient(create_door(replicas, tenants or Tenants([])), raise_server_exceptions=False)
    return client.post("/v1/completions", json={"prompt": prompt}, **options)


def body(text: bytes) -> dict:
    return {"type": "http.response.body", "body": text}


def test_a_request_goes_on_to_another_replica_once_and_only_if_nothing_was_sent() -> None:
    begun = [START, {**body(b"data: 1\n\n"), "more_body": True}, RayActorError()]
    answer = through_the_door(Replicas([RayActorError()], [START, body(b"data: 1\n\n")]))
    assert (answer.status_code, answer.text) == (200, "data: 1\n\n")
    answer = through_the_door(Replicas([RayActorError()], [RayActorError()]))
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_dead"
    answer = through_the_door(Replicas(begun))
    events = answer.text.split("\n\n")
    assert (events[0], events[2:]) == ("data: 1", ["data: [DONE]", ""]) and "the replica has died" in events[1]


def test_too_many_requests_for_all_replicas_are_told_to_come_back() -> None:
    answer = through_the_door(Replicas([BackPressureError(num_queued_requests=1, max_queued_requests=1)]))
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"


def test_a_replica_without_an_engine_ends_itself(monkeypatch) -> None:
    def check() -> None:
        raise EngineDead("the engine has stopped.")

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr("os._exit", leave)
    replica = object.__new__(Replica)
    replica.server = SimpleNamespace(loop=SimpleNamespace(check=check))
    with pytest.raises(SystemExit):
        asyncio.run(anext(replica.answer(scope={}, body=b"")))


def test_keys_hold_at_the_door_and_tenants_share_no_prefix() -> None:
    tenants = Tenants([Tenant("alice", key="a"), Tenant("bob", key="b", isolate_prefix_cache=False)])
    replicas, prompt = Replicas(*[[START, body(b"")]] * 4), "Once " * 50
    assert through_the_door(replicas, tenants).status_code == 401 and not replicas.calls
    for key in ("a", "b"):
        headers = {"Authorization": f"Bearer {key}"}
        assert through_the_door(replicas, tenants, prompt, headers=headers).status_code == 200
        assert through_the_door(replicas, tenants, "Once", headers=headers).status_code == 200
    assert [prefix for prefix, _ in replicas.calls] == [[f'alice "{prompt}"'], [], [f' "{prompt}"'], []]
    assert json.loads(replicas.calls[0][1]["body"]) == {"prompt": prompt}


@pytest.mark.parametrize(("address", "words"), [("", "Ray has not started"), ("auto", "RAY_ADDRESS=auto cannot")])
def test_ray_that_does_not_start_is_said_in_a_sentence(monkeypatch, address, words) -> None:
    def init(**options) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.init", init)
    with pytest.raises(OptionError, match=f"{words}.*timed out"):
        connect(1, None)


def test_limits_of_tenants_are_counted_with_the_clock_of_the_replica_s_machine(monkeypatch) -> None:
    tenant = Tenant("alice", key="a", tokens_per_minute=60)
    tenant.counted_at += 1e6  # the machine that listens has been up for longer
    monkeypatch.setattr("common.serving.replicas.load_server", lambda *arguments: arguments[-1])
    monkeypatch.setattr("common.serving.replicas.create_app", lambda server: None)
    [own] = Replica({}, "", 1, 1, Tenants([tenant])).server.tenants
    own.admit()
    assert (own.name, own.key, own.tokens_left) == ("alice", "a", 60)


# ---------------------------------------------------------------------------------------------------------------
# With Ray: the tests share one server, and the last one ends it
# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server("--model", "tales", "--replicas", "2", "--threads", "1") as found:
        yield found


def engines(server: RunningServer) -> set[psutil.Process]:
    """The processes of the replicas."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return {process for process in children if "ServeReplica:inference:Replica" in " ".join(process.cmdline())}


def measured(server: RunningServer, name: str, label: str = "") -> dict[str, float]:
    """A metric of each engine. label: one that its lines must have."""
    with urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=120) as answer:
        lines = re.findall(rf'^vllm:{name}{{engine="(\d+)".*{label}.*}} (\S+)$', answer.read().decode(), re.MULTILINE)
    return {engine: float(value) for engine, value in lines}


def ask(server: RunningServer, body: dict):
    return asyncio.run(asyncio.wait_for(complete(server.port, body), 120))


@pytest.mark.slow
def test_a_prompt_goes_where_its_prefix_is_cached(server) -> None:
    """Two conversations, each continued three times: each stays with its replica, whose prefix cache knows it."""
    first, second = ([number] * 64 for number in (11, 23))
    for _ in range(3):
        for prompt in (first, second):
            answer = ask(server, {**BODY, "prompt": prompt})
            assert answer.times[-1] > answer.times[0], "the answer was not streamed, but came at once"
            prompt += [5] * 16
    assert answer.usage["prompt_tokens_details"]["cached_tokens"] >= 64
    assert measured(server, "prefix_cache_queries_total") == {"0": 240.0, "1": 240.0}


@pytest.mark.slow
def test_a_replica_that_is_killed_is_replaced_and_its_answers_end_or_begin_again(server) -> None:
    """kill -9: a stream ends with an error. An answer of which nothing was sent comes from the other replica."""
    before = engines(server)
    assert len(before) == 2

    async def kill_in_mid_answer() -> None:
        asked = [await begin(server.port, {**LONG, "prompt": [n] * 64}) for n in (31, 37)]
        whole = asyncio.create_task(whole_answer(server.port, {**LONG, "prompt": [31] * 64}))
        while sum((await asyncio.to_thread(measured, server, "num_requests_running")).values()) < 3:
            assert not whole.done() and not any(task.done() for task in asked)
        min(before, key=lambda process: process.pid).kill()
        ends = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 120)
        failures = [end for end in ends if isinstance(end, Exception)]
        assert [str(failure) for failure in failures] == [
            "the replica has died in this answer; Ray starts another one."
        ]
        assert await asyncio.wait_for(whole, 120) == 200

    asyncio.run(kill_in_mid_answer())
    assert ask(server, BODY).finish_reason == "length"
    eventually(lambda: len(engines(server)) == 2 and len(measured(server, "num_requests_running")) == 2)
    assert engines(server) != before


async def whole_answer(port: int, body: dict) -> int:
    """The status of an answer that is not streamed."""
    status, reader, writer = await request(port, "/v1/completions", body)
    await reader.read()
    writer.close()
    return status


@pytest.mark.slow
def test_a_client_that_leaves_is_aborted_in_its_replica(server) -> None:
    asyncio.run(complete(server.port, LONG, leave_after=3))
    eventually(lambda: sum(measured(server, "request_success_total", 'finished_reason="abort"').values()) == 1)
    eventually(lambda: not any(measured(server, "num_requests_running").values()))


@pytest.mark.slow
def test_an_answer_is_finished_after_sigterm_and_no_process_is_left(server) -> None:
    children = psutil.Process(server.process.pid).children(recursive=True)

    async def end_in_mid_answer() -> None:
        asked = await begin(server.port, LONG)
        server.process.terminate()
        assert (await asyncio.wait_for(asked, 120)).usage["completion_tokens"] == LONG["max_tokens"]

    asyncio.run(end_in_mid_answer())
    server.process.communicate(timeout=120)
    eventually(lambda: not [child for child in children if child.is_running() and child.status() != "zombie"])
