"""Lesson 8: speculative decoding. Guess the next tokens cheaply, verify all in one pass, keep those that are right.

A decoding step of one stream reads every weight to compute one row. With guesses behind the newest token it computes a
few rows with the same read, and each row says what comes after its token: as long as that is the next guess, several
tokens have come of one step. A wrong guess costs its row and nothing else. What is kept is what would have been
generated anyway, token for token where guesses are only compared, in distribution where they are drawn.

    propose_ngram       guesses from the text itself: what came after these words before?
    DraftProposer       guesses from a smaller model, with blocks of its own under the same ids
    rejection_sample    keeps drawn guesses such that the outcome is distributed as the model says
    Pace                how many guesses are worth making, measured while it runs; none, where it does not pay
    SpeculativeRunner   lesson 5's runner, which verifies where it would sample, and proposes after it

In the engine rollback needs no code: the scheduler moves `num_computed_tokens` back (lesson 5), and what lies behind it
is not read.

From Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (2023), and Chen et al.,
"Accelerating Large Language Model Decoding with Speculative Sampling" (2023); Saxena, "Prompt Lookup Decoding" (2023).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from common.tokenizer import Tokenizer
from solutions import llama_pytorch
from solutions.batching import ModelRunner, flatten_batch
from solutions.kv_cache import KVCache, prefill
from solutions.llama_pytorch import (
    Llama,
    RequestOutput,
    SamplingParams,
    adjust_logits,
    draw_generator,
    sample,
    sampling_probs,
    stable_hash,
)
from solutions.paged_attention import PagedKVCache
from solutions.scheduler import ModelRunnerOutput, ScheduledRequest, SchedulerOutput

# ---------------------------------------------------------------------------------------------------------------
# Guesses for nothing, and what becomes of them
# ---------------------------------------------------------------------------------------------------------------

MAX_NGRAM, MIN_NGRAM = 4, 2
"""The most and the fewest tokens at the end of a text that are looked up in it."""


def propose_ngram(
    token_ids: Sequence[int], num_tokens: int, max_ngram: int = MAX_NGRAM, min_ngram: int = MIN_NGRAM
) -> list[int]:
    """Guess the next `num_tokens` tokens: what followed when the text last ended as it ends now.

    The last `max_ngram` tokens are looked for earlier in the text, then fewer, down to `min_ngram`; of several places
    the latest counts. What followed there is copied, and the copy may run into itself: after a b a b, the guess is
    a b a b a ... Returns `num_tokens` tokens, or none if the text has never ended so.
    """
    # Exercise 8.1: from the longest n-gram to the shortest; from the latest place to the first; then copy.
    text = list(token_ids)
    ends = [i for i in range(1, len(text)) if text[i - 1] == text[-1]]  # places behind the same token
    for n in range(min(max_ngram, len(text) - 1), min_ngram - 1, -1):
        for end in reversed(ends):
            if text[max(0, end - n) : end] == text[-n:]:
                for source in range(end, end + num_tokens):
                    text.append(text[source])
                return text[len(token_ids) :]
    return []


def verify_greedy(chosen: Iterable[int], guesses: Sequence[int]) -> list[int]:
    """What comes of a pass over guesses: the tokens that the model has chosen, up to the first that was not guessed.

    chosen: what the model chooses after the newest token, after the first guess, after the second, ...: one more than
    there are guesses; it is asked only as far as needed. A choice behind a wrong guess was made after tokens that are
    not in the text, and says nothing. Returns 1 to len(guesses) + 1 tokens, all of them the model's own.
    """
    # Exercise 8.2: take each choice; go on to the next only if it is what was guessed.
    tokens = []
    for token_id, guess in zip(chosen, [*guesses, None]):
        tokens.append(token_id)
        if token_id != guess:
            break
    return tokens


# ---------------------------------------------------------------------------------------------------------------
# One sequence
# ---------------------------------------------------------------------------------------------------------------


class Lookahead:
    """Answers lesson 2's loop, which asks what comes after these tokens, from rows that were computed for guesses.

    The loop does not know. It chooses a token by its own rules; if that was guessed, the row behind it is there.
    """

    def __init__(self, model: Llama, capacity: int, propose: Callable[[Sequence[int]], list[int]]):
        self.model = model
        self.propose = propose
        self.cache = KVCache(model, capacity)
        self.cached_token_ids: list[int] = []  # what stands in the cache: the text, and guesses behind it
        self.rows: dict[int, Tensor] = {}  # after so many of them: the logits (V,) of what comes next
        self.num_passes = 0

    def commit(self, token_ids: Sequence[int]) -> Tensor | None:
        """The text has become one token longer. Returns the logits (V,) of what comes after it, if they are there.

        They are if the new token is what was guessed. If it is not, or if there was no guess for it, the result is
        None, and the cache holds the text without its new token: rejected guesses are taken back. On the first call
        the text is the prompt, and the cache is empty.
        """
        # Exercise 8.6: compare the text with as much of `cached_token_ids`; take back both these and the cache.
        if self.cached_token_ids[: len(token_ids)] == list(token_ids):
            return self.rows[len(token_ids)]
        kept = min(len(self.cached_token_ids), len(token_ids) - 1)
        self.cached_token_ids = self.cached_token_ids[:kept]
        self.cache.truncate(kept)
        return None

    def next_logits(self, token_ids: Sequence[int]) -> Tensor:
        """The logits (V,) of what comes after these tokens; where they must be computed, guesses are computed too."""
        row = self.commit(token_ids)
        if row is not None:
            return row
        if len(token_ids) - self.cache.num_tokens > 1:
            prefill(self.model, self.cache, token_ids[self.cache.num_tokens : -1])
        guesses = self.propose(token_ids)[: self.cache.keys.shape[2] - len(token_ids)]
        self.cached_token_ids = [*token_ids, *guesses]
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
    """What lesson 2's `generate` gives, token for token, in fewer passes wherever the text repeats itself."""
    llama_pytorch.check_prompt(prompt_token_ids, model.config, params)
    capacity = min(len(prompt_token_ids) + params.max_tokens, model.config.max_position_embeddings)
    lookahead = Lookahead(model, capacity, partial(propose_ngram, num_tokens=num_speculative_tokens))
    return llama_pytorch.generate(model, tokenizer, prompt_token_ids, params, on_text, lookahead.next_logits)


