#!/bin/sh
# gguf 0.19.0, format Q8_0, beside torch 2.13.0: both round a weight divided by its scale to a whole number.
# One would guess the same integers. Observed: gguf rounds halves away from zero (0.5 -> 1, 2.5 -> 3), torch (and numpy)
# to the nearest even number (0 and 2). An engine that quantizes with `torch.round` differs from a Q8_0 file of the same
# weights wherever a weight lies in the middle, which integers and powers of two, as tests like them, do.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 numpy==2.4.6 torch==2.13.0
cat > "$dir/observe.py" <<'EOF'
import gguf
import numpy as np
import torch

Q8_0 = gguf.GGMLQuantizationType.Q8_0
weights = np.array([[127.0, 0.5, 1.5, 2.5, -0.5] + [0.0] * 27], dtype=np.float32)  # the scale is 1
stored = gguf.quants.dequantize(gguf.quants.quantize(weights, Q8_0), Q8_0)[0, 1:5].tolist()
rounded = torch.from_numpy(weights)[0, 1:5].round().tolist()
print("gguf", stored, "torch", rounded)
assert stored == [1.0, 2.0, 3.0, -1.0]
assert rounded == [0.0, 2.0, 2.0, -0.0]
EOF
"$dir/venv/bin/python" "$dir/observe.py"
