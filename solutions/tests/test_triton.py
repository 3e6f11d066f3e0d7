"""The optional kernels: that they compile for a GPU, for which no GPU is needed; their checks run them interpreted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from common.course import ROOT
from common.tests.zygote import typed_in

pytest.importorskip("triton", reason="Triton is not installed (python -m common setup triton)")

COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import triton.language as tl

from common.kernels import triton_ops as ops
from solutions import triton_int4
from solutions import triton_kernels as kernels

pointer, half, ids, number = "*fp32", "*bf16", "*i64", "i32"
sizes = {"HEAD_DIM": 80, "DIMS": 128}
attention = {"GROUP": 3, "BLOCK_SIZE": 7, "TILE": kernels.TILE, **sizes}
engine = {"HEADS": 9, "GROUP": 3, "HEAD_DIM": 64, "BLOCK_SIZE": 16, "TILE": ops.TILE, "DIMS": 64, "DTYPE": tl.bfloat16}
heads = {"HEADS": 9, "KV_HEADS": 3, "HEAD_DIM": 64, "ROWS": 16, "PAIRS": 32}
for kernel, types, constants in (
    (kernels.add_kernel, [pointer] * 3 + [number], {"BLOCK": 1024}),
    (kernels.softmax_kernel, [half] * 2 + [number] * 3, {"BLOCK": 1024}),
    (kernels.add_rms_norm_kernel, [half] * 4 + [number, "fp32"], {"BLOCK": 1024}),
    (
        kernels.decode_kernel,
        [half] * 3 + [ids] * 2 + [pointer] * 3 + ["fp32"] + [number] * 4,
        {"ROWS": 16, **attention},
    ),
    (kernels.merge_kernel, [pointer] * 3 + [half, number], {"SPLITS": 4, **sizes}),
    (kernels.prefill_kernel, [half] * 3 + [ids] * 3 + [half, "fp32"] + [number] * 4, attention),
    (
        triton_int4.int4_kernel,
        [half, "*u8", "*fp16", "*fp16", half] + [number] * 5,
        {"GROUP_SIZE": 32, "TOKENS": 16, "OUTPUTS": 16, "PAIRS": 16},
    ),
    *((ops.add_rms_norm_kernel, [half] * 5 + [number, "fp32"], {"BLOCK": 2048, "ADD": add}) for add in (True, False)),
    *(
        (
            ops.rotate_and_store_kernel,
            [half, pointer, pointer, half, ids, half, half, half, "fp32", number],
            {**heads, "NORM": norm},
        )
        for norm in (True, False)
    ),
    (ops.silu_mul_kernel, [half] * 2 + [number], {"BLOCK": 1024}),
    *(
        (
            ops.attention_kernel,
            [half] * 3 + [ids] * 3 + [out, pointer, "fp32"] + [number] * 2,
            {**engine, "QUERIES": queries, "ROWS": rows, "SPLITS": splits},
        )
        for queries, rows, splits, out in ((1, 16, 8, pointer), (1, 16, 1, half), (21, 64, 1, half))
    ),
    (ops.merge_kernel, [pointer] * 2 + [half], {"SPLITS": 8, "HEAD_DIM": 64, "DIMS": 64}),
    (ops.draw_kernel, [pointer] * 2 + [ids, "*i32", number], {"TILE": 2048}),
):
    names = [name for name in kernel.arg_names if name not in constants]
    assert len(names) == len(types), kernel
    signature = dict(zip(names, types)) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants)
    assert compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"], kernel
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter accepts what a compiler does not: products of small tiles, and values of two types."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_gpu_check_in_miniature_and_its_refusal(tmp_path):
    """Every part of it on a CPU, where only its verdicts mean something."""
    quick = typed_in(ROOT, "gpu-check", "--quick", "--out", str(tmp_path))
    assert quick.returncode == 0, quick.stdout
    assert "All of it is right." in quick.stdout and not list(tmp_path.iterdir())
    assert quick.stdout.count(" s  ") == 8, quick.stdout
    if not torch.cuda.is_available():
        refused = typed_in(ROOT, "gpu-check", "--out", str(tmp_path))
        assert refused.returncode == 2 and "gpu-check needs an NVIDIA GPU" in refused.stdout


@pytest.mark.slow
def test_gpu_check_goes_on_after_a_step_that_fails():
    from common.bench.gpu import run_step, try_step

    assert run_step("collective", True, 600) == {"gloo": True}
    assert "'nothing' is not one of 'graphs'" in run_step("nothing", True, 600)["error"]
    assert "It was stopped after 0 seconds." in run_step("collective", True, 0.1)["error"]
    assert "no time was left" in run_step("collective", True, -1)["error"]
    assert try_step("nothing", "cpu") == {"error": "KeyError: 'nothing'"}


def test_gpu_check_says_what_is_wrong():
    from common.bench.gpu import wrong_things

    good = {
        "a": {"failed": []},
        "same": {"float32": True, "INT8": True},
        "speed": {"1": {"tokens_per_s": 0, "ms": None}},
    }
    assert list(wrong_things(good, "all")) == []
    for wrong, where in (
        ({"a": {"failed": ["4.18 softmax_kernel: no"]}}, "all, a, failed"),
        ({"same": {"float32": False}}, "all, same, float32"),
        ({"speed": {"error": "CUDA error"}}, "all, speed, error"),
    ):
        assert list(wrong_things(good | wrong, "all")) == [where]