# ---------------------------------------------------------------------------------------------------------------
# Guesses that were drawn
# ---------------------------------------------------------------------------------------------------------------


class Proposal(NamedTuple):
    """Guesses for one request."""

    token_ids: list[int]
    probs: Tensor | None = None  # (k, V), what each was drawn from; None: they were not drawn


def accept_or_recover(target: Tensor, draft: Tensor, token_id: int, generator: torch.Generator) -> tuple[bool, int]:
    """Keep a token that was drawn from `draft`, or draw another, so that the outcome is distributed as `target`.

    target, draft: (V,), probabilities. The token is kept with probability target / draft, or surely where the target
    likes it better. What is missing then, of each token, is by how much the target likes it better than the draft:
    that is what the other one is drawn from. Rounding may leave nothing missing: then, too, a token must come that the
    target may say. Returns whether it was kept, and the token.
    """
    # Exercise 8.3: `torch.rand` first; then, if it was not kept, `torch.multinomial`, both with this generator.
    chance = float(torch.rand((), generator=generator, dtype=torch.float64))
    if chance * float(draft[token_id]) < float(target[token_id]):
        return True, token_id
    missing = (target - draft).clamp(min=0)
    weights = missing if missing.sum() > 0 else target  # alike but for rounding
    return False, int(torch.multinomial(weights, 1, generator=generator))


def rejection_sample(target: Tensor, proposal: Proposal, generator: Callable[[int], torch.Generator]) -> list[int]:
    """Tokens that are distributed as if each were drawn from the target, made of guesses drawn from a draft.

    target: (k + 1, V), the model's probabilities after the newest token and after each guess. proposal: k guesses, with
    the probabilities (k, V) that they were drawn from. generator(i): the randomness for the i-th token. The first guess
    that is not kept is replaced, and ends the run; if all are kept, one more token is drawn: the bonus. Returns 1 to
    k + 1 tokens. From Leviathan et al. (2023) and Chen et al. (2023).
    """
    # Exercise 8.4: a chain of `accept_or_recover`, and its end.
    tokens = []
    for i, guess in enumerate(proposal.token_ids):
        is_kept, token_id = accept_or_recover(target[i], proposal.probs[i], guess, generator(i))
        tokens.append(token_id)
        if not is_kept:
            return tokens
    last = len(proposal.token_ids)
    return [*tokens, int(torch.multinomial(target[last], 1, generator=generator(last)))]


