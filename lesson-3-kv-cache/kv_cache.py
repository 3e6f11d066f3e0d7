"""Lesson 3: the KV cache. A token's key and value never change: compute them once, and keep them.

Lesson 2's `generate` computes the whole sequence again for every token. Here a `KVCache` stands behind the `attend`
seam: the model hands it the new tokens' queries, keys and values, layer by layer, and it answers with attention over
all tokens so far. The model is lesson 2's, and so is the loop around it: neither is edited.

One cache holds one sequence, in one piece of memory as long as the sequence may become. This file does not know
about several sequences that share memory (lesson 4), nor about requests that come and go (lesson 5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from common.tokenizer import Tokenizer
from solutions import llama_pytorch
from solutions.llama_pytorch import Llama, RequestOutput, SamplingParams
from solutions.llm_basics import ModelConfig, attention

# ---------------------------------------------------------------------------------------------------------------
# Many new tokens, more old ones
# ---------------------------------------------------------------------------------------------------------------


def offset_mask(positions: Tensor, num_keys: int) -> Tensor:
    """Which key each query may see, wherever the queries stand. positions: (T,); returns (T, num_keys) booleans.

    Key s stands at position s. A token sees itself and all before it. Lesson 1's `causal_mask` is the case in which
    the queries are the last tokens and stand side by side; here that is not promised.
    """
    # TODO 3.2: compare each query's position with every key's.
    raise NotImplementedError("TODO 3.2")


def fold_groups(q: Tensor, num_kv_heads: int) -> Tensor:
    """Lay the query heads of one key/value head below each other, as more rows. (T, H, D) -> (K, H / K * T, D).

    Lesson 1 repeated each key and value H / K times. At decode the keys are thousands of tokens and the query is
    one: it costs nothing to arrange the queries instead, and the keys are then read once for the whole group. Row
    g * T + t of key/value head h is token t of query head h * H / K + g.
    """
    # TODO 3.3: split the head axis into (K, group), and bring the axes into the order (K, group, T, D).
    raise NotImplementedError("TODO 3.3")


class KVCache:
    """The keys and values of one sequence, for all layers, in memory of a fixed capacity.

    keys, values: (num_layers, K, capacity, D); of layer i the first `lengths[i]` slots are filled. Within a step the
    layers are filled one after the other; between steps all have the same length.
    """

    def __init__(self, model: Llama, capacity: int):
        config, weight = model.config, model.model.norm.weight  # `weight`: whose dtype and device the cache has
        shape = (config.num_hidden_layers, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = weight.new_empty(shape)
        self.values = weight.new_empty(shape)
        self.lengths = [0] * config.num_hidden_layers

    @property
    def num_tokens(self) -> int:
        """How many tokens of the sequence need not be computed again. This holds between steps; within a step, while
        the layers are filled one after the other, ask `lengths[layer]`.
        """
        return self.lengths[-1]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of the next T tokens. k, v: (T, K, D). Returns all so far, two of (K, S, D).

        Raises ValueError when the capacity does not suffice, and then stores nothing.
        """
        # TODO 3.1: copy them behind the layer's filled slots, heads first; move the layer's length; return views.
        raise NotImplementedError("TODO 3.1")

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The `attend` seam: remember these tokens, then let each look at all that came before it.

        q: (T, H, D); k, v: (T, K, D), of the T tokens that follow those in the cache. Returns (T, H, D).
        """
        # TODO 3.4: append, fold the queries, mask by position (the same for every head of a group), call lesson
        # 1's `attention`, and undo the folding.
        raise NotImplementedError("TODO 3.4")

    def truncate(self, num_tokens: int) -> None:
        """Forget all tokens but the first `num_tokens`. Nothing is erased: what lies behind the length is not read.

        The capacity stays what it was: those slots are for other tokens. Raises ValueError for more tokens than there
        are, or fewer than none.
        """
        # TODO 3.8: the cache is as long as it says it is.
        raise NotImplementedError("TODO 3.8")


# ---------------------------------------------------------------------------------------------------------------
# Prefill, decode
# ---------------------------------------------------------------------------------------------------------------


def prefill(model: Llama, cache: KVCache, token_ids: Sequence[int], chunk_size: int = 512) -> Tensor:
    """Compute the tokens that follow those in the cache, a chunk at a time. Returns the last one's logits, (V,).

    token_ids: at least one. The model gives hidden states, (T, hidden_size); `model.logits` takes rows of these,
    (R, hidden_size), and returns (R, V). Only the last chunk's last token needs logits.
    Smaller chunks need less memory for scores (T x S for each head) and give the same result.
    """
    # TODO 3.5: positions go on where the cache ends; the model remembers through `cache.attend`.
    raise NotImplementedError("TODO 3.5")


def decode_step(model: Llama, cache: KVCache, token_id: int) -> Tensor:
    """Compute one token, which follows those in the cache. Returns the logits (V,) of what comes after it."""
    # TODO 3.6: one token, one position.
    raise NotImplementedError("TODO 3.6")


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    on_text: Callable[[str], None] = lambda piece: None,
) -> RequestOutput:
    """What lesson 2's `generate` gives, token for token, with each token computed once."""
    llama_pytorch.check_prompt(prompt_token_ids, model.config, params)
    capacity = min(len(prompt_token_ids) + params.max_tokens, model.config.max_position_embeddings)
    cache = KVCache(model, capacity)

    # TODO 3.7: hand lesson 2's loop a function that computes only what the cache has not seen: the whole prompt
    # at first, then one token.
    raise NotImplementedError("TODO 3.7")


