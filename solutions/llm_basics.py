"""Lesson 1: a transformer in plain functions.

Everything that a Llama computes, as functions from tensors to tensors: no module, no state, no cache. `block`
and `forward` make a model of them that runs with a real checkpoint's weights, under their real names.

Shapes are written with these letters throughout the course:

    T  tokens computed now        H  query heads        V  vocabulary size
    S  keys to attend to          K  key/value heads    D  head_dim, the width of one head

Tokens lie flat: there is no batch axis and no padding. One sequence of T tokens is (T, ...).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModelConfig:
    """A model's shape, named as in Hugging Face's `config.json`; the last four are parts that it may have."""

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


def upcast(x: Tensor) -> Tensor:
    """x in float32 or, if it is wider already, as it is. Sums of many 16-bit numbers are taken in this."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------------------------------------------------------
# Text becomes numbers
# ---------------------------------------------------------------------------------------------------------------


def merge_pair(ids: list[int], pair: tuple[int, int], new_id: int) -> list[int]:
    """One merge of byte pair encoding: each `pair` of neighbours in `ids`, from left to right, becomes `new_id`.

    Two occurrences never share an element: in [7, 7, 7] the pair (7, 7) occurs once. Returns a new list.
    From Sennrich, Haddow and Birch, "Neural Machine Translation of Rare Words with Subword Units" (2016).
    """
    # Exercise 1.1: walk along `ids`; where two neighbours are the pair, write `new_id` and step over both.
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
    """Each token's vector. token_ids: (T,) integers; table: (V, hidden_size). Returns (T, hidden_size)."""
    # Exercise 1.2: row `token_ids[t]` of the table is token t's vector.
    return table[token_ids]


# ---------------------------------------------------------------------------------------------------------------
# Numbers are kept in range
# ---------------------------------------------------------------------------------------------------------------


