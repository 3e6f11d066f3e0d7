#!/bin/sh
# torch 2.13.0 on a CPU (Linux, libgomp): a program that computes in a thread of its own, as servers and GUIs do.
# One would guess that it does not matter whether the main thread has computed anything before, a model's loading say.
# Observed: it does. libgomp keeps a team of threads for each thread that has ever used one, and once all teams together
# are more threads than there are cores, it does not spin at the end of an operator but sleeps: two context switches an
# operator.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import os
import resource
import sys
import threading

import torch

torch.set_num_threads(len(os.sched_getaffinity(0)))
NUM_OPERATORS = 300

def compute():
    x = torch.zeros(100_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    for _ in range(NUM_OPERATORS):
        x.add_(1)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    print((after - before) / NUM_OPERATORS)

if sys.argv[1] == "main too":
    torch.zeros(100_000)
thread = threading.Thread(target=compute)
thread.start()
thread.join()
EOF
unset OMP_NUM_THREADS OMP_WAIT_POLICY GOMP_SPINCOUNT
alone=$("$dir/venv/bin/python" "$dir/observe.py" alone)
both=$("$dir/venv/bin/python" "$dir/observe.py" "main too")
echo "sleeps an operator: $alone in the only thread that computes, $both once the main thread has computed, too"
"$dir/venv/bin/python" -c "import os; assert len(os.sched_getaffinity(0)) == 1 or ($alone < 0.5 and $both > 1)"
