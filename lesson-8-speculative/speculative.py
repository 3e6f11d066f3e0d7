"""Lesson 8: speculative decoding. Propose draft tokens cheaply, verify all of them in one step, keep the right ones.

A decoding step of one request reads every weight to compute one token. With draft tokens after the newest token, the
same read computes several positions, and the logits of each say which token comes after it. As long as that is the next
draft token, one step generates several tokens; a rejected draft token only costs the computation of its position. If
draft tokens are compared, the output has the same tokens; if they were sampled, it has the same distribution.

Draft tokens come from the text itself (`propose_ngram`) or from a smaller model (`DraftProposer`). `SpeculativeRunner`
is lesson 5's runner; it verifies where lesson 5 samples, and then proposes as many as `AdaptiveSpeculation` says.
Rejecting needs no code here: the scheduler moves `num_computed_tokens` back, and attention reads nothing beyond it.

From Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), and Chen et al.,
"Accelerating Large Language Model Decoding with Speculative Sampling" (2023); Saxena, "Prompt Lookup Decoding" (2023).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from common import kernels
from common.tokenizer import Tokenizer
from solutions import llama_pytorch
from solutions.batching import ModelRunner, flatten_batch
from solutions.kv_cache import KVCache, prefill
from solutions.llama_pytorch import Llama, RequestOutput, SamplingParams, adjust_logits, sample, sampling_probs
from solutions.paged_attention import PagedKVCache
from solutions.scheduler import ModelRunnerOutput, ScheduledRequest, SchedulerOutput

# --- Draft tokens from the text, and their verification ---------------------------------------------------------------


def propose_ngram(token_ids: Sequence[int], num_tokens: int, max_ngram: int = 4, min_ngram: int = 2) -> list[int]:
    """Propose `num_tokens` draft tokens: what followed an earlier place where the text reads as it does at its end.

    Look for the last `max_ngram` tokens earlier in the text, then for fewer, down to `min_ngram`; of several matches
    use the latest. Copy the tokens after the match. The copy may continue into the tokens that it has just written:
    after a b a b, the draft is a b a b a ... Returns `num_tokens` token ids, or an empty list if there is no match.
    """
    # TODO 8.1: search from the longest n-gram to the shortest and from the latest match to the earliest; then copy.
    raise NotImplementedError("TODO 8.1")


def verify_greedy(chosen: Iterable[int], draft_token_ids: Sequence[int]) -> list[int]:
    """Return the tokens that one step generates: the model's choices up to the first that differs from its draft token.

    chosen: the model's choice after the newest token, after the first draft token, after the second, and so on, one
    more than there are draft tokens. Each choice takes time, so do not consume more than are needed. A choice after a
    wrong draft token was made for another text. Returns 1 to len(draft_token_ids) + 1 of the choices.
    """
    # TODO 8.2: append each choice, and continue only while it equals its draft token.
    raise NotImplementedError("TODO 8.2")


# --- One sequence -----------------------------------------------------------------------------------------------------


class Lookahead:
    """Serves `next_logits` of lesson 2's loop, which is unchanged, from logits that were computed for draft tokens."""

    def __init__(self, model: Llama, capacity: int, propose: Callable[[Sequence[int]], list[int]]):
        self.model, self.propose = model, propose
        self.cache = KVCache(model, capacity)
        self.cached_token_ids: list[int] = []  # the tokens in the cache: the text, then draft tokens
        self.rows: dict[int, Tensor] = {}  # length of a text -> logits (V,) of its next token
        self.num_passes = 0

    def commit(self, token_ids: Sequence[int]) -> Tensor | None:
        """Return the logits (V,) after this text, which is one token longer than before, if they were computed.

        They were computed if the new token equals its draft token. Otherwise return None and remove the rejected draft
        tokens: the cache then holds the text without its new token. Nothing is removed in the first call, in which the
        text is the prompt and the cache is empty, and nothing if all draft tokens were accepted.
        """
        # TODO 8.3: compare the text with the cached tokens. Truncate `cached_token_ids` and the cache alike.
        raise NotImplementedError("TODO 8.3")

    def next_logits(self, token_ids: Sequence[int]) -> Tensor:
        """Return the logits (V,) after these tokens; a forward pass, if one is needed, includes draft tokens."""
        row = self.commit(token_ids)
        if row is not None:
            return row
        if len(token_ids) - self.cache.num_tokens > 1:
            prefill(self.model, self.cache, token_ids[self.cache.num_tokens : -1])
        draft_token_ids = self.propose(token_ids)[: self.cache.keys.shape[2] - len(token_ids)]
        self.cached_token_ids = [*token_ids, *draft_token_ids]
        positions = torch.arange(len(token_ids) - 1, len(self.cached_token_ids), device=self.cache.keys.device)
        new = torch.tensor(self.cached_token_ids[len(token_ids) - 1 :], device=positions.device)
        logits = self.model.logits(self.model(new, positions, self.cache.attend))
        self.rows = {len(token_ids) + i: row for i, row in enumerate(logits)}
        self.num_passes += 1
        return logits[0]


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    on_text: Callable[[str], None] = lambda piece: None,
    num_speculative_tokens: int = 4,
) -> RequestOutput:
    """Return what lesson 2's `generate` returns, in fewer forward passes where the text repeats itself."""
    capacity = min(len(prompt_token_ids) + params.max_tokens, model.config.max_position_embeddings)
    lookahead = Lookahead(model, capacity, partial(propose_ngram, num_tokens=num_speculative_tokens))
    return llama_pytorch.generate(model, tokenizer, prompt_token_ids, params, on_text, lookahead.next_logits)


