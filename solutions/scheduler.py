"""Lesson 5, first half: the scheduler. In each step it decides which requests compute how many of their tokens.

A `Request` is a list of tokens and a number, `num_computed_tokens`: how many of them have keys and values in the cache.
In every step the number catches up with the list a little. There is no prefill phase and no decode phase. A new prompt,
a prompt of which the prefix cache has a part, a preempted request, and draft tokens that must be verified are all one
case: tokens that are not computed yet. This file handles ids and counts, without tensors, text or time.

Scheduling at each step is from Yu et al., "Orca" (2022); chunks of prompts beside decoding requests are from Agrawal et
al., "Sarathi-Serve" (2024). The names are vLLM's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from common.config import EngineConfig
from common.sampling import SamplingParams
from solutions.paged_attention import BlockCopy, BlockPool, KVCacheBlock, KVCacheManager, cdiv

# --- Before: batches that wait for their longest request --------------------------------------------------------------


def static_batch(output_lengths: Sequence[int], batch_size: int) -> list[range]:
    """Return the steps in which each request is computed, if a batch is kept until all of its requests are done.

    Requests are served in order, `batch_size` at a time, one token a step. Returns a range of step numbers for each
    request, counted from 0. A batch begins when the batch before it has ended.
    """
    # Exercise 5.1: all requests of a batch begin in the same step; a batch lasts as long as its longest request.
    steps, start = [], 0
    for first in range(0, len(output_lengths), batch_size):
        batch = output_lengths[first : first + batch_size]
        steps += [range(start, start + length) for length in batch]
        start += max(batch)
    return steps


# --- Requests, and what is decided about them -------------------------------------------------------------------------


class RequestStatus(Enum):
    WAITING = "waiting"  # holds no blocks: it is new, or it was preempted and will compute its tokens again
    SWAPPED = "swapped"  # waits, and its blocks are kept on the host
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One sequence to be continued. `all_token_ids` is the prompt and the output so far."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    max_tokens: int  # the most output tokens: what was asked for, or what fits into the context
    stop_token_ids: frozenset[int] = frozenset()  # tokens that end it, including the end of sequence
    arrival: int = 0  # when it came, as a count; the n samples of a prompt share it
    priority: int = 0  # with the policy "priority", the lowest number is served first
    tenant: str = "default"
    cache_salt: str = ""  # only requests with the same salt share blocks of the prefix cache
    parent: Request | None = None  # the first of n samples is the parent of the others; None for itself
    child: int = 0  # its number among the n samples
    output_token_ids: list[int] = field(default_factory=list)
    spec_token_ids: list[int] = field(default_factory=list)  # draft tokens to verify in the next step (lesson 8)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # prompt tokens found in the prefix cache when it was first scheduled
    num_preemptions: int = 0
    last_step: int = -1  # the step in which it was last scheduled
    last_start: int = 0  # the position of the first token that it computed then, or found in the cache
    in_flight: bool = False  # between `schedule` and `update_from_output`
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: str | None = None

    def __post_init__(self):
        self.all_token_ids = [*self.prompt_token_ids, *self.output_token_ids]

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    def append(self, token_id: int) -> None:
        self.output_token_ids.append(token_id)
        self.all_token_ids.append(token_id)


def finish_reason(request: Request) -> str | None:
    """Return why the request ends with its newest output token: "stop", "length", or None if it goes on.

    If a stop token is the last token that `max_tokens` allows, the reason is "stop". A request without output goes on.
    """
    # Exercise 5.2: look first at the newest output token, then at the number of output tokens.
    if request.output_token_ids and request.output_token_ids[-1] in request.stop_token_ids:
        return "stop"
    if len(request.output_token_ids) >= request.max_tokens:
        return "length"
    return None


@dataclass(frozen=True)
class ScheduledRequest:
    """What one request computes in a step: `token_ids`, the first of which is at position `start`."""

    request_id: str
    start: int
    token_ids: list[int]
    num_spec_tokens: int  # how many of `token_ids`, at their end, are draft tokens
    block_table: list[int]
    params: SamplingParams
    sample_index: int | None  # index of the output token to sample; None: more of the prompt is to come
    prompt_token_ids: list[int]  # this and the rest: for penalties, `min_tokens` and proposals of draft tokens
    output_token_ids: list[int]
    stop_token_ids: frozenset[int]
    max_tokens: int


@dataclass
class SchedulerOutput:
    """The plan of one step. Blocks move first: swaps out, swaps in, copies. Then all tokens are computed at once."""

    step_id: int
    scheduled: list[ScheduledRequest] = field(default_factory=list)
    swaps_out: list[BlockCopy] = field(default_factory=list)  # from the device to the host
    swaps_in: list[BlockCopy] = field(default_factory=list)  # from the host to the device
    copies: list[BlockCopy] = field(default_factory=list)  # on the device
    preempted_ids: list[str] = field(default_factory=list)
    finished_ids: list[str] = field(default_factory=list)  # since the plan before

    @property
    def is_empty(self) -> bool:
        return not (self.scheduled or self.preempted_ids)

    @property
    def num_tokens(self) -> int:
        return sum(len(scheduled.token_ids) for scheduled in self.scheduled)


@dataclass
class ModelRunnerOutput:
    """The results of one step, by request id. A request with more of its prompt to compute has no sampled tokens."""

    step_id: int
    sampled_token_ids: dict[str, list[int]] = field(default_factory=dict)
    spec_token_ids: dict[str, list[int]] = field(default_factory=dict)  # draft tokens for the next step (lesson 8)
    logprobs: dict[str, list[dict[int, float]]] = field(default_factory=dict)  # one dict for each sampled token
    prompt_logprobs: dict[str, dict[int, dict[int, float]]] = field(default_factory=dict)  # by position in the prompt
    errors: dict[str, str] = field(default_factory=dict)  # why a request failed


# --- Policies: which request is served first --------------------------------------------------------------------------


def tokens_to_schedule(request: Request, budget: int, max_chunk: int) -> int:
    """Return the number of tokens to schedule for this request: all that are not computed, including draft tokens, but
    at most both limits. budget: tokens that are left in this step. max_chunk: the limit of one request in a step.
    """
    # Exercise 5.3: add its tokens and its draft tokens, subtract the computed ones, and apply both limits.
    num_uncomputed = request.num_tokens + len(request.spec_token_ids) - request.num_computed_tokens
    return min(num_uncomputed, budget, max_chunk)


def fair_share(request: Request, served: Mapping[str, float]) -> tuple:
    """Return a sort key that puts requests of the least served tenant first, and earlier arrivals before later ones.

    served: for each tenant, the number of tokens that were computed and sampled for it. From Sheng et al., "Fairness in
    Serving Large Language Models" (2024).
    """
    # Exercise 5.4: return a tuple. Tuples compare from the left, and the request with the smallest is served first.
    return (served[request.tenant], request.arrival)


def join(served: dict[str, float], tenant: str, active: Collection[str]) -> None:
    """Update `served` when a tenant makes a request, so that it gets no credit for the time in which it had none.

    served: changed in place. active: the tenants with requests that wait or run. A tenant that is not active is raised
    to the lowest count among the active ones, if it is below that. Otherwise it keeps its count. A new one begins at 0.
    """
    # Exercise 5.5: enter a new tenant with 0. Then, if there are active tenants and this is none of them, raise it.
    own = served.setdefault(tenant, 0.0)
    if active and tenant not in active:
        served[tenant] = max(own, min(served[other] for other in active))


POLICIES: dict[str, Callable[[Request, Mapping[str, float]], tuple]] = {
    "fcfs": lambda request, served: (request.arrival,),
    "priority": lambda request, served: (request.priority, request.arrival),
    "fair": fair_share,
}
"""Sort keys. The request with the smallest is admitted first, the one with the largest is preempted first."""


class Scheduler:
    """Decides in each step which requests compute how many tokens, and which is preempted when blocks run out.

    manager: the pool of blocks. config: resolved. Preemption by "recompute" frees a request's blocks and computes its
    tokens again later; "swap" moves the blocks to the host, while it has free ones.
    """

    def __init__(self, manager: KVCacheManager, config: EngineConfig):
        self.manager = manager
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.max_chunk = config.long_prefill_token_threshold
        self.policy = POLICIES[config.scheduling_policy]
        self.preemption = config.preemption
        self.host_pool = BlockPool(config.num_host_blocks)
        self.num_lookahead_tokens = config.num_lookahead_tokens  # slots for a draft model's tokens (lesson 8)
        self.depth = 1  # steps in flight at once (lesson 6)
        self.requests: dict[str, Request] = {}  # all that are not finished: those that wait and those that run
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.swapped: dict[str, list[KVCacheBlock]] = {}  # the host's blocks of each swapped request
        self.served: dict[str, float] = {}  # tokens computed and sampled for each tenant
        self.finished_ids: list[str] = []
        self.step_id = 0

    def add(self, request: Request) -> None:
        join(self.served, request.tenant, {other.tenant for other in self.requests.values()})
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def rank(self, request: Request) -> tuple:
        """Return the policy's sort key, followed by the request's number among the samples of its prompt."""
        return (*self.policy(request, self.served), request.child)

    @property
    def max_step_seqs(self) -> int:
        """The limit of requests in one step: with several steps in flight, each gets an equal share of the requests."""
        return cdiv(len(self.requests), self.depth)

    # One step ------------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Plan the next step. Running requests come first; waiting ones get the rest, unless blocks ran out."""
        self.step_id += 1
        plan = SchedulerOutput(self.step_id)
        for request in self.running:
            if not request.in_flight:
                self.manager.drop_outside_window(request)
        self.release_lookahead()
        budget = self.schedule_running(plan)
        if not plan.preempted_ids:
            self.schedule_waiting(plan, budget)
        self.reserve_lookahead(plan)
        plan.copies = self.manager.take_copies()
        return plan

    def schedule_running(self, plan: SchedulerOutput) -> int:
        """Schedule the running requests, those first that were scheduled longest ago. Returns the rest of the budget.

        A request leaves one token of the budget for each request after it, but takes at least one itself, so that a
        long prompt does not stop the others. Three kinds are not scheduled: requests in flight; requests that were
        preempted earlier in this step, to free blocks for another; and those for which `make_room` returns 0.
        """
        budget = self.max_num_batched_tokens
        ready = [request for request in self.running if not request.in_flight]
        ready.sort(key=lambda request: (request.last_step, self.rank(request)))
        ready = ready[: self.max_step_seqs]
        # Exercise 5.6: go through `ready` in order. Stop when the budget is 0. Skip a request that is not RUNNING.
        # Call `tokens_to_schedule` with the budget minus one token for each request after it, but at least 1. Of these
        # `make_room` returns how many have slots. If any, call `schedule_request` and subtract them from the budget.
        for i, request in enumerate(ready):
            if budget == 0:
                break
            if request.status is not RequestStatus.RUNNING:
                continue
            num_after = len(ready) - i - 1
            num_tokens = tokens_to_schedule(request, max(1, budget - num_after), self.max_chunk)
            num_tokens = self.make_room(request, num_tokens, plan)
            if num_tokens > 0:
                self.schedule_request(request, num_tokens, plan)
            budget -= num_tokens
        return budget

    def schedule_waiting(self, plan: SchedulerOutput, budget: int) -> None:
        """Admit waiting requests in the policy's order, while there are tokens in the budget, fewer than `max_num_seqs`
        running requests, and enough blocks for the first waiting one. No other overtakes it, or it might wait for ever.
        """
        # Exercise 5.7: `next_waiting` gives the request, `can_allocate` says if there are blocks for it, and `admit`
        # schedules it and returns how many tokens of the budget it takes.
        while budget > 0 and len(self.running) < self.max_num_seqs:
            request = self.next_waiting(plan)
            if request is None or not self.can_allocate(request):
                break
            budget -= self.admit(request, budget, plan)

    def next_waiting(self, plan: SchedulerOutput) -> Request | None:
        """Return the first waiting request in the policy's order, or None if none may join this step.

        A sample waits until it can fork the first sample of its prompt, unless that one has finished.
        """
        if len(plan.scheduled) >= self.max_step_seqs:
            return None
        candidates = [
            request
            for request in self.waiting
            if request.parent is None
            or request.parent.status is RequestStatus.FINISHED
            or request.num_preemptions > 0
            or self.can_fork(request)
        ]
        return min(candidates, key=self.rank, default=None)

    def can_fork(self, request: Request) -> bool:
        """Whether a new sample can share its parent's blocks. The prompt must have been computed in an earlier step,
        because a step copies blocks before it computes, and a window must not have passed blocks that the sample reads.
        """
        parent = request.parent
        if parent is None or request.output_token_ids or parent.status is not RequestStatus.RUNNING:
            return False
        if parent.last_start < len(request.prompt_token_ids):
            return False
        num_computed_tokens = len(request.prompt_token_ids) - 1  # of the sample, once it has forked
        return self.manager.num_dropped(parent) <= self.manager.num_skipped(num_computed_tokens)

    def can_allocate(self, request: Request) -> bool:
        """Whether there are free blocks for all tokens of a waiting request. With blocks for only its first chunk, it
        might be preempted in the middle of its prompt.
        """
        blocks: Sequence[KVCacheBlock] = ()
        if self.can_fork(request):  # it shares all blocks of the prompt but the last, which it is going to write to
            num_shared = (request.num_tokens - 1) // self.manager.block_size
            blocks = self.manager.block_tables[request.parent.request_id][:num_shared]
        elif request.status is RequestStatus.WAITING:
            blocks, _ = self.manager.get_computed_blocks(request)
        return self.manager.can_allocate(request.num_tokens, blocks)

    def admit(self, request: Request, budget: int, plan: SchedulerOutput) -> int:
        """Let a waiting request run, after `can_allocate` returned True. Returns the number of tokens scheduled."""
        computed_blocks: Sequence[KVCacheBlock] = ()
        if self.can_fork(request):
            self.manager.fork(request.parent, request)
        elif request.status is RequestStatus.WAITING:
            computed_blocks, request.num_computed_tokens = self.manager.get_computed_blocks(request)
        if request.last_step < 0:
            request.num_cached_tokens = request.num_computed_tokens
        num_tokens = tokens_to_schedule(request, budget, self.max_chunk)
        self.manager.allocate_slots(request, num_tokens, computed_blocks=computed_blocks)
        if request.status is RequestStatus.SWAPPED:
            self.swap_in(request, plan)
        self.waiting.remove(request)
        self.running.append(request)
        request.status = RequestStatus.RUNNING
        self.schedule_request(request, num_tokens, plan)
        if computed_blocks:  # another request may be computing them in this very step
            request.last_start = 0
        return num_tokens

    def schedule_request(self, request: Request, num_tokens: int, plan: SchedulerOutput) -> None:
        """Add a request's next tokens, which have slots already, to the plan. They count as computed from now on,
        because every later step runs after this one.
        """
        start, end = request.num_computed_tokens, request.num_computed_tokens + num_tokens
        num_spec_tokens = max(0, end - request.num_tokens)
        token_ids = request.all_token_ids[start:end] + request.spec_token_ids[:num_spec_tokens]
        is_sampled = end >= request.num_tokens
        plan.scheduled.append(
            ScheduledRequest(
                request.request_id, start, token_ids, num_spec_tokens, self.manager.block_table(request.request_id),
                request.sampling_params, len(request.output_token_ids) if is_sampled else None,
                request.prompt_token_ids, list(request.output_token_ids), request.stop_token_ids, request.max_tokens,
            )
        )  # fmt: skip
        request.num_computed_tokens = end
        request.in_flight = True
        request.last_step, request.last_start = plan.step_id, start
        self.served[request.tenant] += num_tokens + is_sampled
        self.manager.cache_blocks(request, min(end, request.num_tokens))

    def update_from_output(self, plan: SchedulerOutput, output: ModelRunnerOutput) -> list[Request]:
        """Update the requests of a plan with its results. Returns all of them, including those that finish.

        A request with draft tokens gets the accepted ones and one further token; the rejected ones no longer count as
        computed. Tokens after one that ends the request are dropped. A request with more of its prompt to compute gets
        no token, and its `num_computed_tokens` stays. A request in `output.errors` finishes with "error".
        """
        requests = [self.requests[scheduled.request_id] for scheduled in plan.scheduled]
        # Exercise 5.8: set in_flight to False for each. If it was aborted meanwhile (it has a finish_reason) or failed,
        # `finish` it. Otherwise subtract rejected draft tokens, append sampled tokens until there is a `finish_reason`,
        # store the new draft tokens, call `cache_blocks` for the computed tokens, and `finish` it if there is a reason.
        for scheduled, request in zip(plan.scheduled, requests):
            request.in_flight = False
            if request.finish_reason or request.request_id in output.errors:
                self.finish(request, request.finish_reason or "error")
                continue
            sampled = output.sampled_token_ids.get(request.request_id, [])
            if sampled:
                request.num_computed_tokens -= scheduled.num_spec_tokens + 1 - len(sampled)
            reason = None
            for token_id in sampled:
                request.append(token_id)
                reason = finish_reason(request)
                if reason:
                    break
            request.spec_token_ids = output.spec_token_ids.get(request.request_id, [])
            self.manager.cache_blocks(request, min(request.num_computed_tokens, request.num_tokens))
            if reason:
                self.finish(request, reason)
        return requests

    # Preemption ----------------------------------------------------------------------------------------------

    def make_room(self, request: Request, num_tokens: int, plan: SchedulerOutput) -> int:
        """Allocate blocks for a running request's next tokens, and preempt others if too few are free.

        Its draft tokens are dropped before any request is preempted. Returns the number of tokens that have slots now.
        This is 0 if the request itself comes last in the policy's order, because then it is preempted itself.
        """
        while self.manager.allocate_slots(request, num_tokens) is None:
            if request.spec_token_ids:
                request.spec_token_ids = []
                num_tokens = tokens_to_schedule(request, num_tokens, self.max_chunk)
                continue
            victim = self.choose_victim()
            if victim is None:
                return 0
            self.preempt(victim, plan)
            if victim is request:
                return 0
        return num_tokens

    def choose_victim(self) -> Request | None:
        """Return the request to preempt: the last running one in the policy's order, or None if all are in flight.

        The blocks of a request in flight are being read and written. Requests scheduled in this step are in flight too.
        """
        # Exercise 5.9: choose the request with the largest `rank` among those that are not in flight.
        return max((request for request in self.running if not request.in_flight), key=self.rank, default=None)

    def preempt(self, request: Request, plan: SchedulerOutput) -> None:
        """Take all blocks from a running request and let it wait. It keeps its tokens."""
        plan.preempted_ids.append(request.request_id)
        request.num_preemptions += 1
        request.spec_token_ids = []
        self.running.remove(request)
        self.waiting.append(request)
        # Swapping moves every block of a table, and blocks that a window has dropped do not exist.
        is_swapped = self.preemption == "swap" and not self.manager.num_dropped(request)
        if not is_swapped or not self.swap_out(request, plan):
            self.preempt_by_recompute(request)

    def preempt_by_recompute(self, request: Request) -> None:
        """Free a request's blocks, to compute all of its tokens again once it is admitted. `preempt` does the rest."""
        # Exercise 5.10: give its blocks back to the manager, and set `num_computed_tokens` and the status.
        self.manager.free(request)
        request.num_computed_tokens = 0
        request.status = RequestStatus.WAITING

    def swap_out(self, request: Request, plan: SchedulerOutput) -> bool:
        """Move a request's computed tokens to blocks on the host, and free its blocks on the device, even shared ones.

        Returns True; or False, with no side effects, if the host has too few free blocks. `preempt` does the rest.
        """
        # Exercise 5.11: take a host block for each block with a computed token. Append each move, with its number of
        # filled slots, to `plan.swaps_out`. Keep the host blocks in `swapped`, free the device's, and set the status.
        block_size = self.manager.block_size
        num_blocks = cdiv(request.num_computed_tokens, block_size)
        if num_blocks > self.host_pool.num_free_blocks:
            return False
        hosts = self.host_pool.get_new_blocks(num_blocks)
        for i, (block_id, host) in enumerate(zip(self.manager.block_table(request.request_id), hosts)):
            num_filled = min(block_size, request.num_computed_tokens - i * block_size)
            plan.swaps_out.append(BlockCopy(block_id, host.block_id, num_filled))
        self.swapped[request.request_id] = hosts
        self.manager.free(request)
        request.status = RequestStatus.SWAPPED
        return True

    def swap_in(self, request: Request, plan: SchedulerOutput) -> None:
        """Move a swapped request's tokens back into the blocks of its new block table; free the host's blocks."""
        # Exercise 5.12: append the same moves, in the other direction, to `plan.swaps_in`. Then free the host's blocks.
        block_size = self.manager.block_size
        hosts = self.swapped.pop(request.request_id)
        for i, (host, block_id) in enumerate(zip(hosts, self.manager.block_table(request.request_id))):
            num_filled = min(block_size, request.num_computed_tokens - i * block_size)
            plan.swaps_in.append(BlockCopy(host.block_id, block_id, num_filled))
        self.host_pool.free_blocks(hosts)

    # Slots for draft tokens (lesson 8) -----------------------------------------------------------------------

    def release_lookahead(self) -> None:
        """If blocks may run short in this step, release the slots reserved for draft tokens."""
        # The budget fills some blocks. Besides, each running request may begin a block and may copy a shared one.
        num_needed = self.max_num_batched_tokens // self.manager.block_size + 2 * len(self.running)
        if self.num_lookahead_tokens and self.manager.pool.num_free_blocks < num_needed:
            for request in self.running:
                if not request.in_flight:
                    self.manager.trim(request)

    def reserve_lookahead(self, plan: SchedulerOutput) -> None:
        """Reserve slots after the tokens of each request that samples, as far as blocks are free."""
        for scheduled in plan.scheduled if self.num_lookahead_tokens else ():
            request = self.requests[scheduled.request_id]
            if scheduled.sample_index is not None:
                last = len(request.prompt_token_ids) + request.max_tokens - 1  # no token is computed after this one
                num_slots = min(self.num_lookahead_tokens, max(0, last - request.num_computed_tokens))
                new_blocks = self.manager.allocate_slots(request, 0, num_slots) or ()
                scheduled.block_table.extend(block.block_id for block in new_blocks)

    # Leaving -------------------------------------------------------------------------------------------------

    def abort(self, request_id: str) -> None:
        """End a request early. An id that is unknown, or whose request has finished, is ignored.

        A request in flight keeps its blocks until its step is collected, since they are being written. Its
        finish_reason "abort" tells `update_from_output` to finish it then.
        """
        # Exercise 5.13: look it up in `requests`. If it is in flight, set its finish_reason, otherwise `finish` it.
        request = self.requests.get(request_id)
        if request is None:
            return
        if request.in_flight:
            request.finish_reason = "abort"
        else:
            self.finish(request, "abort")

    def finish(self, request: Request, reason: str) -> None:
        """End a request that runs, waits or is swapped out: it leaves its list, and all its blocks become free."""
        # Exercise 5.14: find the bug. Preemption by swap works, and so does aborting. But after a long day of both, no
        # request is swapped out any more: every preempted request computes its tokens again.

        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        (self.running if request in self.running else self.waiting).remove(request)
        self.manager.free(request)
        self.host_pool.free_blocks(self.swapped.pop(request.request_id, ()))
        del self.requests[request.request_id]
        self.finished_ids.append(request.request_id)

    def start_over(self, requests: Sequence[Request]) -> None:
        """Rebuild everything from these requests' tokens alone, because a step was interrupted at an unknown line."""
        self.finished_ids += self.requests.keys() - {request.request_id for request in requests}
        self.manager.reset()
        self.host_pool = BlockPool(len(self.host_pool.blocks))
        self.requests = {request.request_id: request for request in requests}
        self.waiting, self.running, self.swapped = list(requests), [], {}
        for request in requests:
            request.all_token_ids = [*request.prompt_token_ids, *request.output_token_ids]
            request.num_computed_tokens, request.spec_token_ids = 0, []
            request.status, request.in_flight = RequestStatus.WAITING, False
