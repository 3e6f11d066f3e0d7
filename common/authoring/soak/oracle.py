"""What an engine should have said: lesson 2's `generate` says it of each request alone."""

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
    """What a request's answer is when it is alone: lesson 2's `generate`, each question asked once.

    cache: the kind of cache through which attention reads what it wrote, if that changes the numbers. All tokens are
    computed anew for each next one, whatever the cache: nothing is remembered from step to step.
    """

    def __init__(self, model: Llama, tokenizer, cache: type[PagedKVCache] | None = None):
        self.model, self.tokenizer, self.cache = model, tokenizer, cache
        self.answers: dict = {}

    def __call__(
        self, prompt: list[int], params: SamplingParams, told: Sequence[int] = ()
    ) -> llama_pytorch.RequestOutput:
        """The answer. told: what it may be. As far as it is, one pass of the model gives the logits of all its tokens;
        from the first token that differs, each takes a pass of its own."""
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
        """Logits (T, V) of what comes after each token, and the one block that holds all their keys and values."""
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
    """The same tokens in the same order, the chosen one first, and their log-probabilities."""
    assert [list(each) for each in told] == [list(each) for each in expected]
    for one, other in zip(told, expected):
        assert all(math.isclose(one[token_id], other[token_id], abs_tol=1e-6) for token_id in one)


def compare(output: RequestOutput, alone: llama_pytorch.RequestOutput, may_be_cut: bool) -> None:
    """The same tokens, text, reason and log-probabilities; of an aborted one, the beginning."""
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
    """A request with a fault of its own ends with a sentence, after the tokens before the fault at the latest."""
    assert output.finish_reason == "error" and len(output.token_ids) <= fault.after
    assert ("a fault" if fault.what == "raises" else "logits_processors") in output.error, output.error


def place_of(token: int, probs: Tensor, draft: Tensor, rng: random.Random) -> float:
    """Where on a line from 0 to 1 a drawn token lies, if each token takes its probability's length of it; within its
    own length anywhere. probs, draft: (V,).

    Of tokens that were drawn from what they should be drawn from, the places are spread evenly, whatever the
    distributions were and however the line is ordered. Here those come first that the draft likes least, as measured by
    what they should be: whatever favours its draft tokens shifts the places to the end.
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
    """What can be said of tokens that were drawn with a draft's help: they are others than without, and as likely.

    Each can have been drawn where it stands; text and reason follow from them; log-probabilities are the model's.
    Returns the tokens' places.
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
    """How likely places that are spread evenly look as uneven as these: Pearson's chi-squared test."""
    counts = torch.histc(torch.tensor(places, dtype=torch.float64), num_bins, 0.0, 1.0)
    expected = len(places) / num_bins
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((num_bins - 1) / 2, dtype=torch.float64), statistic / 2))
