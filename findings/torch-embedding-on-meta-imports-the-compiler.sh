#!/bin/sh
# torch 2.13.0: building `nn.Embedding` on the meta device, where tensors have shapes and no memory.
# One would guess that nothing happens: that is what the device is for, and `nn.Linear` takes microseconds there.
# Observed: initialising the table imports torch's compiler (torch._dynamo), which takes seconds in every process, ranks
# and workers included. `nn.Embedding.from_pretrained` with an empty table does not.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import sys
import time
import torch

def imports_compiler(build):
    start = time.perf_counter()
    with torch.device("meta"):
        build()
    print(f"{time.perf_counter() - start:.2f} s, compiler imported: {'torch._dynamo' in sys.modules}")
    return "torch._dynamo" in sys.modules

assert not imports_compiler(lambda: torch.nn.Linear(10, 4))
assert not imports_compiler(lambda: torch.nn.Embedding.from_pretrained(torch.empty(10, 4)))
assert imports_compiler(lambda: torch.nn.Embedding(10, 4))
EOF
"$dir/venv/bin/python" "$dir/observe.py"
