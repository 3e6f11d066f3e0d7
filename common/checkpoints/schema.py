"""What the JSON files of a checkpoint may contain: keys, their types and ranges, and what an absent key means.

All of it is declared here once, as `msgspec` structs, and checked whenever a checkpoint is read. So no later code gets
a string in place of a size, an infinite epsilon, or two billion layers. A valid value that the engine does not compute
is refused here too. Every error names the file, the key and its value.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from common.checkpoints.folder import ABSENT_EXPERTS, CheckpointError

# The limits are far above those of any known model, and low enough that a corrupt number cannot exhaust the memory.
Size = Annotated[int, Meta(ge=1, le=2**24)]
Count = Annotated[int, Meta(ge=1, le=2**16)]
Layers = Annotated[int, Meta(ge=1, le=4096)]
Context = Annotated[int, Meta(ge=1, le=2**31)]
LARGEST_ID = 2**24
TokenId = Annotated[int, Meta(ge=0, lt=LARGEST_ID)]
Positive = Annotated[float, Meta(ge=1e-6, le=1e12)]
Factor = Annotated[float, Meta(ge=1, le=1e6)]
Scale = Annotated[float, Meta(ge=0, le=1e6)]
Original = Annotated[int, Meta(ge=2, le=2**31)]

SAME: Mapping[str, str] = {}  # the names of a file whose keys are called as in config.json
RENAMED = {"num_experts": "num_local_experts"}

# --- config.json ------------------------------------------------------------------------------------------------------


class Linear(Struct, tag_field="rope_type", tag="linear"):
    """Every frequency divided by `factor`."""

    factor: Factor


class Dynamic(Struct, tag_field="rope_type", tag="dynamic"):
    """Theta grows with the length of the text beyond the original context."""

    factor: Factor
    original_max_position_embeddings: Original


class Yarn(Struct, tag_field="rope_type", tag="yarn"):
    """Slow frequencies divided by `factor`, fast ones kept, and the attention's temperature changed."""

    factor: Factor
    original_max_position_embeddings: Original
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    attention_factor: Positive | None = None
    mscale: Scale | None = None
    mscale_all_dim: Scale | None = None
    truncate: bool = True


class LongRope(Struct, tag_field="rope_type", tag="longrope"):
    """A factor for every frequency, one list for texts within the original context and one for longer ones."""

    short_factor: list[Positive]
    long_factor: list[Positive]
    original_max_position_embeddings: Original
    factor: Factor | None = None
    attention_factor: Positive | None = None


class Llama3(Struct, tag_field="rope_type", tag="llama3"):
    """Slow frequencies divided by `factor`, fast ones kept."""

    factor: Factor
    low_freq_factor: Positive
    high_freq_factor: Positive
    original_max_position_embeddings: Original


class _Scaled(Struct):
    rope_scaling: Linear | Dynamic | Yarn | LongRope | Llama3


class _Context(Struct):
    max_position_embeddings: Context


class Moe(Struct, frozen=True):
    """A mixture of experts: which layers have one, and its sizes, named as in `config.json`."""

    layers: tuple[int, ...]
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool


class Config(Struct, kw_only=True, frozen=True):
    """The checked content of a `config.json`. None stands for a value that follows from others, or does not exist."""

    model_type: Literal["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"]
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Count
    num_key_value_heads: Count | None = None  # None: num_attention_heads
    head_dim: Count | None = None  # None: hidden_size // num_attention_heads
    hidden_act: Literal["silu"] = "silu"
    max_position_embeddings: Context  # "dynamic" and "yarn" reach further than the original context: by `factor`
    rms_norm_eps: Annotated[float, Meta(gt=0, le=0.1)] = 1e-6
    rope_theta: Annotated[float, Meta(gt=1, le=1e15)] = 10_000.0
    rope_scaling: dict[str, Any] | None = None  # the keys of one of the structs above; None: plain frequencies
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    is_causal: bool = True
    use_sliding_window: bool = False  # Qwen's files have a `sliding_window` that counts only if this is true
    sliding_window: Context | None = None
    max_window_layers: Annotated[int, Meta(ge=0, le=2**31)] = 0  # Qwen: the first layer with a window
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None  # Qwen: replaces max_window_layers
    layer_windows: tuple[int | None, ...] = ()  # in no file: follows from the four above; empty if no layer has one
    num_experts: Annotated[int, Meta(ge=0, le=4096)] = 0
    num_experts_per_tok: Annotated[int, Meta(ge=1, le=4096)] = 1
    moe_intermediate_size: Size = 1
    norm_topk_prob: bool = False
    decoder_sparse_step: Layers = 1  # layers step - 1, 2 * step - 1, ... have experts ...
    mlp_only_layers: list[int] = []  # ... except for these
    moe: Moe | None = None  # in no file: follows from the six above; None if no layer has experts
    bos_token_id: TokenId | list[TokenId] | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    quantization_config: dict[str, Any] | None = None


