"""The steps of `make gpu-check`. Each takes the device and whether it runs in miniature, and returns a result.

In a result, True and an empty list of failures mean that a check has passed, and a number is a speed. An exception ends
a step and is reported as its result.
"""

from __future__ import annotations

import importlib.util
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from common.bench.ladder import Silent, assembled, weights_of
from common.config import EngineConfig
from common.course import MODULES
from common.course.exercises import exercises_of
from common.grading.runner import grade
from common.machine import median_seconds
from solutions.batching import Engine
from solutions.engine import InferenceEngine, load_model
from solutions.llama_pytorch import Llama, SamplingParams, parse_config, use_kernels
from solutions.paged_attention import cdiv

LLAMA_1B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128_256, "hidden_size": 2_048,
    "intermediate_size": 8_192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "max_position_embeddings": 8_192,
    "tie_word_embeddings": True,
}  # fmt: skip
"""The config of Llama-3.2-1B. Its weights are random, which take the same time as trained ones."""
SMOLLM2 = LLAMA_1B | {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1_536, "num_hidden_layers": 30}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "rope_theta": 100_000.0}
MINIATURE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
MINIATURE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}

PAIRS = {
    "float32": {},
    "INT8": {"quantization": "int8"},
    "W8A8": {"quantization": "w8a8"},
    "INT4": {"quantization": "int4"},
    "INT8 keys and values": {"kv_cache_dtype": "int8"},
    "n-grams": {"speculative": "ngram"},
    "a draft model": {"speculative": "tales-draft"},
    "offloaded layers": {"offload": 4_000_000},
    "few blocks": {"num_blocks": 7, "max_num_batched_tokens": 16},
    "few blocks, swapped": {"num_blocks": 7, "max_num_batched_tokens": 16, "preemption": "swap"},
    "contiguous": {"kv_cache_policy": "contiguous", "max_model_len": 64},
}
"""The options of engines that must give the same tokens on the CPU and on the GPU."""
PROMPTS = ["Once upon a time there was a", "Once upon a time there was a little dog. It", "The little dog"]
STREAMS, PROMPT_LEN, LENGTH = (1, 8, 64), 64, 128


def generate(engine: Engine, prompts: Sequence, length: int, **sampling) -> list[list[int]]:
    params = SamplingParams(max_tokens=length, ignore_eos=True, **sampling)
    return [output.token_ids for output in engine.generate(prompts, params, progress=False)]


def seconds_of(function: Callable[[], object], device: str, repeats: int) -> float:
    """The median seconds of a call, until the device has finished its work."""

    def wait() -> None:
        function()
        if device == "cuda":
            torch.cuda.synchronize()

    return median_seconds(wait, repeats)


# --- Checks -----------------------------------------------------------------------------------------------------------


def check_exercises(device: str, quick: bool) -> dict[str, list[str]]:
    """Return the exercises that the reference fails, for each module that needs Triton. quick: one exercise of each."""
    modules = [each for each in MODULES if each.needs == "triton"]
    some = {each: [exercises_of(each)[0].id] if quick else None for each in modules}
    found = {each.slug: grade(each, each.solution, only=only) for each, only in some.items()}
    return {
        slug: [f"{each}: {each.sentence}" for each in results if each.status != "passed"]
        for slug, results in found.items()
    }


def check_pairs(device: str, quick: bool) -> dict[str, bool | list[str]]:
    """Whether each engine on the device, in float32, gives the tokens that plain code gives on the CPU."""
    prompts, length = (PROMPTS[2:], 2) if quick else (PROMPTS, 24)

    def answers(kernels: str, where: str, options: dict) -> list[list[int]]:
        with mock.patch.dict(os.environ, {"KERNELS": kernels}):
            with InferenceEngine("tales", device=where, dtype="float32", **options) as engine:
                return generate(engine, prompts, length)

    def same(options: dict) -> bool | list[str]:
        try:
            return answers(os.environ.get("KERNELS", ""), device, options) == answers("plain", "cpu", options)
        except Exception as error:  # the other pairs are still checked
            return [f"{type(error).__name__}: {error}"]

    return {name: same(PAIRS[name]) for name in (["float32"] if quick else PAIRS)}


