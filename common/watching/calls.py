"""Records the calls that a check makes to a scheduler, a block manager or an engine. Each call is a step of the trace.

Checks build a `Scheduler` or a `KVCacheManager` by hand and call its methods, mostly without a model. `recorded_calls`
records every object of a class that is made while the check runs.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

from common.config import EngineConfig
from common.course import counted
from common.metrics import EngineMetrics
from common.watching.recorder import Recorder, short

MOVES = ("scheduled", "swaps_out", "swaps_in", "copies")
"""The lists of a plan that are recorded; several calls may add to them."""
MOST = 200
"""The largest number of tokens, blocks or requests recorded of a call, since an endless one may add any number."""


@contextmanager
def recorded_calls(module: ModuleType, name: str, title: str, files: str = "") -> Iterator[list[CallRecorder]]:
    """Record each object of the module's class `name` that is made within the context. Yields the list of recorders.

    name: `Scheduler`, `KVCacheManager` or `Engine`. title: the page's heading.
    """
    watched, recorders = getattr(module, name), []
    original = watched.__init__

    def init(self, *arguments, **named) -> None:
        original(self, *arguments, **named)
        config = next(
            (each for each in arguments if hasattr(each, "scheduling_policy")), EngineConfig(num_host_blocks=0)
        )
        recorders.append(CallRecorder(self, config, title, files))

    with mock.patch.object(watched, "__init__", init):
        yield recorders
    for recorder in recorders:
        recorder.close()


class CallRecorder(Recorder):
    """Writes the trace of calls into `file`. calls: for each call its text, and then sentences on the state after it.
    failure: the check's message, which must be set before the end.
    """

    def __init__(self, owner: Any, config: EngineConfig, title: str, files: str):
        self.owner, self.title = owner, title
        self.is_busy, self.failure = False, ""
        self.calls: list[list[str]] = []
        self.known: dict[str, Any] = {}  # requests, by id
        self.plans: dict[int, tuple[Any, dict[str, int]]] = {}  # by id(): the plan, and how much of it was written
        super().__init__(parts(owner, config), io.StringIO(), files)

    def config(self) -> dict[str, Any]:
        found = {**super().config(), "num_blocks": len(self.manager.pool.blocks), "block_size": self.manager.block_size}
        if not hasattr(self.scheduler, "schedule"):
            found |= dict.fromkeys(("scheduling_policy", "max_num_batched_tokens"))
        return found

    def model(self) -> str:
        return self.title

    def close(self) -> None:
        self.line["failure"] = self.failure
        super().close()

    def attach(self) -> None:
        self.watch_pool()
        own = [each for each in (self.scheduler, self.manager) if not isinstance(each, SimpleNamespace)]
        if len(own) == 2:
            self.wrap(self.scheduler, "make_room", "preempt", "can_allocate")
        for each in own:
            names = [name for name, value in vars(type(each)).items() if isinstance(value, FunctionType)]
            for name in names:
                if not name.startswith("_") and name not in ("reset", "block_table"):
                    self.replace(each, name, partial(self.call, name, False))
        if self.owner is self.engine:
            executor = self.engine.executor
            for each, name in ((self.engine, "step"), (executor, "submit"), (executor, "collect")):
                self.replace(each, name, partial(self.call, name, True))

    def call(self, name: str, is_outer: bool, original: Any, *arguments, **named) -> Any:
        """Call a method and write a step for it, unless another recorded method has called it. is_outer: the calls
        within it are written, too.
        """
        if self.is_busy:
            return original(*arguments, **named)
        self.is_busy, came = not is_outer, ""
        for each in (*arguments, *named.values()):
            self.meet(each)
        try:
            returned = original(*arguments, **named)
            came = f"returns {told(returned)}" if returned is not None else ""
            return returned
        except BaseException as error:
            returned, came = None, f"raises {type(error).__name__}: {error}"
            raise
        finally:
            given = [told(each) for each in arguments] + [f"{key}={told(value)}" for key, value in named.items()]
            text = f"{name}({', '.join(given)})"
            touched = () if name == "update_from_output" else (returned, *arguments)
            try:
                self.step(text, came, touched)
                self.is_busy = False
            except Exception as error:  # perhaps a list with wrong contents: no later call is recorded
                state = [came, f"leaves a state that cannot be shown: {error!r}"]
                self.write_call({"run": [], "free": self.pool.num_free_blocks}, text, state)

    def meet(self, each: Any) -> None:
        """Give a request a number when it first appears."""
        if hasattr(each, "all_token_ids") and self.known.get(each.request_id) is not each:
            self.known[each.request_id] = each
            if not hasattr(each, "prompt_token_ids"):  # lesson 4's sequences, which no scheduler knows
                self.scheduler.requests[each.request_id] = each
                each = SimpleNamespace(
                    request_id=each.request_id, prompt_token_ids=each.all_token_ids, max_tokens=0, priority=0,
                    tenant="default", parent=None,
                )  # fmt: skip
            if each.parent is not None:
                self.meet(each.parent)
            self.enter(each)

    def step(self, text: str, came: str, touched: Sequence[Any]) -> None:
        """Write a call as a step, with its additions to a plan and all changes of the state."""
        for each in self.scheduler.requests.values():
            self.meet(each)
        plan = next((each for each in touched if hasattr(each, "scheduled")), None)
        state = [came, *self.plan_state(plan), *self.state()]
        new = dict.fromkeys(MOVES, ())
        if plan is not None:
            _, written = self.plans.setdefault(id(plan), (plan, dict.fromkeys(MOVES, 0)))
            new = {name: getattr(plan, name)[written[name] :][:MOST] for name in MOVES}
            written.update({name: len(getattr(plan, name)) for name in MOVES})
        self.write_call(self.plan_line(SimpleNamespace(step_id=0, **new)), text, state)

    def write_call(self, line: dict[str, Any], text: str, state: list[str]) -> None:
        state = [each for each in state if each]
        self.calls.append([text, *state])
        number, times = len(self.calls), [self.now()] * 3
        self.write({**line, "plan": number, "call": text, "state": state, "t": times})
        outs = [None] * len(line["run"])
        self.write({"result": number, "out": outs, "free": line["free"], "t": times, "seconds": 0.0})

    # What the state is, in sentences ---------------------------------------------------------------------------

    def plan_state(self, plan: Any) -> Iterator[str]:
        if plan is not None:
            for each in plan.scheduled[:MOST]:
                drafts = f", of which {counted(each.num_spec_tokens, 'draft token')}" if each.num_spec_tokens else ""
                samples = "" if each.sample_index is None else f", samples output token {each.sample_index}"
                tokens = counted(len(each.token_ids), "token")
                yield f"plan: {each.request_id} from {each.start}, {tokens}{drafts}{samples}"
            for name in ("swaps_out", "swaps_in", "copies", "preempted_ids", "finished_ids"):
                if found := getattr(plan, name):
                    yield f"plan.{name}: {told(found)}"

    def state(self) -> Iterator[str]:
        scheduler, manager, pool = self.scheduler, self.manager, self.manager.pool
        for name in ("running", "waiting", "finished_ids"):
            if hasattr(scheduler, name):
                yield f"{name}: {told(getattr(scheduler, name))}"
        for each in self.known.values():
            yield f"{each.request_id}: {', '.join(self.facts(each))}"
        yield f"free blocks, the oldest first: {ranges(pool.free)}"
        if pool.cached:
            yield f"in the prefix cache: {ranges(block.block_id for block in pool.cached.values())}"
        if manager.copies:
            yield f"copies to make: {told(manager.copies)}"
        if scheduler.swapped:
            yield f"on the host: {told(scheduler.swapped)}"
        if hasattr(scheduler, "host_pool") and self.engine.config.num_host_blocks:
            yield f"free blocks of the host: {ranges(scheduler.host_pool.free)}"
        if len(served := getattr(scheduler, "served", {})) > 1:
            yield f"served: {told(served)}"
        if self.owner is self.engine:
            totals, states = self.engine.totals, self.engine.processor.states
            seconds = f"{'some' if totals.seconds else 'no'} seconds"
            steps, tokens = counted(totals.num_steps, "step"), counted(totals.num_computed_tokens, "computed token")
            yield f"counted: {steps}, {tokens}, {seconds}"
            for each in states.values():
                since = "was scheduled" if each.output.metrics.first_scheduled_time else "was never scheduled"
                yield f"output of {told(each.output)}, {since}"

    def facts(self, request: Any) -> Iterator[str]:
        """Descriptions of the state of a request, or of a sequence of lesson 4."""
        if hasattr(request, "status"):
            yield request.status.value + (f" ({request.finish_reason})" if request.finish_reason else "")
        yield f"{request.num_computed_tokens} of {len(request.all_token_ids)} tokens computed"
        if getattr(request, "in_flight", False):
            yield "in flight"
        if output := getattr(request, "output_token_ids", ()):
            yield f"output {told(output)}"
        if drafts := getattr(request, "spec_token_ids", ()):
            yield f"draft tokens {told(drafts)}"
        if count := getattr(request, "num_preemptions", 0):
            yield f"preempted {count} times" if count > 1 else "preempted once"
        if table := self.manager.block_tables.get(request.request_id):
            yield "blocks " + ", ".join(map(block_in_words, table[:MOST]))


def parts(owner: Any, config: EngineConfig) -> Any:
    """The object itself if it is an engine; otherwise an object with the attributes of an engine that Recorder uses."""
    if hasattr(owner, "executor"):
        return owner
    scheduler, manager = owner, getattr(owner, "manager", owner)
    if manager is owner:
        scheduler = SimpleNamespace(requests={}, swapped={})
    words = SimpleNamespace(token_bytes=lambda token_id: b" %d" % token_id)
    return SimpleNamespace(scheduler=scheduler, manager=manager, config=config, tokenizer=words, metrics=EngineMetrics)


def block_in_words(block: Any) -> str:
    holders = "" if block.ref_cnt == 1 else f" ({block.ref_cnt} holders)"
    return f"{block.block_id}{holders}" + (f" #{short(block.block_hash.value)}" if block.block_hash else "")


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in their order, with consecutive ones as ranges: 2, 5–9, 0."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][-1] == number - 1:
            found[-1] = [found[-1][0], number]
        else:
            found.append([number])
    return ", ".join("–".join(map(str, each)) for each in found) or "none"


def told(value: Any) -> str:
    """A short text for a value: a request's id, a block's number."""
    if hasattr(value, "logprobs") and hasattr(value, "finish_reason"):
        return f"{value.request_id}: {counted(len(value.token_ids), 'token')}, {len(value.logprobs)} logprobs"
    if hasattr(value, "request_id"):
        return value.request_id
    if hasattr(value, "block_id"):
        return f"block {value.block_id}"
    if hasattr(value, "scheduled"):
        return "plan"
    if hasattr(value, "sampled_token_ids"):
        return f"sampled {told(value.sampled_token_ids)}" + (f", errors {told(value.errors)}" if value.errors else "")
    if hasattr(value, "_fields"):
        return f"({', '.join(f'{name} {told(each)}' for name, each in value._asdict().items())})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {told(each)}" for key, each in list(value.items())[:MOST]) + "}"
    if isinstance(value, (list, tuple)):
        text = ", ".join(map(told, value[:MOST])) + ", ..." * (len(value) > MOST)
        return f"[{text}]" if isinstance(value, list) else f"({text})"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