def resume(model: Llama, cache: KVCache, cached_token_ids: Sequence[int], token_ids: Sequence[int]) -> Tensor:
    """The logits (V,) of what comes after `token_ids`, computing only what the cache does not have of them.

    A conversation is sent whole at every turn, and most of it is what it was before. cached_token_ids: the tokens
    that stand in the cache, one for each of its slots. What the two have in common *from the start* is kept, the
    rest is truncated and computed. One token at least is always computed: the cache holds keys and values, no logits.
    """
    # TODO 3.12: find the bug. Ask, change one word in the middle of the question, ask again: the answer is to
    # a mixture of the two questions. Where nothing was changed, or only the end, all is well.
    raise NotImplementedError("TODO 3.12")  # take this line out, then find the one mistake below and mend it

    shared = 0
    for old, new in zip(cached_token_ids, token_ids[:-1]):
        if old != new:
            continue
        shared += 1
    cache.truncate(shared)
    return prefill(model, cache, token_ids[shared:])


# ---------------------------------------------------------------------------------------------------------------
# What it costs, what it wastes, what it gains
# ---------------------------------------------------------------------------------------------------------------


def cache_bytes(config: ModelConfig, num_tokens: int, bytes_per_number: int) -> int:
    """The memory that the keys and values of so many tokens take, in bytes."""
    # TODO 3.9: two tensors, every layer, K heads of D numbers for each token.
    raise NotImplementedError("TODO 3.9")


def padding_waste(lengths: Sequence[int]) -> float:
    """The share of computed tokens that are padding when sequences of these lengths are padded to the longest.

    lengths: at least one, each at least 1. Returns a number from 0 (all alike) to just under 1.
    """
    # TODO 3.10: what would be computed, and what of it is needed?
    raise NotImplementedError("TODO 3.10")


@dataclass(frozen=True)
class Latency:
    """What one answer's reader felt, in seconds."""

    time_to_first_token: float
    time_per_output_token: float  # the mean gap from one token to the next; 0 where there is only one token
    slowest_gap: float  # the longest of these gaps, or 0


def latency_summary(start: float, token_times: Sequence[float]) -> Latency:
    """Sum up when tokens came. start: when the request was made; token_times: when each token came, at least one."""
    # TODO 3.11: the first token waits for the prompt; the others wait for the one before them.
    raise NotImplementedError("TODO 3.11")
