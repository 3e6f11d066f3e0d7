"""Reads a GGUF file: its key-value pairs, and its tensors as they are stored.

The `gguf` library has a reader, too, but it trusts every length in the file. One wrong byte makes it read an array of
2**60 numbers, for hours, or read weights in the wrong byte order. Here each length is first compared with the number of
bytes left in the file.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Container
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy
import torch

from common.checkpoints.folder import CheckpointError

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""The types of numbers, as `struct` and numpy call them."""
UINT32, STRING, ARRAY = 4, 8, 9
MOST = 100_000  # keys, and tensors
MOST_DIMENSIONS = 4


class Stored(NamedTuple):
    """Where and how a tensor is stored. `GGUFFile.numbers` reads it."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # outermost first, unlike in the file
    row_bytes: int
    offset: int  # from where the first tensor begins

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which it is written: float32 for quantized numbers."""
        half = {gguf.GGMLQuantizationType.F16: torch.float16, gguf.GGMLQuantizationType.BF16: torch.bfloat16}
        return half.get(self.kind, torch.float32)


class GGUFFile:
    """An open GGUF file. keys: its key-value pairs. tensors: by name. architecture: begins the names of a model's keys.

    Values are read one after another. `what` is the part of the file that an error names. Raises CheckpointError,
    naming the key or the tensor, where the header does not fit the file.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.position, self.what = path, 0, "the header"
        if (size := path.stat().st_size) < 24:
            raise self.refusal(f"cut short, or not a GGUF file: it has {size} bytes.")
        self.data = memoryview(numpy.memmap(path, mode="r"))
        if self.data[self.skip(4) : 4] != b"GGUF":
            raise self.wrong(f"begins with {bytes(self.data[:4])!r}")
        version = self.number("I")
        if version & 0xFFFF == 0:
            raise self.refusal(
                "its numbers are big-endian, for another kind of processor; take the little-endian file."
            )
        if version not in (2, 3):
            raise self.wrong(f"says that it is version {version}; 2 and 3 are read")
        num_tensors, num_keys = self.number("Q"), self.number("Q")
        if max(num_tensors, num_keys) > MOST:
            raise self.wrong(f"says that there are {num_keys:,} keys and {num_tensors:,} tensors")
        self.alignment = 32  # where each tensor begins is a multiple of this
        self.keys: dict[str, Any] = {}
        for i in range(num_keys):
            self.read_key(i)
        self.num_bytes = 0  # of the tensors so far
        self.tensors: dict[str, Stored] = {}
        for i in range(num_tensors):
            self.read_tensor_header(i)
        self.what = "the last tensor"
        self.skip(-self.position % self.alignment)
        self.first = self.skip(self.num_bytes)
        self.architecture = self.get("general.architecture")

    REQUIRED = object()

    def get(self, key: str, default: Any = REQUIRED) -> Any:
        if (value := self.keys.get(key, default)) is self.REQUIRED:
            raise self.refusal(f"the key {key!r} is missing, so the model cannot be rebuilt.")
        return value

    def of_model(self, key: str, default: Any = REQUIRED) -> Any:
        return self.get(f"{self.architecture}.{key}", default)

    def uniform(self, key: str, default: Any = REQUIRED) -> Any:
        """A value of the model. The file may have a list with one value for each layer; they must be the same."""
        value = self.of_model(key, default)
        if isinstance(value, list) and value:
            if value.count(value[0]) != len(value) or len(value) != self.of_model("block_count"):
                raise self.refusal(
                    f"{self.architecture}.{key} is {value!r:.80}; this course runs models whose layers "
                    "are all of one shape, so it must be the same number for each layer."
                )
            return value[0]
        return value

    def numbers(self, name: str) -> numpy.ndarray:
        """A tensor's numbers as float32."""
        kind, shape, row_bytes, offset = self.tensors[name]
        data = numpy.ndarray((*shape[:-1], row_bytes), "u1", self.data, self.first + offset)
        try:
            return gguf.dequantize(data, kind)
        except (NotImplementedError, ValueError) as error:
            raise self.refusal(f"tensor {name!r} is stored as {kind.name}, which cannot be read: {error}") from error

    # Reading: one value after another

    def refusal(self, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {problem}")

    def wrong(self, problem: str) -> CheckpointError:
        return self.refusal(f"cut short, or not a GGUF file: {self.what} {problem}. Download it again.")

    def skip(self, size: int) -> int:
        """Move the position by `size` bytes. Returns the old position."""
        start, self.position = self.position, self.position + size
        if self.position > len(self.data):
            raise self.wrong(f"should end at byte {self.position:,}, and the file has {len(self.data):,}")
        return start

    def number(self, format: str) -> Any:
        return struct.unpack_from(f"<{format}", self.data, self.skip(struct.calcsize(f"<{format}")))[0]

    def text(self) -> str:
        size = self.number("Q")
        start = self.skip(size)
        try:
            return str(self.data[start : start + size], "utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(f"has text that is no UTF-8 ({error.reason})") from None

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            return self.number(NUMBERS[kind])
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            raise self.wrong(f"has a value of type {kind}, which there is not")
        item, length = self.number("I"), self.number("Q")
        if item == ARRAY:
            raise self.wrong("has arrays in an array, which llama.cpp does not read either")
        if item in NUMBERS:
            dtype = numpy.dtype(f"<{NUMBERS[item]}")
            return numpy.ndarray(length, dtype, self.data, self.skip(length * dtype.itemsize)).tolist()
        if length * 8 > len(self.data):  # a text begins with 8 bytes, its length
            raise self.wrong(f"says that it has {length:,} values")
        return [self.value(item) for _ in range(length)]

    def new_name(self, kind: str, i: int, known: Container[str]) -> str:
        """Read the name of a key or a tensor, number i of its kind. Errors name it from here on."""
        self.what = f"{kind} number {i}"
        name = self.text()
        self.what = f"{kind} {name!r:.80}"
        if name in known:
            raise self.wrong("is there twice")
        return name

    def read_key(self, i: int) -> None:
        key = self.new_name("key", i, self.keys)
        kind = self.number("I")
        value = self.keys[key] = self.value(kind)
        if key == "general.alignment":
            self.alignment = value
            if kind != UINT32 or not value or value & (value - 1):
                raise self.wrong("is no power of two in 32 bits")

    def read_tensor_header(self, i: int) -> None:
        """A tensor must begin where the one before it ends, as in llama.cpp."""
        name = self.new_name("tensor", i, self.tensors)
        num_dimensions = self.number("I")
        if num_dimensions > MOST_DIMENSIONS:
            raise self.wrong(f"has {num_dimensions:,} dimensions")
        shape = [self.number("Q") for _ in range(num_dimensions)]
        number, offset = self.number("I"), self.number("Q")
        try:
            kind = gguf.GGMLQuantizationType(number)
            per_block, block_size = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise self.wrong(f"is stored as type {number}, which cannot be read") from None
        if not shape or not math.prod(shape) or shape[0] % per_block:
            raise self.wrong(f"has the shape {shape}")
        if offset != (expected := self.num_bytes + -self.num_bytes % self.alignment):
            raise self.wrong(f"begins at byte {offset:,} of the tensors, in place of {expected:,}")
        row_bytes = shape[0] // per_block * block_size
        self.num_bytes = offset + math.prod(shape[1:]) * row_bytes
        if self.num_bytes > len(self.data):
            raise self.wrong(f"of shape {shape} does not fit into the file")
        self.tensors[name] = Stored(kind, tuple(reversed(shape)), row_bytes, offset)
