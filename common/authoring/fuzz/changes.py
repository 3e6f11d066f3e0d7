"""Changes to a checkpoint's files: impossible numbers, values of another type, files cut in half, flipped bytes."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.authoring.fuzz import files

VALUES = (
    None, True, False, -1, 0, 1, 2, 3, 160, 2**15, 2**24, 2**31, 2**63, 2**64, 10**30, 0.0, -0.5, 1e-45, 0.5, 1e9,
    1e300, float("inf"), float("nan"), "", " ", "a", "160", "llama", "a" * 5000, "\ud83d", "\x00", "../model", [], [[]],
    [None], [1, "a"], ["a", "a"], [-1], [2**40], {},
    {"a": 1}, {"content": 5}, {"type": "linear"}, [{"name": "a"}], "{% for %}",
)  # fmt: skip
"""Values that replace another one: numbers out of range, other types, texts that cannot be encoded."""


def change(kind: str, folder: Path, source: random.Random) -> str:
    """Change one file in the folder, sometimes two. Returns a description of the changes."""
    done = []
    for _ in range(1 if source.random() < 0.8 else 2):
        names = sorted(path.name for path in folder.iterdir())
        name = source.choice(names)
        if kind.startswith("gguf") and source.random() < 0.6:
            done.append(_change_gguf(kind, folder, source))
            continue
        path = folder / name
        ways: list[Callable] = [_whole_file, _bytes, _bytes]
        if path.suffix == ".json":
            ways += [_json] * 6
        elif path.suffix == ".safetensors":
            ways = [_safetensors] * 6 + [_bytes, _whole_file]
        elif path.suffix == ".gguf":
            ways = [_numbers] * 4 + [_bytes]
        try:
            done.append(f"{name}: {source.choice(ways)(path, source)}")
        except (ValueError, OSError, struct.error):  # the first of two changes has left no such file
            break
    return "; ".join(done)


def _whole_file(path: Path, source: random.Random) -> str:
    way = source.choice(["removed", "empty", "cut", "another's", "repeated", "a folder"])
    data = path.read_bytes()
    if way in ("removed", "a folder"):
        path.unlink()
        if way == "a folder":
            path.mkdir()
    elif way == "another's":
        other = source.choice(sorted(each for each in path.parent.iterdir() if each.is_file()))
        path.write_bytes(other.read_bytes())
        way = f"replaced by {other.name}"
    else:
        path.write_bytes({"empty": b"", "cut": data[: source.randrange(len(data) + 1)], "repeated": data * 2}[way])
    return way


def _bytes(path: Path, source: random.Random) -> str:
    """Change a few bytes, most often near the beginning, where the header is."""
    data = bytearray(path.read_bytes() or b"\x00")
    for _ in range(source.choice([1, 1, 2, 8])):
        place = source.randrange(min(len(data), source.choice([16, 200, 4000, len(data)])))
        way = source.choice(["flip", "set", "insert", "remove"])
        if way == "flip":
            data[place] ^= 1 << source.randrange(8)
        elif way == "set":
            data[place] = source.choice([0, 0xFF, 0x7F, 0x80, 0x22, 0x7B])
        elif way == "insert":
            data[place:place] = source.randbytes(source.choice([1, 4, 16]))
        elif len(data) > 1:
            del data[place]
    path.write_bytes(data)
    return "bytes"


def _numbers(path: Path, source: random.Random) -> str:
    """Overwrite a number somewhere in a binary header."""
    data = bytearray(path.read_bytes())
    size = source.choice([4, 8])
    place = source.randrange(min(len(data) - size, source.choice([64, 2000, 20000])))
    value = source.choice([0, 1, 2**8, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**64 - 1]) % 2 ** (8 * size)
    data[place : place + size] = value.to_bytes(size, "little")
    path.write_bytes(data)
    return f"{value} at byte {place}"


def _json(path: Path, source: random.Random) -> str:
    value = json.loads(path.read_text(encoding="utf-8"))
    done = change_value(value, source)
    path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
    return done


def _safetensors(path: Path, source: random.Random) -> str:
    """Change a value in the header of a safetensors file, and sometimes the header's length."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    done = change_value(header, source)
    written = json.dumps(header).encode("utf-8", "surrogatepass")
    length = len(written) if source.random() < 0.9 else source.choice([0, 1, size, 2**31, 2**63, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", length) + written + data[8 + size :])
    return done


def _change_gguf(kind: str, folder: Path, source: random.Random) -> str:
    """Write the GGUF file again, with one of its keys or tensors changed."""
    done = ""

    def change(keys: dict, tensors: dict) -> None:
        nonlocal done
        if source.random() < 0.8:
            done = change_value(keys, source)
            return
        name = source.choice(sorted(tensors))
        shape, numbers = tensors.pop(name)
        way = source.choice(["dropped", "renamed", "reshaped", "cut"])
        done = f"{name} {way}"
        if way == "renamed":
            tensors[f"{name}s"] = (shape, numbers)
        elif way == "reshaped":
            tensors[name] = (source.choice([shape[::-1], [*shape, 1], [len(numbers) // 4], [0], []]), numbers)
        elif way == "cut":
            tensors[name] = (shape, numbers[: len(numbers) // 2])

    files.make(kind, folder, change)
    return f"tiny.gguf: {done}"


def change_value(tree: Any, source: random.Random) -> str:
    """Change one value somewhere in a tree of dicts and lists. Returns its path and the change."""
    node, steps = tree, []
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return "nothing to change"
        key = source.choice(keys)
        steps.append(str(key)[:30])
        if not (isinstance(node[key], (dict, list)) and node[key] and source.random() < 0.7):
            break
        node = node[key]
    way = source.choice(["value", "value", "value", "number", "removed", "renamed", "another", "added"])
    old = node[key]
    if way == "number" and isinstance(old, (int, float)) and not isinstance(old, bool):
        node[key] = source.choice(
            [old + 1, old - 1, old * 2, old / 2, -old, old * 1000, old * 10**9, float(old), str(old)]
        )
    elif way == "removed":
        del node[key]
        return f"{'.'.join(steps)} removed"
    elif way in ("renamed", "added") and isinstance(node, dict):
        node[source.choice(["x", "", key.upper(), key + "_"])] = source.choice([old, *VALUES])
        if way == "renamed":
            del node[key]
        return f"{'.'.join(steps)} {way}"
    elif way == "another":
        node[key] = copy.deepcopy(node[source.choice(keys)])
    else:
        node[key] = copy.deepcopy(source.choice(VALUES))
    return f"{'.'.join(steps)} = {node[key]!r:.60}"
