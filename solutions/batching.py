"""Lesson 5, second half: the engine. Many requests in one batch, computed together in every step.

    Engine           accepts requests and returns text          knows text and time, no tensors
    Scheduler        decides what a step computes               knows ids and counts, no tensors
    Executor         sends the plan to the model runner         here in this process; in lesson 6 in many
    ModelRunner      computes and samples                       knows tensors, no queues
    OutputProcessor  turns tokens into text                     knows nothing of the others

The executor gets a `SchedulerOutput` for each step and returns a `ModelRunnerOutput`; both can be pickled.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from common import kernels
from common.config import EngineConfig
from common.metrics import EngineMetrics, RequestMetrics
from common.progress import progress_bar
from common.sampling import check_kind, check_params, encode_prompt, list_prompts
from common.tokenizer import Tokenizer
from solutions import llama_pytorch, scheduler
from solutions.kv_cache import cache_bytes
from solutions.llama_pytorch import Llama, SamplingParams, StopChecker, TextStream, adjust_logits, sample, top_logprobs
from solutions.paged_attention import AttentionMetadata, KVCacheManager, PagedKVCache, slot_mapping
from solutions.scheduler import ModelRunnerOutput, Request, RequestStatus, ScheduledRequest, Scheduler, SchedulerOutput

# --- The model runner -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """The tokens of all scheduled requests, side by side."""

    token_ids: Tensor  # (T,)
    positions: Tensor  # (T,)
    metadata: AttentionMetadata
    logit_rows: Tensor  # (L,): the rows whose logits are needed, to sample or to verify draft tokens


def flatten_batch(scheduled: Sequence[ScheduledRequest], block_size: int, device: torch.device) -> Batch:
    """Put the tokens of the requests side by side, in order, without a batch axis and without padding.

    A request that samples needs the logits of its last row and of the `num_spec_tokens` rows before it. All tensors
    have dtype long and are on `device`.
    """
    # Exercise 5.15: for each request extend six lists: token ids, positions, slots (4.14), the end of its rows
    # (query_start), its context length, and the rows of its logits.
    token_ids, positions, slots, logit_rows, query_start, context_lens = [], [], [], [], [0], []
    for request in scheduled:
        end = request.start + len(request.token_ids)
        token_ids += request.token_ids
        positions += range(request.start, end)
        slots += slot_mapping(request.block_table, request.start, len(request.token_ids), block_size)
        query_start.append(len(token_ids))
        context_lens.append(end)
        if request.sample_index is not None:
            logit_rows += range(len(token_ids) - request.num_spec_tokens - 1, len(token_ids))

    def tensor(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=device)

    block_tables = [request.block_table for request in scheduled]
    metadata = AttentionMetadata(query_start, context_lens, tensor(slots), block_tables)
    return Batch(tensor(token_ids), tensor(positions), metadata, tensor(logit_rows))


class ModelRunner:
    """Computes a step with some layers of a model (all of them, until lesson 6), and samples."""

    def __init__(self, model: Llama, cache: PagedKVCache):
        self.model, self.cache = model, cache

    @torch.inference_mode()
    def execute(self, plan: SchedulerOutput, hidden: Tensor | None = None) -> Tensor | ModelRunnerOutput:
        """Move blocks, compute, and sample. hidden: (T, hidden_size), the output of the stage before; None: begin with
        the tokens. A stage without the last layer returns (T, hidden_size) for the next stage.
        """
        self.cache.swap_out(plan.swaps_out)
        self.cache.swap_in(plan.swaps_in)
        self.cache.copy(plan.copies)
        output = ModelRunnerOutput(plan.step_id)
        if not plan.scheduled:
            return output
        batch = flatten_batch(plan.scheduled, self.cache.block_size, self.cache.keys.device)
        hidden = self.forward(batch, hidden)
        if self.cache.layers.stop < self.model.config.num_hidden_layers:
            return hidden
        if len(batch.logit_rows):
            self.sample(plan, self.model.logits(hidden[batch.logit_rows]), output)
        self.score_prompts(plan, hidden, output)
        return output

    def forward(self, batch: Batch, hidden: Tensor | None) -> Tensor:
        """Run this runner's layers. (T, hidden_size), or None at the first one -> (T, hidden_size)."""
        if hidden is None:
            hidden = self.model.embed(batch.token_ids)
        attend = kernels.paged(self.cache, batch.metadata)  # `cache.attend`, unless fused layers do its work
        return self.model.run_layers(hidden, batch.positions, attend, self.cache.layers)

    def draw(self, sampling: Sequence[ScheduledRequest], logits: Tensor) -> dict[str, int]:
        """Return next tokens, by id, for requests whose tokens kernels choose all at once; none without them."""
        return {}

    def score_prompts(self, plan: SchedulerOutput, hidden: Tensor, output: ModelRunnerOutput) -> None:
        """Write the log-probabilities of prompt tokens into `output`, for the requests that ask for them.

        hidden: (T, hidden_size). The row of a token gives the probabilities of the token after it.
        """
        rows = hidden.split([len(request.token_ids) for request in plan.scheduled])
        for request, own_rows in zip(plan.scheduled, rows):
            first, num = request.start + 1, request.params.prompt_logprobs
            targets = request.prompt_token_ids[first : first + len(own_rows)]
            if num is not None and targets:
                likely = map(top_logprobs, self.model.logits(own_rows[: len(targets)]), targets, itertools.repeat(num))
                output.prompt_logprobs[request.request_id] = dict(enumerate(likely, first))

    def sample(self, plan: SchedulerOutput, logits: Tensor, output: ModelRunnerOutput) -> None:
        """Choose the next tokens of each request that samples, and write them into `output`.

        logits: (L, V), in the order of `logit_rows`; (0, V) on a rank that does not sample (lesson 6).
        """
        sampling = [request for request in plan.scheduled if request.sample_index is not None and len(logits)]
        drawn = self.draw(sampling, logits)
        for request, rows in zip(sampling, logits.split([request.num_spec_tokens + 1 for request in sampling])):
            try:
                if request.request_id in drawn:
                    tokens = [drawn[request.request_id]]
                elif rows.amax().isnan():  # amax of a NaN is NaN; eight times as fast as isnan of all
                    raise ValueError("the model's logits are not numbers (NaN)")
                else:
                    tokens = self.choose(request, rows)
                if (num := request.params.logprobs) is not None:
                    likely = [top_logprobs(row, token, num) for row, token in zip(rows, tokens)]
                    output.logprobs[request.request_id] = likely
            except Exception as error:  # whatever it is, it must not end the other requests
                kind = "" if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: "
                output.errors[request.request_id] = f"{kind}{error}"
            else:
                output.sampled_token_ids[request.request_id] = tokens

    def choose(self, request: ScheduledRequest, logits: Tensor) -> list[int]:
        """Return the next tokens of a request, here one. logits: (1, V). (Lesson 8 has one more per draft token.)"""
        adjusted = adjust_logits(
            logits[0], request.params, request.prompt_token_ids, request.output_token_ids, request.stop_token_ids
        )
        return [sample(adjusted, request.params, request.sample_index)]


