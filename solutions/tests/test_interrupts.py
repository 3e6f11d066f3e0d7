"""Ctrl-C at any line of `generate`: all blocks are free afterwards, nothing is left, and the next answers are right."""

from __future__ import annotations

import json
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

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
    """Presses Ctrl-C once, at the n-th line of our own code; n too large: counts the lines.

    functions: count only lines of functions with these names; empty: of all.
    """

    def __init__(self, number: int, functions: tuple[str, ...] = ()):
        self.number, self.functions, self.count, self.place = number, functions, 0, ""

    def __call__(self, frame, event, argument):
        file = frame.f_code.co_filename
        if not file.startswith(OURS) or "/tests/" in file:
            return None
        if self.functions and frame.f_code.co_name not in self.functions:
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
    sys.settrace(tracer)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    config = dict(model_type="llama", hidden_size=16, intermediate_size=24, num_attention_heads=4, vocab_size=40)
    config |= dict(num_key_value_heads=2, num_hidden_layers=2, max_position_embeddings=64, tie_word_embeddings=True)
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
    return [
        (each.token_ids, each.text, each.finish_reason) for output in outputs for each in (output, *output.siblings)
    ]


def asked(engine: InferenceEngine) -> list[SamplingParams]:
    """With a draft model, drawn tokens depend on how many are proposed, which depends on the time: so none is drawn."""
    return [replace(params, temperature=0.0) for params in PARAMS] if engine.config.draft else PARAMS


def interrupted(engine: InferenceEngine, tracer: AtLine, action: Callable) -> None:
    """Press Ctrl-C at a line of action(), and check that nothing is left of it."""
    is_raised = False
    try:
        with tracing(tracer):
            action()
    except KeyboardInterrupt:
        is_raised = True
    assert is_raised == bool(tracer.place), tracer.place
    while engine.in_flight:  # between two steps of a pipeline: what is aborted ends when its step is collected
        assert all(state.request.finish_reason == "abort" for state in engine.processor.states.values())
        engine.step()
    assert not engine.has_unfinished_requests and not engine.scheduler.requests, tracer.place
    assert not engine.in_flight and engine.manager.pool.num_free_blocks == engine.config.num_blocks, tracer.place
    check_books(engine)


def interrupt_at_many_lines(engine: InferenceEngine, most: int, seed: int) -> None:
    def generate() -> list:
        return told(engine.generate(PROMPTS, asked(engine), progress=False))

    expected, counter = generate(), AtLine(10**9)
    with tracing(counter):
        generate()
    for number in random.Random(seed).sample(range(1, counter.count), most):
        tracer = AtLine(number)
        interrupted(engine, tracer, generate)
        assert generate() == expected, tracer.place


@pytest.mark.parametrize("name", ENGINES)
def test_ctrl_c_at_any_line_leaves_nothing(start, name):
    with start(name) as engine:
        interrupt_at_many_lines(engine, 2, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
def test_ctrl_c_at_many_more_lines_leaves_nothing(start, name):
    with start(name) as engine:
        interrupt_at_many_lines(engine, 100, seed=2)


BEGINNING = (
    "add_request",
    "add",
    "samples",
    "choose_id",
    "generate",
    "stream",
    "abort",
    "start_over",
    "rewind",
    "close",
)


@pytest.mark.parametrize("call", ["generate", "stream"])
def test_ctrl_c_at_every_line_at_which_a_request_begins_and_ends(start, call):
    """Here it is known to one part of the engine and not to the other."""
    params = SamplingParams(max_tokens=2, n=2 if call == "generate" else 1, ignore_eos=True)

    def action():
        return (
            list(engine.stream([5, 6, 7], params)) if call == "stream" else engine.generate([[5, 6, 7]], params, False)
        )

    with start("plain") as engine:
        counter = AtLine(10**9, BEGINNING)
        with tracing(counter):
            action()
        assert counter.count > 30
        for number in range(1, counter.count + 1):
            interrupted(engine, AtLine(number, BEGINNING), action)
        assert len(engine.generate([[5, 6, 7]], params, False)[0].token_ids) == 2
