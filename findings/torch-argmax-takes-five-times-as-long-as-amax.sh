#!/bin/sh
# torch 2.13.0 on a CPU (x86-64): the likeliest of 49,152 logits, which greedy decoding looks for once a token.
# `argmax` and `amax` read the same numbers once, so one would guess that they take about as long. Observed (AVX2, one
# thread): argmax takes 48 microseconds and amax 8, numpy's argmax of the same memory 5; `isnan().any()` takes 61, though
# `amax().isnan()` says the same. Both of torch's reductions are exact; argmax is not vectorised. The script asks for half of the
# difference, in the shortest of many turns.
set -eu
[ "$(uname -m)" = x86_64 ] || { echo "skipped: seen on x86-64 only"; exit 0; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import time
import torch

torch.set_num_threads(1)
logits = torch.randn(49152, generator=torch.Generator().manual_seed(0))
ways = {
    "argmax": lambda: logits.argmax(),
    "amax": lambda: logits.amax(),
    "numpy's argmax": lambda: logits.numpy().argmax(),
    "isnan().any()": lambda: logits.isnan().any(),
    "amax().isnan()": lambda: logits.amax().isnan(),
}
best = dict.fromkeys(ways, float("inf"))
for _ in range(300):
    for name, compute in ways.items():
        start = time.perf_counter()
        compute()
        best[name] = min(best[name], time.perf_counter() - start)
print({name: f"{1e6 * seconds:.0f} us" for name, seconds in best.items()})
assert best["argmax"] > 2.5 * best["amax"] and best["argmax"] > 2.5 * best["numpy's argmax"]
assert best["isnan().any()"] > 2.5 * best["amax().isnan()"]
EOF
"$dir/venv/bin/python" "$dir/observe.py"