# --- Draft tokens that were sampled -----------------------------------------------------------------------------------


def accept_or_recover(target: Tensor, draft: Tensor, token_id: int, generator: torch.Generator) -> tuple[bool, int]:
    """Accept a token that was sampled from `draft`, or replace it, such that the result is distributed as `target`.

    target, draft: (V,), probabilities. Accept the token with probability min(1, target / draft). Sample a replacement
    in proportion to max(0, target - draft), the probability that is missing from each token. If rounding leaves this
    zero for all tokens, sample the replacement from `target`. Returns (whether it was accepted, the token id).
    """
    # TODO 8.4: call `torch.rand` first, and `torch.multinomial` if the token is rejected, both with this generator.
    raise NotImplementedError("TODO 8.4")


def rejection_sample(
    target: Tensor, draft: Tensor, draft_token_ids: Sequence[int], generator: Callable[[int], torch.Generator]
) -> list[int]:
    """Turn draft tokens into tokens that are distributed as if each had been sampled from the target.

    target: (k + 1, V), the model's probabilities after the newest token and after each of the k draft tokens. draft:
    (k, V), the probabilities that these were sampled from. generator(i): the random generator of token i, from 0. The
    first rejected draft token is replaced, and no token follows it. If all are accepted, a bonus token is sampled from
    the last row. Returns 1 to k + 1 token ids.
    """
    # TODO 8.5: call `accept_or_recover` for one draft token after the other, then sample the bonus token.
    raise NotImplementedError("TODO 8.5")


# --- How many draft tokens? -------------------------------------------------------------------------------------------


def expected_tokens(rate: float, num_draft_tokens: int) -> float:
    """Return the mean number of tokens that a step with this number of draft tokens generates, including the one that
    every step generates. rate: the probability, 0 to 1, that a draft token is accepted if all before it were.
    """
    # TODO 8.6: for each i from 0 on, add the probability that the first i draft tokens are all accepted.
    raise NotImplementedError("TODO 8.6")


def choose_k(rate: float, seconds: Sequence[float]) -> int:
    """Return the number k of draft tokens that gives the most tokens per second, the smallest if several are equal.

    rate: as in `expected_tokens`. seconds[k], from k = 0: duration of a step with k draft tokens, including proposing.
    """
    # TODO 8.7: divide `expected_tokens` by the duration, for each k.
    raise NotImplementedError("TODO 8.7")


MEMORY = 0.9  # each observed draft token multiplies older weights by this, so about the last ten count


