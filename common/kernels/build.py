"""Compiles the C++ sources of this folder for this processor, once, and keeps the result in the cache folder."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import sys
from pathlib import Path
from unittest import mock

import torch

from common.checkpoints.names import cache_folder, prepare
from common.machine import cpu_name

LIBRARY = "inference_course"


@functools.cache
def compiled():
    """Returns the classes of cpu.cpp, compiled for this processor, or None if they cannot be compiled here.

    KERNELS_MARCH in the environment names another processor, as gcc's -march does, such as x86-64-v2, without AVX2.
    """
    march = os.environ.get("KERNELS_MARCH", "native")
    headers, sources = (sorted(Path(__file__).parent.glob(pattern)) for pattern in ("*.h", "*.cpp"))
    texts = [path.read_text(encoding="utf-8") for path in headers + sources]
    made_for = repr((torch.__version__, sys.version, cpu_name(), march, texts))
    folder = cache_folder() / f"kernels-{hashlib.sha256(made_for.encode()).hexdigest()[:12]}"
    try:
        if not folder.is_dir():
            prepare(folder, lambda partial: compile_into(partial, sources, march))
        torch.ops.load_library(folder / f"{LIBRARY}{'.pyd' if os.name == 'nt' else '.so'}")
        return torch.classes.inference_course
    except Exception as error:  # no compiler, no ninja, a folder that cannot be written, a system it does not know, ...
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        print(f"Layers run without compiled kernels, slower: they cannot be compiled here ({reason}).", file=sys.stderr)
        return None


def compile_into(folder: Path, sources: list[Path], march: str) -> None:
    """Compile these C++ sources. The library is written to the folder.

    Without -fopenmp a kernel would run on one core. Apple's compiler does not have that option, so on macOS nothing is
    compiled.
    """
    # A torch that was built for CUDA warns on a machine without a GPU. These sources need none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils import cpp_extension

    tools = Path(sys.executable).parent  # where ninja is installed; the folder need not be on the PATH
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    with mock.patch.dict(os.environ, PATH=f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"):
        cpp_extension.load(
            name=LIBRARY,
            sources=[str(path) for path in sources],
            # Not -ffast-math: NaN must stay NaN, and W8A8 rounds as the lesson does.
            extra_cflags=["-O3", f"-march={march}", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", *wide],
            extra_ldflags=["-fopenmp"],
            build_directory=str(folder),
            is_python_module=False,
        )
