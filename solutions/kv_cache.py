"""Lesson 3: the KV cache. A token's key and value never change, so compute them once and keep them.

Lesson 2's `generate` recomputes the whole sequence for every token. Here a `KVCache` implements `attend`: in each layer
the model passes it the new tokens' queries, keys and values, and it returns attention over all tokens so far. Lesson
2's model and loop are used unchanged.

One cache holds one sequence, in contiguous memory for the longest that the sequence may become. This file does not
know about sequences that share memory (lesson 4) or about batches of requests (lesson 5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from common.tokenizer import Tokenizer
from common.windows import window_attention
from solutions import llama_pytorch
from solutions.llama_pytorch import Llama, RequestOutput, SamplingParams
from solutions.llm_basics import ModelConfig, attention

# --- Attention of new tokens to all tokens ----------------------------------------------------------------------------


def offset_mask(positions: Tensor, num_keys: int) -> Tensor:
    """Return which keys each query may attend to. positions: (T,), of the queries. Returns (T, num_keys) booleans.

    Key s is at position s. A token attends to itself and to all before it. Unlike in lesson 1's `causal_mask`, the
    queries need not be the last tokens, nor adjacent.
    """
    # Exercise 3.1: compare each query's position with every key's, on the device of `positions`.
    return torch.arange(num_keys, device=positions.device) <= positions[:, None]


def fold_groups(q: Tensor, num_kv_heads: int) -> Tensor:
    """Stack the query heads of each key/value head as more rows. (T, H, D) -> (K, H / K * T, D).

    Lesson 1 repeated each key and value H / K times. In decoding there are thousands of keys and one query: rearranging
    the queries instead costs nothing, and the keys are read once for the whole group. Row g * T + t of key/value head h
    is token t of query head h * H / K + g.
    """
    # Exercise 3.2: split the head axis into (K, group), then bring the axes into the order (K, group, T, D).
    num_tokens, num_heads, head_dim = q.shape
    grouped = q.view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    return grouped.permute(1, 2, 0, 3).reshape(num_kv_heads, -1, head_dim)


class KVCache:
    """The keys and values of one sequence, for all layers, in memory of a fixed capacity.

    A step fills one layer after the other. Between steps all layers have the same length.
    """

    def __init__(self, model: Llama, capacity: int):
        config, weight = model.config, model.model.norm.weight
        shape = (config.num_hidden_layers, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = weight.new_empty(shape)  # (num_layers, K, capacity, D), dtype and device of the weights
        self.values = weight.new_empty(shape)
        self.lengths = [0] * config.num_hidden_layers  # filled slots of each layer

    @property
    def num_tokens(self) -> int:
        """The number of cached tokens. Only valid between steps; within a step use `lengths[layer]`."""
        return self.lengths[-1]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values of the next T tokens, both (T, K, D), and return all of the layer, both (K, S, D).

        Raises ValueError, and stores nothing, if they exceed the capacity.
        """
        # Exercise 3.3: copy them after the layer's filled slots, heads first; update its length; return views.
        start = self.lengths[layer]
        end = start + k.shape[0]
        capacity = self.keys.shape[2]
        if end > capacity:
            raise ValueError(f"{k.shape[0]} more tokens do not fit: {start} of {capacity} slots are filled.")
        self.keys[layer, :, start:end] = k.transpose(0, 1)
        self.values[layer, :, start:end] = v.transpose(0, 1)
        self.lengths[layer] = end
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        """Lesson 2's `attend`: cache these tokens, then let each attend to itself and to all before it.

        q: (T, H, D); k, v: (T, K, D), of the T tokens that follow the cached ones. Returns (T, H, D).
        """
        if window is not None:
            keys, values = (x.transpose(0, 1)[None] for x in self.append(layer, k, v))  # (1, S, K, D) each
            positions = torch.arange(keys.shape[1] - len(q), keys.shape[1], device=q.device)
            return window_attention(q[None], keys, values, positions[None], 0, window)[0]
        # Exercise 3.4: append, fold the queries, mask by position (repeated for each head of a group), call lesson 1's
        # `attention`, unfold.
        keys, values = self.append(layer, k, v)
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads, num_keys, _ = keys.shape
        positions = torch.arange(num_keys - num_tokens, num_keys, device=q.device)
        mask = offset_mask(positions, num_keys).repeat(num_heads // num_kv_heads, 1)
        mixed = attention(fold_groups(q, num_kv_heads), keys, values, mask)
        return mixed.view(num_heads, num_tokens, head_dim).transpose(0, 1)

    def truncate(self, num_tokens: int) -> None:
        """Keep only the first `num_tokens` tokens. The capacity stays; slots after the length are never read.

        Raises ValueError if `num_tokens` is negative or more than the cache holds.
        """
        # Exercise 3.5: set the length of every layer; nothing needs to be erased.
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"truncate({num_tokens}): the cache holds {self.num_tokens} tokens.")
        self.lengths = [num_tokens] * len(self.lengths)


