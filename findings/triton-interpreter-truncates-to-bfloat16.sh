#!/bin/sh
# triton 3.9.0 under TRITON_INTERPRET=1: converting float32 to bfloat16 with `.to(tl.bfloat16)`.
# One would guess round to nearest even, which is what torch and the compiled kernel's instruction do.
# Observed: the lower 16 bits are cut off. 1.01171875 becomes 1.0078125 and not 1.015625; the error is up to twice as
# large and always toward zero, so sums drift. Comparisons with torch in bfloat16 need a wider tolerance there.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check triton==3.9.0 torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
import triton
import triton.language as tl

@triton.jit
def convert(x, y):
    i = tl.arange(0, 4)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16).to(tl.float32))

x = torch.tensor([1.01171875, -1.01171875, 1.0058, 3.1415926])
y = torch.zeros(4)
convert[(1,)](x, y)
print("interpreter", y.tolist(), "torch", x.bfloat16().tolist())
assert y.tolist() == [1.0078125, -1.0078125, 1.0, 3.140625]
assert x.bfloat16().tolist() == [1.015625, -1.015625, 1.0078125, 3.140625]
EOF
"$dir/venv/bin/python" "$dir/observe.py"
