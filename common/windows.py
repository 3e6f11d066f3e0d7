"""Attention through a sliding window: a token attends to itself and to the window - 1 tokens before it.

Mistral's layers have one, and some layers of Qwen2. What lies further back still acts through the layers below: a
window of W tokens in each of L layers reaches L x W tokens back. From Beltagy et al., "Longformer" (2020).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def window_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, first: int, window: int) -> Tensor:
    """Attention of B sequences' queries to the keys in their windows.

    q: (B, T, H, D); positions: (B, T), of the queries; k, v: (B, S, K, D), of the positions first, first + 1, ...
    Returns (B, T, H, D) in q's dtype; in float32 at least within. Keys that no query sees may hold anything.
    """
    age = positions[:, :, None] - torch.arange(first, first + k.shape[1], device=q.device)
    visible = (0 <= age) & (age < window)  # (B, T, S)
    unseen = ~visible.any(1)[:, :, None, None]
    wide = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.to(wide).masked_fill(unseen, 0).transpose(1, 2) for x in (k, v))  # their weight is 0, but 0 * NaN is NaN
    mixed = F.scaled_dot_product_attention(
        q.to(wide).transpose(1, 2), k, v, attn_mask=visible[:, None], enable_gqa=True
    )
    return mixed.transpose(1, 2).to(q.dtype)
