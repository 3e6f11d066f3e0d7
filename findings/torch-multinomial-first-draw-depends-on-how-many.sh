#!/bin/sh
# torch 2.13.0 on a CPU: `torch.multinomial(p, n, replacement=True)` with one seed.
# n draws are n independent draws, so one would guess that the first of three is the one that n = 1 gives.
# Observed: another algorithm draws a single one; the first of three is a different element. An engine that draws the
# tokens of n samples in one call, or one at a time, gives different texts for one seed, both of them right.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import torch

parted = 0
for seed in range(20):
    p = torch.rand(100, generator=torch.Generator().manual_seed(seed))
    one, three = (
        torch.multinomial(p, n, replacement=True, generator=torch.Generator().manual_seed(5)).tolist() for n in (1, 3)
    )
    parted += one[0] != three[0]
print("of 20 distributions, the first of three draws differs from a single draw in", parted)
assert parted >= 15
EOF
"$dir/venv/bin/python" "$dir/observe.py"
