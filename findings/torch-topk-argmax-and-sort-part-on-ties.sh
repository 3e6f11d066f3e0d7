#!/bin/sh
# torch 2.13.0 on a CPU: the largest of 50 equal scores, asked for in three ways.
# One would guess that greedy decoding by `argmax`, by `topk(1)` and by `sort(descending=True)[0]` picks one token.
# Observed: `argmax` (and `max`'s index) is the first, `topk` and `sort` choose others, and which ones depends on the
# number of scores. Engines that rank for log-probabilities by `topk` and sample by `argmax` can report a different
# "best" token than they chose; comparing two engines' greedy tokens needs one rule for ties.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import torch

scores = torch.zeros(50)
argmax, topk, sort = (int(i) for i in (scores.argmax(), scores.topk(1).indices, scores.sort(descending=True).indices[0]))
print("argmax", argmax, "topk", topk, "sort", sort, "topk of 1000:", int(torch.zeros(1000).topk(1).indices))
assert argmax == int(scores.max(0).indices) == 0
assert topk != 0 and sort != 0
EOF
"$dir/venv/bin/python" "$dir/observe.py"
