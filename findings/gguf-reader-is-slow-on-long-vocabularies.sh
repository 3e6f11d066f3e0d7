#!/bin/sh
# gguf 0.19.0 (llama.cpp's Python package): opening a file with `GGUFReader`.
# One would guess that opening a file costs little, since the tensors are only mapped, and a vocabulary is a few megabytes.
# Observed: each string of an array becomes two memory-mapped numpy views (80,005 for an array of 40,000 strings), and
# opening that file took 1.9 s, where the same bytes, read with struct in a loop, took 0.03 s. Vocabularies of today's models
# have 100,000 tokens and more, and twice as many merges, so a tool that opens a file only to learn its architecture waits for
# many seconds. Read the fields that you need yourself, or keep the reader for as long as it is useful.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import struct
import sys
import time

from gguf import GGUFReader, GGUFWriter

path, count = sys.argv[1] + "/words.gguf", 40_000
words = [f"word{i}" for i in range(count)]
writer = GGUFWriter(path, "llama")
writer.add_token_list(words)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()


def with_struct():
    """The same array, from the same bytes."""
    with open(path, "rb") as file:
        data = file.read()
    at = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4 + 4  # behind two types
    (length,) = struct.unpack_from("<Q", data, at)
    at, found = at + 8, []
    for _ in range(length):
        (size,) = struct.unpack_from("<Q", data, at)
        found.append(data[at + 8 : at + 8 + size].decode())
        at += 8 + size
    return found


def with_reader():
    return GGUFReader(path)


seconds = {}
for read in (with_struct, with_reader):
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        result = read()
        taken.append(time.perf_counter() - start)
    seconds[read.__name__] = min(taken)
    if read is with_struct:
        assert result == words
    else:
        field = result.fields["tokenizer.ggml.tokens"]
        print("numpy views for one array:", len(field.parts))
        assert field.contents() == words and len(field.parts) > 2 * count
ratio = seconds["with_reader"] / seconds["with_struct"]
print(f"{count} strings: struct {seconds['with_struct']:.3f} s, GGUFReader {seconds['with_reader']:.2f} s, {ratio:.0f} times")
assert ratio > 8
EOF
"$dir/venv/bin/python" "$dir/observe.py" "$dir"
