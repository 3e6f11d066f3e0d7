"""Checks the header of a GGUF file before the `gguf` library reads it.

The library trusts every length in the file. One wrong byte makes it read an array of 2**60 numbers, for hours, or read
weights in the wrong byte order. So each length is first compared with the number of bytes left in the file.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

from common.checkpoints.folder import CheckpointError

SIZES = dict(enumerate((1, 1, 2, 2, 4, 4, 4, 1, None, None, 8, 8, 8)))  # bytes of a value, by its type
UINT32, STRING, ARRAY = 4, 8, 9
MOST = 100_000  # keys, and tensors
DEEPEST = 4  # arrays in arrays
MOST_DIMENSIONS = 4


def check_header(path: Path) -> None:
    """Read through the header. Raises CheckpointError, naming the key or the tensor, where it does not fit the file."""
    size = path.stat().st_size
    if size < 24:
        raise CheckpointError(f"{path}: cut short, or not a GGUF file: it has {size} bytes.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Walk(path, data).header()


class _Walk:
    """Reads values one after another. `what` is the part of the file that an error names."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position, self.what = path, data, 0, "the header"
        self.alignment, self.num_bytes = 32, 0  # where each tensor begins is a multiple; bytes of the tensors so far

    def wrong(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: cut short, or not a GGUF file: {self.what} {problem}. Download it again.")

    def skip(self, size: int) -> int:
        """Move the position by `size` bytes. Returns the old position."""
        start, self.position = self.position, self.position + size
        if self.position > len(self.data):
            raise self.wrong(f"should end at byte {self.position:,}, and the file has {len(self.data):,}")
        return start

    def number(self, format: str) -> int:
        return struct.unpack_from(f"<{format}", self.data, self.skip(struct.calcsize(format)))[0]

    def text(self) -> str:
        size = self.number("Q")
        start = self.skip(size)
        try:
            return self.data[start : start + size].decode()
        except UnicodeDecodeError as error:
            raise self.wrong(f"has text that is no UTF-8 ({error.reason})") from None

    def header(self) -> None:
        if self.data[self.skip(4) : 4] != b"GGUF":
            raise self.wrong(f"begins with {self.data[:4]!r}")
        version = self.number("I")
        if version & 0xFFFF == 0:
            raise CheckpointError(
                f"{self.path}: its numbers are big-endian, for another kind of processor; take the little-endian file."
            )
        if version not in (2, 3):
            raise self.wrong(f"says that it is version {version}; 2 and 3 are read")
        num_tensors, num_keys = self.number("Q"), self.number("Q")
        if max(num_tensors, num_keys) > MOST:
            raise self.wrong(f"says that there are {num_keys:,} keys and {num_tensors:,} tensors")
        keys: set[str] = set()
        for i in range(num_keys):
            self.what = f"key number {i}"
            key = self.text()
            self.what = f"key {key!r:.80}"
            if key in keys:
                raise self.wrong("is there twice")
            keys.add(key)
            start, kind = self.position, self.number("I")
            self.value(kind)
            if key == "general.alignment":
                (self.alignment,) = struct.unpack_from("<I", self.data, start + 4)
                if kind != UINT32 or not self.alignment or self.alignment & (self.alignment - 1):
                    raise self.wrong("is no power of two in 32 bits")
        for i in range(num_tensors):
            self.what = f"tensor number {i}"
            self.what = f"tensor {self.text()!r:.80}"
            num_dimensions = self.number("I")
            if num_dimensions > MOST_DIMENSIONS:
                raise self.wrong(f"has {num_dimensions:,} dimensions")
            shape = [self.number("Q") for _ in range(num_dimensions)]
            self.tensor(shape, self.number("I"), self.number("Q"))
        self.what = "the last tensor"
        self.skip(-self.position % self.alignment)
        self.skip(self.num_bytes)

    def value(self, kind: int, depth: int = 0) -> None:
        if kind == STRING:
            self.text()
        elif kind == ARRAY:
            item, length = self.number("I"), self.number("Q")
            if depth == DEEPEST:
                raise self.wrong("has arrays in arrays in arrays")
            if item in SIZES and SIZES[item] is not None:
                self.skip(length * SIZES[item])
            else:
                if length * 8 > len(self.data):  # a text has a length of 8 bytes, an array 12
                    raise self.wrong(f"says that it has {length:,} values")
                for _ in range(length):
                    self.value(item, depth + 1)
        elif kind in SIZES:
            self.skip(SIZES[kind])
        else:
            raise self.wrong(f"has a value of type {kind}, which there is not")

    def tensor(self, shape: list[int], kind: int, offset: int) -> None:
        """Check a tensor's type and shape, and that it begins where the one before it ends, as llama.cpp does."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            per_block, block_size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError):
            raise self.wrong(f"is stored as type {kind}, which cannot be read") from None
        count = math.prod(shape)
        if not shape or not count or shape[0] % per_block:
            raise self.wrong(f"has the shape {shape}")
        if offset != (expected := self.num_bytes + -self.num_bytes % self.alignment):
            raise self.wrong(f"begins at byte {offset:,} of the tensors, in place of {expected:,}")
        self.num_bytes = offset + count // per_block * block_size
        if self.num_bytes > len(self.data):
            raise self.wrong(f"of shape {shape} does not fit into the file")