# ---------------------------------------------------------------------------------------------------------------
# Does it pay?
# ---------------------------------------------------------------------------------------------------------------


def expected_tokens(rate: float, num_guesses: int) -> float:
    """How many tokens a pass over so many guesses brings, on average. rate: how likely a guess is right, if all before
    it in its run were; between 0 and 1.

    The one token that every pass brings is counted. From Leviathan et al. (2023), equation 1.
    """
    # Exercise 8.7: with which probability are the first i guesses right, all of them?
    return sum(rate**i for i in range(num_guesses + 1))


def choose_k(rate: float, seconds: Sequence[float]) -> int:
    """How many guesses to make. seconds[k]: what a step with k guesses takes, making them included. rate: as above.

    Returns the k that brings the most tokens a second; of equals the smallest. 0: speculation does not pay.
    """
    # Exercise 8.8: `expected_tokens` over time, for each k there is.
    return max(range(len(seconds)), key=lambda k: expected_tokens(rate, k) / seconds[k])


MEMORY = 0.9
"""How much of what was seen of guesses is still counted, one guess later: about the last ten count."""


@dataclass
class Acceptance:
    """How likely a guess is right, if all before it in its run were. It begins with an opinion, worth two guesses."""

    right: float = 1.0
    tried: float = 2.0

    @property
    def rate(self) -> float:
        return self.right / self.tried

    def observe(self, num_guesses: int, num_accepted: int) -> None:
        """So many guesses were made in a run, and the first so many of them were right. Newer ones weigh more: each
        guess that is counted takes the weight of all runs before down by `MEMORY`.
        """
        # Exercise 8.11: find the bug. With up to five guesses a step, each right three times in four, the engine takes
        # guesses for right only about every second time, and makes too few. With one guess a step all is well.

        tried = num_accepted + (num_accepted < num_guesses)  # what lies behind a wrong guess was not tried
        kept = MEMORY**tried
        self.right = self.right * kept + num_accepted
        self.tried = self.tried * kept + tried


class StepTimes:
    """What a step takes, as a fixed part and a part for each row, fitted to the steps so far; newer ones weigh more."""

    FORGETTING = 0.95  # a step's weight, one step later
    ROW_SHARE = 0.05  # what a row is believed to take of the fixed part, until steps have shown it

    def __init__(self):
        # Sums over the steps. The first, of hardly any weight, is made up: a row in a second.
        self.weight = self.rows = self.seconds = self.rows_rows = self.rows_seconds = 1e-15

    def observe(self, num_rows: int, seconds: float) -> None:
        terms = {"weight": 1, "rows": num_rows, "seconds": seconds}
        terms |= {"rows_rows": num_rows**2, "rows_seconds": num_rows * seconds}
        for name, term in terms.items():
            setattr(self, name, getattr(self, name) * self.FORGETTING + term)

    def __call__(self, num_rows: float) -> float:
        """Seconds that a step of so many rows is going to take."""
        mean_rows, mean_seconds = self.rows / self.weight, self.seconds / self.weight
        believed = mean_seconds * self.ROW_SHARE / (1 + self.ROW_SHARE * mean_rows)
        spread = self.rows_rows - self.rows * mean_rows
        shown = self.rows_seconds - self.seconds * mean_rows
        # As if one step, one row off the mean, had shown `believed`.
        slope = max(0.0, (shown + believed) / (spread + 1))
        # Never less than one row takes, however few there are.
        return max(mean_seconds + slope * (num_rows - mean_rows), slope)


