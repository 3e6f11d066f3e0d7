#!/bin/sh
# torch 2.13.0, backend gloo: `all_reduce` of a view whose elements are not neighbours in memory.
# One would guess that the view is summed, or that the call is refused, as `dist.gather` refuses it.
# Observed: no error. The first elements of the *storage*, as many as the view has, are summed in place: neighbours that
# the view does not contain are overwritten, and most of the view keeps its old numbers.
# A column slice of a matrix, which tensor parallelism produces everywhere, is such a view: copy it first.
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
    matrix = torch.arange(12.0).view(3, 4) + 100 * rank
    dist.all_reduce(matrix[:, 1:3])  # six elements
    if rank == 0:
        wanted = torch.arange(12.0).view(3, 4)
        wanted[:, 1:3] = 2 * wanted[:, 1:3] + 100
        print("expected", wanted.tolist())
        print("observed", matrix.tolist())
        summed = torch.arange(12.0)
        summed[1:7] = 2 * summed[1:7] + 100
        assert matrix.flatten().tolist() == summed.tolist() != wanted.flatten().tolist()
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(main, args=(tempfile.mktemp(),), nprocs=2)
EOF
"$dir/venv/bin/python" "$dir/observe.py"