WINDOWS = {"sliding_window": 4096, "max_window_layers": 28}

# What an absent key means where families differ, as in transformers 5.23.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, **WINDOWS},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128, **WINDOWS},
    "qwen3_moe": {
        "max_position_embeddings": 32768, "num_key_value_heads": 4, "sliding_window": 4096,
        "num_experts": ABSENT_EXPERTS, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    },
}  # fmt: skip
# A null means that the key is absent, except for these keys of these families, where it is a value of its own.
NULLABLE = {"num_key_value_heads": ("qwen2", "qwen3"), "sliding_window": ("mistral", "qwen2", "qwen3", "qwen3_moe")}
# Keys that a family does not read, whatever its files say.
EXPERTS = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step",
    "mlp_only_layers",
)  # fmt: skip
IGNORED = {
    "llama": ("sliding_window", "layer_types", *EXPERTS),
    "mistral": ("attention_bias", "mlp_bias", "layer_types", *EXPERTS),
    "qwen2": EXPERTS,
    "qwen3": EXPERTS,
    "qwen3_moe": ("mlp_bias", "max_window_layers", "layer_types"),
}

# What is allowed, for keys whose error from msgspec does not say it.
ADVICE = {
    "model_type": f"this engine runs {', '.join(map(repr, FAMILIES))}",
    "hidden_act": "this engine computes 'silu'",
    "rope_type": "this engine computes 'default', 'linear', 'dynamic', 'yarn', 'longrope' and 'llama3'",
}


