#!/bin/sh
# triton 3.9.0: a mask `(i < 3) & (n > 0)`, of a tile of booleans and a single one, as where a program has nothing to store.
# Both parts are int1, either alone is a mask, the compiler takes it, and the interpreter says that the result is int1; so
# one would guess that it is a mask there, too. Observed: under TRITON_INTERPRET=1 the store ends with "mask has unsupported
# dtype", because the single one was widened to a tile of 32-bit numbers. `i < tl.where(n > 0, 3, 0)` works in both.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 triton==3.9.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOP'
import sys

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def both(out, n):
    i = tl.arange(0, 8)
    tl.store(out + i, i, mask=(i < 3) & (n > 0))


@triton.jit
def other(out, n):
    i = tl.arange(0, 8)
    tl.store(out + i, i, mask=i < tl.where(n > 0, 3, 0))


if sys.argv[1] == "compiled":
    source = ASTSource(both, {"out": "*i32", "n": "i32"}, {})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]
    print("compiled: both")
else:
    out = torch.full((8,), -1, dtype=torch.int32)
    try:
        both[(1,)](out, 1)
        raise AssertionError("it was interpreted")
    except Exception as error:
        print("interpreted: both:", error)
        assert "mask has unsupported dtype" in str(error)
    other[(1,)](out, 1)
    print("interpreted: other:", out.tolist())
    assert out.tolist() == [0, 1, 2] + 5 * [-1]
EOP
TRITON_INTERPRET=0 "$dir/venv/bin/python" -W ignore "$dir/observe.py" compiled
TRITON_INTERPRET=1 "$dir/venv/bin/python" -W ignore "$dir/observe.py" interpreted