def softmax(scores: Tensor) -> Tensor:
    """Turn the last axis into probabilities: exp(score) over the sum of them. scores: (..., n); returns the same.

    It holds for scores of any size: exp(89) already overflows float32. A score of -inf gets probability 0; at
    least one score of each row is finite.
    """
    # Exercise 1.3: adding a constant to a whole row changes nothing. Which constant makes every exp safe?
    shifted = scores - scores.amax(dim=-1, keepdim=True)
    exponentials = shifted.exp()
    return exponentials / exponentials.sum(dim=-1, keepdim=True)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale each vector to unit root mean square, then by `weight`.

    x: (..., d), any float dtype; weight: (d,). Returns x's shape and dtype. From Zhang and Sennrich, "Root Mean
    Square Layer Normalization" (2019).
    """
    # Exercise 1.4: average the squares in `upcast(x)`, add eps under the root, and return x's dtype.
    wide = upcast(x)
    mean_square = wide.pow(2).mean(-1, keepdim=True)
    return (wide * torch.rsqrt(mean_square + eps)).to(x.dtype) * weight


# ---------------------------------------------------------------------------------------------------------------
# Where a token stands: rotary position embedding
# ---------------------------------------------------------------------------------------------------------------


def rotary_frequencies(head_dim: int, theta: float) -> Tensor:
    """The angle, in radians, by which each pair of dimensions turns from one position to the next.

    Returns (D / 2,) float32: theta ** (-2i / D) for i = 0, 1, ...; the first pair turns one radian a token, the
    last needs tens of thousands of tokens for a turn. From Su et al., "RoFormer" (2021).
    """
    return theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rotary_tables(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles. positions: (T,) integers; frequencies: (D / 2,) float32.

    Returns two tensors (T, D / 2) in float32, whatever dtype the model has: in bfloat16, positions 1000 and
    1001 would get the same angle.
    """
    # Exercise 1.5: a position's angle is position times frequency, for every pair of the two.
    angles = positions.float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn every head's vector by its position's angles. x: (T, heads, D); cos, sin: (T, D / 2). Returns x's shape
    and dtype.

    Dimension i is paired with i + D / 2 ("half-split", as Hugging Face's checkpoints are stored), and each pair
    turns as a point of the plane: (a, b) -> (a cos - b sin, b cos + a sin). The same angle serves every head.
    """
    # Exercise 1.6: split the last axis in two halves, turn the pairs, join the halves again.
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------
# Tokens look at each other: attention
# ---------------------------------------------------------------------------------------------------------------


def causal_mask(num_queries: int, num_keys: int, device: torch.device | None = None) -> Tensor:
    """Which key each query may see. Returns (num_queries, num_keys) booleans, True where it may look.

    The queries are the last `num_queries` of the `num_keys` tokens; a token sees itself and all before it.
    """
    # Exercise 1.7: at which position does query 0 stand? Key s is visible from position p when s <= p.
    query_positions = torch.arange(num_keys - num_queries, num_keys, device=device)
    key_positions = torch.arange(num_keys, device=device)
    return key_positions <= query_positions[:, None]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Scaled dot-product attention: each query takes the mean of the values, weighted by how well the keys match.

    q: (..., T, D); k, v: (..., S, D); mask: (T, S), True where a query may look. Returns (..., T, D) in q's dtype.
    The scores are computed in float32 at least: a dot product of two float16 vectors easily passes 65504.
    From Vaswani et al., "Attention Is All You Need" (2017).
    """
    # Exercise 1.8: scores are `upcast` dot products over the square root of D; a masked score is -inf; softmax.
    scores = upcast(q) @ upcast(k).mT / math.sqrt(q.shape[-1])
    weights = softmax(scores.masked_fill(~mask, -math.inf))
    return (weights @ upcast(v)).to(q.dtype)


def grouped_query_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention in which each key/value head serves a group of H / K neighbouring query heads.

    q: (T, H, D); k, v: (S, K, D) with K dividing H; mask: (T, S). Returns (T, H, D). Query head h looks at
    key/value head h // (H / K). From Ainslie et al., "GQA" (2023).
    """
    # Exercise 1.9: give every query head its key/value head, move the heads to the front, and call `attention`.
    group_size = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group_size, dim=1) for x in (k, v))
    heads_first = attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), mask)
    return heads_first.transpose(0, 1)


# ---------------------------------------------------------------------------------------------------------------
# A layer, a model
# ---------------------------------------------------------------------------------------------------------------


def swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """The feed-forward network: w_down(silu(w_gate x) * w_up x), where silu(z) = z * sigmoid(z).

    x: (T, hidden_size); w_gate, w_up: (intermediate_size, hidden_size); w_down: (hidden_size, intermediate_size):
    a weight is stored as (outputs, inputs). Returns (T, hidden_size). From Shazeer, "GLU Variants" (2020).
    """
    # Exercise 1.10: three matrix products; only the gate passes through silu.
    gate = x @ w_gate.T
    return (gate * torch.sigmoid(gate) * (x @ w_up.T)) @ w_down.T


def block(x: Tensor, weights: Mapping[str, Tensor], config: ModelConfig, cos: Tensor, sin: Tensor) -> Tensor:
    """One layer of a Llama: attention, then the feed-forward network, each on the normalised input and added to it.

    x: (T, hidden_size); cos, sin: (T, D / 2). `weights` has a layer's tensors by their names in a checkpoint:
    input_layernorm, self_attn.{q,k,v,o}_proj, post_attention_layernorm, mlp.{gate,up,down}_proj, each with
    ".weight" behind it. Returns (T, hidden_size).
    """
    # Exercise 1.11: project and split into heads, rotate q and k (not v), attend causally, project, add; then
    # norm, swiglu, add. What is added is x itself, not the normalised x. The mask belongs on x's device.
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
    """The whole model: token ids in, a score for every possible next token out.

    token_ids: (T,); `weights` has every tensor of a checkpoint by its name: model.embed_tokens.weight, the
    layers' under "model.layers.0.", "model.layers.1.", ..., model.norm.weight, and lm_head.weight unless
    `config.tie_word_embeddings`: then the embedding table is the head too. Returns logits (T, V): row t scores
    what follows token t.
    """
    # Exercise 1.12: embed, pass through every block with its own weights, norm, and project to the vocabulary. What
    # you make yourself, positions and frequencies, belongs on the device where the rest is.
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


# ---------------------------------------------------------------------------------------------------------------
# How large, how good
# ---------------------------------------------------------------------------------------------------------------


def count_parameters(config: ModelConfig) -> int:
    """How many numbers a checkpoint of this shape holds; a tied head counts once.

    The optional parts: `qkv_bias`, `o_bias` and `mlp_bias` add a bias to those projections, and `qk_norm` adds
    two weights of head_dim numbers to each layer.
    """
    # Exercise 1.13: embedding, layers, final norm, head. The heads' total width need not be hidden_size.
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
    """How many tokens the model was, in effect, choosing between at each step: exp of the mean surprise.

    logits: (T, V), as `forward` gives them for these very tokens; token_ids: (T,), T >= 2. The surprise of a
    token is minus the natural logarithm of the probability that the logits *before* it gave it; the first token
    has none. Holds for a token that was all but impossible, too: its probability may be 0 in float32, the logarithm
    of it is still a number.
    """
    # Exercise 1.14: which row of the logits predicted token 1, and which row predicts nothing that we have?
    log_probabilities = torch.log_softmax(upcast(logits[:-1]), dim=-1)
    surprise = -log_probabilities.gather(-1, token_ids[1:, None])
    return surprise.mean().exp().item()
