#!/bin/sh
# torch 2.13.0 on Linux: `at::parallel_for` in an extension that torch.utils.cpp_extension compiles (g++ is needed).
# torch's own operators use all threads of `torch.get_num_threads()`, so one would guess that a loop of an extension does.
# Observed: `parallel_for` is a template in a header, and it is serial unless the extension itself is compiled with
# -fopenmp, which cpp_extension does not add. It compiles and runs without a warning, on one core.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 ninja==1.13.2 setuptools==84.2.1
cat > "$dir/observe.py" <<'EOF'
import os
import tempfile
import torch
from torch.utils import cpp_extension

SOURCE = '''
#include <torch/extension.h>
#include <ATen/Parallel.h>
#include <mutex>
#include <set>
#include <thread>
int64_t threads_used() {
  std::set<std::thread::id> seen;
  std::mutex lock;
  at::parallel_for(0, 1 << 20, 1, [&](int64_t, int64_t) {
    std::lock_guard<std::mutex> guard(lock);
    seen.insert(std::this_thread::get_id());
  });
  return seen.size();
}'''
torch.set_num_threads(2)
used = {}
for name, flags in (("without", []), ("with", ["-fopenmp"])):
    module = cpp_extension.load_inline(
        f"{name}_openmp", SOURCE, functions=["threads_used"], extra_cflags=["-O0", *flags], extra_ldflags=flags,
        build_directory=tempfile.mkdtemp(),
    )
    used[name] = module.threads_used()
print("threads used without and with -fopenmp:", used, "of", torch.get_num_threads())
assert used == {"without": 1, "with": 2}
EOF
PATH="$dir/venv/bin:$PATH" "$dir/venv/bin/python" "$dir/observe.py"
