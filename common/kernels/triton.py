"""Triton for the lessons' optional parts: compiled if there is a GPU, otherwise interpreted by Python.

Import `triton` and `tl` from here: importing `common.kernels` first decides which of the two it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the device of a kernel's tensors

if DEVICE == "cpu" and not hasattr(tl.max, "rewriter") and triton.knobs.runtime.interpret:
    raise RuntimeError(
        "Triton was imported before the course's kernels, and so it does not interpret its own functions. Set "
        "TRITON_INTERPRET=1 in the environment, or import the lesson's module first."
    )
