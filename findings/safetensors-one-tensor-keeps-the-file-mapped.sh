#!/bin/sh
# safetensors 0.8.0 with torch 2.13.0: memory after all but one small tensor of a file have been dropped.
# The small tensor's storage has just its own 16 bytes, and `torch.save` of it writes no more, so one would guess that the
# file is let go once `safe_open` is left and the large tensors are gone. Observed: the whole file stays mapped, with all
# pages that were ever read counted as resident, for as long as any tensor of it lives; a clone of the small one frees them.
# An engine that repacks its matrices but keeps the norms as they were loaded holds its checkpoint twice.
set -eu
[ -r /proc/self/maps ] || { echo "skipped: it looks at /proc"; exit 0; }
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import sys
import torch
from safetensors import safe_open
from safetensors.torch import save_file

path = sys.argv[1]
save_file({"large": torch.ones(25 << 20), "small": torch.ones(4)}, path)


def resident_megabytes():
    """Of this file's pages, in this process."""
    mappings, of_file = 0, False
    for line in open("/proc/self/smaps"):
        if "-" in line.split()[0]:
            of_file = path in line
        elif of_file and line.startswith("Rss:"):
            mappings += int(line.split()[1])
    return mappings // 1024


with safe_open(path, "pt") as file:
    small = file.get_tensor("small")
    file.get_tensor("large").sum()
held, kept = small.untyped_storage().nbytes(), resident_megabytes()
small = small.clone()
freed = resident_megabytes()
print(f"a storage of {held} bytes keeps {kept} MB of the file; after its clone {freed} MB")
assert held == 16 and kept >= 100 and freed == 0
EOF
"$dir/venv/bin/python" "$dir/observe.py" "$dir/model.safetensors"
