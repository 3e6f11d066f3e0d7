"""Lesson 2, optional: a mixture of experts. A layer has many MLPs, and each token uses a few of them.

A *router* scores the experts for a token. The best k compute it, and the layer's output is their weighted sum. So a
model can have many weights, and multiply a token by few of them: Qwen3-30B-A3B has 30 billion weights and uses 3
billion for each token.

This file does not know about checkpoints or the layers of lesson 2: an expert is any function of (n, hidden_size)
tokens.

From Shazeer et al., "Outrageously Large Neural Networks" (2017); the details are Qwen3-MoE's, Yang et al. (2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from solutions.llm_basics import upcast


def route(scores: Tensor, k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """Choose k experts for each token by the router's scores. scores: (T, E), with k <= E.

    Returns the experts' weights, (T, k) in the scores' dtype, and their numbers, (T, k), the likeliest first. A weight
    is the expert's probability among all E; with `norm_topk_prob` the k weights of a token are divided by their sum.
    """
    # TODO 2.18: take the softmax over all experts, in float32 (`upcast`: 16 bits are coarse), then the best k.
    raise NotImplementedError("TODO 2.18")


def tokens_by_expert(chosen: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Sort the tokens by the experts that compute them. chosen: (T, k), from `route`.

    Returns {expert: (tokens, places)}, with an entry for each expert that is chosen, and for no other. tokens: (n,),
    the indices of the tokens that chose it, ascending. places: (n,), the index of this expert among the k of each.
    """
    # TODO 2.19: choice i of the flattened `chosen` is token i // k's, at place i % k. Sort the choices by expert,
    # or find the choices of one expert after the other.
    raise NotImplementedError("TODO 2.19")


def mix_experts(x: Tensor, weights: Tensor, chosen: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    """Add up what each token's experts compute, times their weights. x: (T, hidden_size). Returns the same shape.

    weights, chosen: (T, k), from `route`. experts: E functions from (n, hidden_size) to the same shape. Each is called
    at most once, only with its own tokens; one that no token has chosen is not called, so its weights are not read.
    """
    # TODO 2.20: for each entry of `tokens_by_expert`, compute the expert's tokens, scale them by their weights, and
    # add them to the output's rows with `index_add_`.
    raise NotImplementedError("TODO 2.20")


def experts_read(num_experts: int, k: int, num_tokens: int) -> float:
    """Return how many different experts a step of `num_tokens` tokens reads from memory, on average.

    Each token chooses k of the experts, all equally likely, and independently of the others. (Real routers are less
    even, since neighbouring tokens are alike.)
    """
    # TODO 2.21: an expert is read unless no token chooses it. Compute that probability, and multiply by E.
    raise NotImplementedError("TODO 2.21")


class SparseMoeBlock(nn.Module):
    """The feed-forward part of a layer with experts. (T, hidden_size) -> (T, hidden_size).

    gate: the router, a module from (T, hidden_size) to scores (T, E). experts: E modules. Names are a checkpoint's.
    """

    def __init__(self, gate: nn.Module, experts: Sequence[nn.Module], top_k: int, norm_topk_prob: bool):
        super().__init__()
        self.gate, self.experts = gate, nn.ModuleList(experts)
        self.top_k, self.norm_topk_prob = top_k, norm_topk_prob

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = route(self.gate(x), self.top_k, self.norm_topk_prob)
        return mix_experts(x, weights, chosen, self.experts)
