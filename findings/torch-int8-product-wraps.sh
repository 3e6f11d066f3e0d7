#!/bin/sh
# torch 2.13.0 on a CPU: a product of two int8 matrices, which is where an INT8 engine spends its time.
# One would guess that sums are kept in int32, as `torch._int_mm` does and as `sum` of an int8 tensor does in int64.
# Observed: `@`, `bmm`, `einsum` and `linear` return int8 and wrap around without a warning: 100 times 100 times 100
# terms, 1,000,000, comes out as 64. Values of a test that are small enough hide it.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import torch

a, b = torch.full((2, 100), 100, dtype=torch.int8), torch.full((100, 2), 100, dtype=torch.int8)
products = {
    "@": a @ b,
    "bmm": torch.bmm(a[None], b[None])[0],
    "einsum": torch.einsum("ij,jk->ik", a, b),
    "linear": torch.nn.functional.linear(a, b.T),
}
for name, product in products.items():
    print(name, product.dtype, product[0, 0].item())
    assert product.dtype == torch.int8 and product[0, 0] == 64 == (1_000_000 + 128) % 256 - 128
whole = torch._int_mm(a, b)
print("_int_mm", whole.dtype, whole[0, 0].item(), "  sum", a.sum().dtype, a.sum().item())
assert (whole.dtype, whole[0, 0].item()) == (torch.int32, 1_000_000)
assert (a.sum().dtype, a.sum().item()) == (torch.int64, 20_000)
EOF
"$dir/venv/bin/python" "$dir/observe.py"
