"""Reads a trace: its lines, which `recorder.py` describes, and the numbers that follow from them.

`page/trace.js` computes the same numbers in the browser, and a test compares both with `engine.metrics()`.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.course import CourseError
from common.metrics import EngineMetrics

KINDS = ("prefill", "recompute", "decode", "verify")
"""What a request computes in a step: a chunk of its prompt; tokens that it has lost by preemption; its newest token;
that and draft tokens to be verified."""


@dataclass
class Entry:
    """What one request computed in a step."""

    request: int  # its number
    start: int  # position of the first token
    num_tokens: int
    num_spec_tokens: int  # of these, draft tokens
    kind: str  # one of KINDS
    sampled: list[int] = field(default_factory=list)
    num_kept: int = 0  # of the sampled tokens, those that became output

    @property
    def num_accepted(self) -> int:
        """Draft tokens that became output; the last sampled token was none."""
        return min(self.num_kept, max(0, len(self.sampled) - 1))


@dataclass
class Step:
    """One step, and the engine's state once it was collected; `result` is None if it was interrupted."""

    number: int
    entries: list[Entry]
    plan: dict[str, Any]  # the lines themselves
    result: dict[str, Any] | None = None
    num_free: int = 0  # blocks
    num_stored: int = 0  # tokens of the running requests; one that two of them share counts twice
    num_running: int = 0
    num_waiting: int = 0
    lost: int = 0  # blocks that are not free, although no block table contains them
    miscounted: int = 0  # blocks whose reference count is not the number of block tables that contain them

    @property
    def num_tokens(self) -> int:
        return sum(entry.num_tokens for entry in self.entries)


@dataclass
class Trace:
    lines: list[dict[str, Any]]
    requests: list[dict[str, Any]]  # by number
    steps: list[Step]

    @property
    def config(self) -> dict[str, Any]:
        return self.lines[0]["config"]


def read_trace(file: Path) -> Trace:
    """Read a trace; one that breaks off is read as far as it goes. Raises CourseError for a file of another kind."""
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if lines[0]["trace"] != 1:
            raise CourseError(f"{file} is a trace of version {lines[0]['trace']}; this course reads version 1.")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CourseError(f"{file} is not a trace that make watch-engine wrote: {error!r}.") from None
    replay = Replay(lines[0]["config"]["num_blocks"])
    for line in lines:
        replay.apply(line)
    return Trace(lines, replay.requests, list(replay.steps.values()))


