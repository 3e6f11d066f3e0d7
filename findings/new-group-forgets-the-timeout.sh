#!/bin/sh
# torch 2.13.0: the timeout of a process group that `dist.new_group` makes, after `init_process_group(timeout=7 s)`.
# One would guess that it inherits the seven seconds.
# Observed: half an hour. A rank that dies while the others wait in a sub-group keeps them waiting for that long, although
# the program has asked for seconds: `new_group` must be told the timeout again.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import datetime
import tempfile
import torch
import torch.distributed as dist

def seconds(group):
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()

file = tempfile.mktemp()
dist.init_process_group(
    "gloo", init_method=f"file://{file}", rank=0, world_size=1, timeout=datetime.timedelta(seconds=7)
)
default, made = seconds(dist.group.WORLD), seconds(dist.new_group([0]))
print(f"default group: {default:g} s, new_group: {made:g} s")
assert (default, made) == (7, 1800)
EOF
"$dir/venv/bin/python" "$dir/observe.py"
