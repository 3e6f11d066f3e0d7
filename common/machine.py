"""What is known of this machine: its processor's name, its devices and memory, and how fast it reads and multiplies.

A machine's speed drifts. So every measured number is a median, and functions to compare are called in turn.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def let_triton_interpret() -> None:
    """Let Triton interpret its kernels where there is no GPU. Call this before Triton is imported, as torch may do."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def choose_device(name: str | None) -> str:
    """The device with this name; for None, the GPU if there is one. Raises ValueError if torch cannot use it here."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    name = name or ("cuda" if gpus else "cpu")
    try:
        is_there = name in ("cpu", *gpus, *(["cuda"] if gpus else [])) or (
            not name.startswith(("cuda", "meta")) and torch.empty(0, device=name).numel() == 0
        )
    except RuntimeError:
        is_there = False
    if not is_there:
        raise ValueError(f"device is {name!r}, which torch cannot use here; it can use {', '.join(['cpu', *gpus])}.")
    return name


def check_memory(config: Any, slot_bytes: int) -> None:
    """Raise ValueError if the blocks take more memory than this machine has: the system itself would notice it late.

    config: a resolved `EngineConfig` with a device. slot_bytes: the bytes of one token's keys and values.
    """
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return
    for name in ("num_blocks", "num_host_blocks") if config.device == "cpu" else ("num_host_blocks",):
        number, size = getattr(config, name), config.block_size
        if (num_bytes := number * size * slot_bytes) > memory:
            raise ValueError(
                f"{name}={number} blocks of block_size={size} tokens would take {num_bytes:,} bytes; this machine has "
                f"{memory:,}."
            )


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """The median over `repeats` calls, after one that warms up."""
    return interleaved_medians({"": function}, repeats)[""]


def interleaved_medians(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The median seconds of each function, by its name. They are called in turn, so drift affects all of them alike."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for repeat in range(repeats + 1):
        for way, function in ways.items():
            start = time.perf_counter()
            function()
            if repeat:  # the first round warms up
                seconds[way].append(time.perf_counter() - start)
    return {way: statistics.median(taken) for way, taken in seconds.items()}


def seconds_without_core() -> float:
    """Seconds that this thread has been ready to run while no core was free. Elsewhere than on Linux it is 0."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text(encoding="utf-8").split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def cpu_name() -> str:
    """What the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def circumstances(command: str) -> dict:
    """What a reader of a measurement has to know: the machine, the versions, the date and the command."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "transformers"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "command": command,
    }


def read_bandwidth(megabytes: int, repeats: int, device: str = "cpu") -> float:
    """GB/s at which float32 numbers are read by adding them up. No engine can read its weights faster.

    megabytes: their size, which must be much more than the caches hold, or the caches are what is measured.
    """
    numbers = torch.ones(megabytes * 2**20 // 4, device=device)
    # `item` waits for a GPU, which otherwise answers before it has begun.
    return numbers.numel() * 4 / median_seconds(lambda: numbers.sum().item(), repeats) / 1e9


def gemm_rate(size: int, repeats: int) -> float:
    """GFLOP/s of a float32 product of two square matrices."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2 * size**3 / median_seconds(lambda: a @ b, repeats) / 1e9
