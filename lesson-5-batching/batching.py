"""Lesson 5: continuous batching. Many requests at once from one pool of blocks; who computes what is decided each step.

A `Request` is a list of tokens and a number: of so many of them, keys and values are in the cache. Every step the
`Scheduler` lets that number catch up a little: within one budget of tokens for all, some requests compute their one
newest token, others a chunk of a long prompt. It knows no phase of reading and no phase of writing; a prompt found in
the prefix cache, a request that begins again after it had to make room, a guess that is verified are all the same
case: tokens that are not computed yet.

    Engine       takes requests in, hands text out        knows text and time, no tensors
    Scheduler    decides who computes how many tokens     knows ids and counts, no tensors
    Executor     brings decisions to whoever computes     here: the same process. Lesson 6: many
    ModelRunner  computes and samples                     knows tensors, no queues

What passes between them is a `SchedulerOutput` one way and a `ModelRunnerOutput` back; both can be pickled.

From Yu et al., "Orca" (2022), for scheduling at each step; Agrawal et al., "Sarathi-Serve" (2024), for chunks of
prompts beside decoding requests; and vLLM, whose names these are.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from common.tokenizer import Tokenizer
from solutions import llama_pytorch
from solutions.kv_cache import cache_bytes
from solutions.llama_pytorch import (
    Llama,
    SamplingParams,
    StopChecker,
    TextStream,
    adjust_logits,
    check_prompt,
    load,
    sample,
    top_logprobs,
    use_kernels,
)
from solutions.paged_attention import (
    AttentionMetadata,
    BlockCopy,
    BlockPool,
    KVCacheBlock,
    KVCacheManager,
    PagedKVCache,
    slot_mapping,
)

# ---------------------------------------------------------------------------------------------------------------
# The batch that waits for its slowest
# ---------------------------------------------------------------------------------------------------------------


def static_batch(output_lengths: Sequence[int], batch_size: int) -> list[range]:
    """When each request is computed, if batches are formed once and kept until their last member is done.

    The requests are served in order, `batch_size` at a time, a token a step. Returns for each the steps in which it
    produces its tokens, counted from 0: a batch begins when the batch before it has ended.
    """
    # TODO 5.1: a batch lasts as long as its longest member.
    raise NotImplementedError("TODO 5.1")


# ---------------------------------------------------------------------------------------------------------------
# Requests, and what is decided about them
# ---------------------------------------------------------------------------------------------------------------


class RequestStatus(Enum):
    WAITING = "waiting"  # holds no blocks: it is new, or was preempted and will compute its tokens again
    SWAPPED = "swapped"  # holds no blocks, but a copy of them on the host
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Request:
    """One sequence to be continued. `all_token_ids` is the prompt and what was generated since."""

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    max_tokens: int  # of output: what was asked for, or what the context has room for
    stop_token_ids: frozenset[int] = frozenset()  # whatever ends it: its own, and the end of sequence
    arrival: int = 0  # its number among all requests; n samples share it
    priority: int = 0  # the lower, the sooner
    tenant: str = "default"  # on whose account it is computed
    parent: Request | None = None  # of n samples, the first is the parent of the others
    child: int = 0  # its number among them
    output_token_ids: list[int] = field(default_factory=list)
    spec_token_ids: list[int] = field(default_factory=list)  # guesses (lesson 8) to be verified in the next step
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, found in the cache when it was first scheduled
    num_preemptions: int = 0
    last_step: int = -1  # when it was scheduled last
    in_flight: bool = False  # between schedule() and update_from_output()
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: str | None = None
    error: str | None = None

    def __post_init__(self):
        self.all_token_ids = [*self.prompt_token_ids, *self.output_token_ids]

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    def append(self, token_id: int) -> None:
        self.output_token_ids.append(token_id)
        self.all_token_ids.append(token_id)


def finish_reason(request: Request) -> str | None:
    """Why the request ends with the token that it got last: "stop", "length", or None: it does not.

    A token that ends it counts even where it is the last that there is room for; with no output yet, nothing ends.
    (Stop strings are the engine's business: it has the text.)
    """
    # TODO 5.2: the last token among those that end it? As many as are allowed?
    raise NotImplementedError("TODO 5.2")


@dataclass(frozen=True)
class ScheduledRequest:
    """What one request computes in a step: `token_ids`, of which the first stands at position `start`."""

    request_id: str
    start: int
    token_ids: list[int]
    num_spec_tokens: int  # the last so many of them are guesses
    block_table: list[int]
    params: SamplingParams
    sample_index: int | None  # which output token is sampled after these; None: none, more of what is known is to come
    prompt_token_ids: list[int]  # these three are for penalties and `min_tokens`
    output_token_ids: list[int]
    stop_token_ids: frozenset[int]
    max_tokens: int  # of output: it ends there, so no guess goes further


@dataclass
class SchedulerOutput:
    """One step. Blocks move first, in this order: swaps out, swaps in, copies. Then everything is computed at once."""

    step_id: int
    scheduled: list[ScheduledRequest] = field(default_factory=list)
    swaps_out: list[BlockCopy] = field(default_factory=list)  # from the device to the host
    swaps_in: list[BlockCopy] = field(default_factory=list)  # from the host to the device
    copies: list[BlockCopy] = field(default_factory=list)  # on the device
    preempted_ids: list[str] = field(default_factory=list)
    finished_ids: list[str] = field(default_factory=list)  # since the step before: whoever remembers them may forget

    @property
    def is_empty(self) -> bool:
        return not (self.scheduled or self.preempted_ids)

    @property
    def num_tokens(self) -> int:
        return sum(len(each.token_ids) for each in self.scheduled)


@dataclass
class ModelRunnerOutput:
    """What came of a step. A request whose prompt has not come to its end has no entry in `sampled_token_ids`."""

    step_id: int
    sampled_token_ids: dict[str, list[int]] = field(default_factory=dict)
    spec_token_ids: dict[str, list[int]] = field(default_factory=dict)  # guesses (lesson 8) for the next step
    logprobs: dict[str, list[dict[int, float]]] = field(default_factory=dict)  # for each sampled token
    errors: dict[str, str] = field(default_factory=dict)  # of the requests that failed: why


# ---------------------------------------------------------------------------------------------------------------
# Who is served next
# ---------------------------------------------------------------------------------------------------------------


def tokens_to_schedule(request: Request, budget: int, max_chunk: int) -> int:
    """How many of its tokens a request computes in this step: all it lacks, guesses included, as far as is allowed.

    budget: what is left of the step's tokens. max_chunk: the most that one request may take of a step.
    """
    # TODO 5.3: what is known, less what is computed, within both limits.
    raise NotImplementedError("TODO 5.3")


def first_come(request: Request, served: Mapping[str, float]) -> tuple:
    """In the order of arrival."""
    return (request.arrival,)


def by_priority(request: Request, served: Mapping[str, float]) -> tuple:
    """The lowest number first; equals in the order of arrival."""
    return (request.priority, request.arrival)


def fair_share(request: Request, served: Mapping[str, float]) -> tuple:
    """The tenant who was served least first; its requests in the order of arrival.

    served: the tokens computed and sampled for each tenant. From Sheng et al., "Fairness in Serving Large Language
    Models" (2024).
    """
    # TODO 5.12: a pair to sort by: the smaller goes first.
    raise NotImplementedError("TODO 5.12")


def join(served: dict[str, float], tenant: str, active: Collection[str]) -> None:
    """A tenant that had nothing to do for a while makes a request: let it begin level with the others.

    served: changed in place. active: the tenants that have requests waiting or running. A tenant keeps what it has
    above the least served of them, and is lifted to that one if it is below: time in which it asked for nothing is
    no credit to be claimed later. An active tenant is left as it is; with nobody active, so is everyone.
    """
    # TODO 5.16: a new tenant has been served 0.
    raise NotImplementedError("TODO 5.16")


POLICIES: dict[str, Callable[[Request, Mapping[str, float]], tuple]] = {
    "fcfs": first_come,
    "priority": by_priority,
    "fair": fair_share,
}
"""What requests are sorted by: who comes first is admitted first, who comes last makes room first."""


class Scheduler:
    """Decides, each step, which requests compute how many tokens, and who makes room when blocks run out.

    max_num_seqs: how many requests run at once. max_num_batched_tokens: the budget of a step. max_chunk: the most that
    one request takes of it. preemption: "recompute" throws a victim's blocks away, to compute them again later; "swap"
    brings them to `num_host_blocks` blocks on the host, as long as there is room.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_chunk: int | None = None,
        policy: str = "fcfs",
        preemption: str = "recompute",
        num_host_blocks: int = 0,
    ):
        self.manager = manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_chunk = max_chunk or max_num_batched_tokens
        self.policy = POLICIES[policy]
        self.preemption = preemption if num_host_blocks else "recompute"  # there is nowhere to swap to
        self.host_pool = BlockPool(max(1, num_host_blocks))  # a pool has one; without "swap" nobody takes it
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.swapped: dict[str, list[KVCacheBlock]] = {}  # the host's blocks of each swapped request
        self.served: dict[str, float] = {}  # tokens computed and sampled for each tenant
        self.depth = 1  # how many steps may be under way at once
        self.num_lookahead_tokens = 0  # room behind a request's tokens for a draft model's guesses (lesson 8)
        self.finished_ids: list[str] = []
        self.step_id = 0

    def add(self, request: Request) -> None:
        join(self.served, request.tenant, {other.tenant for other in self.requests.values()})
        self.requests[request.request_id] = request
        self.waiting.append(request)

    def rank(self, request: Request) -> tuple:
        """What the policy sorts by; siblings of one prompt in their order."""
        return (*self.policy(request, self.served), request.child)

    @property
    def max_step_seqs(self) -> int:
        """How many requests one step may have: where several are under way at once, its share of all there are."""
        return -(-len(self.requests) // self.depth)

    # One step ------------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput:
        """Decide the next step. Requests that run come first; who waits gets what is left, unless memory ran out."""
        self.step_id += 1
        plan = SchedulerOutput(self.step_id)
        self.take_back_lookahead()
        budget = self.schedule_running(plan)
        if not plan.preempted_ids:
            self.schedule_waiting(plan, budget)
        self.give_lookahead(plan)
        plan.copies = self.manager.take_copies()
        if not plan.is_empty:  # nobody is told of an empty one
            plan.finished_ids, self.finished_ids = self.finished_ids, []
        return plan

    def take_back_lookahead(self) -> None:
        """If this step might lack blocks, nobody keeps room for guesses: what is needed goes before what may be."""
        # Besides full blocks, each request may begin one, and may copy one that is shared.
        most_needed = self.max_num_batched_tokens // self.manager.block_size + 2 * len(self.running)
        if self.num_lookahead_tokens and self.manager.pool.num_free_blocks < most_needed:
            for request in self.running:
                if not request.in_flight:
                    self.manager.trim(request)

    def give_lookahead(self, plan: SchedulerOutput) -> None:
        """Room for guesses to come, behind the tokens of those who sample in this step, where any is left."""
        for i, each in enumerate(plan.scheduled if self.num_lookahead_tokens else ()):
            request = self.requests[each.request_id]
            if each.sample_index is not None:
                last = len(request.prompt_token_ids) + request.max_tokens - 1  # no token is computed behind this one
                num_tokens = min(self.num_lookahead_tokens, max(0, last - request.num_computed_tokens))
                self.manager.allocate_slots(request, 0, num_tokens)
                plan.scheduled[i] = replace(each, block_table=self.manager.block_table(each.request_id))

    def schedule_running(self, plan: SchedulerOutput) -> int:
        """Let the running requests go on, those first that have waited longest. Returns what is left of the budget.

        No chunk of a prompt may starve the others: each request leaves one token for everyone behind it, as long as
        the budget is large enough for that. A request that is in flight is left alone; so is one that `make_room` has
        preempted for another, or finds no room for (it then gives 0).
        """
        budget = self.max_num_batched_tokens
        ready = [request for request in self.running if not request.in_flight]
        ready.sort(key=lambda request: (request.last_step, self.rank(request)))
        ready = ready[: self.max_step_seqs]
        # TODO 5.4: for each in turn: stop at a budget of 0; pass over whoever is no longer RUNNING. How many
        # tokens, leaving one for each behind it, but one at least? Make room; `grant` what there is room for.
        raise NotImplementedError("TODO 5.4")

    def schedule_waiting(self, plan: SchedulerOutput, budget: int) -> None:
        """Admit requests that wait, in the policy's order, while there is budget, a place, and memory.

        If the first cannot be admitted nobody behind it is: small requests would starve a large one.
        """
        # TODO 5.5: `next_waiting`, `admit` it with what is left of the budget, go on until something is exhausted.
        raise NotImplementedError("TODO 5.5")

    def next_waiting(self, plan: SchedulerOutput) -> Request | None:
        """The first in the policy's order; None if the step has requests enough. A sibling waits until the first sample
        has computed their prompt.
        """

        def may_begin(request: Request) -> bool:
            is_first = request.parent is None or request.parent.status is RequestStatus.FINISHED
            return is_first or request.num_preemptions > 0 or self.can_fork(request, plan)

        if len(plan.scheduled) >= self.max_step_seqs:
            return None
        return min(filter(may_begin, self.waiting), key=self.rank, default=None)

    def admit(self, request: Request, budget: int, plan: SchedulerOutput) -> int:
        """Let a waiting request run, from where it can. Returns the tokens granted; 0, and nothing changed: no room.

        There must be room for all that is known of it, not for its first chunk alone: it would only have to be
        preempted in the middle of its prompt.
        """
        computed_blocks: list[KVCacheBlock] = []
        if request.status is RequestStatus.WAITING:
            if self.can_fork(request, plan):
                self.manager.fork(request.parent, request)
            else:
                computed_blocks, request.num_computed_tokens = self.manager.get_computed_blocks(request)
        num_cached = request.num_computed_tokens
        num_tokens = tokens_to_schedule(request, budget, self.max_chunk)
        num_later = request.num_tokens - num_cached - num_tokens
        if not self.has_room(request, num_tokens + num_later, computed_blocks) or (
            self.manager.allocate_slots(request, num_tokens, computed_blocks=computed_blocks) is None
        ):
            if request.status is RequestStatus.WAITING:
                self.manager.free(request)
                request.num_computed_tokens = 0
            return 0
        if request.status is RequestStatus.SWAPPED:
            self.swap_in(request, plan)
        elif not request.output_token_ids:
            request.num_cached_tokens = num_cached
        self.waiting.remove(request)
        self.running.append(request)
        request.status = RequestStatus.RUNNING
        self.grant(request, num_tokens, plan)
        return num_tokens

    def can_fork(self, request: Request, plan: SchedulerOutput) -> bool:
        """Whether it can begin with the blocks of its first sibling: they hold the prompt, and did so before this step,
        for blocks are copied before anything is computed.
        """
        parent = request.parent
        if parent is None or request.output_token_ids or parent.status is not RequestStatus.RUNNING:
            return False
        now = sum(len(each.token_ids) for each in plan.scheduled if each.request_id == parent.request_id)
        return parent.num_computed_tokens - now >= len(request.prompt_token_ids)

    def has_room(self, request: Request, num_tokens: int, computed_blocks: Sequence[KVCacheBlock]) -> bool:
        """Whether free blocks would do for so many more tokens."""
        held = len(self.manager.block_table(request.request_id)) + len(computed_blocks)
        unheld = sum(block.ref_cnt == 0 for block in computed_blocks)
        blocks = -(-(request.num_computed_tokens + num_tokens) // self.manager.block_size)
        return blocks - held <= self.manager.pool.num_free_blocks - unheld

    def grant(self, request: Request, num_tokens: int, plan: SchedulerOutput) -> None:
        """Write it into the plan. From now on these tokens count as computed: they will be before anyone reads them."""
        start, request.num_computed_tokens = request.num_computed_tokens, request.num_computed_tokens + num_tokens
        num_spec_tokens = max(0, request.num_computed_tokens - request.num_tokens)
        token_ids = request.all_token_ids[start : start + num_tokens] + request.spec_token_ids[:num_spec_tokens]
        is_sampled = request.num_computed_tokens >= request.num_tokens
        plan.scheduled.append(
            ScheduledRequest(
                request.request_id,
                start,
                token_ids,
                num_spec_tokens,
                self.manager.block_table(request.request_id),
                request.sampling_params,
                len(request.output_token_ids) if is_sampled else None,
                request.prompt_token_ids,
                list(request.output_token_ids),
                request.stop_token_ids,
                request.max_tokens,
            )
        )
        request.in_flight = True
        request.last_step = plan.step_id
        self.served[request.tenant] += num_tokens + is_sampled
        self.manager.cache_blocks(request, min(request.num_computed_tokens, request.num_tokens))

    def update_from_output(self, plan: SchedulerOutput, output: ModelRunnerOutput) -> list[Request]:
        """Take in what a step has brought. Returns its requests, those that have finished with it included.

        Of a request with guesses as many tokens come back as were accepted, and one more; what was computed for the
        others is not counted any more. What comes after a token that ends the request is dropped. A chunk in the middle
        of a prompt brings no token: its tokens are computed all the same, and nothing of them is taken back. A request
        that failed ends with "error", and keeps as its `error` what `output.errors` says of it.
        """
        requests = [self.requests[each.request_id] for each in plan.scheduled]
        # TODO 5.7: for each: no longer in flight; if it was aborted meanwhile or failed, `finish` it so. Otherwise
        # take back the rejected, append the sampled until there is a reason to finish, keep its next guesses, let its
        # full blocks be found, `finish` it if it ends. A chunk that is not the last has sampled nothing.
        raise NotImplementedError("TODO 5.7")

    # Making room ---------------------------------------------------------------------------------------------

    def make_room(self, request: Request, num_tokens: int, plan: SchedulerOutput) -> int:
        """Get the blocks for a running request's next tokens, if need be from others. Returns for how many there are.

        Guesses are given up before anyone is preempted. If the request itself comes last in the policy's order, it is
        the one that makes room; as long as steps before this one are in flight, it waits for their blocks instead.
        """
        while self.manager.allocate_slots(request, num_tokens) is None:
            if request.spec_token_ids:
                request.spec_token_ids = []
                num_tokens = tokens_to_schedule(request, num_tokens, self.max_chunk)
                continue
            victim = self.choose_victim(plan)
            if victim is None or (victim is request and any(other.last_step < plan.step_id for other in self.flying())):
                return 0
            self.preempt(victim, plan)
            if victim is request:
                return 0
        return num_tokens

    def flying(self) -> list[Request]:
        return [request for request in self.running if request.in_flight]

    def choose_victim(self, plan: SchedulerOutput) -> Request | None:
        """Who makes room: of the running requests the last in the policy's order, or None.

        Not one in flight: its blocks are being read and written. (Those scheduled in this step are in flight too.)
        """
        # TODO 5.8: `rank` is what the policy sorts by.
        raise NotImplementedError("TODO 5.8")

    def preempt(self, request: Request, plan: SchedulerOutput) -> None:
        """Take all blocks from a running request; it waits, and goes on later as if nothing had been."""
        plan.preempted_ids.append(request.request_id)
        request.num_preemptions += 1
        request.spec_token_ids = []
        self.running.remove(request)
        self.waiting.append(request)
        if self.preemption == "recompute" or not self.swap_out(request, plan):
            self.preempt_by_recompute(request)

    def preempt_by_recompute(self, request: Request) -> None:
        """Throw its blocks away. It keeps all its tokens, and computes them again when it is admitted again."""
        # TODO 5.9: what does it hold, what is computed, what is its status?
        raise NotImplementedError("TODO 5.9")

    def swap_out(self, request: Request, plan: SchedulerOutput) -> bool:
        """Bring what it has computed to the host. Returns False, and changes nothing, if the host has no room for it.

        Its blocks on the device are free then, even those that it shared: what is on the host is its own.
        """
        # TODO 5.10: a host block for each block with a computed token in it; note each move in `plan.swaps_out`,
        # with the number of slots that are filled; keep the host blocks in `swapped`; free the others; its status.
        raise NotImplementedError("TODO 5.10")

    def swap_in(self, request: Request, plan: SchedulerOutput) -> None:
        """Bring it back, into the blocks that it has just been given; the host's are free again."""
        # TODO 5.11: the same moves the other way, in `plan.swaps_in`.
        raise NotImplementedError("TODO 5.11")

    # Leaving -------------------------------------------------------------------------------------------------

    def abort(self, request_id: str) -> None:
        """End a request before its time, wherever it is; one that is unknown or finished is none to abort.

        One in flight keeps its blocks until its step is collected: they are being written. It is marked by its
        finish_reason, "abort", and `update_from_output` does the rest.
        """
        # TODO 5.13: in flight, or not?
        raise NotImplementedError("TODO 5.13")

    def finish(self, request: Request, reason: str) -> None:
        """The request is done, wherever it stood: it gives up its place and all that it holds."""
        # TODO 5.15: find the bug. Preemption by swap works, and so does aborting. But after a long day of both,
        # preempted requests are computed again, all of them: nothing is swapped any more.
        raise NotImplementedError("TODO 5.15")  # take this line out, then find the one mistake below and mend it

        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        (self.running if request in self.running else self.waiting).remove(request)
        self.manager.free(request)
        self.swapped.pop(request.request_id, ())
        del self.requests[request.request_id]
        self.finished_ids.append(request.request_id)

    def start_over(self) -> None:
        """A step was interrupted, and nobody knows how far it got: let everyone compute all of their tokens again."""
        for request in [*self.running, *self.waiting]:
            request.in_flight = False
            request.spec_token_ids = []
            if request.finish_reason:
                self.finish(request, request.finish_reason)
                continue
            self.host_pool.free_blocks(self.swapped.pop(request.request_id, ()))
            self.preempt_by_recompute(request)
        self.waiting, self.running = [*self.running, *self.waiting], []
        self.manager.take_copies()
        self.manager.reset_prefix_cache()


# ---------------------------------------------------------------------------------------------------------------
# Who computes
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """The tokens of all scheduled requests, laid flat."""

    token_ids: Tensor  # (T,)
    positions: Tensor  # (T,)
    metadata: AttentionMetadata
    logit_rows: Tensor  # (L,): of which rows logits are needed: the last of each request that samples, and its guesses


def flatten_batch(scheduled: Sequence[ScheduledRequest], block_size: int, device: torch.device) -> Batch:
    """Lay the requests' tokens side by side, in order. There is no batch axis and no padding.

    Logits are needed for the last row of each request that samples; where it has guesses, also for the row before each
    guess, so for its last `num_spec_tokens` + 1 rows.
    """
    # TODO 5.6: go through the requests, and note where each begins and ends.
    raise NotImplementedError("TODO 5.6")


class ModelRunner:
    """Computes a step with some layers of a model (all of them, until lesson 6), and samples."""

    def __init__(self, model: Llama, cache: PagedKVCache):
        self.model = model
        self.cache = cache

    @torch.inference_mode()
    def execute(self, plan: SchedulerOutput, hidden: Tensor | None = None) -> Tensor | ModelRunnerOutput:
        """Move blocks, compute, and sample; a stage without the last layer returns (T, hidden_size) for the next one.

        hidden: (T, hidden_size), what the stage before has computed; None: begin with the tokens.
        """
        self.cache.swap_out(plan.swaps_out)
        self.cache.swap_in(plan.swaps_in)
        self.cache.copy(plan.copies)
        output = ModelRunnerOutput(plan.step_id)
        if not plan.scheduled:
            return output
        batch = flatten_batch(plan.scheduled, self.cache.block_size, self.cache.keys.device)
        if hidden is None:
            hidden = self.model.embed(batch.token_ids)
        hidden = self.model.run_layers(hidden, batch.positions, self.cache.attend(batch.metadata), self.cache.layers)
        if self.cache.layers.stop < self.model.config.num_hidden_layers:
            return hidden
        if len(batch.logit_rows):
            self.sample(plan, self.model.logits(hidden[batch.logit_rows]), output)
        return output

    def sample(self, plan: SchedulerOutput, logits: Tensor, output: ModelRunnerOutput) -> None:
        """Draw what comes next for each request that is to be sampled. logits: (L, V), in the order of `logit_rows`;
        (0, V) on a rank that does not sample (lesson 6).
        """
        sampled = [each for each in plan.scheduled if each.sample_index is not None and len(logits)]
        for each, rows in zip(sampled, logits.split([each.num_spec_tokens + 1 for each in sampled])):
            try:
                if rows.isnan().any():
                    raise ValueError("the model's logits are not numbers (NaN)")
                tokens = self.choose(each, rows)
                if each.params.logprobs is not None:
                    likely = [top_logprobs(row, token, each.params.logprobs) for row, token in zip(rows, tokens)]
                    output.logprobs[each.request_id] = likely
            except (ValueError, RuntimeError) as error:
                output.errors[each.request_id] = str(error)
            else:
                output.sampled_token_ids[each.request_id] = tokens

    def choose(self, each: ScheduledRequest, logits: Tensor) -> list[int]:
        """What comes next in a request: one token. logits: (1, V); a row more for each guess, which are lesson 8's."""
        adjusted = adjust_logits(
            logits[0], each.params, each.prompt_token_ids, each.output_token_ids, each.stop_token_ids
        )
        return [sample(adjusted, each.params, each.sample_index)]


class Executor(Protocol):
    """Brings steps to whoever computes them, and what came of them back. First in, first out."""

    depth: int  # how many steps may be under way at once

    def submit(self, plan: SchedulerOutput) -> None: ...
    def collect(self) -> ModelRunnerOutput: ...
    def close(self) -> None: ...


class LocalExecutor:
    """Computes at once, in this process."""

    depth = 1

    def __init__(self, runner: ModelRunner):
        self.runner = runner
        self.outputs: deque[ModelRunnerOutput] = deque()

    def submit(self, plan: SchedulerOutput) -> None:
        try:
            self.outputs.append(self.runner.execute(plan))
        except Exception:  # whatever it is, it is not to take the other requests with it
            if not plan.scheduled:
                raise  # blocks could not be moved
            self.outputs.append(self.one_by_one(plan))

    def one_by_one(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """A step has failed. Compute its requests again, each alone, and let only those fail that fail again.

        Computing a token twice writes the same key and value to the same slot. Blocks have been moved already.
        """
        output = ModelRunnerOutput(plan.step_id)
        for each in plan.scheduled:
            try:
                alone = self.runner.execute(SchedulerOutput(plan.step_id, [each]))
            except Exception as again:
                output.errors[each.request_id] = f"{type(again).__name__}: {again}"
            else:
                output.sampled_token_ids |= alone.sampled_token_ids
                output.logprobs |= alone.logprobs
                output.errors |= alone.errors
        return output

    def collect(self) -> ModelRunnerOutput:
        return self.outputs.popleft()

    def close(self) -> None:
        self.outputs.clear()


# ---------------------------------------------------------------------------------------------------------------
# The engine
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is to be. The names are vLLM's where it has one."""

    block_size: int = 16  # tokens a block
    num_blocks: int | None = None  # in the pool; None: as many as `kv_cache_memory` holds
    kv_cache_memory: int = 2**30  # bytes
    num_host_blocks: int | None = None  # for swapped requests; None: as many as on the device
    max_model_len: int | None = None  # prompt and output together; None: as much as the model can
    max_num_seqs: int = 64  # requests that run at once
    max_num_batched_tokens: int = 256  # tokens computed in a step
    long_prefill_token_threshold: int | None = None  # the most of them for one request; None: half
    scheduling_policy: str = "fcfs"  # or "priority", "fair"
    preemption: str = "recompute"  # or "swap"
    enable_prefix_caching: bool | None = None  # None: wherever blocks can be shared
    kv_cache_policy: str = "paged"  # or "contiguous": one block a request, as long as max_model_len

    def __post_init__(self):
        choices = {
            "scheduling_policy": tuple(POLICIES),
            "preemption": ("recompute", "swap"),
            "kv_cache_policy": ("paged", "contiguous"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; it is {getattr(self, name)!r}.")
        for name in ("block_size", "num_blocks", "kv_cache_memory", "max_model_len", "max_num_seqs"):
            self.check_positive(name)
        for name in ("max_num_batched_tokens", "long_prefill_token_threshold", "num_host_blocks"):
            self.check_positive(name)
        if self.kv_cache_policy == "contiguous" and self.enable_prefix_caching:
            raise ValueError('enable_prefix_caching: with kv_cache_policy="contiguous" there are no blocks to share.')

    def check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a whole number of at least 1; it is {value!r}.")

    def resolve(self, model: Llama) -> EngineConfig:
        """The same, with everything that was left open decided for this model."""
        context = model.config.max_position_embeddings
        max_model_len = self.max_model_len or context
        if max_model_len > context:
            raise ValueError(f"max_model_len is {max_model_len}; the model's context is {context}.")
        is_paged = self.kv_cache_policy == "paged"
        block_size = self.block_size if is_paged else max_model_len
        weight = model.model.norm.weight
        fitting = self.kv_cache_memory // cache_bytes(model.config, block_size, weight.element_size())
        needed = self.max_num_seqs * -(-max_model_len // block_size)
        num_blocks = self.num_blocks or min(fitting, needed)
        if num_blocks < 1:
            raise ValueError(f"kv_cache_memory is {self.kv_cache_memory} bytes: too few for one block of {block_size}.")
        return replace(
            self,
            block_size=block_size,
            num_blocks=num_blocks,
            num_host_blocks=(self.num_host_blocks or num_blocks) if self.preemption == "swap" else None,
            enable_prefix_caching=is_paged if self.enable_prefix_caching is None else self.enable_prefix_caching,
            max_model_len=max_model_len,
            long_prefill_token_threshold=self.long_prefill_token_threshold or -(-self.max_num_batched_tokens // 2),
        )


@dataclass
class RequestMetrics:
    """When things happened to a request, in seconds of `time.perf_counter`, and how often it was disturbed."""

    arrival_time: float = 0.0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_draft_tokens: int = 0  # guesses that were verified (lesson 8)
    num_accepted_tokens: int = 0  # and those of them that became output

    @property
    def queue_time(self) -> float | None:
        """Seconds until it was scheduled for the first time."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def time_per_output_token(self) -> float | None:
        """The mean of the gaps between tokens; None before the second."""
        if self.num_output_tokens < 2:
            return None
        return (self.last_token_time - self.first_token_time) / (self.num_output_tokens - 1)


@dataclass
class RequestOutput(llama_pytorch.RequestOutput):
    """Lesson 2's, and what an engine knows besides. finish_reason may also be "abort" or "error"."""

    request_id: str = ""
    prompt_token_ids: list[int] = field(default_factory=list)
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: str | None = None  # why it failed
    siblings: list[RequestOutput] = field(default_factory=list, repr=False)  # of n samples: the other n - 1


@dataclass
class EngineMetrics:
    """What an engine has done so far."""

    num_steps: int = 0
    seconds: float = 0.0  # in `step`
    num_computed_tokens: int = 0
    num_output_tokens: int = 0
    num_prompt_tokens: int = 0  # of the requests that are done
    num_cached_tokens: int = 0  # of those, found in the prefix cache
    num_preemptions: int = 0
    num_draft_tokens: int = 0  # guesses that were verified (lesson 8)
    num_accepted_tokens: int = 0  # and those of them that became output
    num_finished: int = 0
    slots_held: int = 0  # summed over the steps
    tokens_stored: int = 0  # summed over the steps; a token that two requests share counts twice
    num_slots: int = 0  # in the pool

    @property
    def tokens_per_second(self) -> float:
        """Output tokens a second."""
        return self.num_output_tokens / self.seconds if self.seconds else 0.0

    @property
    def pool_utilisation(self) -> float:
        """The share of the pool that was held, on average over the steps."""
        return self.slots_held / (self.num_slots * self.num_steps) if self.num_steps else 0.0

    @property
    def slots_per_token(self) -> float:
        """Slots held for each token stored, on average: 1 is perfect, and shared prefixes make it less."""
        return self.slots_held / self.tokens_stored if self.tokens_stored else 0.0

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that were found in the prefix cache."""
        return self.num_cached_tokens / self.num_prompt_tokens if self.num_prompt_tokens else 0.0

    @property
    def acceptance_rate(self) -> float:
        """The share of verified guesses that became output."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0


class Reader:
    """Turns the tokens of one request into its output: text as it becomes certain, and the end at a stop string."""

    def __init__(self, output: RequestOutput, params: SamplingParams, tokenizer: Tokenizer):
        self.output = output
        self.stream = TextStream(tokenizer)
        self.checker = StopChecker(params.stop)

    def push(self, token_id: int, is_stop_token: bool) -> None:
        self.output.token_ids.append(token_id)
        if not is_stop_token:
            self.output.text += self.checker.push(self.stream.push(token_id))

    def end(self) -> None:
        """Nothing will follow: what was held back is shown, unless a stop string was found."""
        if not self.checker.found:
            self.output.text += self.checker.push(self.stream.flush()) + self.checker.flush()


class Engine:
    """Serves many requests at once with one model and one pool of blocks.

        with Engine(model, tokenizer, num_blocks=512) as engine:
            outputs = engine.generate(prompts, SamplingParams(max_tokens=64))

    Settings are those of `EngineConfig`. It is driven by `step`, one forward pass; `generate` and `stream` do that.
    Not thread-safe.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer, **settings):
        self.model = model
        self.tokenizer = tokenizer
        self.config = config = EngineConfig(**settings).resolve(model)
        self.manager = KVCacheManager(config.num_blocks, config.block_size, config.enable_prefix_caching)
        self.scheduler = Scheduler(
            self.manager,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.long_prefill_token_threshold,
            config.scheduling_policy,
            config.preemption,
            config.num_host_blocks or 0,
        )
        self.executor = self.build_executor()
        self.scheduler.depth = self.executor.depth
        self.in_flight: deque[SchedulerOutput] = deque()
        self.readers: dict[str, Reader] = {}
        self.samples: dict[str, list[str]] = {}  # the ids of a request's samples, itself the first
        self.num_arrivals = 0
        self.totals = EngineMetrics(num_slots=config.num_blocks * config.block_size)

    def build_executor(self) -> Executor:
        """Who computes. Lesson 6 brings others."""
        config = self.config
        cache = PagedKVCache(self.model, config.num_blocks, config.block_size, config.num_host_blocks or 0)
        return LocalExecutor(ModelRunner(self.model, cache))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """End whatever computes for this engine. Requests that are not finished stay as they are."""
        self.executor.close()

    # Requests in, outputs out --------------------------------------------------------------------------------

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.scheduler.requests)

    def add_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str = "default",
    ) -> str:
        """Take a request in; `step` will serve it. prompt: text, or token ids. Returns the request's id.

        Raises ValueError, naming what is wrong, for a request that can never be served.
        """
        params = params or SamplingParams()
        token_ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        request_id = request_id or f"request-{self.num_arrivals}"
        max_tokens = self.check_request(token_ids, params, request_id)
        eos_token_ids = () if params.ignore_eos else self.tokenizer.eos_token_ids
        self.samples[request_id] = []
        parent, now = None, time.perf_counter()
        for child, child_params in enumerate(params.children()):
            request = Request(
                request_id if child == 0 else f"{request_id}/{child}",
                token_ids,
                child_params,
                max_tokens,
                frozenset({*params.stop_token_ids, *eos_token_ids}),
                arrival=self.num_arrivals,
                priority=priority,
                tenant=tenant,
                parent=parent,
                child=child,
            )
            parent = parent or request
            output = RequestOutput(
                request_id=request.request_id, prompt_token_ids=token_ids, metrics=RequestMetrics(arrival_time=now)
            )
            self.readers[request.request_id] = Reader(output, child_params, self.tokenizer)
            self.samples[request_id].append(request.request_id)
            self.scheduler.add(request)
        outputs = [self.readers[each].output for each in self.samples[request_id]]
        outputs[0].siblings = outputs[1:]
        self.num_arrivals += 1
        return request_id

    def check_request(self, token_ids: list[int], params: SamplingParams, request_id: str) -> int:
        """How many tokens the request may bring forth. Raises ValueError if it can never be served."""
        limit, block_size = self.config.max_model_len, self.config.block_size
        if request_id in self.samples:
            raise ValueError(f"request_id {request_id!r} is taken: a request with this id is not finished yet.")
        check_prompt(token_ids, self.model.config, replace(params, n=1))
        if len(token_ids) >= limit:
            raise ValueError(
                f"The prompt has {len(token_ids)} tokens; max_model_len is {limit}, and one at least must be left for "
                "the answer."
            )
        max_tokens = min(params.max_tokens, limit - len(token_ids))
        needed = -(-(len(token_ids) + max_tokens - 1) // block_size)  # the last token's key and value nobody asks for
        if needed > self.config.num_blocks:
            room = self.config.num_blocks * block_size
            raise ValueError(
                f"A prompt of {len(token_ids)} tokens with max_tokens={max_tokens} needs {needed} blocks of "
                f"{block_size}; the pool has num_blocks={self.config.num_blocks}, for {room} tokens in all."
            )
        return max_tokens

    def abort(self, request_id: str) -> None:
        """End a request and its siblings; what they have said so far stands. An id that is not known is ignored."""
        for each in list(self.samples.get(request_id, [request_id])):
            request = self.scheduler.requests.get(each)
            self.scheduler.abort(each)
            if request is not None and not request.in_flight:
                self.report(request)

    def step(self) -> list[RequestOutput]:
        """One step: decide, compute, take in. Returns the outputs of all requests that the collected step computed
        something for: of those that finished with it, and of those in the middle of their prompt, too.

        Steps are submitted until the executor has as many as it can hold; then the oldest is collected. Where nothing
        is in flight then, there is nothing to collect: the result is an empty list, or RuntimeError if requests are
        waiting all the same and none of them can be served, which would be a mistake of ours.
        """
        start = time.perf_counter()
        # TODO 5.14: schedule and `submit` while there is room in flight and the plan is not empty; collect the
        # oldest and give it to the scheduler; `report` each request that the scheduler returns; `count` the step.
        raise NotImplementedError("TODO 5.14")

    def submit(self, plan: SchedulerOutput) -> None:
        """Hand a step to the executor. If that is interrupted, by Ctrl-C perhaps, all begin again from their tokens."""
        now = time.perf_counter()
        for each in plan.scheduled:
            metrics = self.readers[each.request_id].output.metrics
            metrics.num_draft_tokens += each.num_spec_tokens
            self.totals.num_draft_tokens += each.num_spec_tokens
            if metrics.first_scheduled_time is None:
                metrics.first_scheduled_time = now
        try:
            self.executor.submit(plan)
        except BaseException:
            self.in_flight.clear()
            self.scheduler.finished_ids += plan.finished_ids  # perhaps nobody has heard of them yet
            self.scheduler.start_over()
            raise
        self.in_flight.append(plan)

    def report(self, request: Request, step: ModelRunnerOutput | None = None) -> RequestOutput:
        """Bring a request's output up to date with the tokens that it has now; a complete stop string ends it.

        step: what has just brought them, if anything has.
        """
        step = step or ModelRunnerOutput(0)
        sampled, logprobs = (each.get(request.request_id, ()) for each in (step.sampled_token_ids, step.logprobs))
        reader = self.readers[request.request_id]
        output, metrics = reader.output, reader.output.metrics
        is_first = not output.token_ids
        accepted = request.output_token_ids[len(output.token_ids) :]
        for token_id in accepted:
            reader.push(token_id, token_id in request.stop_token_ids)
            if reader.checker.found:
                break
        output.logprobs += logprobs[: len(output.token_ids) - len(output.logprobs)]
        if accepted:
            metrics.last_token_time = time.perf_counter()
            if is_first:
                metrics.first_token_time = metrics.last_token_time
            num_new = len(output.token_ids) - metrics.num_output_tokens
            self.totals.num_output_tokens += num_new
            metrics.num_output_tokens += num_new
            num_accepted = min(num_new, max(0, len(sampled) - 1))  # the last was no guess, but may be cut off
            self.totals.num_accepted_tokens += num_accepted
            metrics.num_accepted_tokens += num_accepted
        metrics.num_preemptions = request.num_preemptions
        metrics.num_cached_tokens = request.num_cached_tokens
        output.error = request.error
        if reader.checker.found:
            if request.status is not RequestStatus.FINISHED:
                self.scheduler.finish(request, "stop")
            request.finish_reason = "stop"
        if request.status is RequestStatus.FINISHED:
            reader.end()
            output.finish_reason = request.finish_reason
            self.forget(request)
        return output

    def forget(self, request: Request) -> None:
        """A request has finished: whoever asked for it has its output."""
        self.totals.num_finished += 1
        self.totals.num_prompt_tokens += len(request.prompt_token_ids)
        self.totals.num_cached_tokens += request.num_cached_tokens
        del self.readers[request.request_id]
        first = (request.parent or request).request_id
        self.samples[first].remove(request.request_id)
        if not self.samples[first]:
            del self.samples[first]

    def count(self, plan: SchedulerOutput, seconds: float) -> None:
        """Add a step to the metrics."""
        totals, pool = self.totals, self.manager.pool
        totals.num_steps += 1
        totals.seconds += seconds
        totals.num_computed_tokens += plan.num_tokens
        totals.num_preemptions += len(plan.preempted_ids)
        totals.slots_held += (len(pool.blocks) - pool.num_free_blocks) * self.config.block_size
        totals.tokens_stored += sum(request.num_computed_tokens for request in self.scheduler.running)

    def metrics(self) -> EngineMetrics:
        """What this engine has done so far: a copy, to keep."""
        return replace(self.totals)

    # Whole answers -------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Continue all prompts and return their outputs, in their order. params: one for all, or one for each.

        With n above 1 the other samples are the output's `siblings`. A request that fails has finish_reason "error",
        and takes no other with it. Raises ValueError, and begins nothing, if one can never be served. Ctrl-C aborts
        all of them.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        each_params = list(params) if isinstance(params, Sequence) else [params] * len(prompts)
        if len(each_params) != len(prompts):
            raise ValueError(f"There are {len(prompts)} prompts and {len(each_params)} SamplingParams.")
        ids: list[str] = []
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: [self.abort(request_id) for request_id in ids])
            for number, (prompt, own_params) in enumerate(zip(prompts, each_params)):
                try:
                    ids.append(self.add_request(prompt, own_params))
                except ValueError as error:
                    raise ValueError(f"Prompt {number}: {error}") from None
            outputs = [self.readers[request_id].output for request_id in ids]
            bar = stack.enter_context(
                Progress(
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[speed]}"),
                    TimeElapsedColumn(),
                    disable=not progress,
                    transient=True,
                )
            )
            task = bar.add_task("requests", total=len(ids), speed="")
            while any(request_id in self.samples for request_id in ids):
                self.step()
                done = sum(request_id not in self.samples for request_id in ids)
                bar.update(task, completed=done, speed=f"{self.totals.tokens_per_second:.0f} tokens/s")
        return outputs

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the answer's text piece by piece. Whoever stops listening aborts it; other requests go on with it."""
        if params is not None and params.n != 1:
            raise ValueError(f"SamplingParams: n is {params.n}; a stream is one answer.")
        request_id = self.add_request(prompt, params)
        output, num_shown = self.readers[request_id].output, 0
        try:
            while request_id in self.samples:
                self.step()
                if len(output.text) > num_shown:
                    piece, num_shown = output.text[num_shown:], len(output.text)
                    yield piece
            if output.error:
                raise RuntimeError(f"{request_id} failed: {output.error}")
        finally:
            self.abort(request_id)


def load_engine(name: str, dtype: torch.dtype | None = None, device: str | None = None, **settings) -> Engine:
    """An engine for a checkpoint, named as for `load`, with kernels unless the environment says `KERNELS=plain`."""
    model, tokenizer = load(name, dtype, device)
    use_kernels(model)
    return Engine(model, tokenizer, **settings)