@dataclass
class Acceptance:
    """Estimates the probability that a draft token is accepted if all before it were. It begins with one of two."""

    accepted: float = 1.0  # both are sums in which newer observations weigh more
    tried: float = 2.0

    @property
    def rate(self) -> float:
        return self.accepted / self.tried

    def observe(self, num_draft_tokens: int, num_accepted: int) -> None:
        """Record that the first `num_accepted` of `num_draft_tokens` draft tokens were accepted. Each draft token that
        counts as tried multiplies the weight of all earlier observations by `MEMORY`.
        """
        # TODO 8.8: find the bug. With up to five draft tokens a step, each accepted three times in four, the rate
        # is estimated as about one half, and too few are proposed. With one draft token a step the rate is right.
        raise NotImplementedError("TODO 8.8")  # take this line out, then find the one mistake below and mend it

        tried = num_draft_tokens
        weight = MEMORY**tried
        self.accepted = self.accepted * weight + num_accepted
        self.tried = self.tried * weight + tried


class AdaptiveSpeculation:
    """Chooses the number of draft tokens of each request, from acceptance and from how long steps take.

    A step without draft tokens takes `plain_seconds`, a moving average for each number of requests; a draft token adds
    `added_seconds / num_added` to it, including the time to propose it. Now and then all requests get no draft tokens,
    or a few although none would pay, to measure both again.
    """

    REST_EVERY = 32  # steps
    PROBE_TOKENS, PROBE_EVERY, PROBE_SHARE = 3, 16, 0.03  # at least 16 steps apart, at most 3 % of the time

    def __init__(self, num_speculative_tokens: int, is_adaptive: bool = True):
        self.num_speculative_tokens = num_speculative_tokens
        self.is_adaptive = is_adaptive
        self.acceptances: dict[str, Acceptance] = defaultdict(Acceptance)  # by request id
        self.plain_seconds: dict[int, float] = {}  # by number of requests
        self.added_seconds = self.num_added = 0.0  # sums in which newer steps weigh more
        self.num_steps = self.steps_since_probe = 0

    def observe_step(self, num_requests: int, num_draft_tokens: int, seconds: float) -> None:
        """Record how long a step of decoding requests has taken, with the time to propose its draft tokens."""
        plain = self.plain_seconds.get(num_requests, seconds)
        if num_draft_tokens == 0:
            self.plain_seconds[num_requests] = 0.8 * plain + 0.2 * seconds
        elif num_requests in self.plain_seconds:
            self.added_seconds = 0.9 * self.added_seconds + seconds - plain
            self.num_added = 0.9 * self.num_added + num_draft_tokens

    def forget(self, request_id: str) -> None:
        self.acceptances.pop(request_id, None)

    def limits(self, request_ids: Sequence[str]) -> list[int]:
        """Return the limits of draft tokens for these requests, which are in one step."""
        num_requests, most = len(request_ids), self.num_speculative_tokens
        plain, probe = self.plain_seconds.get(num_requests), min(self.PROBE_TOKENS, most)
        self.num_steps, self.steps_since_probe = self.num_steps + 1, self.steps_since_probe + 1
        if not self.is_adaptive:
            return [most] * num_requests
        if plain is None or self.num_steps % self.REST_EVERY == 0:
            return [0] * num_requests
        if self.num_added == 0:
            return [probe] * num_requests
        added = max(0.0, self.added_seconds / self.num_added)
        seconds = [plain / num_requests + k * added for k in range(most + 1)]
        interval = max(self.PROBE_EVERY, probe * added / seconds[0] / self.PROBE_SHARE)
        least = probe if self.steps_since_probe >= interval else 0
        self.steps_since_probe = 0 if least else self.steps_since_probe
        rates = [self.acceptances[request_id].rate for request_id in request_ids]
        mean = sum(rates) / num_requests  # a rate from a few tokens is uncertain, so take its average with the mean
        return [max(least, choose_k((rate + mean) / 2, seconds)) for rate in rates]


# --- Proposers --------------------------------------------------------------------------------------------------------


