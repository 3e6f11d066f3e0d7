#!/bin/sh
# torch 2.13.0 on a CPU: casting what is too large to float8_e4m3fn, a format for weights and KV caches.
# The format has no infinity but has NaN, so one would guess NaN, a visible error; float8_e5m2 beside it keeps infinity.
# Observed: everything too large, infinity included, becomes 448, the largest finite number. An overflow that float16 or
# bfloat16 would have shown as inf is stored as an ordinary value.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import torch

x = torch.tensor([448.0, 480.0, 1e4, float("inf"), float("nan")])
e4m3, e5m2 = (x.to(dtype).float().tolist() for dtype in (torch.float8_e4m3fn, torch.float8_e5m2))
print("e4m3fn", e4m3, "e5m2", e5m2)
assert e4m3[:4] == [448.0] * 4 and e4m3[4] != e4m3[4]
assert e5m2[3] == float("inf")
EOF
"$dir/venv/bin/python" "$dir/observe.py"