def check_config(config: Mapping, file: object = "config.json", names: Mapping[str, str] = SAME) -> Config:
    """Check the content of a `config.json`. Returns it with absent keys filled in as its family means them.

    file: named in errors. names: what the keys are called there, if it is no config.json. Raises CheckpointError for
    a wrong value, and for one that the engine does not compute.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise refusal(file, names.get("model_type", "model_type"), family, ADVICE["model_type"])
    if config.get("num_experts") is None and "num_local_experts" in config:  # transformers 5 writes this name
        config, names = {**config, "num_experts": config["num_local_experts"]}, {**RENAMED, **names}
    given = {key: value for key, value in config.items() if value is not None or family in NULLABLE.get(key, ())}
    given = {**FAMILIES[family], **given}
    for key in ("layer_windows", "moe", *IGNORED[family]):
        given.pop(key, None)
    checked = check(Config, {**given, **_rope(given, file, names)}, file, names)
    for key, value, problem in _contradictions(checked):
        raise refusal(file, names.get(key, key), value, problem)
    return msgspec.structs.replace(checked, layer_windows=_layer_windows(checked), moe=_moe(checked))


def _rope(given: Mapping, file: object, names: Mapping[str, str]) -> dict[str, Any]:
    """Returns the rotary settings as `rope_theta`, `rope_scaling` and, if it changes, `max_position_embeddings`.

    Newer files have the first two in `rope_parameters`, older ones as two keys. Some have the original context, too.
    """
    place = "rope_parameters" if given.get("rope_scaling", {}) == {} else "rope_scaling"
    rope = given.get(place, {})
    if not isinstance(rope, Mapping):
        raise refusal(file, names.get(place, place), rope, "a JSON object was expected")
    rope = {key: value for key, value in rope.items() if value is not None}
    theta = rope.pop("rope_theta", given.get("rope_theta", 10_000.0))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    part = rope.pop("partial_rotary_factor", given.get("partial_rotary_factor", 1.0))
    if part != 1.0:
        raise refusal(file, "partial_rotary_factor", part, "this engine rotates whole heads, which is 1.0")
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    original = "original_max_position_embeddings"
    context = given["max_position_embeddings"]
    if kind == "dynamic":
        rope[original] = context
    elif original in given and kind in ("yarn", "longrope", "llama3"):  # transformers prefers this one, too
        rope[original] = given[original]
    elif kind in ("yarn", "longrope"):
        rope.setdefault(original, context)
    scaling = {"rope_type": kind, **rope}
    checked = check(_Scaled, {"rope_scaling": scaling}, file, {"rope_scaling": place, **names}).rope_scaling
    check(_Context, given, file, names)
    if isinstance(checked, LongRope) and checked.factor is None:
        checked.factor = max(context / checked.original_max_position_embeddings, 1.0)
    if isinstance(checked, Dynamic | Yarn):
        context = min(max(context, int(checked.factor * checked.original_max_position_embeddings)), 2**31)
    return {"rope_theta": theta, "rope_scaling": msgspec.to_builtins(checked), "max_position_embeddings": context}


def _layer_windows(config: Config) -> tuple[int | None, ...]:
    """The window of each layer, None for a layer without one; empty if no layer has one."""
    is_qwen = config.model_type.startswith("qwen")
    window = config.sliding_window if config.use_sliding_window or not is_qwen else None
    if window is None or window >= config.max_position_embeddings:
        return ()
    layers = range(config.num_hidden_layers)
    if config.layer_types is not None:
        has_window = [kind == "sliding_attention" for kind in config.layer_types]
    else:
        has_window = [not is_qwen or layer >= config.max_window_layers for layer in layers]
    return tuple(window if has_window[layer] else None for layer in layers) if any(has_window) else ()


def _moe(config: Config) -> Moe | None:
    """The mixture of experts, or None if no layer has one."""
    step, dense = config.decoder_sparse_step, set(config.mlp_only_layers)
    layers = [layer for layer in range(step - 1, config.num_hidden_layers, step) if layer not in dense]
    if not layers or not config.num_experts:
        return None
    sizes = (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size, config.norm_topk_prob)
    return Moe(tuple(layers), *sizes)


def _contradictions(config: Config):
    """Yields (key, value, what is allowed) for each key that contradicts others or that the engine does not compute."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if kv_heads is not None and heads % kv_heads:
        yield "num_key_value_heads", kv_heads, f"it must divide num_attention_heads, which is {heads}"
    if config.head_dim is None and config.hidden_size % heads:
        yield "num_attention_heads", heads, f"without a head_dim it must divide hidden_size, {config.hidden_size}"
    head_dim = config.head_dim or config.hidden_size // heads
    if head_dim % 2:
        yield "head_dim", head_dim, "it must be even, since dimensions are rotated in pairs"
    for key in ("bos_token_id", "eos_token_id"):
        ids = getattr(config, key)
        if any(token_id >= config.vocab_size for token_id in (ids if isinstance(ids, list) else [ids or 0])):
            yield key, ids, f"the vocabulary ends at {config.vocab_size - 1}"
    if not config.is_causal:
        yield "is_causal", False, "this engine computes causal attention, which is true"
    if config.quantization_config:
        kind = config.quantization_config.get("quant_method")
        yield "quantization_config", kind, "load the unquantized checkpoint instead"
    if (moe := _moe(config)) and moe.num_experts_per_tok > moe.num_experts:
        yield "num_experts_per_tok", moe.num_experts_per_tok, f"there are {moe.num_experts} experts"
    if config.layer_types is not None and len(config.layer_types) != config.num_hidden_layers:
        yield "layer_types", config.layer_types, f"it needs an entry for each of {config.num_hidden_layers} layers"
    rope = config.rope_scaling or {"rope_type": None}
    if rope["rope_type"] == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        yield "high_freq_factor", rope["high_freq_factor"], f"low_freq_factor, {rope['low_freq_factor']}, must be less"
    for key in ("short_factor", "long_factor") if rope["rope_type"] == "longrope" else ():
        if len(rope[key]) != head_dim // 2:
            yield key, rope[key], f"it needs {head_dim // 2} numbers, one for each pair of a head's dimensions"


# --- The other files --------------------------------------------------------------------------------------------------


class SpecialIds(Struct, frozen=True):
    """The keys of a `generation_config.json` that are read. A `config.json` may have them, too."""

    bos_token_id: TokenId | list[TokenId] | None = None
    eos_token_id: TokenId | list[TokenId] | None = None


# --- One check for all of them ----------------------------------------------------------------------------------------

Checked = TypeVar("Checked", bound=Struct)


def check(kind: type[Checked], given: Mapping, file: object, names: Mapping[str, str] = SAME) -> Checked:
    """Returns `given` as a struct of this kind. Raises CheckpointError, naming file, key and value, if it is none."""
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
    steps: list[str] = re.findall(r"[^.\[\]`]+", path)
    missing = re.fullmatch(r"Object missing required field `(\w+)`", problem)
    if missing:
        steps.append(missing[1])
    value = given
    for step in steps:
        value = value[int(step)] if isinstance(value, (list, tuple)) else value.get(step)
    key = ".".join([names.get(steps[0], steps[0]), *steps[1:]])
    problem = ADVICE.get(steps[-1], problem[:1].lower() + problem[1:])
    raise refusal(file, key, value, "it has to be given" if missing else problem)


def refusal(file: object, key: str, value: object, problem: str) -> CheckpointError:
    """The error for a key of a file; `problem` says what is expected instead."""
    return CheckpointError(
        f"{file}: {key} is {'None (missing)' if value is None else format(repr(value), '.80')}; {problem}."
    )
