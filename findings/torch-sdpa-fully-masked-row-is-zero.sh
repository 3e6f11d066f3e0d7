#!/bin/sh
# torch 2.13.0 on a CPU: `scaled_dot_product_attention` for a query that may see no key (padding in a batch).
# The formula is softmax of a row of -inf, which is NaN, and one would guess NaN.
# Observed: zeros, with a boolean mask and with a float mask of -inf. Padded rows therefore do not spread NaN through this
# function, but do so as soon as the same attention is written by hand: a test against one cannot stand for the other.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import torch
import torch.nn.functional as F

q = torch.randn(1, 1, 2, 4, generator=torch.Generator().manual_seed(0))
seen = torch.tensor([[True, False], [False, False]])
by_bool = F.scaled_dot_product_attention(q, q, q, attn_mask=seen)[0, 0, 1]
by_float = F.scaled_dot_product_attention(q, q, q, attn_mask=torch.zeros(2, 2).masked_fill(~seen, -torch.inf))[0, 0, 1]
by_hand = ((q @ q.mT / 2).masked_fill(~seen, -torch.inf).softmax(-1) @ q)[0, 0, 1]
print("sdpa", by_bool.tolist(), by_float.tolist(), "by hand", by_hand.tolist())
assert by_bool.tolist() == by_float.tolist() == [0.0] * 4
assert by_hand.isnan().all()
EOF
"$dir/venv/bin/python" "$dir/observe.py"