def check_graphs(device: str, quick: bool) -> dict[str, bool]:
    """Whether decoding steps that a CUDA graph replays give the same tokens as launched ones, and whether a seeded
    request gets the same tokens alone as in a batch.
    """
    if quick:
        model = Llama(parse_config(LLAMA_1B | MINIATURE)).eval()
        use_kernels(model)
    else:
        model, *_ = load_model(EngineConfig(model="tales", dtype="float32", device=device))
    prompts = [[5 + n * i % 50 for i in range(n)] for n in ((2, 3) if quick else range(1, 40))]
    length, options = 3 if quick else 32, dict(max_num_seqs=2 if quick else 20, max_model_len=128)
    drawn = dict(temperature=1.0, top_p=0.95, seed=5)
    with assembled(model, Silent(), **options) as engine:
        runner = engine.executor.runner
        replayed, seeded = generate(engine, prompts, length), generate(engine, prompts, length, **drawn)
        is_graphed = vars(runner).pop("forward", None) is not None  # from now on lesson 5's `forward` runs
        launched = generate(engine, prompts, length)
        alone = [generate(engine, [prompt], length, **drawn)[0] for prompt in prompts[:2]]
    return {
        "steps were captured": is_graphed or device == "cpu",
        "the same tokens": replayed == launched,
        "the same seeded tokens alone": seeded[:2] == alone,
        "a seed draws": seeded != replayed,
    }


def check_collective(device: str, quick: bool) -> dict[str, bool]:
    """Whether an all-reduce works in a process group of one rank, with NCCL on a GPU."""
    with tempfile.TemporaryDirectory() as folder:
        backend = "nccl" if device == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            numbers = torch.arange(4.0, device=device)
            torch.distributed.all_reduce(numbers)
            return {backend: numbers.tolist() == [0, 1, 2, 3]}
        finally:
            torch.distributed.destroy_process_group()


# --- Speeds -----------------------------------------------------------------------------------------------------------


def copy_rate(device: str, quick: bool) -> float:
    """GB/s of a copy: the bytes that it reads and writes."""
    source = torch.ones(2**12 if quick else 2**28, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device, 1 if quick else 20) / 1e9


def measure_attention(device: str, quick: bool) -> dict[str, float]:
    """GB/s of a copy, and of the decode kernels that read the caches of 32 contexts of 4,096 tokens."""
    from common.kernels import triton_ops
    from solutions.triton_kernels import paged_decode_attention

    num_requests, context, kv_heads, block_size = (2, 20, 1, 16) if quick else (32, 4_096, 8, 16)
    dtype = torch.float32 if quick else torch.bfloat16
    blocks = cdiv(context, block_size)
    pool = torch.randn(2, num_requests * blocks, block_size, kv_heads, 64, device=device).to(dtype)
    q = torch.randn(num_requests, 4 * kv_heads, 64, device=device).to(dtype)
    tables = torch.randperm(num_requests * blocks, device=device).view(num_requests, blocks)
    lens = torch.full((num_requests,), context, device=device)
    start = torch.arange(num_requests + 1, device=device)
    ways = {
        f"lesson 4, {n} splits": partial(paged_decode_attention, q, *pool, tables, lens, context, n) for n in (1, 4)
    }
    ways["engine"] = partial(triton_ops.paged_attention, q, *pool, tables, start, lens, 1)
    result = {"copy_gb_per_s": copy_rate(device, quick)}
    for name, way in ways.items():
        result[f"{name}, gb_per_s"] = pool.nbytes / seconds_of(way, device, 1 if quick else 20) / 1e9
    error = (ways["engine"]() - ways["lesson 4, 1 splits"]()).abs().max().item()
    return result | {"both_agree": error < 2e-2}


def speed_of(answer: Callable[[list[list[int]], int], object], streams: int, quick: bool, vocab_size: int) -> float:
    """Tokens a second of `answer(prompts, length)`, the same random prompts for any engine, after a short call."""
    generator = torch.Generator().manual_seed(streams)
    shape = (streams, 8 if quick else PROMPT_LEN)
    prompts, length = torch.randint(0, vocab_size, shape, generator=generator).tolist(), 3 if quick else LENGTH
    answer(prompts, 2)  # compiles
    start = time.perf_counter()
    answer(prompts, length)
    return streams * length / (time.perf_counter() - start)


