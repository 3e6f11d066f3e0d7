"""`make run`: the engine answers several prompts at once, in a live table.

The table has a row for each request, with its text as it comes, and below them the state of the engine. If the output
is no terminal, each answer is printed when it is complete. At the end the metrics are printed.
"""

from __future__ import annotations

import time

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

BUSY_SHARE = 0.2
"""If a thread waits for a core for more than this share of the time, the machine is busy. If it is idle, it is 0.01."""

QUESTIONS = (
    "What is gravity? Answer in two or three sentences.",
    "Write a short poem about the sea at night.",
    "Give me three tips for learning a language.",
    "Explain to a child why the sky is blue.",
    "What is the capital of France, and what is it known for?",
    "Write a friendly e-mail that invites a colleague to lunch. Mention that the new place around the corner is open "
    "since Monday, that it has a garden, and that Tuesday or Thursday would both be fine.",
    "List the planets of the solar system.",
    "Finish the story: The old lighthouse had been dark for years, until one evening",
)
BEGINNINGS = (
    "There was once a",
    "Long ago, in a dark wood,",
    "One day the owl found",
    "In the deep blue sea lived",
    "The robot looked at the clock",
    "Her name was Ada, and",
    "Nobody in the village had ever seen",
    "It was the first day of winter.",
)


def state_of(request) -> tuple[str, str]:
    """The state of a request in a word, and the word's colour. request: None once it has finished."""
    if request is None:
        return "done", "green"
    if request.output_token_ids and request.status.value == "running":
        return "writes", "cyan"
    return {"running": ("reads", "yellow"), "swapped": ("swapped", "magenta")}.get(
        request.status.value, ("waits", "dim")
    )


def tail(text: str, width: int) -> str:
    """The end of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= width else "…" + line[len(line) - width + 1 :]


def picture(engine, prompts: list[str], ids: list[str], outputs: list, width: int) -> Group:
    """The table of the requests, and the state of the engine."""
    table = Table(box=None, padding=(0, 1), header_style="dim", width=width)
    table.add_column("", no_wrap=True, width=7)
    table.add_column("tokens", justify="right", no_wrap=True)
    table.add_column("prompt", no_wrap=True, width=max(10, width // 4))
    table.add_column("answer", no_wrap=True, ratio=1)
    answer_width = width - 7 - 6 - max(10, width // 4) - 8
    for prompt, request_id, output in zip(prompts, ids, outputs):
        word, color = state_of(engine.scheduler.requests.get(request_id))
        answer = Text(tail(output.text, answer_width))
        table.add_row(Text(word, color), str(len(output.token_ids)), Text(prompt, "dim"), answer)
    metrics, pool, scheduler = engine.metrics(), engine.manager.pool, engine.scheduler
    held = 1 - pool.num_free_blocks / len(pool.blocks)
    words = [
        f"{len(scheduler.running)} run, {len(scheduler.waiting)} wait",
        f"{metrics.tokens_per_second:.0f} tokens/s",
        f"{held:.0%} of {len(pool.blocks)} blocks held",
    ]
    return Group(table, Text(" · ".join(words), "dim"))


def serve(engine, prompts: list[str], token_ids: list[list[int]], params, console: Console | None = None) -> int:
    """Answer all prompts at once. Returns 0, or 130 if Ctrl-C ended it; then the answers so far are shown.

    Raises ValueError, and answers none, if one of them can never be served.
    """
    from common.machine import seconds_without_core  # it imports torch

    console = console or Console(highlight=False)
    ids: list[str] = []
    try:
        ids += (engine.add_request(prompt_token_ids, params) for prompt_token_ids in token_ids)
    except ValueError:
        for request_id in ids:
            engine.abort(request_id)
        raise
    outputs = [engine.output(request_id) for request_id in ids]
    code, start, waited = 0, time.perf_counter(), seconds_without_core()
    try:
        if console.is_terminal:
            with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
                while engine.has_unfinished_requests:
                    engine.step()
                    live.update(picture(engine, prompts, ids, outputs, console.width), refresh=True)
        else:
            while engine.has_unfinished_requests:
                for output in engine.step():
                    if output.finish_reason:
                        number = ids.index(output.request_id)
                        console.print(f"[{number + 1}] {prompts[number]}\n{output.text.strip()}\n", markup=False)
    except KeyboardInterrupt:
        for request_id in ids:
            engine.abort(request_id)
        console.print("Stopped.")
        code = 130
    if console.is_terminal:
        for prompt, output in zip(prompts, outputs):
            console.print(Text(f"\n{prompt}", "bold"))
            console.print(output.text.strip(), markup=False)
    console.print(report(engine, outputs))
    share = (seconds_without_core() - waited) / (time.perf_counter() - start)
    if share > BUSY_SHARE:
        console.print(
            f"Other processes had the cores for {share:.0%} of this time, so this was slower than the machine can be. "
            "End some of them, or try THREADS=1."
        )
    return code


def report(engine, outputs: list) -> Group:
    """The metrics of each request and of the engine."""

    def ms(seconds: float | None) -> str:
        return "" if seconds is None else f"{seconds * 1e3:.0f}"

    table = Table(box=None, padding=(0, 1), header_style="dim")
    for column in ("", "prompt", "output", "queue", "first", "each", "cached", "preempted", "end"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for number, output in enumerate(outputs, 1):
        times = output.metrics
        table.add_row(
            f"[{number}]",
            str(len(output.prompt_token_ids)),
            str(len(output.token_ids)),
            ms(times.queue_time),
            ms(times.time_to_first_token),
            ms(times.time_per_output_token),
            str(times.num_cached_tokens),
            str(times.num_preemptions),
            output.error or output.finish_reason or "",
        )
    note = "Tokens of prompt and output; milliseconds in the queue, to the first token, and for each after it."
    totals = engine.metrics()
    words = [
        f"{totals.num_output_tokens} tokens in {totals.seconds:.1f} s: {totals.tokens_per_second:.1f} tokens/s",
        f"{totals.num_steps} steps",
        f"pool {totals.pool_utilisation:.0%} held on average",
        f"{totals.slots_per_token:.2f} slots held for each token stored",
        f"{totals.hit_rate:.0%} of the prompts' tokens found in the cache",
        f"{totals.num_preemptions} preemptions",
    ]
    if totals.num_draft_tokens:
        words.append(f"{totals.num_accepted_tokens} of {totals.num_draft_tokens} draft tokens right")
    return Group(Text(""), table, Text(note, "dim"), Text(""), Text(", ".join(words) + "."))
