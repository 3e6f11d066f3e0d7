"""What an engine measures of each request and in total. Times are in seconds of `time.perf_counter`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class RequestMetrics:
    """Timestamps of a request, and counts of its tokens."""

    arrival_time: float = 0.0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    num_output_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache
    num_preemptions: int = 0
    num_draft_tokens: int = 0  # draft tokens that were verified (lesson 8)
    num_accepted_tokens: int = 0  # and those of them that became output

    @property
    def queue_time(self) -> float | None:
        """Seconds until it was scheduled for the first time."""
        return None if self.first_scheduled_time is None else self.first_scheduled_time - self.arrival_time

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds until its first output token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time

    @property
    def time_per_output_token(self) -> float | None:
        """The mean of the seconds between output tokens; None before the second."""
        if self.num_output_tokens < 2:
            return None
        return (self.last_token_time - self.first_token_time) / (self.num_output_tokens - 1)


@dataclass
class EngineMetrics:
    """What an engine has done so far."""

    num_steps: int = 0
    seconds: float = 0.0  # in `Engine.step`
    num_computed_tokens: int = 0
    num_output_tokens: int = 0
    num_prompt_tokens: int = 0  # of the requests that have finished
    num_cached_tokens: int = 0  # of those, found in the prefix cache
    num_preemptions: int = 0
    num_draft_tokens: int = 0  # draft tokens that were verified (lesson 8)
    num_accepted_tokens: int = 0  # and those of them that became output
    num_finished: int = 0
    slots_held: int = 0  # summed over the steps
    tokens_stored: int = 0  # summed over the steps; a token that two requests share counts twice
    num_slots: int = 0  # in the pool

    def observe(self, scheduler, plan, result, outputs: Sequence, seconds: float) -> None:
        """Count one collected step, here and in the metrics of its requests.

        plan, result: the step's SchedulerOutput and ModelRunnerOutput. outputs: a RequestOutput for each scheduled
        request, up to date. seconds: how long the step took.
        """
        pool = scheduler.manager.pool
        now = time.perf_counter()
        self.num_steps += 1
        self.seconds += seconds
        self.num_computed_tokens += plan.num_tokens
        self.num_preemptions += len(plan.preempted_ids)
        self.slots_held += (len(pool.blocks) - pool.num_free_blocks) * scheduler.manager.block_size
        self.tokens_stored += sum(request.num_computed_tokens for request in scheduler.running)
        for scheduled, output in zip(plan.scheduled, outputs):
            own = output.metrics
            num_new = len(output.token_ids) - own.num_output_tokens
            num_sampled = len(result.sampled_token_ids.get(scheduled.request_id, ()))
            if num_new:
                own.first_token_time = own.first_token_time or now
                own.last_token_time = now
            for metrics in (self, own):
                metrics.num_output_tokens += num_new
                metrics.num_draft_tokens += scheduled.num_spec_tokens
                # The last sampled token was no draft token, but it may have been cut off.
                metrics.num_accepted_tokens += min(num_new, max(0, num_sampled - 1))

    def observe_end(self, output) -> None:
        """Count a request that has finished. output: its RequestOutput."""
        self.num_finished += 1
        self.num_prompt_tokens += len(output.prompt_token_ids)
        self.num_cached_tokens += output.metrics.num_cached_tokens

    @property
    def tokens_per_second(self) -> float:
        """Output tokens per second."""
        return self.num_output_tokens / self.seconds if self.seconds else 0.0

    @property
    def pool_utilisation(self) -> float:
        """The share of the pool's slots that was held, on average over the steps."""
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
        """The share of verified draft tokens that became output."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0
