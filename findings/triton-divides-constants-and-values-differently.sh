#!/bin/sh
# triton 3.9.0: `-7 // 2` and `-7 % 3` in a kernel, where -7 is a `tl.constexpr` and where it was loaded from memory.
# A kernel is written in Python, and one would guess that `//` means one thing in it.
# Observed: of constants they are Python's, rounded down: -4 and 2; of values they are C's, rounded toward zero: -3 and -1.
# Making an argument a constexpr, which should only make a kernel faster, changes its results for negative numbers.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 triton==3.9.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import os

os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl


@triton.jit
def divide(x, y, A: tl.constexpr):
    tl.store(y, A // 2)
    tl.store(y + 1, A % 3)
    tl.store(y + 2, tl.load(x) // 2)
    tl.store(y + 3, tl.load(x) % 3)


results = torch.zeros(4, dtype=torch.int32)
divide[(1,)](torch.tensor([-7], dtype=torch.int32), results, -7)
print("constants: -7 // 2, -7 % 3 =", results[:2].tolist(), " values:", results[2:].tolist())
assert results.tolist() == [-4, 2, -3, -1]
EOF
"$dir/venv/bin/python" "$dir/observe.py"
