"""The ladder, what speculation gives, and the engines beside ours: that they run, and that they are compared fairly."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable

import numpy
import pytest
import torch

from common.bench import cli as bench
from common.bench import ladder, plots, results, style
from common.bench import peers as rivals
from common.bench import speculation as speculation_bench
from common.checkpoints import MODELS, Checkpoint
from common.checkpoints import gguf as gguf_convert
from common.course import ROOT
from common.tests.typed import typed
from solutions.llama_pytorch import SamplingParams, load, use_kernels


@pytest.fixture(scope="module")
def tales():
    return load("tales", torch.float32, "cpu")


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    rivals.write_gguf(MODELS / "tales", path)
    return path


# What is measured -------------------------------------------------------------------------------------------------


def test_a_name_or_its_beginning_says_what_is_measured(capsys, monkeypatch):
    monkeypatch.setenv("COURSE_MODULES", "")
    measured = []
    monkeypatch.setattr(
        speculation_bench, "measure_speculation", lambda name, draft, quick: measured.append((name, draft))
    )
    assert typed("bench", "speculation", "speculation-tales", "--quick") == 0
    assert measured == [("tales", None), ("tales", "tales-draft")]  # each once, in miniature on the small model
    assert typed("bench", "spec") == 2  # the beginning of a word is none of a name
    assert "nothing called 'spec'" in capsys.readouterr().err
    assert all(any(name == each or name.startswith(f"{each}-") for name in bench.NAMES) for each in bench.DEFAULT)


@pytest.mark.slow
def test_the_machine_is_measured_without_any_lesson():
    """A student of lesson 0 does it; later lessons' files need not even be readable then."""
    program = "import sys; from common.bench.cli import measure; measure('machine', True); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "GFLOP/s" in done.stdout and "solutions" not in done.stdout