class Pace:
    """Decides how many guesses each request makes, from what became of those before and from what steps took.

    A request for which no number pays makes none. Every `PROBE_EVERY` steps all of these make two, in the same step, to
    see whether that has changed.
    """

    PROBE_EVERY = 16
    PROBE_TOKENS = 2

    def __init__(self, num_speculative_tokens: int, is_adaptive: bool = True):
        self.num_speculative_tokens = num_speculative_tokens
        self.is_adaptive = is_adaptive
        self.overall = Acceptance()
        self.acceptances: dict[str, Acceptance] = {}
        self.coverage = 1.0  # of the requests that may guess, the share that has a guess; newer steps weigh more
        self.step_seconds, self.draft_seconds = StepTimes(), StepTimes()
        self.num_steps = 0

    def observe(self, request_id: str, num_guesses: int, num_accepted: int) -> None:
        """What became of a request's guesses."""
        self.overall.observe(num_guesses, num_accepted)
        self.of(request_id).observe(num_guesses, num_accepted)

    def of(self, request_id: str) -> Acceptance:
        """A request's own; a new one begins with what the others have shown."""
        rate = self.overall.rate
        return self.acceptances.setdefault(request_id, Acceptance(2 * rate, 2))

    def forget(self, request_id: str) -> None:
        self.acceptances.pop(request_id, None)

    def observe_coverage(self, num_asked: int, num_guessing: int) -> None:
        self.coverage = MEMORY * self.coverage + (1 - MEMORY) * num_guessing / num_asked

    def limits(self, request_ids: Sequence[str], num_rows: int) -> dict[str, int]:
        """How many guesses each of these is to make for its next step, which without guesses has so many rows."""
        self.num_steps += 1
        most = self.num_speculative_tokens
        if not self.is_adaptive:
            return dict.fromkeys(request_ids, most)
        least = min(self.PROBE_TOKENS, most) if self.num_steps % self.PROBE_EVERY == 0 else 0
        seconds = self.seconds(len(request_ids), num_rows)
        return {each: max(least, choose_k(self.of(each).rate, seconds)) for each in request_ids}

    def seconds(self, num_requests: int, num_rows: int) -> list[float]:
        """A request's share of a step, in seconds, for each number of guesses k. The step without guesses is shared by
        all; what k guesses add is shared by those likely to have some, who are all taken to make k.
        """
        num_guessing = max(1.0, self.coverage * num_requests)
        plain = self.step_seconds(num_rows)
        shares = [plain / num_requests]
        for k in range(1, self.num_speculative_tokens + 1):
            more = self.step_seconds(num_rows + k * num_guessing) - plain
            if self.draft_seconds.weight >= 1:  # a draft was timed at least once
                more += self.draft_seconds(k)
            shares.append(shares[0] + more / num_guessing)
        return shares


# ---------------------------------------------------------------------------------------------------------------
# Who guesses
# ---------------------------------------------------------------------------------------------------------------


class Proposer(Protocol):
    """Makes guesses. It sees every step before it is computed, and is asked after it."""

    def follow(self, plan: SchedulerOutput) -> None:
        """A step is about to be computed: blocks move, and some requests are gone."""

    def propose(
        self, scheduled: Sequence[ScheduledRequest], sampled: Mapping[str, list[int]], limits: Mapping[str, int]
    ) -> dict[str, Proposal]:
        """Guesses for requests that have just been given the tokens `sampled`. limits: how many at most for each."""


class NgramProposer:
    """Guesses from each request's own text, prompt and output."""

    def follow(self, plan: SchedulerOutput) -> None:
        pass

    def propose(
        self, scheduled: Sequence[ScheduledRequest], sampled: Mapping[str, list[int]], limits: Mapping[str, int]
    ) -> dict[str, Proposal]:
        return {
            each.request_id: Proposal(propose_ngram(text_of(each, sampled), limits[each.request_id]))
            for each in scheduled
            if limits[each.request_id] > 0
        }


def text_of(each: ScheduledRequest, sampled: Mapping[str, list[int]]) -> list[int]:
    """All tokens of a request, those included that the step has just brought."""
    return [*each.prompt_token_ids, *each.output_token_ids, *sampled[each.request_id]]


