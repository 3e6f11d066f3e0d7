"""`EngineConfig`: every option of an engine, whichever lesson it comes from.

Each option carries its help, the values it may have and the variable by which `make` passes it. A command's flags and
the check of a constructor's arguments are both made from it. Options have vLLM's names where vLLM has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any

DTYPES = ("float64", "float32", "bfloat16", "float16")


def option(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    minimum: float | None = None,
    maximum: float | None = None,
    envvar: str | None = None,
) -> Any:
    """A field of `EngineConfig`. choices: the values it may have, besides None where that is the default.

    minimum, maximum: it is a number within these, bounds included; a whole number, unless the default is a float.
    envvar: the variable by which `make` passes it.
    """
    metadata = {"help": help, "choices": choices, "minimum": minimum, "maximum": maximum, "envvar": envvar}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """The options of an engine. Raises ValueError, naming the option, its value and what is allowed.

    An option may be None, which leaves it open; `resolve` decides it for a model.
    """

    model: str = option("smollm2-135m", "a name, a folder, a .gguf file or org/name", envvar="MODEL")
    dtype: Any = option(  # noqa: RUF009  (the default is None)
        None, "of weights and cache; default: float32 on a CPU, bfloat16 on a GPU", choices=DTYPES, envvar="DTYPE"
    )
    device: str | None = option(None, "cpu or cuda; default: the GPU if there is one")

    # Lesson 4: the cache. Lesson 5: the scheduler.
    block_size: int = option(16, "tokens in a block of the cache", minimum=1, maximum=2**24)
    num_blocks: int | None = option(
        None, "blocks in the cache; default: as many as kv_cache_memory holds", minimum=1, maximum=10**6
    )
    kv_cache_memory: int = option(2**30, "bytes of cache, on each rank", minimum=1)
    num_host_blocks: int | None = option(
        None, "blocks on the host for preemption by swap; default: as many as num_blocks", minimum=0, maximum=10**6
    )
    max_model_len: int | None = option(
        None, "tokens of a request, prompt and output together; default: the model's context", minimum=1
    )
    max_num_seqs: int = option(64, "requests that run at once", minimum=1)
    max_num_batched_tokens: int = option(256, "tokens computed in one step", minimum=1)
    long_prefill_token_threshold: int | None = option(None, "of those, tokens of one request; default: half", minimum=1)
    scheduling_policy: str = option("fcfs", "which request is served first", choices=("fcfs", "priority", "fair"))
    preemption: str = option(
        "recompute", "what happens to the blocks of a preempted request", choices=("recompute", "swap")
    )
    enable_prefix_caching: bool | None = option(
        None, "reuse blocks with the same beginning; default: yes, unless the cache is contiguous"
    )
    kv_cache_policy: str = option(
        "paged", "contiguous: one block for each request, of max_model_len tokens", choices=("paged", "contiguous")
    )

    # Lesson 6: parallelism
    tensor_parallel: int = option(1, "processes that share every layer", minimum=1, maximum=1024, envvar="TP")
    pipeline_parallel: int = option(
        1, "stages of layers, each with processes of its own", minimum=1, maximum=1024, envvar="PP"
    )
    timeout: float = option(
        30.0, "seconds that a rank waits for another one within a step", minimum=0.001, maximum=10**6
    )

    # Lesson 7: quantization
    quantization: str | None = option(
        None, "how weights are stored; default: as they are", choices=("int8", "w8a8", "int4", "w4a8"), envvar="QUANT"
    )
    group_size: int = option(
        64, "weights that share a scale, with int4 and w4a8; even", minimum=2, maximum=2**14, envvar="GROUP"
    )
    symmetric: bool = option(False, "int4 or w4a8 without zero points")
    kv_cache_dtype: str = option("auto", "auto: as the weights", choices=("auto", "int8"), envvar="KV")
    offload: int | None = option(
        None, "bytes of weights in memory, the others are read in each step; default: all", minimum=1, envvar="OFFLOAD"
    )

    # Lesson 8: speculative decoding
    speculative: str | None = option(None, "source of draft tokens: ngram, or a draft model", envvar="SPEC")
    num_speculative_tokens: int | None = option(
        None, "draft tokens for a request in a step, at most; default 8", minimum=1, maximum=1024
    )
    adaptive_speculation: bool = option(True, "fewer draft tokens where they do not pay")

    model_config: Any = field(default=None, init=False, repr=False, compare=False)
    """The model's own config, once this one is resolved."""

    def __post_init__(self):
        if isinstance(self.dtype, str) and (name := self.dtype.removeprefix("torch.")) in DTYPES:
            import torch  # not before it is needed: a command's help is made from this class

            object.__setattr__(self, "dtype", getattr(torch, name))
        for name, each in ENGINE_FIELDS.items():
            check_option(each, getattr(self, name))
        if self.group_size % 2:
            raise ValueError(f"group_size must be an even number; it is {self.group_size!r}.")
        if self.kv_cache_policy == "contiguous" and self.enable_prefix_caching:
            raise ValueError(
                'enable_prefix_caching is True: with kv_cache_policy="contiguous" there are no blocks to share; leave '
                "one of the two out."
            )
        if self.preemption == "swap" and self.num_host_blocks == 0:
            raise ValueError('num_host_blocks is 0: preemption="swap" needs at least 1, or leave it out.')
        if self.num_speculative_tokens is not None and self.speculative is None:
            raise ValueError(
                f"num_speculative_tokens is {self.num_speculative_tokens}, and there is no source of draft tokens: set "
                'speculative="ngram", or name a draft model.'
            )

    @property
    def draft(self) -> str | None:
        """The draft model's name, if draft tokens come from a model."""
        return None if self.speculative == "ngram" else self.speculative

    @property
    def sliding_window(self) -> int | None:
        """How many of the newest keys some layer still reads; None if a layer, or a draft model, reads all of them."""
        windows = self.model_config.layer_windows
        return max(windows) if windows and None not in windows and self.draft is None else None

    @property
    def num_lookahead_tokens(self) -> int:
        """Slots that the scheduler reserves after a request's tokens, for a draft model to write to."""
        return (self.num_speculative_tokens or 8) if self.draft else 0

    def resolve(self, model_config: Any, slot_bytes: int) -> EngineConfig:
        """Returns these options for a model: what was left open is decided, and `model_config` is set.

        model_config: the model's, with `max_position_embeddings`. slot_bytes: the bytes of one token's keys and values,
        on the rank that holds the largest share. Raises ValueError if the two do not fit the options.
        """
        context = model_config.max_position_embeddings
        max_model_len = self.max_model_len or context
        if max_model_len > context:
            raise ValueError(f"max_model_len is {max_model_len}; the model's context is {context}.")
        is_paged = self.kv_cache_policy == "paged"
        block_size = self.block_size if is_paged else max_model_len
        fitting = self.kv_cache_memory // (slot_bytes * block_size)
        wanted = self.max_num_seqs * -(-max_model_len // block_size)
        num_blocks = self.num_blocks or min(fitting, wanted)
        if num_blocks < 1:
            raise ValueError(
                f"kv_cache_memory is {self.kv_cache_memory} bytes: too few for one block of {block_size} tokens, which "
                f"takes {slot_bytes * block_size}."
            )
        resolved = replace(
            self,
            block_size=block_size,
            num_blocks=num_blocks,
            num_host_blocks=(self.num_host_blocks or num_blocks) if self.preemption == "swap" else 0,
            enable_prefix_caching=is_paged if self.enable_prefix_caching is None else self.enable_prefix_caching,
            max_model_len=max_model_len,
            long_prefill_token_threshold=self.long_prefill_token_threshold or -(-self.max_num_batched_tokens // 2),
        )
        object.__setattr__(resolved, "model_config", model_config)
        return resolved

    def limit_output(self, num_prompt_tokens: int, max_tokens: int) -> int:
        """The number of tokens, at most `max_tokens`, that a request with such a prompt can generate.

        This config must be resolved. Raises ValueError for a request that can never be served.
        """
        if num_prompt_tokens >= self.max_model_len:
            raise ValueError(
                f"The prompt has {num_prompt_tokens} tokens; max_model_len is {self.max_model_len}, and one at least "
                "must be left for the answer."
            )
        max_tokens = min(max_tokens, self.max_model_len - num_prompt_tokens)
        num_needed = -(-(num_prompt_tokens + max_tokens - 1) // self.block_size)  # the last token is never computed
        if num_needed > self.num_blocks:
            raise ValueError(
                f"A prompt of {num_prompt_tokens} tokens with max_tokens={max_tokens} needs {num_needed} blocks of "
                f"{self.block_size}; the pool has num_blocks={self.num_blocks}, for "
                f"{self.num_blocks * self.block_size} tokens in all."
            )
        return max_tokens


ENGINE_FIELDS = {each.name: each for each in fields(EngineConfig) if each.init}
"""The options by name, as dataclass fields; their metadata is what was given to `option`."""


def shown(value: Any) -> str:
    """The value as an error quotes it: at most 80 characters, or its type if it has no text."""
    try:
        return format(repr(value), ".80")
    except Exception:  # a whole number of 5,000 digits, or a class of the caller's whose __repr__ fails
        return f"an object of type {type(value).__name__} that cannot be written"


def check_option(each: Field, value: Any, name: str | None = None) -> None:
    """Raise ValueError if a field cannot have the value. name: what the caller calls the field."""
    if not (value is None and each.default is None) and (rule := broken_rule(each, value)):
        raise ValueError(f"{name or each.name} must be {rule}; it is {shown(value)}.")


def check_names(values: Any, name: str) -> Mapping[str, Any]:
    """Return the values, or raise ValueError if they are not a mapping from names, as keyword arguments must be."""
    if isinstance(values, Mapping) and all(isinstance(key, str) for key in values):
        return values
    raise ValueError(f"{name} must be a mapping from names to values; it is {shown(values)}.")


def broken_rule(each: Field, value: Any) -> str | None:
    """What the value of a field must be, as a phrase; None if it is that."""
    rules, default = each.metadata, each.default
    if rules["choices"]:
        name = str(value).removeprefix("torch.") if type(value).__module__ == "torch" else value
        is_allowed = isinstance(name, str) and name in rules["choices"]  # "float32" or torch.float32
        return None if is_allowed else f"one of {', '.join(rules['choices'])}"
    if rules["minimum"] is not None:
        is_number = isinstance(value, (int, float) if isinstance(default, float) else int)
        if is_number and not isinstance(value, bool) and rules["minimum"] <= value <= (rules["maximum"] or value):
            return None
        kind = "a number" if isinstance(default, float) else "a whole number"
        is_too_large = is_number and value > rules["minimum"]
        return f"{kind} of at most {rules['maximum']}" if is_too_large else f"{kind} of at least {rules['minimum']}"
    if isinstance(default, bool) or "bool" in each.type:
        return None if isinstance(value, bool) else "True or False"
    return None if isinstance(value, str) and value else "a name"
