"""Moves weights into pages of 2 MB.

A step reads all weights once. In pages of 4 kB a new page begins after every 64 cache lines, and the page table is too
large for the processor's caches. Linux uses larger pages for memory that asks for them.
"""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor, nn

CHUNK_BYTES = 64 << 20
CACHE_LINE_BYTES = 64


def move(model: nn.Module) -> None:
    """Move a model's contiguous weights into huge pages, one after the other, if the system has such pages.

    The parameters stay the same objects, so kernels that refer to them use the new memory. A tensor that was detached
    before keeps the old memory. The new memory is freed with the last tensor in it.
    """
    rest = torch.empty(0, dtype=torch.uint8)
    for tensor in model.parameters():
        if tensor.is_meta:  # it is read from the disk in each step
            continue
        size = -(-tensor.nbytes // CACHE_LINE_BYTES) * CACHE_LINE_BYTES
        if size > len(rest):
            free_unused_pages()  # of the tensors that moved into the last chunk
            rest = map_chunk(max(size, CHUNK_BYTES))
            if rest is None:
                return
        part, rest = rest[: tensor.nbytes], rest[size:]
        tensor.data = part.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    free_unused_pages()


def map_chunk(num_bytes: int) -> Tensor | None:
    """Returns (num_bytes,) uint8 in huge pages, which are allocated when they are written. None if there are none."""
    try:
        chunk = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        chunk.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError):  # not Linux, or built without huge pages
        return None
    return torch.frombuffer(chunk, dtype=torch.uint8)


def free_unused_pages() -> None:
    """Return free memory between tensors to the system, which glibc does not do by itself."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
