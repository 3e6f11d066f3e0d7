#!/bin/sh
# torch 2.13.0 (oneDNN), `torch.ops.onednn.qlinear_pointwise`: uint8 activations times int8 weights on an x86 processor
# without VNNI instructions (here asked for by ONEDNN_MAX_CPU_ISA=AVX2, so that it shows on newer processors too).
# One would guess that a product of 8-bit integers summed in 32 bits is exact.
# Observed: two products are added in 16 bits first, which saturates: sums are wrong by tens of thousands, with no error
# or warning. With weights limited to 7 bits (-63 to 63) no pair can overflow, and every sum is exact.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import os
os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX2"
import torch

generator = torch.Generator().manual_seed(0)
x = torch.randint(0, 256, (4, 576), dtype=torch.uint8, generator=generator)

def largest_error(limit):
    weight = torch.randint(-limit, limit + 1, (64, 576), dtype=torch.int8, generator=generator)
    packed = torch.ops.onednn.qlinear_prepack(weight, [len(x), 576])
    ones, zeros = torch.ones(64), torch.zeros(64, dtype=torch.long)
    y = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, 128, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return (y.double() - (x.double() - 128) @ weight.double().T).abs().max().item()

full, seven = largest_error(127), largest_error(63)
print(f"largest error with weights of 8 bits {full:g}, of 7 bits {seven:g}")
assert full > 1000 and seven == 0
EOF
"$dir/venv/bin/python" "$dir/observe.py"
