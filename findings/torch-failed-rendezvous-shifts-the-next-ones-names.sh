#!/bin/sh
# torch 2.13.0: `init_process_group` that fails because no other rank came in time, and is called again, with another
# store and another rank 1 that is there. One would guess that a failed call leaves nothing behind (`is_initialized()` is
# False), and that the second one works.
# Observed: the second one fails as well, however long it waits. torch names a group by a count, and the failed one has
# been counted: this process looks for keys of group 1, and the new process writes those of group 0. There is nothing to
# call: `destroy_process_group` needs a group. A server that starts its workers again after a failure must itself be new.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import datetime
import tempfile
import torch.distributed as dist
from torch.multiprocessing import get_context

def begin(rank, file, seconds):
    limit = datetime.timedelta(seconds=seconds)
    dist.init_process_group("gloo", store=dist.FileStore(file, 2), rank=rank, world_size=2, timeout=limit)

def attempt(seconds, with_rank_1):
    file = tempfile.mktemp()
    other = get_context("spawn").Process(target=begin, args=(1, file, seconds), daemon=True)
    if with_rank_1:
        other.start()
    try:
        begin(0, file, seconds)
        return "works"
    except RuntimeError as error:
        return f"fails: {str(error).splitlines()[0]}"
    finally:
        if with_rank_1:
            other.terminate()

if __name__ == "__main__":
    first = attempt(1, with_rank_1=False)
    print("alone:", first, "; is_initialized():", dist.is_initialized())
    second = attempt(40, with_rank_1=True)
    print("with rank 1:", second)
    assert first.startswith("fails") and second.startswith("fails")
EOF
"$dir/venv/bin/python" "$dir/observe.py"
