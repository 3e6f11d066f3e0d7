#!/bin/sh
# torch 2.13.0 on a CPU: `torch.Generator.manual_seed` with seeds that differ only above their lowest 32 bits.
# It takes any 64-bit number, `initial_seed()` returns all of it and the state has 5,056 bytes, so one would guess that
# different seeds give different numbers. Observed: only the lowest 32 bits count. Seeds 1 and 1 + 2**32 give the same draws,
# and so do -1 and 2**32 - 1. A server that packs two numbers into one seed, a request's above a sample's for instance,
# draws the same tokens for every request; hash the two instead.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import torch

def draws(seed):
    generator = torch.Generator().manual_seed(seed)
    assert generator.initial_seed() == seed % 2**64
    numbers = torch.rand(3, generator=generator).tolist()
    print(f"{seed:22}", numbers, flush=True)
    return numbers

for one, other in ((1, 1 + 2**32), (1, 1 + (12345 << 32)), (-1, 2**32 - 1)):
    assert draws(one) == draws(other)
assert draws(1) != draws(2)
EOF
"$dir/venv/bin/python" "$dir/observe.py"
