"""Triton for the lessons' optional parts: compiled where there is a GPU, interpreted by Python where there is none.

Import `triton` and `tl` from here: `common.kernels` has then decided which of the two it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where a kernel's tensors must be."""

if DEVICE == "cpu" and not hasattr(tl.max, "rewriter") and triton.knobs.runtime.interpret:
    raise RuntimeError(
        "Triton was imported before the course's kernels, and so it does not interpret its own functions. Set "
        "TRITON_INTERPRET=1 in the environment, or import the lesson's module first."
    )
