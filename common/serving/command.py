"""`make serve`: an OpenAI-compatible server over the engine."""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys
from functools import partial
from pathlib import Path

import click

from common.options import engine_options, mine, number, option, threads
from common.setup import ensure
from common.start import OptionError

SAME_EVERYWHERE = {"loop": "asyncio", "http": "h11", "ws": "none"}
"""uvicorn takes faster ones where another package has brought them; httptools knows no limit for the size of a head."""
RAY = {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}
"""Ray's processes refuse requests without a token, which lies in the home directory. Nothing about its use is sent."""


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """Return a socket that listens there, and its URL. Raises OptionError, for example if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=2048, dualstack_ipv6=host == "::")
    except OSError as error:
        raise OptionError(f"HOST={host} PORT={port} cannot be used: {error.strerror.partition(' (')[0]}.") from None
    names = {"127.0.0.1": "localhost", "0.0.0.0": socket.gethostname(), "::": socket.gethostname()}
    name = names.get(host, f"[{host}]" if ":" in host else host)
    return listening, f"http://{name}:{listening.getsockname()[1]}"


@click.command("serve")
@option("--port", "PORT", type=click.IntRange(0, 65535), default=8000, help="0: any free one")
@option("--host", "HOST", default="127.0.0.1", help="the address to listen at; others than loopback need KEYS")
@option("--keys", "KEYS", type=click.Path(path_type=Path), help="a file of keys and tenants")
@option("--max-waiting", "QUEUE", type=number(), default=256, help="sequences that may wait; more get status 429")
@option("--drain", "DRAIN", type=number(), default=30, help="seconds that answers may take after SIGTERM")
@option("--replicas", "REPLICAS", type=number(), default=1, help="engines; two or more run on Ray Serve")
@mine()
@engine_options
@threads
def serve(
    port: int,
    host: str,
    keys: Path | None,
    max_waiting: int,
    drain: int,
    replicas: int,
    mine: str,
    threads: int | None,
    **options,
):
    """An OpenAI-compatible server: /v1/chat/completions, /v1/completions, and a page to try them."""
    if keys is None and not is_loopback(host):
        raise OptionError(f"HOST={host} would let in anybody who reaches this machine. Name a file with KEYS=, too.")
    import uvicorn

    from common.serving.api import create_app
    from common.serving.server import load_server, threads_of_each, welcome
    from common.serving.tenants import load_tenants

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    tenants = load_tenants(keys)
    if replicas == 1:
        server = load_server(options, mine, threads, max_waiting, tenants)
        app, greet = create_app(server), partial(welcome, server)
    else:
        if not os.environ.get("RAY_ADDRESS"):
            threads_of_each(replicas, [os.cpu_count() or 1], threads)  # before anything is installed or started
        ensure("cluster", sys.argv[1:])
        for name, value in RAY.items():
            os.environ.setdefault(name, value)  # before Ray is imported, which reads them
        from common.serving.replicas import create_door, start_replicas

        handle = start_replicas(replicas, options, mine, threads, max_waiting, tenants)
        app, greet = create_door(handle, tenants), lambda address: handle.welcome.remote(address=address).result()
    listening, url = listen(host, port)  # clients that come before the loop below wait for it, and are not refused
    print(greet(url), flush=True)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=drain, **SAME_EVERYWHERE
    )
    uvicorn.Server(config).run(sockets=[listening])
