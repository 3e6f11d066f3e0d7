#!/bin/sh
# gguf 0.19.0, format Q4_0: a block of 32 weights in four bits with one scale.
# One would guess a symmetric grid, -7 to 7 times a positive scale. Observed: the scale is the weight of the largest
# magnitude *with its sign* divided by -8, so it is negative for a block whose largest weight is positive, and the grid
# reaches further on that side: +8 comes back as 8 and -7.9 as -7, while in the mirrored block -8 comes back and 7.9
# becomes 7. A reader that takes the absolute value of the scale flips such blocks.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import gguf
import numpy as np

Q4_0 = gguf.GGMLQuantizationType.Q4_0

def round_trip(first, second):
    block = np.array([[first, second] + [0.0] * 30], dtype=np.float32)
    stored = gguf.quants.quantize(block, Q4_0)
    scale = float(stored[0, :2].view(np.float16)[0])
    return scale, gguf.quants.dequantize(stored, Q4_0)[0, :2].tolist()

positive, negative = round_trip(8.0, -7.9), round_trip(-8.0, 7.9)
print("8, -7.9 ->", positive, "   -8, 7.9 ->", negative)
assert positive == (-1.0, [8.0, -7.0])
assert negative == (1.0, [-8.0, 7.0])
EOF
"$dir/venv/bin/python" "$dir/observe.py"