class DraftProposer:
    """Guesses from a smaller model with the same vocabulary.

    It keeps its keys and values in a cache of its own, under the block ids of the target: what the scheduler decides
    about blocks is done in both. It is behind the target: the newest tokens, and whatever was computed while it was
    not asked, it computes when it is asked. A prompt that its target found in the prefix cache it reads all the same,
    for nobody promises that a draft has ever read it. Were anything stale all the same, guesses would be bad, and
    tokens would not.
    """

    def __init__(self, model: Llama, cache: PagedKVCache):
        self.model = model
        self.cache = cache
        self.num_computed: dict[str, int] = {}  # of each request's tokens: so many are in the draft's cache

    def follow(self, plan: SchedulerOutput) -> None:
        """Move the draft's blocks too. What a request's target has taken back is taken back here."""
        self.cache.swap_out(plan.swaps_out)
        self.cache.swap_in(plan.swaps_in)
        self.cache.copy(plan.copies)
        for request_id in plan.finished_ids:
            self.num_computed.pop(request_id, None)
        for each in plan.scheduled:
            self.num_computed[each.request_id] = min(self.num_computed.get(each.request_id, 0), each.start)

    def propose(
        self, scheduled: Sequence[ScheduledRequest], sampled: Mapping[str, list[int]], limits: Mapping[str, int]
    ) -> dict[str, Proposal]:
        """Let the draft model continue each request by up to `limits` tokens, all requests together in each pass.

        In the first pass a request computes all that the draft lacks of it, in each later one its newest guess. The
        last guess is never computed. Returns a proposal for each request with a limit above 0.
        """
        # Exercise 8.5: pass after pass, as long as anybody lacks guesses: `logits` of what is not computed, and `draw`
        # from each row. Note in `num_computed` what is; stay within `room`.
        texts = {each.request_id: text_of(each, sampled) for each in scheduled}
        limits = {
            id: min(limits[id], self.room(each, len(texts[id]))) for each in scheduled for id in [each.request_id]
        }
        going = [each for each in scheduled if limits[each.request_id] > 0]
        guesses: dict[str, list[int]] = {each.request_id: [] for each in going}
        probs: dict[str, list[Tensor]] = {each.request_id: [] for each in going}
        while going:
            lacking = [texts[each.request_id][self.num_computed[each.request_id] :] for each in going]
            for each, row in zip(going, self.logits(going, lacking)):
                id = each.request_id
                self.num_computed[id] = len(texts[id])
                token_id, drawn_from = self.draw(each, row, sampled[id] + guesses[id])
                guesses[id].append(token_id)
                texts[id].append(token_id)
                probs[id] += [] if drawn_from is None else [drawn_from]
            going = [each for each in going if len(guesses[each.request_id]) < limits[each.request_id]]
        return {id: Proposal(guesses[id], torch.stack(probs[id]) if probs[id] else None) for id in guesses}

    def room(self, each: ScheduledRequest, num_tokens: int) -> int:
        """How many guesses there are slots for behind so many tokens, and positions that the draft knows."""
        slots = len(each.block_table) * self.cache.block_size
        return min(slots, self.model.config.max_position_embeddings) - num_tokens + 1

    def logits(self, requests: Sequence[ScheduledRequest], new_token_ids: Sequence[list[int]]) -> Tensor:
        """Compute tokens that follow those in the draft's cache. Returns the logits (R, V) of what comes after each."""
        work = [
            replace(each, start=self.num_computed[each.request_id], token_ids=token_ids, num_spec_tokens=0)
            for each, token_ids in zip(requests, new_token_ids)
        ]
        batch = flatten_batch(work, self.cache.block_size, self.cache.keys.device)
        hidden = self.model(batch.token_ids, batch.positions, self.cache.attend(batch.metadata))
        return self.model.logits(hidden[batch.logit_rows])

    def draw(self, each: ScheduledRequest, logits: Tensor, new_token_ids: list[int]) -> tuple[int, Tensor | None]:
        """A guess, by the request's own rules, and what it was drawn from (V,); None: it was not drawn.

        new_token_ids: what has come since `output_token_ids`, the tokens just sampled and the guesses behind them. Its
        randomness is not that of its verification, and depends on the seed and the place alone.
        """
        output = [*each.output_token_ids, *new_token_ids]
        adjusted = adjust_logits(logits, each.params, each.prompt_token_ids, output, each.stop_token_ids)
        if each.params.temperature == 0:
            return int(adjusted.argmax()), None
        probs = sampling_probs(adjusted, each.params).cpu()
        seed = None if each.params.seed is None else stable_hash(each.params.seed, DRAFT)
        return int(torch.multinomial(probs, 1, generator=draw_generator(seed, len(output)))), probs


DRAFT = -1
"""Tells a draft's seed from those of samples and their siblings."""


