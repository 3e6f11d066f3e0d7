#!/bin/sh
# triton 3.9.0: `tl.dot` of two tiles of 4 by 4, under the interpreter and compiled for a GPU (which needs no GPU).
# The interpreter refuses a `tl.arange` that is no power of two, as the compiler does, so one would guess that it refuses
# every shape that the compiler refuses. Observed: it multiplies 4 by 4 tiles and the result is right; the compiler stops
# with "K >= 8". A kernel that was only tried without a GPU may not compile: `triton.compile` with a `GPUTarget` shows it.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 triton==3.9.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import subprocess
import sys

KERNEL = '''
import torch, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

@triton.jit
def product(a, b, c, N: tl.constexpr):
    tile = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c + tile, tl.dot(tl.load(a + tile), tl.load(b + tile)))
'''
INTERPRET = '''
a, b, c = torch.randn(4, 4), torch.randn(4, 4), torch.zeros(4, 4)
product[(1,)](a, b, c, 4)
print("interpreted, 4 by 4: error", (c - a @ b).abs().max().item())
assert torch.allclose(c, a @ b, atol=1e-5)
'''
COMPILE = '''
for n in (16, 4):
    source = ASTSource(product, {"a": "*fp32", "b": "*fp32", "c": "*fp32", "N": "constexpr"}, {"N": n})
    try:
        triton.compile(source, target=GPUTarget("cuda", 90, 32))
        print("compiled,", n, "by", n)
        assert n == 16
    except triton.CompilationError as error:
        print("compiled,", n, "by", n, "refused:", str(error).strip().splitlines()[-1])
        assert n == 4 and "K >= 8" in str(error)
'''
import os
import tempfile

for body, interpret in ((INTERPRET, "1"), (COMPILE, "0")):
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(KERNEL + body)
        file.flush()
        subprocess.run([sys.executable, "-W", "ignore", file.name], check=True, env={**os.environ, "TRITON_INTERPRET": interpret})
EOF
"$dir/venv/bin/python" "$dir/observe.py"
