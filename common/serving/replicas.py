"""Replicas of the server on Ray Serve, behind one address: `make serve REPLICAS=2`.

    this process                          a process of each replica
    HTTP, keys, Door    ── request ────▶  api.py's application, EngineLoop, engine
    connection          ◀── answer ─────  as ASGI's messages

Ray Serve starts the replicas, asks for their health, and starts another one when one has died. It also chooses a
replica for each request: its `PrefixCacheAffinityRouter` prefers the one that has seen the longest part of the prompt.
This module carries requests to a replica and answers back. A replica runs the application that serves without Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import ray
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.core import Metric
from ray import serve
from ray.exceptions import RayActorError
from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import PrefixCacheAffinityRouter
from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_tree import PrefixTree
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from common.serving.api import Gate, create_app
from common.serving.errors import EngineDead, QueueFull, as_api_error, handle_errors
from common.serving.generation import event
from common.serving.server import load_server, threads_of_each, welcome
from common.serving.tenants import Tenants
from common.start import OptionError

LOG = logging.getLogger("common.serving")

APPLICATION = "inference"
SCOPE = ("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "query_string", "headers", "client")
SHORTEST_PREFIX, LONGEST_PREFIX = 200, 20_000  # characters. A few blocks are not worth a queue; the router reads all
OBJECT_STORE = 80 * 2**20  # bytes; nothing here is stored in it, and Ray's own choice is a third of the memory


# --- In a replica's process -------------------------------------------------------------------------------------------


class Replica:
    """One engine and the application over it. Ray makes it, and calls `check_health`."""

    def __init__(self, options: dict[str, Any], mine: str, threads: int, max_waiting: int, tenants: Tenants):
        own = Tenants([replace(tenant) for tenant in tenants.tenants])  # whose clocks are this machine's
        self.server = load_server(options, mine, threads, max_waiting, own)
        self.app = create_app(self.server)

    async def answer(self, *prefix: Any, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """Yield what the application sends. If Ray cancels this, the application learns that its client has left.

        Without an engine this process ends itself: the request then goes to another replica, and Ray starts a new one.
        """
        try:
            self.check_health()
        except EngineDead as error:
            LOG.critical("This replica ends: %s", error)
            os._exit(1)
        given: asyncio.Queue[Message] = asyncio.Queue()
        given.put_nowait({"type": "http.request", "body": body, "more_body": False})
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        task = asyncio.create_task(self.app(scope, given.get, sent.put))
        task.add_done_callback(lambda task: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                yield message
            task.result()
        finally:
            given.put_nowait({"type": "http.disconnect"})

    def metrics(self) -> tuple[int, list[Metric]]:
        """The replica's number, and what it measures."""
        return serve.get_replica_context().rank.rank, list(self.server.loop.metrics.registry.collect())

    def welcome(self, address: str) -> str:
        return welcome(self.server, address)

    def check_health(self) -> None:
        """Raises EngineDead; Ray then replaces this replica."""
        self.server.loop.check()


# --- In the process that listens --------------------------------------------------------------------------------------


class PrefixTreeHere:
    """Stands for the actor that Ray's router keeps prefixes in. Here they are kept in the router's own process.

    Ray may place that actor on any machine, and does not start it again: without it, no request is answered any more.
    """

    def __init__(self):
        self.tree = PrefixTree()

    def __getattr__(self, name: str) -> SimpleNamespace:
        method = getattr(self.tree, name)
        return SimpleNamespace(remote=lambda *arguments: ray.put(method(*arguments)))


class Router(PrefixCacheAffinityRouter):
    """Ray's router. (`ray.serve.llm` exports it as well, but imports vLLM.)"""

    def initialize_state(self, **options: Any) -> None:
        super().initialize_state(tree_actor=PrefixTreeHere(), **options)


def prefixes(scope: Scope, body: bytes) -> list[SimpleNamespace]:
    """Return the prompt as the router reads it and compares it, or [] for a request that has none, or a short one.

    It begins with what the engine hashes into the first block, so tenants whose caches are apart share nothing.
    """
    try:
        fields = json.loads(body)
        prompt = fields.get("messages") or fields.get("prompt")
        salt = scope["state"]["tenant"].salt(fields.get("cache_salt"))
    except (ValueError, AttributeError, RecursionError):  # the replica says what is wrong
        return []
    text = f"{salt} {json.dumps(prompt)}"
    return [SimpleNamespace(prompt=text[:LONGEST_PREFIX])] if prompt and len(text) >= SHORTEST_PREFIX else []