class Executor(Protocol):
    """Sends plans to the processes that compute them, and returns their results, in the same order."""

    depth: int  # steps that may be in flight at once

    def submit(self, plan: SchedulerOutput) -> None: ...
    def collect(self) -> ModelRunnerOutput: ...
    def close(self) -> None: ...


class LocalExecutor:
    """Computes a step in this process, as soon as it is submitted."""

    depth = 1

    def __init__(self, runner: ModelRunner):
        self.runner = runner
        self.outputs: deque[ModelRunnerOutput] = deque()

    def submit(self, plan: SchedulerOutput) -> None:
        try:
            self.outputs.append(self.runner.execute(plan))
        except Exception:  # of any kind: the other requests must not fail with the one that caused it
            if not plan.scheduled:
                raise  # moving blocks has failed
            self.outputs.append(self.execute_one_by_one(plan))

    def execute_one_by_one(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Compute each request of a failed step again, alone. Only requests that fail again get an error.

        Blocks have been moved already. A token that is computed twice has the same key and value in the same slot.
        """
        output = ModelRunnerOutput(plan.step_id)
        for request in plan.scheduled:
            try:
                alone = self.runner.execute(SchedulerOutput(plan.step_id, [request]))
            except Exception as error:
                output.errors[request.request_id] = f"{type(error).__name__}: {error}"
            else:
                output.sampled_token_ids |= alone.sampled_token_ids
                output.logprobs |= alone.logprobs
                output.prompt_logprobs |= alone.prompt_logprobs
                output.errors |= alone.errors
        return output

    def collect(self) -> ModelRunnerOutput:
        return self.outputs.popleft()

    def close(self) -> None:
        self.outputs.clear()


# --- From tokens to text ----------------------------------------------------------------------------------------------


@dataclass
class RequestOutput(llama_pytorch.RequestOutput):
    """Lesson 2's, with what an engine knows besides. finish_reason may also be "abort" or "error"."""

    request_id: str = ""
    prompt_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: dict[int, dict[int, float]] = field(default_factory=dict)  # by position, from 1
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: str | None = None  # why it failed, if finish_reason is "error"
    siblings: list[RequestOutput] = field(default_factory=list, repr=False)  # the other n - 1 samples

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None and all(other.is_finished for other in self.siblings)


@dataclass
class RequestState:
    """An unfinished request and its output, with the text that is held back because it is not certain yet."""

    request: Request
    output: RequestOutput
    stream: TextStream
    checker: StopChecker


class OutputProcessor:
    """Turns the tokens of all unfinished requests into text, as it becomes certain, and looks for stop strings."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.states: dict[str, RequestState] = {}

    def add(self, request: Request) -> RequestOutput:
        output = RequestOutput(request_id=request.request_id, prompt_token_ids=request.prompt_token_ids)
        output.metrics.arrival_time = time.perf_counter()
        stream, checker = TextStream(self.tokenizer), StopChecker(request.sampling_params.stop)
        self.states[request.request_id] = RequestState(request, output, stream, checker)
        return output

    def process(self, request: Request, result: ModelRunnerOutput) -> RequestOutput:
        """Bring a request's output up to date with its tokens. result: of the step with its newest tokens. The output's
        finish_reason is set if the request has finished, or if a stop string is complete.
        """
        state = self.states[request.request_id]
        output = state.output
        for token_id in request.output_token_ids[len(output.token_ids) :]:
            self.push(state, token_id)
            if state.checker.found:
                break
        logprobs = result.logprobs.get(request.request_id, [])
        output.logprobs += logprobs[: len(output.token_ids) - len(output.logprobs)]
        output.prompt_logprobs |= result.prompt_logprobs.get(request.request_id, {})
        output.error = result.errors.get(request.request_id) if request.finish_reason == "error" else None
        output.metrics.num_preemptions = request.num_preemptions
        output.metrics.num_cached_tokens = request.num_cached_tokens
        if state.checker.found or request.status is RequestStatus.FINISHED:
            if not state.checker.found:  # no token follows that could change the text which was held back
                output.text += state.checker.push(state.stream.flush()) + state.checker.flush()
            output.finish_reason = "stop" if state.checker.found else request.finish_reason
            del self.states[request.request_id]
        return output

    def push(self, state: RequestState, token_id: int) -> None:
        """Append a token and its text. As in lesson 2, stop strings do not count in the first `min_tokens` tokens."""
        request, output = state.request, state.output
        output.token_ids.append(token_id)
        if token_id not in request.stop_token_ids:
            text = state.stream.push(token_id)
            is_early = len(output.token_ids) <= request.sampling_params.min_tokens
            output.text += text if is_early else state.checker.push(text)

    def rewind(self) -> list[Request]:
        """Return to the state of the outputs, after a step was interrupted at an unknown line.

        A token counts if it is in the output, with its logprobs if they are wanted; others are generated again. Returns
        the unfinished requests.
        """
        for state in list(self.states.values()):
            request, output = state.request, state.output
            if request.sampling_params.logprobs is not None:
                del output.token_ids[len(output.logprobs) :], output.logprobs[len(output.token_ids) :]
            request.output_token_ids, output.token_ids, output.text = output.token_ids, [], ""
            state.stream, state.checker = TextStream(self.tokenizer), StopChecker(request.sampling_params.stop)
            for token_id in request.output_token_ids:
                self.push(state, token_id)
            request.finish_reason = "abort" if request.finish_reason == "abort" else scheduler.finish_reason(request)
            if request.finish_reason or state.checker.found:
                request.status = RequestStatus.FINISHED
                self.process(request, ModelRunnerOutput(0))
        return [state.request for state in self.states.values()]


# --- The engine -------------------------------------------------------------------------------------------------------


def exclusive(method: Callable) -> Callable:
    """Decorate a method of the engine: threads take turns, and a call from within another call is refused."""

    @functools.wraps(method)
    def call(self, *arguments, **options):
        with self.lock:
            if self.inside.locked():
                raise RuntimeError(
                    f"{method.__name__} was called from within a step of this engine, by a logits processor perhaps. "
                    "A step cannot begin another one: call it after the step, or use a second engine."
                )
            with self.inside:
                return method(self, *arguments, **options)

    return call


class Engine:
    """Serves many requests at once with one model and one pool of blocks.

        with load_engine("smollm2-135m", num_blocks=512) as engine:
            outputs = engine.generate(prompts, SamplingParams(max_tokens=64))

    executor: computes the steps. config: resolved for the model. An engine advances by `step`, one forward pass;
    `generate` and `stream` call it. Threads may share an engine: each step computes the requests of all of them.
    """

    def __init__(self, executor: Executor, tokenizer: Tokenizer, config: EngineConfig):
        self.executor, self.tokenizer, self.config = executor, tokenizer, config
        self.manager = KVCacheManager(
            config.num_blocks, config.block_size, config.enable_prefix_caching, config.sliding_window
        )
        self.scheduler = Scheduler(self.manager, config)
        self.scheduler.depth = executor.depth
        self.processor = OutputProcessor(tokenizer)
        self.in_flight: deque[SchedulerOutput] = deque()
        self.totals = EngineMetrics(num_slots=config.num_blocks * config.block_size)
        self.num_arrivals = 0
        self.numbers = itertools.count()  # of the ids that are chosen here
        self.to_abort: deque[str] = deque()
        self.lock = threading.RLock()  # is held by the thread whose turn it is
        self.inside = threading.Lock()  # is held while requests change

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """End the processes that compute for this engine. Unfinished requests stay as they are."""
        self.executor.close()

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self.processor.states)

    def output(self, request_id: str) -> RequestOutput:
        """Return the output of an unfinished request, an object that later steps extend. Other ids raise KeyError."""
        if request_id not in self.processor.states:
            raise KeyError(f"There is no unfinished request {request_id!r}; an output can be kept beyond its end.")
        return self.processor.states[request_id].output

    def metrics(self) -> EngineMetrics:
        """Return a copy of the totals of this engine so far."""
        return replace(self.totals)

    # Requests ------------------------------------------------------------------------------------------------

    @exclusive
    def add_request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        tenant: str = "default",
        cache_salt: str = "",
    ) -> str:
        """Queue a request; `step` will serve it. prompt: text, or token ids. Returns its id.

        It shares blocks of the prefix cache with requests that have the same cache_salt; with prompt_logprobs it shares
        none, since all of its prompt must be computed. Raises ValueError, with the reason, for a request that can never
        be served.
        """
        params = check_params(params)
        request_id = self.choose_id() if request_id is None else request_id
        check_kind(str, request_id=request_id, tenant=tenant, cache_salt=cache_salt)
        check_kind(int, priority=priority)
        token_ids = encode_prompt(prompt, self.tokenizer)
        llama_pytorch.check_prompt(token_ids, self.config.model_config, replace(params, n=1))
        max_tokens = self.config.limit_output(len(token_ids), params.max_tokens)
        eos_token_ids = () if params.ignore_eos else self.tokenizer.eos_token_ids
        stop_token_ids = frozenset((*params.stop_token_ids, *eos_token_ids))
        if params.prompt_logprobs is not None:
            cache_salt = f"{cache_salt}/{self.num_arrivals}"
        shared = (max_tokens, stop_token_ids, self.num_arrivals, priority, tenant, cache_salt)
        requests: list[Request] = []
        for child, own_params in enumerate(params.children()):
            own_id = f"{request_id}/{child}" if child else request_id
            if self.samples(own_id):
                raise ValueError(f"request_id {own_id!r:.80} is taken: a request with this id is not finished yet.")
            parent = requests[0] if requests else None
            requests.append(Request(own_id, token_ids, own_params, *shared, parent, child))
        self.num_arrivals += 1
        try:
            outputs = [self.processor.add(request) for request in requests]
            outputs[0].siblings = outputs[1:]
            for request in requests:
                self.scheduler.add(request)
        except BaseException:  # Ctrl-C, when some of them are known
            for request in requests:
                self.processor.states.pop(request.request_id, None)
            self.start_over()
            raise
        return request_id

    def choose_id(self) -> str:
        """Return a request id that is not in use and was not chosen before."""
        with self.lock:
            return next(name for i in self.numbers if not self.samples(name := f"request-{i}"))

    def samples(self, request_id: str) -> list[Request]:
        """Return the unfinished requests with this id: the request itself, and the other samples of its prompt."""
        requests = [state.request for state in self.processor.states.values()]
        return [each for each in requests if request_id in (each.request_id, (each.parent or each).request_id)]

    def abort(self, request_id: str) -> None:
        """End a request and the other samples of its prompt. They keep their output so far. An unknown id is ignored.

        A call during a step takes effect at the end of the step.
        """
        self.to_abort.append(request_id)
        with self.lock:
            if not self.inside.locked():
                self.abort_now()

    @exclusive
    def abort_now(self) -> None:
        """Carry out the calls of `abort`, whatever interrupts it."""
        try:
            self.abort_requests()
        except BaseException:
            self.start_over()
            raise

    def abort_requests(self) -> None:
        """End the requests of `to_abort`. An id is removed after its requests have ended."""
        while self.to_abort:
            for request in self.samples(self.to_abort[0]):
                self.scheduler.abort(request.request_id)
                if not request.in_flight:
                    self.report(request, ModelRunnerOutput(0))
            self.to_abort.popleft()

    # Steps ---------------------------------------------------------------------------------------------------

    @exclusive
    def step(self) -> list[RequestOutput]:
        """Advance by one step. Returns the outputs of the requests in the step that was collected.

        If it is interrupted, for example by Ctrl-C, all requests begin again from their tokens, and none is lost.
        """
        try:
            outputs = self.run_step()
            self.abort_requests()
            return outputs
        except BaseException:
            self.start_over()
            raise

    def start_over(self) -> None:
        """Return to the state of the outputs, and let all unfinished requests begin again from their tokens."""
        self.scheduler.finished_ids += [request_id for plan in self.in_flight for request_id in plan.finished_ids]
        self.in_flight.clear()
        self.scheduler.start_over(self.processor.rewind())
        self.abort_requests()

    def run_step(self) -> list[RequestOutput]:
        """Submit steps until `depth` of them are in flight, then collect the oldest. Returns the outputs of all its
        requests, including those that finish and those in the middle of their prompt.

        If no step is in flight then, returns an empty list; or raises RuntimeError if there are unfinished requests,
        none of which can be served. That would be an error of the engine.
        """
        start = time.perf_counter()
        # Exercise 5.16: `schedule` and `submit` plans while fewer than `depth` are in flight and the plan is not empty.
        # Take the oldest out of `in_flight` and `collect` it. Update the scheduler, `report` each request that this
        # returns, and pass the step to `totals.observe`.
        while len(self.in_flight) < self.executor.depth:
            plan = self.scheduler.schedule()
            if plan.is_empty:
                break
            self.submit(plan)
        if not self.in_flight:
            if self.has_unfinished_requests:
                raise RuntimeError(f"{len(self.scheduler.waiting)} requests wait, and none can be served.")
            return []
        plan = self.in_flight.popleft()
        result = self.collect(plan)
        requests = self.scheduler.update_from_output(plan, result)
        outputs = [self.report(request, result) for request in requests]
        self.totals.observe(self.scheduler, plan, result, outputs, time.perf_counter() - start)
        return outputs

    def submit(self, plan: SchedulerOutput) -> None:
        """Give a plan to the executor, with the ids of requests that have ended since the plan before, and record when
        its requests were first scheduled.
        """
        now = time.perf_counter()
        for scheduled in plan.scheduled:
            metrics = self.output(scheduled.request_id).metrics
            metrics.first_scheduled_time = metrics.first_scheduled_time or now
        self.in_flight.append(plan)  # first: an interrupted plan's ids are told again only if it is in flight
        plan.finished_ids, self.scheduler.finished_ids = self.scheduler.finished_ids, []
        self.executor.submit(plan)

    def collect(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Return the result of this plan, the oldest in flight. Results of interrupted plans are dropped."""
        result = self.executor.collect()
        while result.step_id < plan.step_id:
            result = self.executor.collect()
        return result

    def report(self, request: Request, result: ModelRunnerOutput) -> RequestOutput:
        """Bring a request's output up to date. A stop string in its text ends the request."""
        output = self.processor.process(request, result)
        if output.finish_reason is not None:
            if request.status is not RequestStatus.FINISHED:
                self.scheduler.finish(request, output.finish_reason)
            self.totals.observe_end(output)
        return output

    # Whole answers -------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        progress: bool = True,
    ) -> list[RequestOutput]:
        """Continue all prompts and return their outputs in the same order. params: one for all, or one for each.

        A single prompt, text or token ids, counts as a list of one. With n above 1 the other samples are the output's
        `siblings`. A request that fails has finish_reason "error", and the others go on. Raises ValueError before it
        computes anything if one prompt can never be served. Ctrl-C aborts all of them.
        """
        prompts = list_prompts(prompts)
        params = list(params) if isinstance(params, (list, tuple)) else [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"There are {len(prompts)} prompts and {len(params)} SamplingParams.")
        ids: list[str] = []
        outputs: list[RequestOutput] = []
        try:
            for number, (prompt, own_params) in enumerate(zip(prompts, params)):
                ids.append(self.choose_id())
                try:
                    with self.lock:  # another thread's step could end it at once
                        outputs.append(self.output(self.add_request(prompt, own_params, ids[-1])))
                except ValueError as error:
                    raise ValueError(f"Prompt {number}: {error}") from None
            with progress_bar("requests", len(outputs), progress) as update:
                while (num_done := sum(output.is_finished for output in outputs)) < len(outputs):
                    update(num_done, f"{self.totals.tokens_per_second:.0f} tokens/s")
                    self.step()
        finally:
            for request_id in ids:
                self.abort(request_id)
        return outputs

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Iterator[str]:
        """Yield the answer's text piece by piece. Closing the iterator aborts the request; other requests go on."""
        if (n := check_params(params).n) != 1:
            raise ValueError(f"SamplingParams: n is {n}; a stream is one answer.")
        request_id, output, num_shown = self.choose_id(), None, 0
        try:
            with self.lock:
                output = self.output(self.add_request(prompt, params, request_id))
            while True:
                if len(output.text) > num_shown:  # other calls of `step` may have brought it, too
                    piece, num_shown = output.text[num_shown:], len(output.text)
                    yield piece
                elif output.is_finished:
                    break
                else:
                    self.step()
            if output.error:
                raise RuntimeError(f"{output.request_id} failed: {output.error}")
        finally:
            if output is None or not output.is_finished:
                self.abort(request_id)


def local_engine(model: Llama, tokenizer: Tokenizer, /, **options) -> Engine:
    """Return an engine for a model in this process. options: of `EngineConfig`; later lessons' have no effect."""
    slot_bytes = cache_bytes(model.config, 1, model.model.norm.weight.element_size())
    config = EngineConfig(**options).resolve(model.config, slot_bytes)
    cache = PagedKVCache(model, config.num_blocks, config.block_size, config.num_host_blocks)
    return Engine(LocalExecutor(kernels.accelerate(ModelRunner(model, cache), config)), tokenizer, config)


def load_engine(name: str, **options) -> Engine:
    """Return an engine for a checkpoint, named as for `load`, with kernels unless `KERNELS=plain` is set."""
    config = EngineConfig(model=name, **options)
    model, tokenizer = llama_pytorch.load(name, config.dtype, config.device)
    llama_pytorch.use_kernels(model)
    return local_engine(model, tokenizer, model=name, **options)
