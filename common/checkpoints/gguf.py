"""Converts a GGUF file, llama.cpp's format, to a checkpoint folder in Hugging Face's layout.

GGUF keeps everything in one file: the shape of the model and the vocabulary as key-value pairs, then the tensors,
which are quantized in most files. Four things differ from a Hugging Face folder and are converted:

names         `blk.0.attn_q.weight` is `model.layers.0.self_attn.q_proj.weight`.
order         llama.cpp rotates neighbouring pairs (0, 1), (2, 3)...; Hugging Face pairs each dimension with the one
              half a head further. Files of the llama family have the rows of q and k permuted accordingly; Qwen's do
              not.
numbers       A quantized weight is scale * q + min for a small integer q. It is written in float32: rounded to 16
              bits it would be another number, and lesson 7 looks at the grid on which these weights lie. What is
              stored in float16 or bfloat16 keeps its dtype.
vocabulary    Rebuilt as tokenizer.json (byte-level BPE) or tokenizer.model (SentencePiece).

Converting a quantized model does not restore the original weights.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from common.checkpoints.download import progress
from common.checkpoints.folder import CheckpointError, write_json
from common.checkpoints.gguf_file import GGUFFile
from common.checkpoints.gguf_vocabulary import Vocabulary, read_vocabulary, write_tokenizer
from common.checkpoints.schema import check_config

SHARD_BYTES = 2 << 30  # of a written file; its tensors are all in memory while it is written

FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3moe": "qwen3_moe"}  # architecture: model_type

# gguf.get_tensor_name_map maps in the other direction: a dozen names of Hugging Face models to one of GGUF's.
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",  # all experts' in one tensor
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
OTHER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def name_in_gguf(name: str) -> str:
    """The name in GGUF of the tensor with this name; the tensors of a layer's experts have the same, that of all."""
    _, layer, inner, part = re.fullmatch(r"(model\.layers\.(\d+)\.)?(.+)\.(\w+)", name).groups()
    old_names = {new: old for old, new in {**LAYER_NAMES, **OTHER_NAMES}.items()}
    old = old_names[re.sub(r"experts\.\d+", "experts.{}", inner)]
    return f"{old}.{part}" if layer is None else f"blk.{layer}.{old}.{part}"


def convert_gguf(path: Path, folder: Path) -> None:
    """Write the model in `path` to `folder`: safetensors, config.json, generation_config.json and the tokenizer.

    Raises CheckpointError for a file that is damaged or that the course cannot run, OSError if writing fails.
    """
    if re.search(r"-\d{5}-of-\d{5}$", path.stem):
        raise CheckpointError(
            f"{path} is one part of a split GGUF; join the parts with llama.cpp's `llama-gguf-split --merge`."
        )
    source = GGUFFile(path)
    if not isinstance(source.architecture, str) or source.architecture not in FAMILIES:
        raise source.refusal(
            f"the architecture is {source.architecture!r:.80}; this course runs {', '.join(FAMILIES)}."
        )
    vocabulary = read_vocabulary(source.get, path)
    config = _config(source, vocabulary)
    _write_tensors(source, config, folder)
    write_tokenizer(vocabulary, path, config, folder)
    write_json(folder / "config.json", config)


# config.json's keys -> GGUF's, which begin with the architecture.
KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
EXPERT_KEYS = {
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}


