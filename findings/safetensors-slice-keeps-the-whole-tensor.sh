#!/bin/sh
# safetensors 0.8.0 with torch 2.13.0: `get_slice`, which tensor parallelism uses to read a rank's own rows, and `get_tensor`.
# One would guess that a slice of 2 rows has the memory of 2 rows, and that every call returns numbers of its own.
# Observed: the slice is a view of the whole tensor's storage, so `torch.save` of 2 rows writes all 1,000 of them; and two
# calls for one tensor return the same memory: what is written into the first result stands in the second.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import io
import os
import tempfile

import torch
from safetensors import safe_open
from safetensors.torch import save_file

path = os.path.join(tempfile.mkdtemp(), "model.safetensors")
save_file({"weight": torch.zeros(1000, 1000)}, path)
with safe_open(path, "pt") as file:
    rows = file.get_slice("weight")[0:2]
    saved = io.BytesIO()
    torch.save(rows, saved)
    print("bytes of 2 rows:", rows.nbytes, "of their storage:", rows.untyped_storage().nbytes())
    print("bytes that torch.save writes:", len(saved.getvalue()))
    first, second = file.get_tensor("weight"), file.get_tensor("weight")
    first[0, 0] = 5
    print("written into the first result: 5, read from the second:", second[0, 0].item())
assert rows.nbytes == 8_000 and rows.untyped_storage().nbytes() == 4_000_000 and len(saved.getvalue()) > 4_000_000
assert second[0, 0] == 5
EOF
"$dir/venv/bin/python" "$dir/observe.py"