# --- Prefill and decode -----------------------------------------------------------------------------------------------


def prefill(model: Llama, cache: KVCache, token_ids: Sequence[int], chunk_size: int = 512) -> Tensor:
    """Compute the tokens that follow the cached ones, `chunk_size` at a time. Returns the last token's logits, (V,).

    token_ids: at least one. The model returns hidden states (T, hidden_size); `model.logits` turns any R rows of them
    into (R, V), and only the last row is needed. Smaller chunks need less memory for scores, T x S per head, and give
    the same result.
    """
    # Exercise 3.6: positions continue where the cache ends; pass `cache.attend` to the model.
    device = cache.keys.device
    for start in range(0, len(token_ids), chunk_size):
        chunk = torch.tensor(token_ids[start : start + chunk_size], device=device)
        positions = torch.arange(cache.num_tokens, cache.num_tokens + len(chunk), device=device)
        hidden = model(chunk, positions, cache.attend)
    return model.logits(hidden[-1:])[0]


def decode_step(model: Llama, cache: KVCache, token_id: int) -> Tensor:
    """Compute one token, which follows the cached ones. Returns the logits (V,) of the token after it."""
    # Exercise 3.7: one token, one position.
    device = cache.keys.device
    position = torch.tensor([cache.num_tokens], device=device)
    return model.logits(model(torch.tensor([token_id], device=device), position, cache.attend))[0]


def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    on_text: Callable[[str], None] = lambda piece: None,
) -> RequestOutput:
    """Return the same tokens as lesson 2's `generate`, computing each only once."""
    capacity = min(len(prompt_token_ids) + params.max_tokens, model.config.max_position_embeddings)
    cache = KVCache(model, capacity)

    # Exercise 3.8: pass lesson 2's loop a `next_logits` that computes only tokens that are not cached: first the whole
    # prompt, then one token at a time.
    def next_logits(token_ids: Sequence[int]) -> Tensor:
        new = token_ids[cache.num_tokens :]
        return decode_step(model, cache, new[0]) if len(new) == 1 else prefill(model, cache, new)

    return llama_pytorch.generate(model, tokenizer, prompt_token_ids, params, on_text, next_logits)


def resume(model: Llama, cache: KVCache, cached_token_ids: Sequence[int], token_ids: Sequence[int]) -> Tensor:
    """Return the logits (V,) of the token after `token_ids`, reusing what is cached.

    Each turn of a conversation sends the whole conversation again. cached_token_ids: the tokens in the cache, one for
    each filled slot. Keep the longest common prefix, truncate the rest, compute what is missing. At least the last
    token is computed, because the cache has no logits.
    """
    # Exercise 3.9: find the bug. Ask a question, change one word in the middle, ask again: the answer is to a mixture
    # of the two questions. If nothing changed, or only the end, the answer is right.

    shared = 0
    for old, new in zip(cached_token_ids, token_ids[:-1]):
        if old != new:
            break
        shared += 1
    cache.truncate(shared)
    return prefill(model, cache, token_ids[shared:])


# --- Memory, waste and latency ----------------------------------------------------------------------------------------


def cache_bytes(config: ModelConfig, num_tokens: int, bytes_per_number: int) -> int:
    """Return the memory of the keys and values of `num_tokens` tokens, in bytes."""
    # Exercise 3.10: two tensors; per layer and token, K heads of D numbers.
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return num_tokens * per_token * bytes_per_number


def padding_waste(lengths: Sequence[int]) -> float:
    """Return the fraction of computed tokens that are padding if sequences are padded to the longest: 0 <= result < 1.

    lengths: at least one, each at least 1.
    """
    # Exercise 3.11: count all tokens of the padded batch, and those that are needed.
    computed = max(lengths) * len(lengths)
    return 1 - sum(lengths) / computed


@dataclass(frozen=True)
class Latency:
    """How long the reader of one answer waited, in seconds."""

    time_to_first_token: float
    time_per_output_token: float  # the mean gap between consecutive tokens; 0 if there is only one
    slowest_gap: float  # the longest gap between consecutive tokens, or 0


def latency_summary(start: float, token_times: Sequence[float]) -> Latency:
    """Summarize one request. start: when it was made; token_times: when each token came, at least one. In seconds."""
    # Exercise 3.12: the first token counts from `start`, each later one from the token before it.
    gaps = [later - earlier for earlier, later in pairwise(token_times)]
    return Latency(token_times[0] - start, sum(gaps) / len(gaps) if gaps else 0.0, max(gaps, default=0.0))
