"""Samples a whole batch on the GPU by lesson 2's rules, with one transfer of token ids at the end.

A sample depends only on the request's seed and on the token's number, as in lesson 2, but the noise is generated on the
GPU. So the same seed gives the same tokens in every batch, but other tokens than on a CPU.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from common.kernels.triton_ops import draw_tokens
from common.sampling import SamplingParams, stable_hash


class Sampling(Protocol):
    """The attributes of lesson 5's `ScheduledRequest` that are used here."""

    request_id: str
    params: SamplingParams
    sample_index: int  # the number of the output token
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    stop_token_ids: frozenset[int]


def draw(requests: Sequence[Sampling], logits: Tensor) -> dict[str, int]:
    """Returns the next tokens by request id. logits: (R, V), a row for each request; they are not changed.

    Requests with logits processors, which are Python functions, are left out, and so are those with a NaN in their row.
    """
    rows = [row for row, request in enumerate(requests) if not request.params.logits_processors]
    requests = [requests[row] for row in rows]
    if not requests:
        return {}
    logits = logits.index_select(0, torch.tensor(rows, device=logits.device)).float()
    penalise(requests, logits)
    forbid_stop_tokens(requests, logits)
    restrict(requests, logits)
    temperatures = torch.tensor([request.params.temperature for request in requests], device=logits.device)
    seeds = torch.tensor([seed_of(request) for request in requests], device=logits.device)
    tokens = draw_tokens(logits, temperatures, seeds).tolist()  # here the CPU waits for the GPU, once
    return {request.request_id: token for request, token in zip(requests, tokens) if token >= 0}


def seed_of(request: Sampling) -> int:
    seed = request.params.seed
    return random.getrandbits(63) if seed is None else stable_hash(seed, request.sample_index)


def column(numbers: list[float], like: Tensor) -> Tensor:
    """The numbers as a column, (n, 1), with dtype and device of `like`."""
    return torch.tensor(numbers, dtype=like.dtype, device=like.device)[:, None]


def count(token_ids: list[list[int]], like: Tensor) -> Tensor:
    """How often each token occurs in each of these lists: (n, V), where like, the logits, has width V."""
    longest, width = max(map(len, token_ids)), like.shape[1]
    table = [ids + [width] * (longest - len(ids)) for ids in token_ids]  # padded with an id that does not exist
    table = torch.tensor(table, dtype=torch.long, device=like.device)
    counts = like.new_zeros(len(token_ids), width + 1)
    return counts.scatter_add_(1, table, torch.ones_like(table, dtype=like.dtype))[:, :width]


def penalise(requests: Sequence[Sampling], logits: Tensor) -> None:
    """Apply the three penalties, in place, to the rows that have any."""

    def has_penalty(params: SamplingParams) -> bool:
        return params.repetition_penalty != 1 or bool(params.presence_penalty or params.frequency_penalty)

    rows = [row for row, request in enumerate(requests) if has_penalty(request.params)]
    if not rows:
        return
    chosen = [requests[row] for row in rows]
    counts = count([request.output_token_ids for request in chosen], logits)
    seen = count([request.prompt_token_ids for request in chosen], logits) + counts > 0
    repetition = column([request.params.repetition_penalty for request in chosen], logits)
    frequency = column([request.params.frequency_penalty for request in chosen], logits)
    presence = column([request.params.presence_penalty for request in chosen], logits)
    scores = logits[rows]
    scores = torch.where(seen, torch.where(scores > 0, scores / repetition, scores * repetition), scores)
    logits[rows] = scores - frequency * counts - presence * (counts > 0)


def forbid_stop_tokens(requests: Sequence[Sampling], logits: Tensor) -> None:
    """Set the logits of stop tokens to minus infinity, in place, for requests with fewer than `min_tokens` tokens."""
    places = [
        (row, token_id)
        for row, request in enumerate(requests)
        if len(request.output_token_ids) < request.params.min_tokens
        for token_id in request.stop_token_ids
        if token_id < logits.shape[1]
    ]
    if places:
        rows, token_ids = torch.tensor(places, device=logits.device).T
        logits[rows, token_ids] = -math.inf


def restrict(requests: Sequence[Sampling], logits: Tensor) -> None:
    """Set the logits that top_k, top_p and min_p exclude to minus infinity, in place."""

    def restricts(params: SamplingParams) -> bool:
        return params.temperature > 0 and (params.top_k > 0 or params.top_p < 1 or params.min_p > 0)

    rows = [row for row, request in enumerate(requests) if restricts(request.params)]
    if not rows:
        return
    chosen, width = [requests[row].params for row in rows], logits.shape[1]
    scores = logits[rows] / column([params.temperature for params in chosen], logits)
    ordered, token_ids = scores.sort(dim=-1, descending=True)
    last = column([min(params.top_k or width, width) - 1 for params in chosen], token_ids)
    ordered = ordered.masked_fill(ordered < ordered.gather(1, last), -math.inf)
    probs = ordered.softmax(-1)
    top_p = column([params.top_p if params.top_p < 1 else math.inf for params in chosen], logits)
    ordered = ordered.masked_fill(probs.cumsum(-1) - probs >= top_p, -math.inf)
    probs = ordered.softmax(-1)
    min_p = column([params.min_p for params in chosen], logits)
    is_left_out = (ordered == -math.inf) | (probs < min_p * probs[:, :1])
    logits[rows] = logits[rows].masked_fill(torch.zeros_like(is_left_out).scatter(1, token_ids, is_left_out), -math.inf)
