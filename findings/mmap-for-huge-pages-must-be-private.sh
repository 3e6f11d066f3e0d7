#!/bin/sh
# Python's mmap (3.8 and later, Linux): anonymous memory in huge pages, as one wants it for the weights of a model.
# `mmap.mmap(-1, size)` is called anonymous memory, and `madvise(MADV_HUGEPAGE)` on it succeeds, so one would guess that it
# then lies in pages of 2 MB, as memory of malloc does after the same call. Observed: none of it does, and nothing says so.
# The default is MAP_SHARED, which makes it shared memory, for which another setting (shmem_enabled, by default "never")
# decides. With flags=MAP_PRIVATE | MAP_ANONYMOUS all of it lies in huge pages.
set -eu
sys=/sys/kernel/mm/transparent_hugepage
grep -q '\[never\]' $sys/enabled 2>/dev/null && { echo "skipped: no huge pages here"; exit 0; }
grep -q '\[never\]' $sys/shmem_enabled 2>/dev/null || { echo "skipped: shared memory may have them here"; exit 0; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
cat > "$dir/observe.py" <<'EOF'
import mmap
import sys


def huge_megabytes():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if "Huge" in line and "tlb" not in line) // 1024


size = 64 << 20
found = {}
for name, flags in (("default", {}), ("private", {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS})):
    memory = mmap.mmap(-1, size, **flags)
    memory.madvise(mmap.MADV_HUGEPAGE)
    before = huge_megabytes()
    for at in range(0, size, 4096):
        memory[at] = 1
    found[name] = huge_megabytes() - before
    memory.close()
print(sys.version.split()[0], found)
assert found["default"] == 0 and found["private"] > 32
EOF
"$dir/venv/bin/python" "$dir/observe.py"
