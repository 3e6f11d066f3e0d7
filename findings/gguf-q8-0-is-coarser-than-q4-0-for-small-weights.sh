#!/bin/sh
# gguf 0.19.0, formats Q8_0 and Q4_0: weights of a normal distribution, made smaller and smaller.
# Every block of 32 has a scale of its own, so one would guess that the error relative to the weights stays, and that eight
# bits are better than four. Observed: the scale is a float16. Q8_0 divides by 127 before it stores the scale, Q4_0 only by 8,
# so Q8_0's is the first to fall among the float16 numbers that have few bits left. With a standard deviation of 1e-4 its
# error is three times that of larger weights, at 1e-5 it is larger than Q4_0's, and at 1e-6 the blocks are off by more than
# the weights themselves. Small weights, a LoRA's product or a test's, should be scaled up before they are quantized.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import gguf
import numpy as np

weights = np.random.default_rng(0).standard_normal((1, 4096)).astype(np.float32)

def error(kind, deviation):  # the largest one, in standard deviations
    small = weights * np.float32(deviation)
    stored = gguf.quants.dequantize(gguf.quants.quantize(small, kind), kind)
    return float(abs(stored - small).max() / deviation)

errors = {}
for deviation in (1.0, 1e-2, 1e-4, 1e-5, 1e-6):
    errors[deviation] = [error(kind, deviation) for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0)]
    print("standard deviation {:7}: error of Q8_0 {:.3f}, of Q4_0 {:.3f}".format(deviation, *errors[deviation]))
assert errors[1.0][0] < 0.02 < 0.1 < errors[1.0][1]
assert errors[1e-4][0] > 2 * errors[1.0][0]
assert errors[1e-5][0] > errors[1e-5][1]
assert errors[1e-6][0] > 1
EOF
"$dir/venv/bin/python" "$dir/observe.py"
