#!/bin/sh
# torch 2.13.0 on a CPU: the first numbers of `torch.randn(n)` with one seed.
# `torch.rand(n)` begins with the same numbers for every n, so one would guess the same of `randn`.
# Observed: n = 15 and n = 16 begin with different numbers: from 16 on another algorithm fills the tensor. Random weights
# for a test change entirely when one dimension grows by one, and a tensor drawn by two ranks in parts is another tensor.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import torch

def first(draw, n):
    return draw(n, generator=torch.Generator().manual_seed(1))[:4].tolist()

for name, draw in (("rand", torch.rand), ("randn", torch.randn)):
    print(name, [round(x, 4) for x in first(draw, 15)], [round(x, 4) for x in first(draw, 16)])
assert first(torch.rand, 15) == first(torch.rand, 16)
assert first(torch.randn, 15) != first(torch.randn, 16) == first(torch.randn, 32)
EOF
"$dir/venv/bin/python" "$dir/observe.py"
