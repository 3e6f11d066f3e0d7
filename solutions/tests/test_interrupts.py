"""Ctrl-C at any line of `generate`: all blocks are free afterwards, nothing is left, and the next answers are right."""

from __future__ import annotations

import gc
import json
import random
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from safetensors.torch import save_file

from common.authoring.soak.invariants import check_books
from common.authoring.soak.requests import Letters, random_model
from common.course import ROOT
from solutions import engine as engine_module
from solutions import llama_pytorch
from solutions.engine import InferenceEngine, SamplingParams

OURS = tuple(str(ROOT / folder) for folder in ("solutions/", "common/"))
PROMPTS = [[5, 6, 7], list(range(5, 14)), list(range(5, 22)), [7, 7, 9], [7, 8, 7, 8, 7]]
PARAMS = [
    SamplingParams(max_tokens=6, n=2, temperature=1.0, seed=3, ignore_eos=True, logprobs=1),
    SamplingParams(max_tokens=8, stop="a"),
    SamplingParams(max_tokens=5, ignore_eos=True, logprobs=0),
    SamplingParams(max_tokens=9, stop_token_ids=[5, 6]),
    SamplingParams(max_tokens=9, ignore_eos=True, repetition_penalty=1.2),
]
ENGINES = {
    "plain": {},
    "swap": {"preemption": "swap"},
    "ngram": {"speculative": "ngram"},
    "draft": {"speculative": "itself", "num_blocks": 12},
    "tensor parallel": {"tensor_parallel": 2},
    "pipeline parallel": {"pipeline_parallel": 2},
    "pipeline parallel, ngram": {"pipeline_parallel": 2, "speculative": "ngram"},
}


class AtLine:
    """Presses Ctrl-C once, at the n-th line of our own code; n too large: counts the lines."""

    def __init__(self, number: int):
        self.number, self.count, self.place = number, 0, ""

    def __call__(self, frame, event, argument):
        file = frame.f_code.co_filename
        if not file.startswith(OURS) or "/tests/" in file:
            return None
        if event == "line":
            self.count += 1
            if self.count == self.number:
                sys.settrace(None)
                self.place = f"{file.removeprefix(str(ROOT))}:{frame.f_lineno} in {frame.f_code.co_name}"
                signal.raise_signal(signal.SIGINT)
        return self


@contextmanager
def tracing(tracer: AtLine) -> Iterator[None]:
    before = sys.gettrace()
    gc.collect()
    sys.settrace(tracer)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = dict(model_type="llama", hidden_size=16, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2,
                  num_hidden_layers=2, vocab_size=40, max_position_embeddings=64, tie_word_embeddings=True)  # fmt: skip
    tensors = {key: tensor.detach().clone() for key, tensor in random_model(1, **config).named_parameters()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture
def start(folder, monkeypatch):
    monkeypatch.setenv("KERNELS", "plain")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for module in (engine_module, llama_pytorch):
        monkeypatch.setattr(module, "load_tokenizer", lambda folder: Letters())

    def start(name: str) -> InferenceEngine:
        options = {"num_blocks": 9, "block_size": 4, "max_num_batched_tokens": 8, **ENGINES[name]}
        if options.get("speculative") == "itself":
            options["speculative"] = str(folder)
        return InferenceEngine(str(folder), dtype=torch.float64, **options)

    return start


def told(outputs) -> list:
    return [(each.token_ids, each.text, each.finish_reason) for output in outputs for each in (output, *output.siblings)]


def interrupt(engine: InferenceEngine, number: int, expected: list) -> str:
    """Press Ctrl-C at a line of `generate`. Returns where, or "" if there is no such line."""
    tracer, is_raised = AtLine(number), False
    try:
        with tracing(tracer):
            engine.generate(PROMPTS, PARAMS, progress=False)
    except KeyboardInterrupt:
        is_raised = True
    assert is_raised == bool(tracer.place)
    check_books(engine)
    assert not engine.has_unfinished_requests and not engine.in_flight and not engine.scheduler.requests
    assert engine.manager.pool.num_free_blocks == engine.config.num_blocks
    assert told(engine.generate(PROMPTS, PARAMS, progress=False)) == expected
    check_books(engine)
    return tracer.place


def places(name: str, start, most: int, seed: int = 1) -> tuple[list[str], dict[str, str]]:
    """Press Ctrl-C at so many different lines. Returns those that were reached, and what went wrong at which."""
    reached, wrong = [], {}
    engine = start(name)
    try:
        expected = told(engine.generate(PROMPTS, PARAMS, progress=False))
        counter = AtLine(10**9)
        with tracing(counter):
            engine.generate(PROMPTS, PARAMS, progress=False)
        for number in random.Random(seed).sample(range(1, counter.count), most):
            try:
                reached.append(interrupt(engine, number, expected))
            except BaseException as error:
                wrong[f"line {number} of {counter.count}: {len(wrong)}"] = f"{type(error).__name__}: {str(error)[:200]}"
                engine.close()
                engine = start(name)
    finally:
        engine.close()
    return reached, wrong
