"""From a command's options to what the routes need, and what to tell the person who started it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from common.course import files_used, substitutes
from common.serving.generation import Server
from common.serving.loop import EngineLoop
from common.serving.metrics import Metrics
from common.serving.tenants import Tenants
from common.start import make_engine, start_engine


def load_server(options: dict[str, Any], mine: str, threads: int | None, max_waiting: int, tenants: Tenants) -> Server:
    """Load the engine that the options ask for, in a thread of its own. Raises as `start_engine` does."""
    name = Path(options["model"]).name
    if tenants.tenants and options["scheduling_policy"] == "fcfs":
        options = {**options, "scheduling_policy": "fair"}

    def start_loop(given: dict[str, Any]) -> EngineLoop:
        return EngineLoop(partial(make_engine, given), lambda engine: Metrics(engine, name), max_waiting)

    loop = start_engine(options, mine, threads, start_loop)
    return Server(loop, loop.engine.tokenizer, loop.engine.config, name, tenants, loop.observer)


def welcome(server: Server, address: str) -> str:
    """What to type next."""
    if server.tokenizer.chat_template is not None:
        route, field = "chat/completions", '"messages": [{"role": "user", "content": "Hello!"}]'
        call, text = 'chat.completions.create(messages=[{"role": "user", "content": "Hello!"}]', "message.content"
    else:
        route, field = "completions", '"prompt": "There was once a"'
        call, text = 'completions.create(prompt="There was once a"', "text"
    key, header = ("KEY", " -H 'Authorization: Bearer KEY'") if server.tenants.tenants else ("none", "")
    return "\n".join(
        [
            f"{server.model_name} answers at {address}. Ctrl-C ends it."
            + (f" {files_used()}" if substitutes() else ""),
            "",
            f"  the page     {address}/",
            f"  curl         curl -N {address}/v1/{route}{header} -H 'Content-Type: application/json' \\",
            f"                 -d '{{{field}, \"stream\": true}}'",
            "  Python       import openai  # pip install openai",
            f'               client = openai.OpenAI(base_url="{address}/v1", api_key="{key}")',
            f'               answer = client.{call}, model="{server.model_name}")',
            f"               print(answer.choices[0].{text})",
            f"  all routes   curl {address}/openapi.json{header}" if header else f"  all routes   {address}/docs",
        ]
    )