@pytest.mark.slow
def test_the_ladder_and_speculation_run_in_miniature(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COURSE_MODULES", "")
    assert typed("bench", "ladder", "speculation", "--quick", "--out", str(tmp_path)) == 0
    text = capsys.readouterr().out
    assert not list(tmp_path.iterdir()) and text.count("not kept") == 3
    for way in ("recompute", "cache", "paged", "engine", "engine, kernels", "INT8", "INT4", "speculation"):
        assert f"mixed requests, round 1 of 1, {way}:" in text
    for way in ("none", "adaptive", "k=2"):
        assert f"1 x rewrite, round 1 of 1, {way}:" in text and f"1 x greedy, round 1 of 1, {way}:" in text


def served(seconds: float, tokens: list[list[int]], **counts) -> rivals.Served:
    """Answers whose last tokens come together; the first ones came after half a second."""
    return rivals.Served(tokens, [[10.5, 10.0 + seconds]] * len(tokens), 64, 10.0, counts)


def way(answer: Callable[[], rivals.Served]) -> ladder.Way:
    return ladder.Way(lambda load: answer(), 1000, 800, 2)


def load_of(name: str, prompts: list[list[int]], lengths: list[int], **more) -> ladder.Load:
    return ladder.Load(name, prompts, list(map(ladder.greedy, lengths)), **more)


def test_of_an_unable_way_the_reason_is_kept_and_the_others_go_on(tales):
    model, _ = tales
    asked = []

    def unable():
        asked.append("b")
        raise rivals.Unable("not on a Tuesday")

    given = load_of("a load", [[5, 6, 7]], [2], rounds=3)
    expected = [greedy_tokens(model, [5, 6, 7], 2)]
    skipped: dict[str, str] = {}
    told = ladder.climb(model, given, {"a": way(lambda: served(4.0, expected)), "b": way(unable)}, skipped)
    assert skipped == {"b": "not on a Tuesday"} and list(told["ways"]) == ["a"] and len(asked) == 1
    assert told["ways"]["a"]["rounds"] == [0.5] * 3


def greedy_tokens(model, prompt: list[int], length: int) -> list[int]:
    from solutions.llama_pytorch import recompute

    text = list(prompt)
    with torch.inference_mode():
        for _ in range(length):
            text.append(int(recompute(model, text).argmax()))
    return text[len(prompt) :]


def test_a_way_with_other_tokens_is_found_even_if_another_answered_fewer_requests(tales):
    model, _ = tales
    prompts = [[5, 6, 7], [300, 12, 9, 44]]
    right = [greedy_tokens(model, prompt, 3) for prompt in prompts]
    wrong = [right[0], [right[1][0], (right[1][1] + 1) % 1024, right[1][2]]]
    given = load_of("a load", prompts, [3, 3], sample=1)
    ways = {"sample": way(lambda: served(1.0, right[:1])), "all": way(lambda: served(1.0, right))}
    told = ladder.climb(model, given, ways, {})
    assert told["ways"]["sample"]["num_requests_answered"] == 1
    assert told["ways"]["sample"]["time_to_first_token"] is None and told["ways"]["all"]["time_to_first_token"] == 0.5
    with pytest.raises(AssertionError, match="token 1 differs"):
        ladder.climb(model, given, {**ways, "mistaken": way(lambda: served(1.0, wrong))}, {})
    quantized = {**ways, "INT4": way(lambda: served(1.0, wrong))}  # other weights may say other things
    assert set(ladder.climb(model, given, quantized, {})["ways"]) == {"sample", "all", "INT4"}


def test_bytes_read_in_a_second_are_those_of_the_steps_after_the_prompt():
    given, of_it = load_of("one stream", [[1, 2]], [5]), way(lambda: None)
    told = ladder.row(given, of_it, [served(0.9, [[3] * 5])], 0)
    assert told["read_gb_per_s"] == pytest.approx(800 * 4 / 0.4 / 1e9)  # four gaps, a step each
    proposed = ladder.row(given, of_it, [served(0.9, [[3] * 5], num_steps=3)], 0)
    assert proposed["read_gb_per_s"] == pytest.approx(800 * 2 / 0.4 / 1e9)  # two steps brought the four tokens
    assert told["tokens_per_second"] == pytest.approx(5 / 0.9) and told["time_to_first_token"] == 0.5
    assert told["weight_bytes"] == 1000 and told["cache_bytes"] == 128
    several = load_of("two", [[1], [2]], [5, 5])
    assert "read_gb_per_s" not in ladder.row(several, of_it, [served(1.0, [[3] * 5] * 2)], 0)


def test_of_answers_with_one_token_there_are_no_gaps():
    assert served(0.5, [[3]]).time_per_output_token == 0
    assert served(0.9, [[3], [3] * 3]).time_per_output_token == pytest.approx(0.2)


def test_a_packed_model_holds_its_table_once(tales, monkeypatch):
    monkeypatch.setenv("KERNELS", "fast")
    model, _ = tales
    plain = sum(parameter.nbytes for parameter in model.parameters())
    assert ladder.weights_of(model) == (plain, plain)
    packed, _ = load("tales", torch.float32, "cpu")
    use_kernels(packed)
    assert ladder.weights_of(packed) == (plain, plain)


def test_ratios_are_those_of_pairs_and_tokens_a_step_count_what_was_proposed_right():
    without = [served(seconds, [[1] * 12], num_steps=12) for seconds in (1.0, 2.0, 10.0)]
    proposed = [
        served(seconds, [[1] * 12], num_steps=4, num_draft_tokens=16, acceptance_rate=0.5)
        for seconds in (0.5, 1.0, 9.0)
    ]
    told = speculation_bench.row(proposed, without, 0)
    assert told["ratios"] == pytest.approx([2, 2, 10 / 9]) and told["ratio"] == pytest.approx(2)
    assert told["tokens_per_step"] == 3 and told["acceptance_rate"] == 0.5
    alone = speculation_bench.row(without, without, 0)
    assert alone["ratio"] == 1 and alone["tokens_per_step"] == 1 and alone["acceptance_rate"] is None


def test_the_assembled_engine_of_the_ladder_draft_tokens_and_says_the_same(tales):
    model, tokenizer = tales
    prompts = [tokenizer.encode(text) for text in speculation_bench.BEGINNINGS[:2]]
    given = ladder.Load("beginnings", prompts, [SamplingParams(max_tokens=16)] * 2)
    plain = ladder.serve(model, tokenizer, {}, given)
    for draft in (None, str(MODELS / "tales-draft")):
        speculation = dict(speculative=draft or "ngram", num_speculative_tokens=3, adaptive_speculation=False)
        proposed = ladder.serve(model, tokenizer, speculation, given)
        ladder.check_same(model, given, plain.token_ids, proposed.token_ids, "speculation")
        assert draft is None or proposed.counts["num_steps"] < plain.counts["num_steps"]
        assert draft is None or proposed.counts["num_draft_tokens"] > 0
    assert "num_draft_tokens" not in plain.counts


# llama.cpp --------------------------------------------------------------------------------------------------------


def test_what_is_written_as_gguf_is_read_back_number_for_number(gguf_file):
    checkpoint, source = Checkpoint(MODELS / "tales"), gguf_convert.GGUFFile(gguf_file)
    config = gguf_convert._config(source, gguf_convert.Vocabulary(model="gpt2", tokens=[]))  # the file has none
    names = {gguf_convert._new_name(source, name): name for name in source.tensors}
    assert sorted(names) == [name for name in checkpoint.names() if name != "lm_head.weight"]
    for name, stored in names.items():
        read = gguf_convert._converted(source, stored, name, config)[name]
        assert read.dtype == torch.float32
        numpy.testing.assert_array_equal(read.numpy(), checkpoint.read(name).float().numpy(), err_msg=name)
    same = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta")
    for key in (*same, "vocab_size", "intermediate_size", "rms_norm_eps", "max_position_embeddings"):
        assert config[key] == checkpoint.config[key], key


@pytest.mark.parametrize("kind, limit", [("Q8_0", 0.01), ("Q4_0", 0.12)])
def test_fewer_bits_are_written_as_gguf_has_them(kind, limit, tmp_path):
    rivals.write_gguf(MODELS / "tales", tmp_path / "model.gguf", kind)
    checkpoint, source = Checkpoint(MODELS / "tales"), gguf_convert.GGUFFile(tmp_path / "model.gguf")
    config = gguf_convert._config(source, gguf_convert.Vocabulary(model="gpt2", tokens=[]))
    for name, stored in {gguf_convert._new_name(source, name): name for name in source.tensors}.items():
        expected = checkpoint.read(name).float()
        error = (gguf_convert._converted(source, stored, name, config)[name] - expected).norm() / expected.norm()
        is_exact = expected.ndim == 1 or expected.shape[1] % 32 > 0
        assert error < (0.01 if "embed" in name else limit) and (error == 0) == is_exact, name


def test_what_is_no_plain_llama_is_not_written(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((MODELS / "tales" / "model.safetensors").read_bytes())
    config = json.loads((MODELS / "tales" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "qwen2"}), encoding="utf-8")
    with pytest.raises(rivals.Unable, match="only a plain Llama"):
        rivals.write_gguf(tmp_path, tmp_path / "model.gguf")


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_says_the_same_of_several_requests_at_once(tales, gguf_file):
    model, _ = tales
    prompts, lengths = [[5, 6, 7], list(range(100, 130)), [9]], [6, 3, 8]
    llama_cpp = rivals.LlamaCpp(gguf_file, 1)
    served = llama_cpp.serve(prompts, lengths)
    assert [len(tokens) for tokens in served.token_ids] == lengths == [len(times) for times in served.times]
    given = load_of("llama.cpp", prompts, lengths)
    expected = [greedy_tokens(model, prompt, length) for prompt, length in zip(prompts, lengths)]
    assert ladder.check_same(model, given, expected, served.token_ids, "llama.cpp") == 0
    assert served.start < served.times[0][0]
    with pytest.raises(rivals.Unable, match="600 tokens"):
        llama_cpp.serve([[5] * 600], [1])
    llama_cpp.close()


# Figures ----------------------------------------------------------------------------------------------------------

MACHINE = {
    "machine": {"cpu": "a CPU", "cores": 2, "threads": 2},
    "versions": {"torch": "2.13.0"},
    "date": "2026-01-01",
    "command": "python -m common bench",
}


def spoken(name: str, num_streams: int, ratio: float, **more) -> dict:
    told = {"ratio": ratio, "num_draft_tokens": 40, "acceptance_rate": 0.75}
    ways = {"none": {**told, "ratio": 1.0}, "adaptive": told}
    return {"name": name, "num_streams": num_streams, "temperature": 0.0, "is_repetitive": None, "ways": ways, **more}


MADE_UP = {
    "ladder-smollm2-135m": {
        **MACHINE,
        "loads": [
            {"name": "recompute", "ways": {"recompute": {"tokens_per_second": 5.0}}},
            {"name": "one stream", "ways": {"engine": {"tokens_per_second": 14.0}}},
            {"name": "8 equal streams", "ways": {"engine": {"tokens_per_second": 64.0}}},
            {"name": "32 mixed requests", "ways": {"llama.cpp": {"tokens_per_second": 200.0}}},
        ],
    },
    "speculation-smollm2-135m": {
        **MACHINE,
        "cases": [
            spoken(f"{streams} {repeats}", streams, 2.0 if repeats else 0.98, is_repetitive=repeats)
            for streams in (1, 8, 32)
            for repeats in (True, False)
        ],
    },
    "speculation-tales": {
        **MACHINE,
        "cases": [spoken("x", streams, 1.5, temperature=t) for streams in (1, 8, 32) for t in (0.0, 0.8)],
    },
}


@pytest.mark.parametrize("path", ["common/bench/figures/ladder.svg", "lesson-8-speculative/figures/speculation.svg"])
def test_the_figures_are_drawn_from_what_was_measured(path, monkeypatch):
    monkeypatch.setattr(results, "read", MADE_UP.__getitem__)
    first = style.svg(style.FIGURES[path])
    assert style.svg(style.FIGURES[path]) == first
    other = copy.deepcopy(MADE_UP)
    other["ladder-smollm2-135m"]["loads"][3]["ways"]["llama.cpp"]["tokens_per_second"] = 150.0
    other["speculation-tales"]["cases"][-1]["ways"]["adaptive"]["acceptance_rate"] = 0.25
    monkeypatch.setattr(results, "read", other.__getitem__)
    assert style.svg(style.FIGURES[path]) != first


def test_the_share_of_right_draft_tokens_is_of_all_draft_tokens():
    few = spoken("few", 1, 1.0)
    few["ways"]["adaptive"] = {"ratio": 1.0, "num_draft_tokens": 0, "acceptance_rate": None}
    assert plots.right_share([few]) == "no draft tokens"
    half = spoken("half", 1, 1.0)
    half["ways"]["adaptive"] = {"ratio": 1.0, "num_draft_tokens": 160, "acceptance_rate": 0.25}
    assert plots.right_share([few, half, spoken("x", 1, 1.0)]) == "35% right of 200"
