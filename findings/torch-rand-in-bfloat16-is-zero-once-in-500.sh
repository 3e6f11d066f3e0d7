#!/bin/sh
# torch 2.13.0 on a CPU: `torch.rand` in a model's own dtype, as for Gumbel noise, -log(-log(u)), or inverse sampling.
# In float32 no zero comes in a million draws, and bfloat16 has even smaller numbers, of which `rand` does return some
# (2e-7), so one would guess that an exact 0 stays as rare. Observed: it comes once in 512 draws (float16: once in 4,096),
# which is how often a number would round to 1, the value that `rand` must not return. So the largest draws become the
# smallest, and in a vocabulary of 50,000 tokens every row of Gumbel noise has a hundred infinities.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import torch

for dtype, low, high in ((torch.bfloat16, 1_700, 2_200), (torch.float16, 180, 320), (torch.float32, 0, 3)):
    draws = torch.rand(10**6, dtype=dtype, generator=torch.Generator().manual_seed(0))
    zeros = int((draws == 0).sum())
    print(dtype, "zeros in a million draws:", zeros, "smallest other:", draws[draws > 0].min().item())
    assert low <= zeros <= high
EOF
"$dir/venv/bin/python" "$dir/observe.py"
