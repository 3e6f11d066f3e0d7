"""Lesson 1: a transformer in plain functions.

Everything that a Llama computes, as functions from tensors to tensors: no modules, no state, no cache. `block` and
`forward` combine them into a model that runs with a real checkpoint's weights. Letters for shapes, in all lessons:

    T  tokens computed now        H  query heads        V  vocabulary size
    S  keys to attend to          K  key/value heads    D  head_dim, the width of one head

Tokens lie flat: there is no batch axis and no padding. One sequence of T tokens is (T, ...).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModelConfig:
    """A model's sizes, named as in Hugging Face's `config.json`, and parts that not every model has."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: Mapping | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    layer_windows: Sequence[int | None] = ()  # the sliding window of each layer; empty: no layer has one
    moe: Any = None  # the mixture of experts in some layers, `Moe` in common/checkpoints/schema.py; None: there is none


def upcast(x: Tensor) -> Tensor:
    """Convert x to float32, or leave it if it is wider already. Sums of many 16-bit numbers need this."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# --- From text to vectors ---------------------------------------------------------------------------------------------


def merge_pair(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """One merge of byte pair encoding: replace each adjacent `pair` in `ids`, from left to right, with `new_id`.

    Occurrences do not overlap: [7, 7, 7] contains the pair (7, 7) once. Returns a new list. From Sennrich, Haddow and
    Birch, "Neural Machine Translation of Rare Words with Subword Units" (2016).
    """
    # Exercise 1.1: walk along `ids`; where two neighbours are the pair, append `new_id` and skip both.
    merged, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == tuple(pair):
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def embed(token_ids: Tensor, table: Tensor) -> Tensor:
    """Look up each token's vector. token_ids: (T,) integers; table: (V, hidden_size). Returns (T, hidden_size)."""
    # Exercise 1.2: row `token_ids[t]` of the table is token t's vector.
    return table[token_ids]