def measure_engine(shape: dict, device: str, quick: bool) -> dict[str, dict[str, float]]:
    """Tokens a second of 1, 8 and 64 streams, the milliseconds of a step, and those of its layers alone.

    The roofline is the time of a step that reads all weights at the rate of a copy.
    """
    with torch.device(device):
        model = Llama(parse_config(shape | (MINIATURE if quick else {}))).to(torch.float32 if quick else torch.bfloat16)
    use_kernels(model.eval())
    (_, read_bytes), bandwidth, result = weights_of(model), copy_rate(device, quick), {}
    for streams in (1, 2) if quick else STREAMS:
        options = dict(max_num_seqs=streams, max_model_len=256, max_num_batched_tokens=2_048)
        with assembled(model, Silent(), **options) as engine:
            speed = speed_of(partial(generate, engine), streams, quick, model.config.vocab_size)
            replays = getattr(engine.executor.runner.forward, "replays", {})
            layers = seconds_of(replays[streams], device, 20) if streams in replays else None
        result[str(streams)] = {
            "tokens_per_s": speed,
            "share_of_roofline": speed / streams * read_bytes / 1e9 / bandwidth,
            "step_ms": 1e3 * streams / speed,
            "layers_ms": layers and 1e3 * layers,
        }
    return result


def measure_transformers(shape: dict, device: str, quick: bool) -> dict[str, dict[str, float] | str]:
    """Tokens a second of transformers' `generate` on the same load."""
    if importlib.util.find_spec("transformers") is None:
        return {"left out": "transformers is not installed"}
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {key: value for key, value in (shape | (MINIATURE if quick else {})).items() if key != "model_type"}
    with torch.device(device):
        config = AutoConfig.for_model(shape["model_type"], **given)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    def answer(prompts: list[list[int]], length: int) -> torch.Tensor:
        ids = torch.tensor(prompts, device=device)
        settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": length}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **settings).cpu()

    counts = (1, 2) if quick else (1, 64)
    return {str(count): {"tokens_per_s": speed_of(answer, count, quick, config.vocab_size)} for count in counts}


def measure_vllm(shape: dict, device: str, quick: bool) -> dict[str, dict[str, float] | str]:
    """Tokens a second of vLLM on the same load, with its own random weights, where it is installed."""
    if importlib.util.find_spec("vllm") is None or device == "cpu":
        return {"left out": "vLLM is not installed, or there is no GPU"}
    from vllm import LLM
    from vllm import SamplingParams as Params

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape | {"torch_dtype": "bfloat16"}), encoding="utf-8")
        llm = LLM(
            folder, load_format="dummy", dtype="bfloat16", skip_tokenizer_init=True, enable_prefix_caching=False,
            max_model_len=256, gpu_memory_utilization=0.5,
        )  # fmt: skip

    def answer(prompts: list[list[int]], length: int) -> None:
        params = Params(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False)
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)

    return {str(count): {"tokens_per_s": speed_of(answer, count, quick, shape["vocab_size"])} for count in STREAMS}


class Step(NamedTuple):
    run: Callable[[str, bool], dict]
    seconds: float  # its limit


STEPS = {
    "graphs": Step(check_graphs, 90),
    "pairs": Step(check_pairs, 120),
    "attention": Step(measure_attention, 60),
    "engine, Llama-3.2-1B": Step(partial(measure_engine, LLAMA_1B), 90),
    "engine, SmolLM2-135M": Step(partial(measure_engine, SMOLLM2), 90),
    "exercises": Step(check_exercises, 150),
    "transformers, Llama-3.2-1B": Step(partial(measure_transformers, LLAMA_1B), 60),
    "transformers, SmolLM2-135M": Step(partial(measure_transformers, SMOLLM2), 60),
    "collective": Step(check_collective, 40),
    "vLLM, Llama-3.2-1B": Step(partial(measure_vllm, LLAMA_1B), 150),
}
"""All steps by name, the most important first, since the time for all of them is less than the sum of their limits."""