# ---------------------------------------------------------------------------------------------------------------
# In the engine
# ---------------------------------------------------------------------------------------------------------------


class SpeculativeRunner(ModelRunner):
    """Lesson 5's runner, on the rank that samples: it verifies the guesses of a step, and makes those for the next."""

    def __init__(self, model: Llama, cache: PagedKVCache, proposer: Proposer, pace: Pace):
        super().__init__(model, cache)
        self.proposer = proposer
        self.pace = pace
        self.proposals: dict[str, Proposal] = {}

    @torch.inference_mode()
    def execute(self, plan: SchedulerOutput, hidden: Tensor | None = None) -> ModelRunnerOutput:
        for request_id in plan.finished_ids:
            self.proposals.pop(request_id, None)
            self.pace.forget(request_id)
        self.proposer.follow(plan)
        start = time.perf_counter()
        output = super().execute(plan, hidden)
        if plan.scheduled and all(is_decoding(each) for each in plan.scheduled):
            self.pace.step_seconds.observe(plan.num_tokens, time.perf_counter() - start)
        self.propose(plan, output)
        return output

    def choose(self, each: ScheduledRequest, logits: Tensor) -> list[int]:
        """Verify a request's guesses. logits: (k + 1, V); returns 1 to k + 1 tokens."""
        tokens = self.verify(each, logits)
        if each.num_spec_tokens:
            self.pace.observe(each.request_id, each.num_spec_tokens, len(tokens) - 1)
        return tokens

    def verify(self, each: ScheduledRequest, logits: Tensor) -> list[int]:
        """The tokens that guesses and rows agree upon, and one more.

        Each row is adjusted as if the guesses before it were in the text: where one is not, nobody asks for the row.
        """
        guesses = each.token_ids[len(each.token_ids) - each.num_spec_tokens :]

        def adjusted(i: int) -> Tensor:
            output = each.output_token_ids + guesses[:i]
            return adjust_logits(logits[i], each.params, each.prompt_token_ids, output, each.stop_token_ids)

        proposed, probs = self.proposals.pop(each.request_id, Proposal([]))
        if guesses and probs is not None and proposed[: len(guesses)] == guesses:
            target = torch.stack([sampling_probs(adjusted(i), each.params) for i in range(len(logits))]).cpu()
            drawn = Proposal(guesses, probs)
            return rejection_sample(target, drawn, lambda i: draw_generator(each.params.seed, each.sample_index + i))
        # A guess that was not drawn is right if it is what is sampled anyway, at any temperature.
        chosen = (sample(adjusted(i), each.params, each.sample_index + i) for i in range(len(logits)))
        return verify_greedy(chosen, guesses)

    def propose(self, plan: SchedulerOutput, output: ModelRunnerOutput) -> None:
        """Guesses for all that go on after this step."""
        sampled = output.sampled_token_ids
        left = {
            each.request_id: each.max_tokens - each.sample_index - len(sampled[each.request_id])
            for each in plan.scheduled
            if each.request_id in sampled and not each.stop_token_ids.intersection(sampled[each.request_id])
        }
        going = [each for each in plan.scheduled if left.get(each.request_id, 0) > 1]  # the last token needs no guess
        if not going:
            return
        num_rows = plan.num_tokens - sum(each.num_spec_tokens for each in plan.scheduled)
        limits = self.pace.limits([each.request_id for each in going], num_rows)
        limits = {id: min(limit, left[id] - 1) for id, limit in limits.items()}
        start = time.perf_counter()
        proposals = self.proposer.propose(going, sampled, limits)
        longest, num_asked = max(limits.values()), sum(limit > 0 for limit in limits.values())
        if num_asked:
            self.pace.observe_coverage(num_asked, sum(bool(each.token_ids) for each in proposals.values()))
        if longest and all(is_decoding(each) for each in going):  # a draft that reads a prompt takes longer
            self.pace.draft_seconds.observe(longest, time.perf_counter() - start)
        self.proposals |= proposals
        output.spec_token_ids = {id: proposal.token_ids for id, proposal in proposals.items() if proposal.token_ids}


def is_decoding(each: ScheduledRequest) -> bool:
    """Whether it computes its newest token and guesses, and nothing of a prompt."""
    return len(each.token_ids) == each.num_spec_tokens + 1
