#!/bin/sh
# safetensors 0.8.0: the order in which `save_file` writes tensors.
# One would guess the order of the dictionary, or that of the names. Observed: first by the width of their type, the widest
# first, and by name only among types of one width. A layer's INT8 weight and its float32 scale therefore stand at opposite
# ends of a quantized checkpoint, and a loader that streams a file from front to back meets all scales before any weight.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import json
import struct
import tempfile
import numpy as np
from safetensors.numpy import save_file

tensors = {}
for layer in range(3):
    tensors[f"layers.{layer}.weight"] = np.zeros(8, np.int8)
    tensors[f"layers.{layer}.norm"] = np.zeros(8, np.float16)
    tensors[f"layers.{layer}.weight_scale"] = np.zeros(1, np.float32)
file = tempfile.mktemp()
save_file(tensors, file)
with open(file, "rb") as opened:
    header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
order = sorted(header, key=lambda name: header[name]["data_offsets"])
print("\n".join(order))
kinds = [name.rpartition(".")[2] for name in order]
assert kinds == ["weight_scale"] * 3 + ["norm"] * 3 + ["weight"] * 3
EOF
"$dir/venv/bin/python" "$dir/observe.py"