def softmax(scores: Tensor) -> Tensor:
    """Turn the last axis into probabilities: exp(score), divided by the sum. scores: (..., n). Returns the same shape.

    Scores may have any size, although exp(89) overflows float32. A score of -inf gets probability 0; each row has at
    least one finite score.
    """
    # Exercise 1.3: adding a constant to a row changes nothing; choose the constant that makes every exp safe.
    shifted = scores - scores.amax(dim=-1, keepdim=True)
    exponentials = shifted.exp()
    return exponentials / exponentials.sum(dim=-1, keepdim=True)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each vector to unit root mean square, then by `weight`.

    x: (..., d), any float dtype; weight: (d,). Returns x's shape and dtype. From Zhang and Sennrich, "Root Mean
    Square Layer Normalization" (2019).
    """
    # Exercise 1.4: average the squares of `upcast(x)`, add eps under the root, convert back to x's dtype.
    wide = upcast(x)
    mean_square = wide.pow(2).mean(-1, keepdim=True)
    return (wide * torch.rsqrt(mean_square + eps)).to(x.dtype) * weight


# --- Rotary position embedding ----------------------------------------------------------------------------------------


def rotary_frequencies(head_dim: int, theta: float) -> Tensor:
    """Return the angles, in radians, by which the pairs of dimensions turn at each position: (D / 2,) float32.

    Pair i turns by theta ** (-2i / D): the first by one radian per token, while the last needs tens of thousands of
    tokens for one turn. From Su et al., "RoFormer" (2021).
    """
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rotary_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosine and sine of each position's angles. positions: (T,) integers; frequencies: (D / 2,) float32.

    Both results are (T, D / 2) in float32, whatever the model's dtype: in bfloat16, positions 1000 and 1001 would get
    the same angle.
    """
    # Exercise 1.5: multiply every position with every frequency; these are the angles.
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head's vector by its position's angles.

    x: (T, heads, D); cos, sin: (T, D / 2). Returns x's shape and dtype. Dimension i is paired with i + D / 2
    ("half-split", the layout of Hugging Face's checkpoints), and each pair rotates as a point of the plane:
    (a, b) -> (a cos - b sin, b cos + a sin). All heads use the same angles.
    """
    # Exercise 1.6: split the last axis into halves, rotate the pairs, concatenate the halves.
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# --- Attention --------------------------------------------------------------------------------------------------------


def causal_mask(num_queries: int, num_keys: int, device: torch.device | None = None) -> Tensor:
    """Return which keys each query may attend to: (num_queries, num_keys) booleans.

    The queries are the last `num_queries` of the `num_keys` tokens. A token attends to itself and all before it.
    """
    # Exercise 1.7: compute the positions of the queries; the query at position p may attend to key s if s <= p.
    query_positions = torch.arange(num_keys - num_queries, num_keys, device=device)
    key_positions = torch.arange(num_keys, device=device)
    return key_positions <= query_positions[:, None]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Scaled dot-product attention: for each query, the mean of the values, weighted by how well their keys match.

    q: (..., T, D); k, v: (..., S, D); mask: (T, S), True where a query may attend. Returns (..., T, D) in q's dtype.
    Scores are computed in float32 at least: a dot product of two float16 vectors easily exceeds 65504, float16's
    largest number. From Vaswani et al., "Attention Is All You Need" (2017).
    """
    # Exercise 1.8: divide the dot products of `upcast` vectors by the root of D, set masked scores to -inf, softmax.
    scores = upcast(q) @ upcast(k).mT / math.sqrt(q.shape[-1])
    weights = softmax(scores.masked_fill(~mask, -math.inf))
    return (weights @ upcast(v)).to(q.dtype)


def grouped_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention in which each key/value head serves H / K neighbouring query heads.

    q: (T, H, D); k, v: (S, K, D) with K dividing H; mask: (T, S). Returns (T, H, D). Query head h uses key/value head
    h // (H / K). From Ainslie et al., "GQA" (2023).
    """
    # Exercise 1.9: repeat the key/value heads, one for each query head, move the heads to the front, call `attention`.
    group_size = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group_size, dim=1) for x in (k, v))
    heads_first = attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), mask)
    return heads_first.transpose(0, 1)


# --- A layer and a model ----------------------------------------------------------------------------------------------


def swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """The feed-forward network: w_down(silu(w_gate x) * w_up x), where silu(z) = z * sigmoid(z).

    x: (T, hidden_size). Weights are stored as (outputs, inputs): w_gate and w_up are (intermediate_size, hidden_size),
    w_down is (hidden_size, intermediate_size). Returns (T, hidden_size). From Shazeer, "GLU Variants" (2020).
    """
    # Exercise 1.10: three matrix products; only the gate passes through silu.
    gate = x @ w_gate.T
    return (gate * torch.sigmoid(gate) * (x @ w_up.T)) @ w_down.T


def block(x: Tensor, weights: Mapping[str, Tensor], config: ModelConfig, cos: Tensor, sin: Tensor) -> Tensor:
    """One layer of a Llama: attention, then the feed-forward network, each applied to the normed input and added to it.

    x: (T, hidden_size); cos, sin: (T, D / 2). `weights` maps the checkpoint's names to the layer's tensors:
    input_layernorm, self_attn.{q,k,v,o}_proj, post_attention_layernorm, mlp.{gate,up,down}_proj, each followed by
    ".weight". Returns (T, hidden_size).
    """
    # Exercise 1.11: norm, project, split into heads, rotate q and k (not v), attend causally, project, add to x (not to
    # the normed x); then norm, swiglu, add. Make the mask on x's device.
    num_tokens = x.shape[0]

    normed = rms_norm(x, weights["input_layernorm.weight"], config.rms_norm_eps)
    q, k, v = (
        (normed @ weights[f"self_attn.{name}_proj.weight"].T).view(num_tokens, -1, config.head_dim) for name in "qkv"
    )
    mask = causal_mask(num_tokens, num_tokens, x.device)
    mixed = grouped_query_attention(apply_rotary(q, cos, sin), apply_rotary(k, cos, sin), v, mask)
    x = x + mixed.flatten(1) @ weights["self_attn.o_proj.weight"].T

    normed = rms_norm(x, weights["post_attention_layernorm.weight"], config.rms_norm_eps)
    return x + swiglu(normed, *(weights[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))


def forward(token_ids: Tensor, weights: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
    """The whole model: from token ids (T,) to logits (T, V). Row t scores what follows token t.

    `weights` maps the checkpoint's names to its tensors: model.embed_tokens.weight, the layers under "model.layers.0.",
    "model.layers.1.", ..., model.norm.weight, and lm_head.weight. If `config.tie_word_embeddings`, there is no lm_head:
    use the embedding table.
    """
    # Exercise 1.12: embed, apply every block with its own weights, norm, project to the vocabulary. Put positions and
    # frequencies on the device of the other tensors.
    x = embed(token_ids, weights["model.embed_tokens.weight"])
    positions = torch.arange(len(token_ids), device=x.device)
    cos, sin = rotary_tables(positions, rotary_frequencies(config.head_dim, config.rope_theta).to(x.device))

    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        layer = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        x = block(x, layer, config, cos, sin)

    x = rms_norm(x, weights["model.norm.weight"], config.rms_norm_eps)
    head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
    return x @ head.T


# --- Size and quality -------------------------------------------------------------------------------------------------


def count_parameters(config: ModelConfig) -> int:
    """Return the number of parameters of a model; a tied head counts once.

    `qkv_bias`, `o_bias` and `mlp_bias` add a bias to those projections; `qk_norm` adds two weights of head_dim numbers
    to each layer.
    """
    # Exercise 1.13: add embedding, layers, final norm and head. The heads' total width need not be hidden_size.
    hidden, intermediate = config.hidden_size, config.intermediate_size
    q_width = config.num_attention_heads * config.head_dim
    kv_width = config.num_key_value_heads * config.head_dim

    attention = hidden * (q_width + 2 * kv_width) + q_width * hidden
    mlp = 3 * hidden * intermediate
    norms = 2 * hidden + (2 * config.head_dim if config.qk_norm else 0)
    biases = 0
    if config.qkv_bias:
        biases += q_width + 2 * kv_width
    if config.o_bias:
        biases += hidden
    if config.mlp_bias:
        biases += 2 * intermediate + hidden

    tables = config.vocab_size * hidden * (1 if config.tie_word_embeddings else 2)
    return tables + config.num_hidden_layers * (attention + mlp + norms + biases) + hidden


def perplexity(logits: Tensor, token_ids: Tensor) -> float:
    """Return exp of the mean surprise: the number of tokens between which the model, in effect, chose at each step.

    logits: (T, V), the `forward` of token_ids, (T,), T >= 2. A token's surprise is minus the natural logarithm of the
    probability that the logits *before* it gave it; the first token has none. The result is finite even if that
    probability is 0 in float32.
    """
    # Exercise 1.14: row t of the logits predicts token t + 1; average the surprise of tokens 1 to T - 1.
    log_probabilities = torch.log_softmax(upcast(logits[:-1]), dim=-1)
    surprise = -log_probabilities.gather(-1, token_ids[1:, None])
    return surprise.mean().exp().item()
