"""Rotary frequencies for texts longer than those in training: every rule but Llama 3's, which is exercise 2.2.

A rule changes the frequencies, (D / 2,), and some also multiply cosines and sines by a factor. `scaling` is checked
(common/checkpoints/schema.py): it has the keys of the struct of its `rope_type`. The rules are those of transformers'
`modeling_rope_utils.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def linear(frequencies: Tensor, scaling: Mapping, theta: float, length: int) -> Tensor:
    """Divide every frequency, so that `factor` positions turn as far as one did. From Chen et al., "Extending Context
    Window of Large Language Models via Positional Interpolation" (2023).
    """
    return frequencies / scaling["factor"]


def dynamic(frequencies: Tensor, scaling: Mapping, theta: float, length: int) -> Tensor:
    """Slow down the last pair in proportion to the length beyond the original context, the first one not at all.

    That is a larger theta: "NTK-aware" scaling, by u/bloc97 and u/emozilla on r/LocalLLaMA (2023).
    """
    beyond = max(length / scaling["original_max_position_embeddings"], 1)
    growth = scaling["factor"] * beyond - (scaling["factor"] - 1)
    share = torch.arange(len(frequencies)) / max(len(frequencies) - 1, 1)  # 0 for the first pair, 1 for the last
    return frequencies * growth**-share


def yarn(frequencies: Tensor, scaling: Mapping, theta: float, length: int) -> Tensor:
    """Keep fast frequencies, divide slow ones by `factor`, and mix between them, linearly in the pair's number.

    `beta_fast` and `beta_slow` are the turns within the original context that bound the mixture. From Peng et al.,
    "YaRN" (2023).
    """
    head_dim = 2 * len(frequencies)

    def pair(turns: float) -> float:
        """The number of the pair, not rounded, that makes this number of turns in the original context."""
        wavelength = scaling["original_max_position_embeddings"] / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(scaling["beta_fast"]), pair(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    kept = 1 - ((torch.arange(len(frequencies)) - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


def longrope(frequencies: Tensor, scaling: Mapping, theta: float, length: int) -> Tensor:
    """Divide every frequency by a factor of its own, found by a search, for short texts or for long ones. From Ding et
    al., "LongRoPE" (2024).
    """
    kind = "long" if length > scaling["original_max_position_embeddings"] else "short"
    return frequencies / torch.tensor(scaling[f"{kind}_factor"])


RULES = {"linear": linear, "dynamic": dynamic, "yarn": yarn, "longrope": longrope}
"""The functions by `rope_type`. length: the number of tokens of the whole text."""


def depends_on_length(scaling: Mapping | None) -> bool:
    """Whether the frequencies of a token depend on the length of the whole text."""
    return scaling is not None and scaling.get("rope_type") in ("dynamic", "longrope")


def attention_factor(scaling: Mapping | None) -> float:
    """The factor of cosines and sines, often 1. A larger one keeps the attention sharp in a long text."""
    kind = (scaling or {}).get("rope_type")
    if kind not in ("yarn", "longrope"):
        return 1.0
    factor, given = scaling["factor"], scaling["attention_factor"]
    if given is not None:
        return given
    if kind == "longrope":
        return math.sqrt(1 + math.log(max(factor, 1)) / math.log(scaling["original_max_position_embeddings"]))
    scale, scale_all = scaling["mscale"], scaling["mscale_all_dim"]
    if scale and scale_all:
        return (0.1 * scale * math.log(factor) + 1) / (0.1 * scale_all * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1
