#!/bin/sh
# safetensors 0.8.0: reading a bfloat16 tensor, the dtype of most published checkpoints, with framework="np".
# The header names the dtype and the file needs no torch, so one would guess an array (of raw bits at least), or an error
# when the file is opened. Observed: opening, names and shapes work, and `get_tensor` raises
# TypeError "data type 'bfloat16' not understood" from inside numpy; float8 raises AttributeError instead.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import tempfile
import torch
from safetensors import safe_open
from safetensors.torch import save_file

path = tempfile.mktemp()
save_file({"bf16": torch.ones(2).bfloat16(), "f8": torch.ones(2).to(torch.float8_e4m3fn)}, path)
file, raised = safe_open(path, "np"), {}
for name in ("bf16", "f8"):
    try:
        file.get_tensor(name)
    except Exception as error:
        raised[name] = type(error).__name__
        print(name, file.get_slice(name).get_dtype(), type(error).__name__, error)
assert raised == {"bf16": "TypeError", "f8": "AttributeError"}
EOF
"$dir/venv/bin/python" "$dir/observe.py"
