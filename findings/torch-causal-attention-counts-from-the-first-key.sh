#!/bin/sh
# torch 2.13.0: `scaled_dot_product_attention(is_causal=True)` with fewer queries than keys, as with a KV cache.
# One would guess that the last query is the newest token and sees all keys, as flash-attn has it since 2.1.
# Observed: the first query is paired with the first key. A decoding step, one query and three cached keys, looks at the
# first key only; and of a chunk of two queries the second sees two keys of five. Nothing warns. The mask for a cache is
# `torch.nn.attention.bias.causal_lower_right`.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as attention

def seen(queries, keys, **mask):
    '''How much of each key every query takes: the values are unit vectors. (queries, keys)'''
    q, k = torch.zeros(1, 1, queries, 8), torch.zeros(1, 1, keys, 8)
    return attention(q, k, torch.eye(keys)[None, None], **mask)[0, 0]

for queries, keys in ((1, 3), (2, 5)):
    first, last = seen(queries, keys, is_causal=True), seen(queries, keys, attn_mask=causal_lower_right(queries, keys))
    print(f"{queries} queries, {keys} keys: is_causal sees", (first > 0).sum(1).tolist(), "keys; lower right", (last > 0).sum(1).tolist())
    assert (first > 0).sum(1).tolist() == list(range(1, queries + 1))
    assert (last > 0).sum(1).tolist() == list(range(keys - queries + 1, keys + 1))
EOF
"$dir/venv/bin/python" "$dir/observe.py"
