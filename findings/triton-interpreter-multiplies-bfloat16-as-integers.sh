#!/bin/sh
# triton 3.9.0 under TRITON_INTERPRET=1, with torch 2.13.0 on a CPU: `tl.dot` of two bfloat16 tiles.
# One would guess the product of the numbers, in float32, as for float16 and float32 tiles.
# Observed: the interpreter keeps bfloat16 as 16-bit integers, and `tl.dot` multiplies these bit patterns: results in the
# billions, no error. Convert tiles to float32 before `tl.dot` where a kernel should also run without a GPU.
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
def square(x, y):
    i = tl.arange(0, 16)
    tile = tl.load(x + i[:, None] * 16 + i[None, :])
    tl.store(y + i[:, None] * 16 + i[None, :], tl.dot(tile, tile))

errors = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.zeros(16, 16)
    square[(1,)](x, y)
    errors[dtype] = (y - x.float() @ x.float()).abs().max().item()
    print(dtype, "largest error", errors[dtype])
assert errors[torch.float32] < 1e-4 and errors[torch.float16] < 1e-1 and errors[torch.bfloat16] > 1e6
EOF
"$dir/venv/bin/python" "$dir/observe.py"
