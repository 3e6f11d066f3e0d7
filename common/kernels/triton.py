"""Triton for the lessons' optional parts: compiled where there is a GPU, interpreted by Python where there is none.

Import `triton`, `tl` and `DEVICE` from here. Triton decides when it is imported whether it interprets its kernels.
"""

from __future__ import annotations

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where a kernel's tensors must be."""

if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

import triton  # noqa: E402, F401
import triton.language as tl  # noqa: E402, F401
