"""Records an engine from outside: the decisions of its scheduler, the moves of blocks, the accepted draft tokens.

    with recording(engine, open("run.jsonl", "w")):
        engine.generate(prompts, params)

Any engine of lesson 5 can be recorded, the student's own too, because all its work passes through `SchedulerOutput`,
`ModelRunnerOutput` and the block pool. `recording` wraps some of their methods, and restores them at the end.

The trace is JSON Lines. Requests are numbered in the order in which they were added. What follows from earlier lines is
left out, and state is written as differences, so that a decoding request takes only its number and its token.

    {"trace": 1, "config": {...}, "model": ..., "files": ...}       first
    {"plan": step, ...}     a step is scheduled and submitted
        "requests"          new ones: {"id", "prompt", "max_tokens", "priority", "tenant", "parent", "time"}; parent is
                            the number of the first sample of its prompt, or null; its prompt is then null
        "run"               what each scheduled request computes, in order: its number for one token, which follows the
                            computed ones; or [number, tokens, draft tokens, start], where the last two may be left out
        "drafts"            draft tokens that are verified, by request
        "preempt"           [victim, the request that needs blocks, blocks that it lacks, free blocks, candidates]: the
                            requests that may be the victim, in the policy's order: [number, what it sorts by, ...]
        "refused"           the waiting request for which there were too few blocks: [number, blocks that it needs]
        "swaps_out", "swaps_in", "copies"    [source, target, filled slots]
        "waiting"           the waiting line once the step is scheduled, in the policy's order, if it is another than
                            before: [requests that stay at its front, those that stay at its end, others between ...]
        "served"            with the policy "fair": tokens computed and sampled for each tenant, this step's included
        "t"                 seconds since the recording began: scheduling began, ended; submitting ended
    {"result": step, ...}   it is collected, and its requests are up to date
        "out"               in the order of "run": null, a sampled token, or several
        "kept"              how many of them became output, by request, where not all did
        "text"              text that became certain, by request, where it is not that of the tokens
        "errors"            why a request failed
        "t"                 collecting began, ended; requests up to date. "seconds": of the whole `Engine.step`
        "call"              in a check's trace, where each call is a step (`calls.py`): the call and what came of it
        "state"             and the state after it, in sentences; its last line has the check's "failure"
    {"metrics": {...}, "ranks": {...}}      last: `engine.metrics()`; of each rank [step, start, end], if it was timed

and in a plan or a result, as far as something has changed since the line before:

    "tables"    block tables: [blocks that stay, new block, ...] by request; -1: a block that the window has passed
    "host"      host blocks of swapped requests: [block, ...] by request
    "blocks"    [block, reference count], or [block, reference count, hash or null], or the same and its parent's hash,
                where that is not the hash of the block before it, in the table to which it was added last
    "free"      number of free blocks; always written
    "computed"  number of computed tokens, by request, where it is not what follows: "run" adds its tokens, and "out"
                takes the draft tokens back that were rejected
    "ends"      why a request ended
    "vocab"     the text of token ids that are new
    "reset"     true: a step was interrupted, and all blocks were freed
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TextIO
from unittest import mock

CONFIG = (
    "block_size", "num_blocks", "num_host_blocks", "max_num_seqs", "max_num_batched_tokens",
    "long_prefill_token_threshold", "scheduling_policy", "preemption", "enable_prefix_caching", "tensor_parallel",
    "pipeline_parallel", "quantization", "speculative",
)  # fmt: skip
"""The options of an engine that a trace notes."""
ENCODER = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, check_circular=False, default=str)
"""Values of other types than JSON's, such as a student's own sort key, are written as text."""


@contextmanager
def recording(engine: Any, file: TextIO, files: str = "") -> Iterator[Recorder]:
    """Record an engine, lesson 5's or one that is built on it, within the context. files: a line on whose code runs.

    If the engine fails, the trace is complete up to the last line.
    """
    recorder = Recorder(engine, file, files)
    try:
        yield recorder
    finally:
        recorder.close()


class Recorder:
    """Writes the trace of an engine; see the head of this module. rank_times: is written at the end, by rank."""

    def __init__(self, engine: Any, file: TextIO, files: str = ""):
        self.engine, self.file = engine, file
        self.scheduler, self.manager = engine.scheduler, engine.manager
        self.pool: Any = None
        self.undo, self.undo_pool = ExitStack(), ExitStack()
        self.is_fair = engine.config.scheduling_policy == "fair"
        self.begin = time.perf_counter()
        self.rank_times: dict[int, list[list[float]]] = {}
        self.number: dict[str, int] = {}  # of each request, by id
        self.line: dict[str, Any] = {}  # what has happened since the last line
        self.scheduling = self.collecting = (0.0, 0.0)
        self.needy: tuple[Any, int] | None = None  # for which request blocks are sought, and its number of tokens
        self.waited: list[Any] = []  # the requests that wait, and their numbers in the policy's order
        self.queue: list[int] = []
        # The state that follows from the lines so far.
        self.waiting: list[int] = []
        self.num_held = 0  # entries of all tables
        self.tables: dict[int, list[int]] = {}
        self.hosts: dict[int, list[int]] = {}
        self.blocks: dict[int, tuple] = {}
        self.before: dict[int, int | None] = {}  # of each block, the one before it in the table to which it was added
        self.computed: dict[int, int] = {}
        self.num_characters: dict[int, int] = {}
        self.pieces: dict[int, str] = {}
        self.touched: dict[int, Any] = {}  # blocks that may have changed, by id
        self.write({"trace": 1, "config": self.config(), "model": self.model(), "files": files})
        self.attach()
        for request in self.scheduler.requests.values():
            self.enter(request)

    def config(self) -> dict[str, Any]:
        found = {name: getattr(self.engine.config, name) for name in CONFIG}
        return found | {"speculative": found["speculative"] and Path(found["speculative"]).name}  # not where it lies

    def model(self) -> str:
        return Path(self.engine.config.model).name

    def attach(self) -> None:
        self.watch_pool()
        self.wrap(self.scheduler, "add", "schedule", "make_room", "preempt", "can_allocate")
        self.wrap(self.engine.executor, "submit", "collect")
        self.wrap(self.engine.totals, "observe", "observe_end")

    def wrap(self, owner: Any, *names: str) -> None:
        """Replace methods by those of the same names here, which get the original as their first argument."""
        for name in names:
            self.replace(owner, name, getattr(self, name))

    def replace(self, owner: Any, name: str, method: Any) -> None:
        undo = self.undo_pool if owner is self.pool else self.undo
        undo.enter_context(mock.patch.object(owner, name, partial(method, getattr(owner, name))))

    def check_pool(self) -> None:
        """After an interrupted step the engine has a new pool, and all requests begin again."""
        if self.manager.pool is not self.pool:
            self.line["reset"] = True
            self.tables, self.hosts, self.blocks, self.before = {}, {}, {}, {}
            self.computed = dict.fromkeys(self.computed, 0)
            self.watch_pool()

    def watch_pool(self) -> None:
        """Note the blocks that the pool's methods touch."""
        self.undo_pool.close()
        self.pool = self.manager.pool
        self.touched = {block.block_id: block for block in self.pool.blocks if block.ref_cnt or block.block_hash}
        self.wrap(self.pool, "get_new_blocks", "free_blocks", "touch", "forget")

    def close(self) -> None:
        self.undo.close()
        self.check_pool()
        if self.line or self.touched:
            self.changes(self.line)
        self.undo_pool.close()
        self.write({**self.line, "metrics": asdict(self.engine.metrics()), "ranks": self.rank_times})

    def now(self) -> float:
        return round(time.perf_counter() - self.begin, 6)

    def write(self, line: dict[str, Any]) -> None:
        self.file.write(ENCODER.encode(line) + "\n")

    # What the engine calls, each with the original first -------------------------------------------------------

    def add(self, original, request) -> None:
        original(request)
        self.enter(request)

    def enter(self, request) -> None:
        parent = None if request.parent is None else self.number[request.parent.request_id]
        number = self.number[request.request_id] = len(self.computed)  # an id may be used again
        self.computed[number] = self.num_characters[number] = 0
        prompt = list(request.prompt_token_ids) if parent is None else None
        self.learn(prompt or ())
        self.line.setdefault("requests", []).append(
            {
                "id": request.request_id, "prompt": prompt, "max_tokens": request.max_tokens,
                "priority": request.priority, "tenant": request.tenant, "parent": parent, "time": self.now(),
            }
        )  # fmt: skip

    def schedule(self, original):
        start = self.now()
        plan = original()
        self.scheduling = start, self.now()
        if plan.is_empty:
            self.line.pop("refused", None)
        waiting = self.scheduler.waiting
        if waiting != self.waited or (waiting and self.is_fair):
            self.waited = list(waiting)
            self.queue = [self.number[each.request_id] for each in sorted(waiting, key=self.scheduler.rank)]
        return plan

    def make_room(self, original, request, num_tokens, plan) -> int:
        self.needy = request, num_tokens
        try:
            return original(request, num_tokens, plan)
        finally:
            self.needy = None

    def preempt(self, original, victim, plan) -> None:
        """Note the request that needs blocks, how many it lacks, with copies of shared ones, how many are free, and the
        other candidates.
        """
        if self.needy is None:  # a student's own reason
            return original(victim, plan)
        request, num_tokens = self.needy
        if not request.spec_token_ids:  # those that it had were dropped
            num_tokens = min(num_tokens, request.num_tokens - request.num_computed_tokens)
        size, table = self.manager.block_size, self.manager.block_tables.get(request.request_id, ())
        num_missing = max(0, -(-(request.num_computed_tokens + num_tokens) // size) - len(table))
        lacks = num_missing + len(self.manager.shared_blocks(request)), self.manager.pool.num_free_blocks
        names = self.number[victim.request_id], self.number[request.request_id]
        ranks = [(*self.scheduler.rank(each), self.number[each.request_id]) for each in self.scheduler.running
                 if not each.in_flight]  # fmt: skip
        candidates = [[number, *rank] for *rank, number in sorted(ranks)]
        self.line.setdefault("preempt", []).append([*names, *lacks, candidates])
        original(victim, plan)

    def can_allocate(self, original, request) -> bool:
        answer = original(request)
        if not answer:
            num_blocks = -(-request.num_tokens // self.manager.block_size)
            self.line["refused"] = [self.number[request.request_id], num_blocks]
        return answer

    def submit(self, original, plan) -> None:
        line = self.plan_line(plan)
        try:
            original(plan)
        finally:
            line["t"] = [*self.scheduling, self.now()]
            self.write(line)

    def plan_line(self, plan) -> dict[str, Any]:
        self.check_pool()
        line, number = {"plan": plan.step_id, **self.line}, self.number
        self.line = {}
        run, drafts, computed = [], {}, self.computed
        line["run"] = run
        for scheduled in plan.scheduled:
            k, num_tokens, num_spec = number[scheduled.request_id], len(scheduled.token_ids), scheduled.num_spec_tokens
            start, expected = scheduled.start, computed[k]
            computed[k] = start + num_tokens
            if start != expected:
                run.append([k, num_tokens, num_spec, start])
            elif num_spec:
                run.append([k, num_tokens, num_spec])
            else:
                run.append(k if num_tokens == 1 else [k, num_tokens])
            if num_spec:
                drafts[k] = scheduled.token_ids[num_tokens - num_spec :]
                self.learn(drafts[k], line)
        moves = {name: getattr(plan, name) for name in ("swaps_out", "swaps_in", "copies")}
        served = self.scheduler.served if self.is_fair else None
        line |= {name: found for name, found in {"drafts": drafts, "served": served, **moves}.items() if found}
        if self.queue != self.waiting:
            line["waiting"], self.waiting = spliced(self.waiting, self.queue), self.queue
        self.changes(line)
        return line

    def collect(self, original):
        start = self.now()
        result = original()
        self.collecting = start, self.now()
        return result

    def observe(self, original, scheduler, plan, result, outputs: Sequence, seconds: float) -> None:
        self.check_pool()
        counts = [output.metrics.num_output_tokens for output in outputs]
        original(scheduler, plan, result, outputs, seconds)
        out: list[Any] = []
        line: dict[str, Any] = {"result": plan.step_id, "out": out, **self.line}
        self.line = {}
        texts, kept, number, pieces, lengths = {}, {}, self.number, self.pieces, self.num_characters
        for scheduled, output, before in zip(plan.scheduled, outputs, counts):
            k, sampled = number[scheduled.request_id], result.sampled_token_ids.get(scheduled.request_id, ())
            text, num_kept = output.text[lengths[k] :], len(output.token_ids) - before
            lengths[k] += len(text)
            if num_kept == len(sampled) == 1 and pieces.get(sampled[0]) == text and not scheduled.num_spec_tokens:
                out.append(sampled[0])  # nearly always
                continue
            out.append(sampled[0] if len(sampled) == 1 else sampled or None)
            if sampled:
                self.learn(sampled, line)
                self.computed[k] -= scheduled.num_spec_tokens + 1 - len(sampled)
                if num_kept != len(sampled):
                    kept[k] = num_kept
            if text != "".join([pieces[token] for token in sampled]):
                texts[k] = text
        errors = {self.number[request_id]: why for request_id, why in result.errors.items()}
        line |= {name: found for name, found in {"text": texts, "kept": kept, "errors": errors}.items() if found}
        self.changes(line)
        line |= {"t": [*self.collecting, self.now()], "seconds": round(seconds, 6)}
        self.write(line)

    def observe_end(self, original, output) -> None:
        original(output)
        self.line.setdefault("ends", {})[self.number[output.request_id]] = output.finish_reason

    def touch(self, original, blocks):
        if blocks:
            blocks = list(blocks)  # an iterator can be read only once
            for block in blocks:
                if block is self.pool.blocks[block.block_id]:  # and not the manager's `dropped`
                    self.touched[block.block_id] = block
        return original(blocks)

    free_blocks = touch

    def get_new_blocks(self, original, num_blocks: int):
        blocks = original(num_blocks)
        for block in blocks or ():
            self.touched[block.block_id] = block
        return blocks

    def forget(self, original, block):
        if block.block_hash:
            self.touched[block.block_id] = block
        original(block)

    def find_cached(self) -> None:
        """Note the blocks that were entered into the prefix cache, whose newest entries are the last. (Wrapping
        `remember` would be slower: it is called in every step for a block whose content another block has.)
        """
        for block in reversed(self.pool.cached.values()):
            if block.block_id not in self.touched:
                if self.blocks.get(block.block_id, (0, None))[1] == block.block_hash.value:
                    break
                self.touched[block.block_id] = block

    # Differences -----------------------------------------------------------------------------------------------

    def learn(self, token_ids: Sequence[int], line: dict[str, Any] | None = None) -> None:
        """Write the text of those tokens that are new in the trace."""
        for token_id in token_ids:
            if token_id not in self.pieces:
                piece = self.engine.tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
                self.pieces[token_id] = piece
                (self.line if line is None else line).setdefault("vocab", {})[token_id] = piece

    def changes(self, line: dict[str, Any]) -> None:
        """Add to a line what has changed since the last one."""
        number = self.number
        self.find_cached()
        num_held = sum(map(len, self.manager.block_tables.values()))
        if self.touched or num_held != self.num_held:  # or no table has changed
            self.num_held = num_held
            self.table_changes(line)
        blocks = []
        for block_id, block in self.touched.items():
            key = block.block_hash
            state, before = (block.ref_cnt, key and key.value), self.blocks.get(block_id, (0, None))
            if state != before:
                blocks.append([block_id, block.ref_cnt])
                self.blocks[block_id] = state
                if state[1] != before[1]:
                    blocks[-1].append(short(state[1]))
                    _, parent = self.blocks.get(self.before.get(block_id), (0, None))
                    if key and (key.parent or None) != parent:
                        blocks[-1].append(short(key.parent))
        self.touched = {}
        if blocks:
            line["blocks"] = blocks
        line["free"] = self.pool.num_free_blocks
        computed = self.computed
        new = {
            k: request.num_computed_tokens
            for request_id, request in self.scheduler.requests.items()
            if (k := number.get(request_id)) is not None and request.num_computed_tokens != computed[k]
        }
        if new:
            line["computed"] = new
            computed |= new

    def table_changes(self, line: dict[str, Any]) -> None:
        """Add the block tables, and the lists of host blocks, that have changed."""
        number, dropped = self.number, getattr(self.manager, "dropped", None)
        tables = {
            number[request_id]: [-1 if block is dropped else block.block_id for block in table]
            for request_id, table in self.manager.block_tables.items()
            if request_id in number
        }
        hosts = {number[id]: [block.block_id for block in blocks] for id, blocks in self.scheduler.swapped.items()}
        if new := difference(self.tables, tables):
            line["tables"] = {k: since(self.tables.get(k, []), table) for k, table in new.items()}
            for k, (num_same, *blocks) in line["tables"].items():
                self.before |= zip(blocks, [tables[k][num_same - 1] if num_same else None, *blocks])
        if new := difference(self.hosts, hosts):
            line["host"] = new
        self.tables, self.hosts = tables, hosts


def difference(before: dict[int, list[int]], after: dict[int, list[int]]) -> dict[int, list[int]]:
    """The entries of `after` that differ from `before`; a removed entry is an empty list."""
    if before == after:
        return {}
    changed = {k: value for k, value in after.items() if before.get(k) != value}
    return changed | {k: [] for k in before.keys() - after.keys()}


def since(before: list[int], after: list[int]) -> list[int]:
    """A block table as the number of unchanged blocks at its beginning, then the others."""
    num_same = next((i for i, (a, b) in enumerate(zip(before, after)) if a != b), min(len(before), len(after)))
    return [num_same, *after[num_same:]]


def spliced(before: list[int], after: list[int]) -> list[int]:
    """A list as the number of unchanged entries at its beginning, the number of those at its end, then the others."""
    num_front, *_ = since(before, after)
    num_end, *_ = since(before[num_front:][::-1], after[num_front:][::-1])
    return [num_front, num_end, *after[num_front : len(after) - num_end]]


def short(digest: bytes | None) -> str | None:
    return digest.hex()[:8] if digest else None
