"""A trace as Chrome trace events, which https://ui.perfetto.dev and chrome://tracing open.

The format is Google's "Trace Event Format": `X` is a span, `i` an instant, `C` a counter, `M` a name; times are in
microseconds.
"""

from __future__ import annotations

from typing import Any

from common.watching.trace import Trace

ENGINE, RANKS, REQUESTS = 1, 2, 3
"""The ids of the processes in the picture: the engine's own work, the ranks, and the requests, with a row for each."""
FIRST = 10
"""The id of a process's first thread. Perfetto confuses thread 0 with the thread whose id is that of its process."""


def chrome_events(trace: Trace) -> dict[str, Any]:
    """The events of a trace, as a JSON object."""
    events = [name("process_name", process, 0, text) for process, text in
              ((ENGINE, "engine"), (RANKS, "ranks"), (REQUESTS, "requests"))]  # fmt: skip
    for k, request in enumerate(trace.requests):
        events.append(name("thread_name", REQUESTS, k, request["id"]))
        events.append(event("i", "arrives", REQUESTS, k, request["time"], s="t"))
    for step in trace.steps:
        begun, submitted, done = step.plan["t"]
        label = {"step": step.number, "tokens": step.num_tokens}
        events.append(span("schedule", ENGINE, 0, begun, submitted, **label))
        events.append(span("submit", ENGINE, 0, submitted, done, **label))
        for victim, cause, *_ in step.plan.get("preempt", ()):
            by = trace.requests[cause]["id"]
            events.append(event("i", "preempted", REQUESTS, victim, begun, s="t", args={"for": by}))
        if step.result is None:
            continue
        waited, collected, end = step.result["t"]
        events.append(span("collect", ENGINE, 0, waited, collected, **label))
        events.append(span("update", ENGINE, 0, collected, end, **label))
        for entry in step.entries:
            found = {"step": step.number, "start": entry.start, "tokens": entry.num_tokens}
            if entry.num_spec_tokens:
                found |= {"draft tokens": entry.num_spec_tokens, "accepted": entry.num_accepted}
            events.append(span(entry.kind, REQUESTS, entry.request, submitted, collected, **found))
        counters = {"running": step.num_running, "waiting": step.num_waiting}
        events.append(event("C", "requests", ENGINE, 0, end, args=counters))
        held = trace.config["num_blocks"] - step.num_free
        events.append(event("C", "blocks", ENGINE, 0, end, args={"held": held, "free": step.num_free}))
    for rank, times in trace.lines[-1].get("ranks", {}).items():
        events.append(name("thread_name", RANKS, int(rank), f"rank {rank}"))
        events += [span(f"step {int(step)}", RANKS, int(rank), start, end) for step, start, end in times]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def event(phase: str, text: str, process: int, thread: int, seconds: float, **more: Any) -> dict[str, Any]:
    return {"ph": phase, "name": text, "pid": process, "tid": FIRST + thread, "ts": round(seconds * 1e6), **more}


def span(text: str, process: int, thread: int, start: float, end: float, /, **arguments: Any) -> dict[str, Any]:
    return event("X", text, process, thread, start, dur=max(0, round(end * 1e6) - round(start * 1e6)), args=arguments)


def name(kind: str, process: int, thread: int, text: str) -> dict[str, Any]:
    return event("M", kind, process, thread, 0, args={"name": text})
