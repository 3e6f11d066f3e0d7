"""The expected answer of an engine to each request: that of lesson 2's `generate` to the request alone."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from common.authoring.soak.requests import MAX_MODEL_LEN, Fault
from solutions import llama_pytorch
from solutions.batching import RequestOutput
from solutions.llama_pytorch import Llama, SamplingParams, adjust_logits, causal_attend, sampling_probs, top_logprobs
from solutions.paged_attention import AttentionMetadata, PagedKVCache


class Oracle:
    """Lesson 2's `generate`, with each answer computed once.

    cache: the kind of cache that attention writes to and reads from, if that changes the numbers. All tokens are
    recomputed for each next one, with any kind: nothing is kept from step to step.
    """

    def __init__(self, model: Llama, tokenizer, cache: type[PagedKVCache] | None = None):
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self.answers: dict = {}

    def __call__(
        self, prompt: list[int], params: SamplingParams, told: Sequence[int] = ()
    ) -> llama_pytorch.RequestOutput:
        """Return the answer. told: the engine's answer, as a guide: one pass of the model gives the logits of all its
        tokens. From the first token that differs, each token takes a pass of its own.
        """
        params = clipped(prompt, params)
        key = (tuple(prompt), params)
        if key not in self.answers:
            supposed = [*prompt, *told[:-1]]
            known = self.rows(supposed) if told else []

            def next_logits(token_ids: Sequence[int]) -> Tensor:
                num_tokens = len(token_ids)
                if num_tokens <= len(known) and supposed[:num_tokens] == list(token_ids):
                    return known[num_tokens - 1]
                return self.rows(token_ids)[-1]

            self.answers[key] = llama_pytorch.generate(
                self.model, self.tokenizer, prompt, params, next_logits=next_logits
            )
        return self.answers[key]

    def compute(self, token_ids: Sequence[int], kind: type[PagedKVCache] | None) -> tuple[Tensor, PagedKVCache | None]:
        """Return the logits (T, V) after each token, and the cache, whose only block holds all keys and values."""
        num_tokens, cache, attend = len(token_ids), None, causal_attend
        if kind is not None:
            cache = kind(self.model, 1, num_tokens)
            attend = cache.attend(AttentionMetadata([0, num_tokens], [num_tokens], torch.arange(num_tokens), [[0]]))
        hidden = self.model(torch.tensor(token_ids), torch.arange(num_tokens), attend)
        return self.model.logits(hidden), cache

    @torch.inference_mode()
    def rows(self, token_ids: Sequence[int]) -> Tensor:
        return self.compute(token_ids, self.cache)[0]

    @torch.inference_mode()
    def block(self, token_ids: Sequence[int]) -> PagedKVCache:
        """All keys and values of a text, in one block."""
        return self.compute(token_ids, self.cache or PagedKVCache)[1]


def clipped(prompt: Sequence[int], params: SamplingParams) -> SamplingParams:
    """Return the parameters as an engine uses them: `max_tokens` is at most what fits into the context."""
    most = min(params.max_tokens, MAX_MODEL_LEN - len(prompt))
    return replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most))


def check_logprobs(told: Sequence[Mapping[int, float]], expected: Sequence[Mapping[int, float]]) -> None:
    """Assert the same tokens in the same order, the chosen one first, with the same log-probabilities."""
    assert [list(each) for each in told] == [list(each) for each in expected]
    for one, other in zip(told, expected):
        assert all(math.isclose(one[token_id], other[token_id], abs_tol=1e-6) for token_id in one)


def compare(output: RequestOutput, alone: llama_pytorch.RequestOutput, may_be_cut: bool) -> None:
    """Assert the same tokens, text, finish reason and log-probabilities; those of an aborted answer are a beginning."""
    assert output.error is None, output.error
    check_logprobs(output.logprobs, alone.logprobs[: len(output.token_ids)])
    if output.finish_reason == "abort":
        assert may_be_cut
        assert alone.token_ids[: len(output.token_ids)] == output.token_ids
        return
    told = (output.token_ids, output.text, output.finish_reason)
    expected = (alone.token_ids, alone.text, alone.finish_reason)
    assert told == expected, f"{output.request_id}: {told}, alone {expected}"


def check_failed(output: RequestOutput, fault: Fault) -> None:
    """Assert that a request with a fault of its own ended with an error, with at most the tokens before the fault."""
    assert output.finish_reason == "error" and len(output.token_ids) <= fault.after
    assert ("a fault" if fault.what == "raises" else "logits_processors") in output.error, output.error


def place_of(token: int, probs: Tensor, draft: Tensor, rng: random.Random) -> float:
    """Return a random number within the token's interval, if the tokens divide the line from 0 to 1 into intervals
    as long as their probabilities. probs: (V,), what the token should be drawn from. draft: (V,), the draft's.

    If all tokens were drawn from the right distributions, these numbers are uniform, whatever the distributions and the
    order of the intervals. They are ordered by draft over target probability, so an engine that prefers draft tokens
    gives numbers that are too large.
    """
    assert probs[token] > 0, f"token {token} cannot have been drawn here"
    order = probs if draft is probs else probs / (draft + 1e-12)
    return float(probs[order > order[token]].sum()) + rng.random() * float(probs[token])


def judge(
    output: RequestOutput,
    oracle: Oracle,
    prompt: list[int],
    params: SamplingParams,
    may_be_cut: bool,
    rng: random.Random,
    draft: Llama | None,
) -> list[float]:
    """Check tokens that were sampled with a draft model, which differ from those sampled without.

    Asserts that each has a probability above 0, that text and finish reason follow from the tokens, and that the
    log-probabilities are the model's. Returns the result of `place_of` for each token.
    """
    assert output.error is None, output.error
    tokens, params = output.token_ids, clipped(prompt, params)
    was_cut = output.finish_reason == "abort"
    assert may_be_cut or not was_cut
    if not tokens:
        return []

    def retold(token_ids: Sequence[int]) -> Tensor:
        assert len(token_ids) - len(prompt) < len(tokens), "it ended where it goes on"
        return torch.nn.functional.one_hot(torch.tensor(tokens[len(token_ids) - len(prompt)]), rows.shape[-1]).double()

    rows = oracle.rows([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
    max_tokens = len(tokens) if was_cut else params.max_tokens
    plain = SamplingParams(
        max_tokens=max_tokens, min_tokens=min(params.min_tokens, max_tokens),  # before which no stop string ends it
        stop=params.stop, stop_token_ids=params.stop_token_ids, ignore_eos=params.ignore_eos,
    )  # fmt: skip
    again = llama_pytorch.generate(oracle.model, oracle.tokenizer, prompt, plain, next_logits=retold)
    reason = output.finish_reason if was_cut else again.finish_reason
    assert (tokens, output.text, output.finish_reason) == (again.token_ids, again.text, reason)
    if params.logprobs is None:
        assert not output.logprobs
    else:
        expected = [top_logprobs(row, token, params.logprobs) for row, token in zip(rows, tokens)]
        check_logprobs(output.logprobs, expected)
    stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else oracle.tokenizer.eos_token_ids)}

    def probs(rows: Tensor) -> list[Tensor]:
        adjusted = [adjust_logits(row, params, prompt, tokens[:i], stop_ids) for i, row in enumerate(rows)]
        return [sampling_probs(row, params) for row in adjusted]

    ours = probs(rows)
    theirs = ours if draft is None else probs(Oracle(draft, None).rows([*prompt, *tokens[:-1]])[len(prompt) - 1 :])
    return [place_of(token, one, other, rng) for token, one, other in zip(tokens, ours, theirs)]


def evenness(places: Sequence[float], num_bins: int = 20) -> float:
    """The probability that uniform numbers are at least as uneven as these, by Pearson's chi-squared test."""
    counts = torch.histc(torch.tensor(places, dtype=torch.float64), num_bins, 0.0, 1.0)
    expected = len(places) / num_bins
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((num_bins - 1) / 2, dtype=torch.float64), statistic / 2))