class Door:
    """An ASGI application that lets one of the replicas answer."""

    def __init__(self, replicas: DeploymentHandle):
        self.replicas = replicas.options(stream=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        relay = asyncio.create_task(self.relay(scope, body, send))
        gone = asyncio.create_task(receive())  # the next message says that the client has left, or that all is sent
        await asyncio.wait([relay, gone], return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        relay.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await relay

    async def relay(self, scope: Scope, body: bytes, send: Send) -> None:
        """Send a replica's answer. If it dies before any of it was sent, another replica is asked, once."""
        plain = {name: scope[name] for name in SCOPE if name in scope}
        for is_last in (False, True):
            begun: Message | None = None
            answer = self.replicas.answer.remote(*prefixes(scope, body), scope=plain, body=body)
            try:
                async for message in answer:
                    begun = begun or message
                    await send(message)
                return
            except BackPressureError:
                raise QueueFull("Too many requests wait for a replica; try again later.") from None
            except RayActorError as error:
                LOG.warning("A replica has died. %s", error)
                dead = EngineDead("the replica has died in this answer; Ray starts another one.")
                if begun or is_last:
                    return await break_off(dead, begun, send)
            finally:
                answer.cancel()


async def break_off(error: Exception, begun: Message | None, send: Send) -> None:
    """End an answer with an error. begun: the message with its status and headers, if that was sent."""
    if begun is None or dict(begun["headers"])[b"content-type"] != b"text/event-stream; charset=utf-8":
        raise error
    body = event(as_api_error(error).body) + b"data: [DONE]\n\n"
    await send({"type": "http.response.body", "body": body})


def create_door(replicas: DeploymentHandle, tenants: Tenants) -> FastAPI:
    """The application that listens. Health and metrics are about all replicas; one of them answers the rest."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        await asyncio.to_thread(serve.shutdown)

    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.add_middleware(Gate, tenants=tenants)
    handle_errors(app)

    @app.get("/health")
    @app.get("/ping")
    @app.post("/ping")
    async def health() -> Response:
        status = await asyncio.to_thread(serve.status)
        states = status.applications[APPLICATION].deployments[Replica.__name__].replica_states
        if not states.get("RUNNING"):
            raise EngineDead("no replica is running; Ray starts one.")
        return Response()

    @app.get("/metrics")
    async def metrics() -> Response:
        try:
            found = await replicas.broadcast("metrics").results_async(timeout_s=10, return_exceptions=True)
        except TimeoutError:
            raise EngineDead("a replica has not answered for 10 s; Ray replaces it if it is lost.") from None
        alive = [each for each in found if not isinstance(each, BaseException)]
        return Response(generate_latest(merged(alive)), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    app.mount("/", Door(replicas))
    return app


def merged(replicas: Iterable[tuple[int, list[Metric]]]) -> SimpleNamespace:
    """The metrics of all replicas as one registry; the label `engine` tells them apart, as in vLLM."""
    families: dict[str, Metric] = {}
    for engine, metrics in sorted(replicas, key=lambda replica: replica[0]):
        for metric in metrics:
            family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
            family.samples += [each._replace(labels={**each.labels, "engine": str(engine)}) for each in metric.samples]
    return SimpleNamespace(collect=families.values)


def connect(num_replicas: int, threads: int | None) -> int:
    """Start Ray on this machine, or join the cluster that RAY_ADDRESS names. Returns the threads of each replica.

    threads: those that were asked for. Raises OptionError.
    """
    address, own = os.environ.get("RAY_ADDRESS"), {}
    if not address:
        own = {"address": "local", "num_cpus": os.cpu_count() or 1, "include_dashboard": False}
        own["object_store_memory"] = OBJECT_STORE
    try:
        ray.init(logging_level=logging.WARNING, **own)
    except Exception as error:  # Ray raises this very class after 30 s on a busy machine
        failure = f"RAY_ADDRESS={address} cannot be joined." if address else "Ray has not started; try again."
        raise OptionError(f"{failure} {error}") from None
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return threads_of_each(num_replicas, [int(machine.get("CPU", 0)) for machine in machines], threads)


def start_replicas(
    num_replicas: int, options: dict[str, Any], mine: str, threads: int | None, max_waiting: int, tenants: Tenants
) -> DeploymentHandle:
    """Start the replicas, and wait until all of them have loaded their engine.

    They are started on this machine, or, where RAY_ADDRESS names a cluster, where that has free processors. Limits of
    tenants hold for each replica. Raises OptionError.
    """
    threads = connect(num_replicas, threads)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    logs = {"log_level": "WARNING", "enable_access_log": False}
    serve.start(proxy_location="Disabled", logging_config=logs)
    router = RequestRouterConfig(
        request_router_class=Router,
        # any two chats begin with the same 30 characters of JSON, so a tenth of the prompt, Ray's default, says little
        request_router_kwargs={"imbalanced_threshold": 10, "match_rate_threshold": 0.5, "do_eviction": True},
    )
    deployment = serve.deployment(
        Replica,
        num_replicas=num_replicas,
        ray_actor_options={"num_cpus": threads},
        max_ongoing_requests=options["max_num_seqs"] + max_waiting,
        max_queued_requests=max_waiting,
        request_router_config=router,
        health_check_period_s=2,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config=logs,
    )
    bound = deployment.bind(options, mine, threads, max_waiting, tenants)
    return serve.run(bound, name=APPLICATION, route_prefix=None)
