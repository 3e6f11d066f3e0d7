"""Small checkpoints of every kind that the engine reads, made without any model from elsewhere."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from common.checkpoints import gguf_vocabulary
from common.checkpoints.folder import write_json
from common.checkpoints.gguf import EXPERT_KEYS, FAMILIES, KEYS, name_in_gguf
from common.tokenizer import BYTE_OF_CHARACTER
from solutions.llama_pytorch import Llama, parse_config

WORDS = ["th", "the", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
WINDOWS = {"use_sliding_window": True, "sliding_window": 4}
FOLDERS: dict[str, dict[str, Any]] = {
    "safetensors": {"model_type": "llama", "rope_scaling": {**LLAMA3, "factor": 8.0}},
    "shards": {"model_type": "qwen3", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "sentencepiece": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
    "merges": {"model_type": "qwen2", **WINDOWS, "layer_types": ["full_attention", "sliding_attention"]},
    "windows": {
        "model_type": "mistral", "sliding_window": 4, "rope_parameters": {"rope_theta": 1e4, "factor": 4.0, **LONGROPE},
        "original_max_position_embeddings": 16,
    },
    "experts": {
        "model_type": "qwen3_moe", **EXPERTS, **WINDOWS, "mlp_only_layers": [1], "decoder_sparse_step": 1,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
}  # fmt: skip
"""The kinds of folders, and the special values in the config.json of each."""
FILES = {"gguf": "llama", "gguf, sentencepiece": "qwen2", "gguf, experts": "qwen3moe"}
KINDS = (*FOLDERS, *FILES)


def make(kind: str, folder: Path, change: Callable[[dict, dict], None] = lambda keys, tensors: None) -> Path:
    """Write a checkpoint of this kind into the folder. Returns the path to load: the folder or a file in it.

    change(keys, tensors): changes both in place before they are written into a GGUF file.
    """
    if kind.startswith("gguf"):
        return write_gguf(folder / "tiny.gguf", FILES[kind], kind == "gguf", change)
    vocabulary = sentencepiece_vocabulary() if kind == "sentencepiece" else byte_level_vocabulary()
    config = {
        "architectures": ["X"], **FOLDERS[kind], "vocab_size": len(vocabulary["tokens"]), **SIZES,
        "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": kind != "safetensors",
        "eos_token_id": vocabulary["eos_token_id"], "bos_token_id": vocabulary["bos_token_id"], "pad_token_id": None,
    }  # fmt: skip
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": [vocabulary["eos_token_id"]]})
    write_tensors(folder, config, shards=2 if kind == "shards" else 1)
    write_tokenizer(folder, vocabulary, kind, config)
    return folder


def random_tensors(config: dict) -> dict:
    torch.manual_seed(0)
    state = Llama(parse_config(config)).state_dict()
    return {
        name: tensor for name, tensor in state.items() if "lm_head" not in name or not config["tie_word_embeddings"]
    }


def write_tensors(folder: Path, config: dict, shards: int) -> None:
    tensors = random_tensors(config)
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    files = files if shards > 1 else ["model.safetensors"]
    weight_map = {name: files[i % shards] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name].clone() for name in tensors if weight_map[name] == file}, folder / file)
    if shards > 1:
        write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def byte_level_vocabulary() -> dict[str, Any]:
    tokens = [*sorted(BYTE_OF_CHARACTER), *WORDS]
    return {
        "model": "gpt2", "pre": "qwen2", "tokens": tokens, "token_type": [1] * 258 + [3, 3], "merges": ["t h", "th e"],
        "bos_token_id": 258, "eos_token_id": 259,
    }  # fmt: skip


def sentencepiece_vocabulary() -> dict[str, Any]:
    pieces = ["</s>", "<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", "t", "h", "e", "th", "the", "\u2581the", "<tool>"]
    return {
        "model": "llama", "tokens": pieces, "token_type": [3, 2, 3] + [6] * 256 + [1] * 7 + [4],
        "scores": [0.0] * 259 + [-4.0, -5.0, -6.0, -7.0, -1.0, -2.0, -3.0, 0.0],
        "bos_token_id": 2, "eos_token_id": 0, "unknown_token_id": 1,
    }  # fmt: skip


def write_tokenizer(folder: Path, vocabulary: dict, kind: str, config: dict) -> None:
    gguf_vocabulary.write_tokenizer(gguf_vocabulary.Vocabulary(**vocabulary), folder / "x", config, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    if kind == "merges":  # in place of tokenizer.json
        (folder / "tokenizer.json").unlink()
        ids = {token: token_id for token_id, token in enumerate(vocabulary["tokens"])}
        write_json(folder / "vocab.json", ids)
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(vocabulary["merges"]) + "\n", encoding="utf-8")
        write_json(folder / "added_tokens.json", {word: ids[word] for word in WORDS[2:]})
        write_json(folder / "special_tokens_map.json", {"eos_token": {"content": WORDS[3], "lstrip": False}})
        settings = {"tokenizer_class": "Qwen2Tokenizer"}
    elif kind == "shards":
        settings["added_tokens_decoder"] = {"258": {"content": WORDS[2], "special": True, "lstrip": False}}
        (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    write_json(path, {**settings, "chat_template": TEMPLATE})


def write_gguf(path: Path, family: str, is_bpe: bool, change: Callable[[dict, dict], None]) -> Path:
    """Write a GGUF file without the library, which would refuse some of the changes."""
    vocabulary = byte_level_vocabulary() if is_bpe else sentencepiece_vocabulary()
    config = {
        "model_type": FAMILIES[family], "vocab_size": len(vocabulary["tokens"]), **SIZES, "rms_norm_eps": 1e-5,
        "rope_theta": 1e4, "tie_word_embeddings": True, **(EXPERTS if family == "qwen3moe" else {}),
    }  # fmt: skip
    keys = {
        "general.architecture": family, "tokenizer.chat_template": TEMPLATE,
        **{f"{family}.{key}": config[name] for name, key in {**KEYS, **EXPERT_KEYS}.items() if name in config},
        **{f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()},
    }  # fmt: skip
    tensors = gguf_tensors(random_tensors(config))
    change(keys, tensors)
    path.write_bytes(gguf_bytes(keys, tensors))
    return path


def gguf_tensors(tensors: dict) -> dict[str, tuple[list[int], bytes]]:
    """Return the shape, innermost dimension first, and the float32 numbers of each tensor, by its name in GGUF."""
    found: dict[str, list] = {}
    for name, tensor in tensors.items():
        found.setdefault(name_in_gguf(name), []).append(tensor)
    whole = {name: torch.stack(parts) if "_exps" in name else parts[0] for name, parts in found.items()}
    return {name: (list(tensor.shape[::-1]), tensor.numpy().tobytes()) for name, tensor in whole.items()}


def gguf_bytes(keys: dict[str, Any], tensors: dict[str, tuple[list[int], bytes]]) -> bytes:
    """A GGUF file of version 3. Whole numbers are stored as uint32 where they fit, otherwise as int64."""

    def text(value: str) -> bytes:
        encoded = value.encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(encoded)) + encoded

    def number(value: int) -> tuple[int, bytes]:
        if 0 <= value < 2**32:
            return 4, struct.pack("<I", value)
        return 11, struct.pack("<q", max(min(value, 2**63 - 1), -(2**63)))

    def typed(value: Any) -> tuple[int, bytes]:
        if isinstance(value, bool):
            return 7, struct.pack("<B", value)
        if isinstance(value, int):
            return number(value)
        if isinstance(value, float):
            return 12, struct.pack("<d", value)
        if isinstance(value, list):
            items = [typed(item) for item in value]
            kind = items[0][0] if items else 4
            same = [data for item_kind, data in items if item_kind == kind]
            return 9, struct.pack("<IQ", kind, len(same)) + b"".join(same)
        return 8, text(value if isinstance(value, str) else json.dumps(value))

    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    for key, value in keys.items():
        kind, data = typed(value)
        header += text(key) + struct.pack("<I", kind) + data
    offset, body = 0, b""
    for name, (shape, numbers) in tensors.items():
        header += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset)
        body += numbers + bytes(-len(numbers) % 32)
        offset = len(body)
    return header + bytes(-len(header) % 32) + body
