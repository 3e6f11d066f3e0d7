#!/bin/sh
# torch 2.13.0, backend gloo: `reduce` to rank 0 among three ranks.
# The documentation says that only rank 0 receives the result, so one would guess that the other ranks' tensors stay.
# Observed: they are changed, to sums of some ranks that differ from element to element. A rank that goes on with its own
# part after a `reduce`, a residual for instance, computes with those.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import tempfile
import torch
import torch.distributed as dist

def main(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=3)
    x = torch.full((4,), float(rank + 1))
    dist.reduce(x, dst=0)
    everyone = [None] * 3
    dist.all_gather_object(everyone, x.tolist())
    if rank == 0:
        print("after reduce:", everyone)
        assert everyone[0] == [6.0] * 4
        assert everyone[1] != [2.0] * 4 and everyone[2] != [3.0] * 4
        assert len(set(everyone[1])) > 1
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(main, args=(tempfile.mktemp(),), nprocs=3)
EOF
"$dir/venv/bin/python" "$dir/observe.py"