@dataclass
class Draft:
    """A request, and the draft tokens proposed for its next step."""

    request: ScheduledRequest
    token_ids: list[int]  # the request's text, including the tokens just sampled; then its draft tokens
    limit: int  # the greatest number of draft tokens
    draft_token_ids: list[int] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)  # (V,) each was sampled from; empty if they were not sampled

    def append(self, token_id: int, probs: Tensor | None = None) -> None:
        self.token_ids.append(token_id)
        self.draft_token_ids.append(token_id)
        self.probs += [] if probs is None else [probs]


class NgramProposer:
    """Proposes tokens from each request's own text, prompt and output."""

    def follow(self, plan: SchedulerOutput) -> None:
        """Called before a step is computed; there is nothing to update."""

    def propose(self, drafts: Sequence[Draft]) -> None:
        """Append up to `limit` draft tokens to each draft."""
        for draft in drafts:
            for token_id in propose_ngram(draft.token_ids, draft.limit):
                draft.append(token_id)


DRAFT_SEED = -1
"""Mixed into a request's seed, so that a draft token and its verification never use the same random numbers."""


class DraftProposer:
    """Proposes tokens with a smaller model that has the target's vocabulary.

    Its cache has the target's block ids: every copy and swap of the scheduler happens in both. The draft model computes
    a request's tokens when it proposes for it, including those that the target found in the prefix cache. A wrong entry
    in the draft's cache would only reduce acceptance; the tokens would still be right.
    """

    def __init__(self, model: Llama, cache: PagedKVCache):
        self.model, self.cache = model, cache
        self.num_computed: dict[str, int] = {}  # by request id: how many of its tokens are in the draft's cache

    def follow(self, plan: SchedulerOutput) -> None:
        """Move the draft's blocks as the target's, and forget tokens that the target no longer counts as computed."""
        self.cache.swap_out(plan.swaps_out)
        self.cache.swap_in(plan.swaps_in)
        self.cache.copy(plan.copies)
        for request_id in plan.finished_ids:
            self.num_computed.pop(request_id, None)
        for request in plan.scheduled:
            id = request.request_id
            self.num_computed[id] = min(self.num_computed.get(id, 0), request.start)

    def propose(self, drafts: Sequence[Draft]) -> None:
        """Append draft tokens to each draft: `limit`, or fewer if its blocks or the draft model's context are full.

        Each forward pass adds one token to every draft that still needs one. In the first pass a draft computes all
        tokens that this cache lacks, later only its newest token. Its last token is never computed, and needs no slot.
        """
        # TODO 8.9: lower each limit to what fits. While drafts lack tokens, compute their `logits`, set
        # `num_computed` to the number of tokens in the cache now, and append what `draw` returns for each row.
        raise NotImplementedError("TODO 8.9")

    def logits(self, drafts: Sequence[Draft], new_token_ids: Sequence[list[int]]) -> Tensor:
        """Compute the tokens that follow those in this cache. Returns the logits (R, V) after each draft's last one."""
        work = []
        for draft, token_ids in zip(drafts, new_token_ids):
            start = self.num_computed[draft.request.request_id]
            work.append(replace(draft.request, start=start, token_ids=token_ids, num_spec_tokens=0))
        batch = flatten_batch(work, self.cache.block_size, self.cache.keys.device)
        hidden = self.model(batch.token_ids, batch.positions, kernels.paged(self.cache, batch.metadata))
        return self.model.logits(hidden[batch.logit_rows])

    def draw(self, draft: Draft, logits: Tensor) -> tuple[int, Tensor | None]:
        """Return the next draft token and the distribution (V,) it was sampled from, with the request's own sampling
        parameters; at temperature 0 the likeliest token and None.
        """
        request, params = draft.request, draft.request.params
        output, adjusted = draft.token_ids[len(request.prompt_token_ids) :], logits.nan_to_num()
        try:
            adjusted = adjust_logits(adjusted, params, request.prompt_token_ids, output, request.stop_token_ids)
        except Exception:  # an error of the request: it ends when its token is sampled; here only the draft is worse
            pass
        if params.temperature == 0:
            return int(adjusted.argmax()), None
        probs = sampling_probs(adjusted, params).cpu()
        seed = None if params.seed is None else llama_pytorch.stable_hash(params.seed, DRAFT_SEED)
        return int(torch.multinomial(probs, 1, generator=llama_pytorch.draw_generator(seed, len(output)))), probs


