"""`make gpu-check`: whether all of this runs on a GPU, and how fast. One command, for a GPU that is lent for minutes.

The optional exercises run natively; engines on the GPU answer as KERNELS=plain does on the CPU; a collective runs over
NCCL, with one rank. Then three speeds: copies, the paged decode kernel, and the engine in the shape of Llama-3.2-1B
with random weights, which take the same time as trained ones. Everything goes into one JSON.

It has not met a GPU yet: `--quick` is how a test runs every part of it on a CPU, and its numbers mean nothing.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import click
import torch

from common.bench.ladder import Silent, assembled, greedy, weights_of
from common.bench.results import MEASUREMENTS, save
from common.course import MODULES, CourseError
from common.grading.runner import grade
from common.machine import median_seconds
from solutions.engine import InferenceEngine
from solutions.llama_pytorch import Llama, SamplingParams, parse_config, use_kernels

SHAPE = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "hidden_size": 2_048,
    "intermediate_size": 8_192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 8_192,
    "tie_word_embeddings": True,
}
"""Llama-3.2-1B."""
QUICK_SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
QUICK_SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}

PAIRS = {
    "float32": {},
    "INT8": {"quantization": "int8"},
    "INT4": {"quantization": "int4"},
    "INT8 keys and values": {"kv_cache_dtype": "int8"},
    "n-grams": {"speculative": "ngram"},
    "offloaded layers": {"offload": 4_000_000},
}
"""Engines that must answer alike on both devices, and their options."""


def check_exercises(quick: bool) -> dict[str, list[str]]:
    """The exercises that the reference does not pass, by optional module that needs Triton; `quick`: of the last."""
    modules = [each for each in MODULES if each.needs == "triton"]
    return {
        each.slug: [
            f"{result}: {result.sentence}" for result in grade(each, each.solution) if result.status != "passed"
        ]
        for each in (modules[-1:] if quick else modules)
    }


def check_pairs(device: str) -> dict[str, bool]:
    """Whether each engine on the device, in float32, gives the tokens that plain code gives on the CPU."""
    prompts = ["Once upon a time there was a", "The little dog"]

    def answers(kernels: str, where: str, options: dict) -> list[list[int]]:
        with mock.patch.dict(os.environ, {"KERNELS": kernels}):
            with InferenceEngine("tales", device=where, dtype="float32", **options) as engine:
                outputs = engine.generate(prompts, SamplingParams(max_tokens=24, ignore_eos=True), progress=False)
        return [output.token_ids for output in outputs]

    return {
        name: answers("fast", device, options) == answers("plain", "cpu", options) for name, options in PAIRS.items()
    }


def check_collective(device: str) -> bool:
    """Whether a process group of one rank adds up, over NCCL on a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            numbers = torch.arange(4.0, device=device)
            torch.distributed.all_reduce(numbers)
            return numbers.tolist() == [0, 1, 2, 3]
        finally:
            torch.distributed.destroy_process_group()


def seconds_of(function: Callable[[], object], device: str, repeats: int) -> float:
    """The median seconds of a call, until the device has done what it was given."""

    def wait() -> None:
        function()
        if device == "cuda":
            torch.cuda.synchronize()

    return median_seconds(wait, repeats)


def measure_attention(device: str, quick: bool) -> dict[str, float]:
    """GB/s that a copy moves, and that the decode kernel reads of 32 contexts of 4,096 tokens."""
    from solutions.triton_kernels import paged_decode_attention

    num_requests, context, block_size = (2, 20, 16) if quick else (32, 4_096, 16)
    dtype = torch.float32 if quick else torch.bfloat16
    blocks = -(-context // block_size)
    pool = torch.randn(2, num_requests * blocks, block_size, 8, 64, device=device).to(dtype)
    q = torch.randn(num_requests, 32, 64, device=device).to(dtype)
    tables = torch.randperm(num_requests * blocks, device=device).view(num_requests, blocks)
    lens = torch.full((num_requests,), context, device=device)
    target, repeats = torch.empty_like(pool), 1 if quick else 20
    copied = 2 * pool.nbytes / seconds_of(lambda: target.copy_(pool), device, repeats)
    result = {"copy_gb_per_s": copied / 1e9}
    for splits in (1, 4):
        decode = partial(paged_decode_attention, q, *pool, tables, lens, context, splits)
        seconds = seconds_of(decode, device, repeats)
        result[f"decode_gb_per_s_{splits}_splits"] = pool.nbytes / seconds / 1e9
    return result


def measure_engine(device: str, quick: bool, copy_gb_per_s: float) -> dict[str, dict[str, float]]:
    """Tokens a second of 1, 8 and 64 streams, and the share of the roofline of one that reads all weights each step."""
    with torch.device(device):
        model = Llama(parse_config(SHAPE | (QUICK_SHAPE if quick else {}))).to(
            torch.float32 if quick else torch.bfloat16
        )
    model = model.eval()
    use_kernels(model)
    read_bytes, result = weights_of(model)[1], {}
    prompt_len, length = (8, 4) if quick else (64, 128)
    for streams in (1, 2) if quick else (1, 8, 64):
        generator = torch.Generator().manual_seed(streams)
        prompts = torch.randint(0, model.config.vocab_size, (streams, prompt_len), generator=generator).tolist()
        with assembled(model, Silent(), max_num_seqs=streams, max_model_len=prompt_len + length) as engine:
            engine.generate(prompts, greedy(2), progress=False)  # warms up
            start = time.perf_counter()
            engine.generate(prompts, greedy(length), progress=False)
            rate = streams * length / (time.perf_counter() - start)
        steps_per_second = rate / streams
        result[str(streams)] = {
            "tokens_per_s": rate,
            "share_of_roofline": steps_per_second * read_bytes / 1e9 / copy_gb_per_s,
        }
    return result


def check(device: str, quick: bool) -> dict:
    start = time.perf_counter()
    name = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    result: dict = {"device": name, "cuda": torch.version.cuda, "triton": version("triton")}
    for part, run in (
        ("failed_exercises", lambda: check_exercises(quick)),
        ("same_tokens", lambda: check_pairs(device)),
        ("collective", lambda: check_collective(device)),
        ("attention", lambda: measure_attention(device, quick)),
        ("engine", lambda: measure_engine(device, quick, result["attention"]["copy_gb_per_s"])),
    ):
        result[part] = run()
        print(f"{time.perf_counter() - start:5.0f} s  {part}: {result[part]}", flush=True)
    return result


def is_good(result: dict) -> bool:
    """Whether everything that can be right or wrong was right."""
    return not any(result["failed_exercises"].values()) and all(result["same_tokens"].values()) and result["collective"]


@click.command()
@click.option("--quick", is_flag=True, help="in miniature, on any machine; nothing is kept")
@click.option("--out", type=click.Path(path_type=Path), default=MEASUREMENTS, help="the folder of the JSON")
def gpu_check(quick: bool, out: Path) -> int:
    """Try the kernels and the engine on a GPU, and write how fast they are to gpu.json."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not quick:
        raise CourseError(
            "gpu-check needs an NVIDIA GPU, and torch sees none here. Without one the kernels are interpreted: "
            "make test-lesson-4 SOLUTION=1 tries them so."
        )
    result = check(device, quick)
    if not quick:
        save(out, "gpu", "python -m common gpu-check", result)
    print("All of it is right." if is_good(result) else "Something is wrong: see above.")
    return int(not is_good(result))