def _config(source: GGUFFile, vocabulary: Vocabulary) -> dict:
    """Returns the content of config.json, made from GGUF's keys and checked as any config.json is."""
    path, tensors, of_model = source.path, source.tensors, source.of_model
    family, keys = FAMILIES[source.architecture], KEYS
    if family == "qwen3_moe":
        keys = KEYS | EXPERT_KEYS
    elif of_model("expert_count", 0):
        raise source.refusal("a mixture of experts; of those, this course runs qwen3moe.")
    if "token_embd.weight" not in tensors:
        raise source.refusal("tensor 'token_embd.weight' is missing.")
    if len(tensors["token_embd.weight"].shape) != 2:
        raise source.refusal("tensor 'token_embd.weight' is no matrix, with a row for each token.")
    # An absent key has the same meaning in every family here, unlike in a config.json.
    heads = source.uniform(KEYS["num_attention_heads"])
    optional = {"num_key_value_heads": heads, "head_dim": None, "rope_theta": 10000.0}
    config = {
        "architectures": [f"{family.title().replace('_', '')}ForCausalLM"],
        "model_type": family,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        **{key: source.uniform(name, optional.get(key, source.REQUIRED)) for key, name in keys.items()},
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "is_causal": of_model("attention.causal", True),
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": str(tensors["token_embd.weight"].dtype).removeprefix("torch."),
    }
    if family == "qwen3_moe":
        config["norm_topk_prob"] = True  # no key says so: llama.cpp always does it for this architecture
    eos = vocabulary.end_ids()
    config["bos_token_id"] = vocabulary.bos_token_id
    config["eos_token_id"] = eos if len(eos) > 1 else eos[0] if eos else None
    config["pad_token_id"] = vocabulary.padding_token_id
    names = {key: f"{source.architecture}.{name}" for key, name in {**keys, "is_causal": "attention.causal"}.items()}
    hidden_size = config["hidden_size"]
    if config["head_dim"] is None and isinstance(heads, int) and isinstance(hidden_size, int) and heads > 0:
        config["head_dim"] = hidden_size // heads
    checked = check_config(config, path, names)
    config["rms_norm_eps"], config["rope_theta"] = _as_written(checked.rms_norm_eps), _as_written(checked.rope_theta)
    if (rotated := of_model("rope.dimension_count", checked.head_dim)) != checked.head_dim:
        raise source.refusal(
            f"{source.architecture}.rope.dimension_count is {rotated!r:.80}, and a head has {checked.head_dim} "
            "dimensions; only a part of each head is rotated, which this course does not do."
        )
    config["rope_scaling"] = _rope_scaling(source, checked.head_dim, checked.max_position_embeddings)
    check_config(config, path, names)
    return config


def _as_written(value: float) -> float:
    """The shortest decimal with the same float32: GGUF rounded 1e-05 to float32, and 1e-05 is what was meant."""
    return float(str(numpy.float32(value)))


def _rope_scaling(source: GGUFFile, head_dim: int, context: int) -> dict | None:
    """Returns config.json's `rope_scaling`, the rule by which rotary frequencies are scaled for long texts.

    For Llama 3, GGUF stores the result, a divisor for each frequency (`rope_freqs.weight`), and not the rule. The
    factor is the largest divisor; the rule's other three numbers are those of all Llama 3 releases. If they do not
    give the stored divisors, the file is refused.
    """
    factor = source.of_model("rope.scaling.factor", source.of_model("rope.scale_linear", None))
    # As llama.cpp reads it: a factor without a type is linear, and a factor of 0 or 1 scales nothing.
    kind = source.of_model("rope.scaling.type", "linear" if factor else "none")
    original = source.of_model("rope.scaling.original_context_length", context)
    if kind == "linear" and factor not in (None, 0, 1):
        return {"rope_type": "linear", "factor": factor}
    computed = {"attn_factor": 1, "yarn_ext_factor": int(kind == "yarn"), "yarn_log_multiplier": 0}
    for key, expected in computed.items():
        if (value := source.of_model(f"rope.scaling.{key}", expected)) != expected:
            key = f"{source.architecture}.rope.scaling.{key}"
            raise source.refusal(f"{key} is {value!r:.80}; this course computes only {expected}.")
    if kind == "yarn":
        factor = factor or 1.0
        more = {key: source.of_model(f"rope.scaling.yarn_{key}", None) for key in ("beta_fast", "beta_slow")}
        if (temperature := source.of_model("rope.scaling.yarn_attn_factor", None)) is not None:
            more["attention_factor"] = temperature * (1 + 0.1 * math.log(factor))
        more = {key: value for key, value in more.items() if value is not None}
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **more}
    if kind not in ("none", "linear"):
        raise source.refusal(f"rope scaling of type {kind!r:.80}, which this course does not do.")
    if "rope_freqs.weight" not in source.tensors:
        return None
    divisors = source.numbers("rope_freqs.weight").astype(numpy.float64)
    if numpy.all(divisors == 1):
        return None
    factor, low, high, original = _as_written(divisors.max()), 1.0, 4.0, 8192
    frequencies = source.of_model("rope.freq_base", 10000.0) ** (-numpy.arange(0, head_dim, 2) / head_dim)
    turns = original * frequencies / (2 * numpy.pi)  # how often each dimension turned within the original context
    smooth = numpy.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not numpy.allclose(divisors, expected, rtol=1e-4):
        raise source.refusal(
            f"tensor 'rope_freqs.weight' does not follow Llama 3's rule for scaled rotary embeddings "
            f"(factor {factor:g}, original context {original}), and its own rule is not stored. Take the model's "
            "safetensors, whose config.json says it."
        )
    more = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    return {"rope_type": "llama3", "factor": factor, **more}


