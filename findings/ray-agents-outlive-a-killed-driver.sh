#!/bin/sh
# ray 2.60.0: a program calls `ray.init("local")`, which starts processes for it alone, and is ended by kill -9.
# Ray asks the kernel to end its processes with their parent, so one would guess that none of them is left.
# Observed: gcs_server and raylet end at once, but two agents, children of raylet, end only after a minute. They notice
# within a second, and then try to report it to gcs_server, which has ended, too.
# RAY_gcs_rpc_server_reconnect_timeout_s=5 changes nothing. A supervisor that ends a whole group does not see this.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check "ray[default]==2.60.0"
cat > "$dir/observe.py" <<'EOF'
import subprocess
import sys
import time

import psutil

PROGRAM = "import ray, time; ray.init('local', num_cpus=1, include_dashboard=False); print('ready', flush=True); time.sleep(600)"

program = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
while "ready" not in program.stdout.readline():
    pass
time.sleep(10)
children = psutil.Process(program.pid).children(recursive=True)
program.kill()
program.wait()
start, before = time.time(), None
while before != [] and time.time() - start < 120:
    left = sorted(child.cmdline()[0].split("/")[-1].strip() for child in children if child.is_running() and child.cmdline())
    if left != before:
        print(f"{time.time() - start:3.0f} s after kill -9:", left or "none is left", flush=True)
    before = left
    time.sleep(1)
EOF
"$dir/venv/bin/python" "$dir/observe.py"
