"""`make serve`: an OpenAI-compatible server over the engine."""

from __future__ import annotations

import ipaddress
import logging
from functools import partial
from pathlib import Path
from typing import Any

import click

from common.course import files_used, substitutes
from common.options import engine_options, mine, number, option, threads
from common.start import OptionError, make_engine, start_engine


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@click.command("serve")
@option("--port", "PORT", type=number(0), default=8000, help="0: any free one")
@option("--host", "HOST", default="127.0.0.1", help="the address to listen at; others than loopback need KEYS")
@option("--keys", "KEYS", type=click.Path(path_type=Path), help="a file of keys and tenants")
@option(
    "--max-waiting", "QUEUE", type=number(), default=256, help="sequences that may wait; more are told to come back"
)
@option("--drain", "DRAIN", type=number(), default=30, help="seconds that answers may take after SIGTERM")
@mine()
@engine_options
@threads
def serve(
    port: int, host: str, keys: Path | None, max_waiting: int, drain: int, mine: str, threads: int | None, **options
):
    """An OpenAI-compatible server: /v1/chat/completions, /v1/completions, and a page to try them."""
    if keys is None and not is_loopback(host):
        raise OptionError(f"HOST={host} would let in anybody who reaches this machine. Name a file with KEYS=, too.")
    import uvicorn

    from common.serving.api import create_app
    from common.serving.generation import Server
    from common.serving.loop import EngineLoop
    from common.serving.metrics import Metrics
    from common.serving.tenants import KeysError, load_tenants

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    try:
        tenants = load_tenants(keys)
    except KeysError as error:
        raise OptionError(str(error)) from None
    name = Path(options["model"]).name
    if tenants.tenants and options["scheduling_policy"] == "fcfs":
        options["scheduling_policy"] = "fair"

    def start_loop(given: dict[str, Any]) -> EngineLoop:
        return EngineLoop(partial(make_engine, given), lambda engine: Metrics(engine, name), max_waiting)

    loop = start_engine(options, mine, threads, start_loop)
    server = Server(loop, loop.engine.tokenizer, loop.engine.config, name, tenants, loop.observer)
    config = uvicorn.Config(
        create_app(server), host, port, log_level="warning", access_log=False, timeout_graceful_shutdown=drain
    )
    socket = config.bind_socket()
    socket.listen(config.backlog)  # clients that come before the loop below wait for it, and are not refused
    port = socket.getsockname()[1]
    print(welcome(server, f"http://{'localhost' if is_loopback(host) else host}:{port}"), flush=True)
    uvicorn.Server(config).run(sockets=[socket])


def welcome(server, address: str) -> str:
    """What to type next."""
    is_chat = server.tokenizer.chat_template is not None
    route, field = (
        ("chat/completions", '"messages": [{"role": "user", "content": "Hello!"}]')
        if is_chat
        else (
            "completions",
            '"prompt": "There was once a"',
        )
    )
    key = " -H 'Authorization: Bearer KEY'" if server.tenants.tenants else ""
    call = (
        'chat.completions.create(messages=[{"role": "user", "content": "Hello!"}]'
        if is_chat
        else ('completions.create(prompt="There was once a"')
    )
    return "\n".join(
        [
            f"{server.model_name} answers at {address}. Ctrl-C ends it."
            + (f" {files_used()}" if substitutes() else ""),
            "",
            f"  the page     {address}/",
            f"  curl         curl {address}/v1/{route}{key} -H 'Content-Type: application/json' \\",
            f"                 -d '{{{field}, \"stream\": true}}'",
            f'  Python       client = openai.OpenAI(base_url="{address}/v1", api_key="{"KEY" if key else "none"}")',
            f'               client.{call}, model="{server.model_name}")',
            f"  all routes   {address}/docs",
        ]
    )
