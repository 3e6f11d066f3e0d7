"""From a command's options to what the routes need, and what to tell the person who started it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common.course import files_used, substitutes
from common.serving.generation import Server
from common.serving.loop import EngineLoop
from common.serving.tenants import Tenants
from common.start import OptionError, make_engine, start_engine


def load_server(options: dict[str, Any], mine: str, threads: int | None, max_waiting: int, tenants: Tenants) -> Server:
    """Load the engine that the options ask for, in a thread of its own. Raises as `start_engine` does."""
    if tenants.tenants and options["scheduling_policy"] == "fcfs":
        options = {**options, "scheduling_policy": "fair"}

    def start(given: dict[str, Any]) -> Server:
        name = Path(options["model"]).name
        return Server(EngineLoop(partial(make_engine, given), name, max_waiting), name, tenants)

    return start_engine(options, mine, threads, start)


def threads_of_each(num_replicas: int, processors: Sequence[int], threads: int | None) -> int:
    """Return how many threads each replica has: by default, the most for which there are processors.

    processors: of each machine; a replica runs on one of them. Raises OptionError if there are too few, since Ray would
    wait for more.
    """
    allowed = [threads] if threads else range(max(processors), 0, -1)
    for number in allowed:
        if sum(each // number for each in processors) >= num_replicas:
            return number
    raise OptionError(
        f"There are too few processors for REPLICAS={num_replicas}: each needs {threads or 1} of one machine, and "
        f"the {'machine has' if len(processors) == 1 else 'machines have'} {', '.join(map(str, processors))}."
    )


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
