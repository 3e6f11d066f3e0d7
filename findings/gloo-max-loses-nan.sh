#!/bin/sh
# torch 2.13.0, backend gloo: `all_reduce` with ReduceOp.MAX where one rank has NaN.
# torch.maximum returns NaN if either operand is NaN, whichever it is, so one would guess the same of the reduction.
# Observed: NaN survives if rank 0 has it and is lost if rank 1 has it; all ranks agree on the result, so nothing looks
# wrong afterwards. A shared absolute maximum (as for quantization scales) therefore does not report a broken rank.
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
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    nan = float("nan")
    x = torch.tensor([nan, 1.0]) if rank == 0 else torch.tensor([2.0, nan])
    dist.all_reduce(x, dist.ReduceOp.MAX)
    if rank == 0:
        print("torch.maximum", torch.maximum(torch.tensor([nan, 1.0]), torch.tensor([2.0, nan])).tolist())
        print("all_reduce   ", x.tolist())
    assert x[0].isnan() and x[1] == 1.0
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(main, args=(tempfile.mktemp(),), nprocs=2)
EOF
"$dir/venv/bin/python" "$dir/observe.py"
