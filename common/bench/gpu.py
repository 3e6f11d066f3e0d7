"""`make gpu-check`: checks and measures the kernels and the engine on a GPU, with one command that takes minutes.

Each step (`gpu_steps.py`) is a process of its own with a time limit, because a kernel with an invalid access ends the
process that launched it. The results are written to gpu.json after each step. With `--quick` all steps run in miniature
in this process, on a CPU with interpreted kernels too, and the numbers mean nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import click
import torch

from common.bench.gpu_steps import STEPS
from common.bench.results import MEASUREMENTS, save
from common.course import ROOT, CourseError
from common.machine import choose_device

LIMIT = 450.0
"""Seconds for all steps together."""


def run_step(name: str, quick: bool, seconds: float) -> dict:
    """Run a step in a process of its own. Returns its result, or {"error": its last lines}."""
    if seconds <= 0:
        return {"error": f"no time was left: all steps together have {LIMIT:.0f} seconds."}
    with tempfile.TemporaryDirectory() as folder:
        result, output = Path(folder) / "result.json", Path(folder) / "output"
        command = [sys.executable, "-m", "common", "gpu-check", "--step", name, "--result", str(result)]
        command += ["--quick"] if quick else []
        environment = {**os.environ, "KERNELS": "triton" if quick else "", "COURSE_PYTHON": "here"}
        with output.open("w") as stream:
            streams = {"stdout": stream, "stderr": subprocess.STDOUT}
            try:
                subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds, **streams)
            except subprocess.TimeoutExpired:
                stream.write(f"\nIt was stopped after {seconds:.0f} seconds.")
        if result.exists():
            return json.loads(result.read_text(encoding="utf-8"))
        return {"error": output.read_text(encoding="utf-8", errors="replace").strip()[-3000:]}


def try_step(name: str, device: str) -> dict:
    """Run a step in miniature, in this process. Returns its result, or {"error": the exception}."""
    with mock.patch.dict(os.environ, {"KERNELS": "triton"}):
        try:
            return STEPS[name].run(device, True)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}


def wrong_things(result: object, where: str) -> Iterator[str]:
    """The places in a result that report a fault: False, an error, or a non-empty list of failures."""
    if isinstance(result, dict):
        for name, part in result.items():
            yield from wrong_things(part, f"{where}, {name}")
    elif result is False or (isinstance(result, list) and result) or where.endswith(", error"):
        yield where


@click.command()
@click.option("--quick", is_flag=True, help="in miniature, on any machine; nothing is kept")
@click.option("--out", type=click.Path(path_type=Path), default=MEASUREMENTS, help="the folder of the JSON")
@click.option("--step", type=click.Choice(list(STEPS)), help="only this one, in this process")
@click.option("--result", type=click.Path(path_type=Path), help="with --step: the file for what it finds")
def gpu_check(quick: bool, out: Path, step: str | None, result: Path | None) -> int:
    """Try the kernels and the engine on a GPU, and write how fast they are to gpu.json."""
    device = choose_device(None)
    if device == "cpu" and not quick:
        raise CourseError(
            "gpu-check needs an NVIDIA GPU, and torch sees none here. Without one the kernels are interpreted: "
            "make test-lesson-4 SOLUTION=1 tries them so."
        )
    if importlib.util.find_spec("triton") is None:
        raise CourseError("gpu-check needs the package triton: python -m common setup triton")
    if step is not None:
        text = json.dumps(STEPS[step].run(device, quick), indent=2)
        print(text) if result is None else result.write_text(text, encoding="utf-8")
        return 0
    start, name = time.perf_counter(), torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    found: dict = {"device": name, "cuda": torch.version.cuda, "triton": version("triton")}
    steps = [each for each in STEPS if not (quick and "SmolLM2" in each)]
    for each in steps:
        left = LIMIT - (time.perf_counter() - start)
        found[each] = try_step(each, device) if quick else run_step(each, quick, min(STEPS[each].seconds, left))
        print(f"{time.perf_counter() - start:5.0f} s  {each}: {json.dumps(found[each])}", flush=True)
        if not quick:
            save(out, "gpu", "python -m common gpu-check", found)
    wrong = [place for each in steps for place in wrong_things(found[each], each)]
    for place in wrong:
        print(f"Wrong: {place}")
    print("Something is wrong: see above." if wrong else "All of it is right.")
    return int(bool(wrong))
