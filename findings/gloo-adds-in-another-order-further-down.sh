#!/bin/sh
# torch 2.13.0, backend gloo: `all_reduce` among four ranks, each with two equal rows, as of one prompt twice in a batch.
# Sums of float32 depend on their order, so one would expect other bits than a loop over the ranks gives; but one would
# guess one order for all elements, hence equal rows. Observed: each part of the tensor starts its way round the ring at
# another rank, so equal rows come back different; 1e8, 1, -1e8, 1 is 0 in one half of a tensor and 1 in the other. With
# two ranks there is only one order. Under tensor parallelism the same prompt can thus get another token in another row of
# the batch, however deterministic the kernels are; compare such runs with a tolerance, or in float64.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import tempfile
import torch
import torch.distributed as dist

def main(rank, file, world_size):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    row = torch.randn(500, generator=torch.Generator().manual_seed(rank))
    rows = torch.stack([row, row])
    dist.all_reduce(rows)
    constant = torch.full((1000,), [1e8, 1.0, -1e8, 1.0][rank])
    dist.all_reduce(constant)
    differing = (rows[0] != rows[1]).sum().item()
    if rank == 0:
        print(world_size, "ranks:", differing, "of 500 elements differ between two equal rows")
    if world_size == 2:
        assert differing == 0
    else:
        assert differing > 0 and torch.allclose(rows[0], rows[1], atol=1e-5)
        values, counts = constant.unique(return_counts=True)
        if rank == 0:
            print("1e8 + 1 - 1e8 + 1 is", values.tolist(), "in", counts.tolist(), "elements")
        assert values.tolist() == [0.0, 1.0] and counts.tolist() == [500, 500]
    dist.destroy_process_group()

if __name__ == "__main__":
    for world_size in (2, 4):
        torch.multiprocessing.spawn(main, args=(tempfile.mktemp(), world_size), nprocs=world_size)
EOF
"$dir/venv/bin/python" "$dir/observe.py"