class Replay:
    """Goes through the lines of a trace and keeps the state of the engine that follows from them."""

    def __init__(self, num_blocks: int):
        self.requests: list[dict[str, Any]] = []
        self.computed: dict[int, int] = {}  # tokens, of each request that has not ended
        self.highest: dict[int, int] = {}  # the most that it ever had
        self.running: set[int] = set()
        self.waiting: list[int] = []  # the waiting line, in the policy's order
        self.tables: dict[int, list[int]] = {}
        self.counts = [0] * num_blocks  # the reference count of each block
        self.cached: set[int] = set()  # blocks with a hash, by which they are found
        self.steps: dict[int, Step] = {}  # by number

    def apply(self, line: dict[str, Any]) -> None:
        self.enter(line)
        if "plan" in line:
            self.steps[line["plan"]] = Step(line["plan"], self.schedule(line), line)
        elif "result" in line:
            self.collect(self.steps[line["result"]], line)
        self.update(line)
        if "result" in line:
            self.note_state(self.steps[line["result"]])

    def enter(self, line: dict[str, Any]) -> None:
        """Add new requests. If the step before was interrupted, free all blocks."""
        for request in line.get("requests", ()):
            self.computed[len(self.requests)] = self.highest[len(self.requests)] = 0
            prompt = request["prompt"] if request["parent"] is None else self.requests[request["parent"]]["prompt"]
            self.requests.append({**request, "prompt": prompt, "cached": None})
        if line.get("reset"):
            self.running, self.cached, self.tables, self.counts = set(), set(), {}, [0] * len(self.counts)
            self.computed = dict.fromkeys(self.computed, 0)

    def schedule(self, line: dict[str, Any]) -> list[Entry]:
        self.running -= {victim for victim, *_ in line.get("preempt", ())}
        entries = []
        for each in line["run"]:
            k, num_tokens, num_spec, *rest = each + [0] * (3 - len(each)) if isinstance(each, list) else (each, 1, 0)
            start = rest[0] if rest else self.computed[k]
            end, request = start + num_tokens, self.requests[k]
            if request["cached"] is None:
                request["cached"] = start
            kind = "verify" if num_spec else "prefill" if end <= len(request["prompt"]) else "decode"
            if start < self.highest[k]:
                kind = "recompute"
            entries.append(Entry(k, start, num_tokens, num_spec, kind))
            self.computed[k], self.highest[k] = end, max(self.highest[k], end - num_spec)
            self.running.add(k)
        return entries

    def collect(self, step: Step, line: dict[str, Any]) -> None:
        step.result = line
        for entry, out in zip(step.entries, line["out"]):
            entry.sampled = [] if out is None else [out] if isinstance(out, int) else out
            if entry.sampled:
                self.computed[entry.request] -= entry.num_spec_tokens + 1 - len(entry.sampled)
            entry.num_kept = line.get("kept", {}).get(str(entry.request), len(entry.sampled))

    def update(self, line: dict[str, Any]) -> None:
        """Apply the differences, which any line may contain."""
        if "waiting" in line:
            num_front, num_end, *between = line["waiting"]
            end = self.waiting[len(self.waiting) - num_end :]
            self.waiting = [*self.waiting[:num_front], *between, *end]
        for k, (num_same, *new) in line.get("tables", {}).items():
            self.tables[int(k)] = self.tables.get(int(k), [])[:num_same] + new
        for block, count, *hashes in line.get("blocks", ()):
            self.counts[block] = count
            if hashes:
                (self.cached.add if hashes[0] else self.cached.discard)(block)
        self.computed |= {int(k): count for k, count in line.get("computed", {}).items()}
        for k in line.get("ends", {}):
            self.running.discard(int(k))
            del self.computed[int(k)]

    def note_state(self, step: Step) -> None:
        step.num_free = step.result["free"]
        step.num_running = len(self.running)
        step.num_waiting = len(self.computed) - len(self.running)
        step.num_stored = sum(self.computed[k] for k in self.running)
        holders = Counter(block for table in self.tables.values() for block in table)
        step.lost = sum(count > 0 and not holders[block] for block, count in enumerate(self.counts))
        step.miscounted = sum(count != holders[block] for block, count in enumerate(self.counts))


def totals(trace: Trace) -> EngineMetrics:
    """The result of `engine.metrics()` at the end of the run, computed from the trace."""
    config, steps = trace.config, [step for step in trace.steps if step.result]
    entries = [entry for step in steps for entry in step.entries]
    ended = [trace.requests[int(k)] for line in trace.lines for k in line.get("ends", ())]
    return EngineMetrics(
        num_steps=len(steps),
        seconds=sum(step.result["seconds"] for step in steps),
        num_computed_tokens=sum(step.num_tokens for step in steps),
        num_output_tokens=sum(entry.num_kept for entry in entries),
        num_prompt_tokens=sum(len(request["prompt"]) for request in ended),
        num_cached_tokens=sum(request["cached"] or 0 for request in ended),
        num_preemptions=sum(len(step.plan.get("preempt", ())) for step in steps),
        num_draft_tokens=sum(entry.num_spec_tokens for entry in entries),
        num_accepted_tokens=sum(entry.num_accepted for entry in entries),
        num_finished=len(ended),
        slots_held=sum(config["num_blocks"] - step.num_free for step in steps) * config["block_size"],
        tokens_stored=sum(step.num_stored for step in steps),
        num_slots=config["num_blocks"] * config["block_size"],
    )