# Tensors


def _new_name(source: GGUFFile, name: str) -> str:
    stem, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if kind in ("weight", "bias"):
        if stem in OTHER_NAMES:
            return f"{OTHER_NAMES[stem]}.{kind}"
        if layer and layer[2] in LAYER_NAMES:
            return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.{kind}"
    raise source.refusal(f"tensor {name!r} has no place in a {source.architecture} model as this course knows it.")


def _write_tensors(source: GGUFFile, config: dict, folder: Path) -> None:
    """Write one file, or several of at most SHARD_BYTES and an index. Only one file's tensors are in memory at once."""
    names = {name: _new_name(source, name) for name in source.tensors if name != "rope_freqs.weight"}
    sizes = {name: math.prod(source.tensors[name].shape) * source.tensors[name].dtype.itemsize for name in names}
    shards: list[list[str]] = [[]]
    for name in names:
        if shards[-1] and sum(sizes[other] for other in [*shards[-1], name]) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else ["model.safetensors"]
    weight_map: dict[str, str] = {}
    with progress(f"Converting {source.path.name}", sum(sizes.values())) as advance:
        for file, shard in zip(files, shards):
            tensors: dict[str, torch.Tensor] = {}
            for name in shard:
                tensors |= _converted(source, name, names[name], config)
                advance(sizes[name])
            weight_map |= dict.fromkeys(tensors, file)
            try:
                save_file(tensors, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:  # most likely a full disk
                raise OSError(error) from error
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _converted(source: GGUFFile, name: str, new_name: str, config: dict) -> dict[str, torch.Tensor]:
    """The tensor by its new name, dequantized, with its rows in Hugging Face's order.

    A tensor with the matrices of all experts becomes one tensor for each expert.
    """
    values, kind, num_experts = source.numbers(name), name.split(".")[-2], config.get("num_experts")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    if source.architecture == "llama" and kind in heads:
        # (heads, pair, 2, ...) -> (heads, 2, pair, ...): from neighbours to halves.
        if len(values) != heads[kind] * config["head_dim"]:
            raise source.refusal(
                f"tensor {name!r} has {len(values)} rows, and {heads[kind]} heads of "
                f"{config['head_dim']} dimensions have {heads[kind] * config['head_dim']}."
            )
        values = values.reshape(heads[kind], -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    tensor = torch.from_numpy(numpy.array(values, dtype=numpy.float32, order="C")).to(source.tensors[name].dtype)
    if "{}" not in new_name:
        return {new_name: tensor}
    if tensor.ndim != 3 or len(tensor) != num_experts:
        raise source.refusal(
            f"tensor {name!r} has shape {tuple(tensor.shape)}; a matrix for each of {num_experts} experts was expected."
        )
    return {new_name.format(expert): matrix for expert, matrix in enumerate(tensor)}