# --- In the engine ----------------------------------------------------------------------------------------------------

Proposer = NgramProposer | DraftProposer


class SpeculativeRunner(ModelRunner):
    """Lesson 5's runner on the rank that samples: verifies the draft tokens of a step, and proposes for the next."""

    def __init__(self, model: Llama, cache: PagedKVCache, proposer: Proposer, adaptive: AdaptiveSpeculation):
        super().__init__(model, cache)
        self.proposer, self.adaptive = proposer, adaptive
        self.drafts: dict[str, Draft] = {}  # by request id, until they are verified
        self.draft_seconds = 0.0  # spent on proposing them

    @torch.inference_mode()
    def execute(self, plan: SchedulerOutput, hidden: Tensor | None = None) -> ModelRunnerOutput:
        for request_id in plan.finished_ids:
            self.drafts.pop(request_id, None)
            self.adaptive.forget(request_id)
        self.proposer.follow(plan)
        is_decoding = all(len(request.token_ids) == request.num_spec_tokens + 1 for request in plan.scheduled)
        start = time.perf_counter()
        output = super().execute(plan, hidden)
        computed = time.perf_counter()
        if plan.scheduled and is_decoding:  # no prompt tokens in this step
            num_draft_tokens = sum(request.num_spec_tokens for request in plan.scheduled)
            self.adaptive.observe_step(len(plan.scheduled), num_draft_tokens, computed - start + self.draft_seconds)
        self.propose(plan, output)
        self.draft_seconds = time.perf_counter() - computed if is_decoding else 0.0
        return output

    def choose(self, request: ScheduledRequest, logits: Tensor) -> list[int]:
        """Verify a request's k draft tokens. logits: (k + 1, V). Returns 1 to k + 1 tokens.

        Row i is adjusted as if the first i draft tokens were output; if one of them is rejected, the row is not used.
        """
        params, k, draft = request.params, request.num_spec_tokens, self.drafts.pop(request.request_id, None)
        draft_token_ids = request.token_ids[len(request.token_ids) - k :]

        def adjusted(i: int) -> Tensor:
            output = request.output_token_ids + draft_token_ids[:i]
            return adjust_logits(logits[i], params, request.prompt_token_ids, output, request.stop_token_ids)

        if k and draft and draft.probs and draft.draft_token_ids[:k] == draft_token_ids:
            target = torch.stack([sampling_probs(adjusted(i), params) for i in range(k + 1)]).cpu()
            generator = lambda i: llama_pytorch.draw_generator(params.seed, request.sample_index + i)  # noqa: E731
            tokens = rejection_sample(target, torch.stack(draft.probs), draft_token_ids, generator)
        else:  # a draft token that was not sampled is right if lesson 2 samples it there, at any temperature
            chosen = (sample(adjusted(i), params, request.sample_index + i) for i in range(k + 1))
            tokens = verify_greedy(chosen, draft_token_ids)
        if k:
            self.adaptive.acceptances[request.request_id].observe(k, len(tokens) - 1)
        return tokens

    def propose(self, plan: SchedulerOutput, output: ModelRunnerOutput) -> None:
        """Add draft tokens to `output` for the requests that continue after this step."""
        drafts = []
        for request in plan.scheduled:
            new = output.sampled_token_ids.get(request.request_id, [])
            num_left = request.max_tokens - len(request.output_token_ids) - len(new) - 1  # the last needs no draft
            if new and num_left > 0 and not request.stop_token_ids.intersection(new):
                text = [*request.prompt_token_ids, *request.output_token_ids, *new]
                drafts.append(Draft(request, text, num_left))
        limits = self.adaptive.limits([draft.request.request_id for draft in drafts]) if drafts else []
        for draft, limit in zip(drafts, limits):
            draft.limit = min(draft.limit, limit)
        drafts = [draft for draft in drafts if draft.limit > 0]
        self.proposer.propose(drafts)
        proposed = {draft.request.request_id: draft for draft in drafts if draft.draft_token_ids}
        self.drafts |= proposed
        output.spec_token_ids = {id: draft.draft_token_ids for id, draft in proposed.items()}
