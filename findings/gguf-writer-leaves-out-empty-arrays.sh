#!/bin/sh
# gguf 0.19.0: `GGUFWriter.add_array(key, [])`, for instance the merges of a tokenizer that has none.
# GGUF can store an array of length 0, so one would guess that the key is there with an empty array, or an error.
# Observed: neither; the key is left out without a word, and a reader cannot tell "none" from "not stated".
# Whole numbers in a list become 32-bit: 2**40 in an array is an error of `struct`, though GGUF has 64-bit integers.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0
cat > "$dir/observe.py" <<'EOF'
import os
import struct
import tempfile

from gguf import GGUFReader, GGUFWriter


def keys(**arrays):
    path = os.path.join(tempfile.mkdtemp(), "model.gguf")
    writer = GGUFWriter(path, "llama")
    for key, array in arrays.items():
        writer.add_array(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [key for key in GGUFReader(path).fields if not key.startswith("GGUF.")]


found = keys(empty=[], one=[1])
print("keys written: empty, one; keys read:", found)
assert found == ["general.architecture", "one"]
try:
    keys(large=[2**40, 1])
    raise SystemExit("[2**40, 1] was written")
except struct.error as error:
    print("[2**40, 1]:", error)
EOF
"$dir/venv/bin/python" "$dir/observe.py"
