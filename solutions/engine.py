"""Lesson 8, second half: the engine, assembled from nine lessons. It computes nothing itself; it combines the parts.

    with InferenceEngine("smollm2-135m", tensor_parallel=2, quantization="int8", speculative="ngram") as engine:
        outputs = engine.generate(prompts, SamplingParams(max_tokens=64))

`resolve` decides what the options leave open (exercise 8.10); `start_executor` starts one process (lesson 5) or a grid
of ranks (lesson 6). Each rank calls `load_model` for its part of the weights (lessons 2, 6 and 7), then `build_runner`
for its cache and its part of a step (exercise 8.11).

Lessons 6 and 7 are imported only if an option needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from common import kernels
from common.checkpoints import Checkpoint, find_checkpoint
from common.config import EngineConfig, check_names, check_option
from common.machine import check_memory, choose_device
from common.tokenizer import Tokenizer, load_tokenizer
from solutions import llama_pytorch
from solutions.batching import Engine, Executor, LocalExecutor, ModelRunner, RequestOutput
from solutions.kv_cache import cache_bytes
from solutions.llama_pytorch import Llama, ModelConfig, SamplingParams, load_weights, parse_config, use_kernels
from solutions.paged_attention import PagedKVCache
from solutions.speculative import AdaptiveSpeculation, DraftProposer, NgramProposer, SpeculativeRunner

if TYPE_CHECKING:
    from solutions.parallelism import Group, RankCoordinates

# --- What the options leave open --------------------------------------------------------------------------------------


def read_config(checkpoint: Checkpoint) -> ModelConfig:
    """Return the model's config without "quantization_config", which lesson 2 would refuse."""
    return parse_config({key: value for key, value in checkpoint.config.items() if key != "quantization_config"})


def check_draft(draft: Checkpoint, target: Checkpoint, tokenizer: Tokenizer) -> None:
    """Raise ValueError if a token id does not stand for the same text in both models. tokenizer: the target's."""
    sizes = [read_config(checkpoint).vocab_size for checkpoint in (draft, target)]
    tokenizers = (load_tokenizer(draft.folder), tokenizer)
    pieces = [[each.token_bytes(token_id) for token_id in range(each.vocab_size)] for each in tokenizers]
    if sizes[0] != sizes[1] or pieces[0] != pieces[1]:
        raise ValueError(
            f"speculative: {draft.folder.name} has another vocabulary than {target.folder.name} ({sizes[0]} and "
            f"{sizes[1]} tokens); a draft proposes token ids, and they must mean the same to both."
        )


def largest_rank_share(config: EngineConfig, model_config: ModelConfig) -> float:
    """Return the largest fraction of a token's keys and values on one rank: 1 with one process."""
    if config.tensor_parallel * config.pipeline_parallel == 1:
        return 1.0
    from solutions.parallelism import check_parallel, largest_share

    check_parallel(model_config, config.tensor_parallel, config.pipeline_parallel)
    return largest_share(model_config, config.tensor_parallel, config.pipeline_parallel)


def slot_bytes(config: EngineConfig, model_config: ModelConfig, draft_config: ModelConfig | None) -> int:
    """Return the bytes of one token's keys and values, on the rank that stores the most.

    In eight bits each head has head_dim bytes and one scale in `config.dtype`, instead of head_dim numbers. The ranks
    divide the target's keys and values. A draft's are added: it is whole on one rank, and its cache has `config.dtype`.
    """
    share = largest_rank_share(config, model_config)
    # Exercise 8.10: multiply the target's `cache_bytes` of one token by `share` and, with kv_cache_dtype "int8", by the
    # factor of eight bits, and round. Then add the draft's, without these factors.
    size, head_dim = config.dtype.itemsize, model_config.head_dim
    target = cache_bytes(model_config, 1, size) * share
    if config.kv_cache_dtype == "int8":
        target *= (head_dim + size) / (head_dim * size)
    return round(target) + (0 if draft_config is None else cache_bytes(draft_config, 1, size))


def resolve(config: EngineConfig) -> tuple[EngineConfig, Tokenizer]:
    """Decide everything that the options leave open, before any process is started or any weight is read.

    Returns the options, with folders in place of names, and the tokenizer. Raises ValueError if the options do not fit
    the model.
    """
    checkpoint = Checkpoint(find_checkpoint(config.model))
    model_config, draft_config = read_config(checkpoint), None
    tokenizer = load_tokenizer(checkpoint.folder)
    llama_pytorch.check_tokenizer(tokenizer, checkpoint, model_config)
    device = choose_device(config.device)
    dtype = config.dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    config = replace(config, model=str(checkpoint.folder), device=device, dtype=dtype)
    if config.draft is not None:
        draft = Checkpoint(find_checkpoint(config.draft))
        check_draft(draft, checkpoint, tokenizer)
        config, draft_config = replace(config, speculative=str(draft.folder)), read_config(draft)
    size = slot_bytes(config, model_config, draft_config)
    config = config.resolve(model_config, size)
    check_memory(config, size)
    return config, tokenizer


# --- The parts: each rank calls `load_model`, then `build_runner` -----------------------------------------------------


def load_model(
    config: EngineConfig, coordinates: RankCoordinates | None = None, group: Group | None = None
) -> tuple[Llama, range, int]:
    """Load a rank's part of a model; without coordinates, the whole model.

    Each tensor is cut and quantized as it is read, so that the whole is never in memory. Returns the model, the numbers
    of its layers, and the number of bytes read.
    """
    checkpoint, make = Checkpoint(find_checkpoint(config.model)), Llama
    if config.offload is not None:
        from solutions.quantization import OffloadedLlama as make
    with torch.device("meta"):
        model = make(read_config(checkpoint)).to(config.dtype)
    model.max_length = config.max_model_len
    if config.quantization is not None or "quantization_config" in checkpoint.config:
        from solutions.quantization import Quantization, quantize_for

        wanted = config.quantization and Quantization(config.quantization, config.group_size, config.symmetric)
        quantize_for(model, checkpoint, wanted)
    layers, parallel = range(model.config.num_hidden_layers), {}
    if coordinates is not None:
        from solutions.parallelism import ColumnParallelLinear, RowParallelLinear, shard

        layers, parallel = shard(model, coordinates, group), dict(column=ColumnParallelLinear, row=RowParallelLinear)
    if config.offload is not None:
        model.stream_from(checkpoint, layers, config.offload)
    else:
        load_weights(model, checkpoint)
        model = model.to(config.device)
    use_kernels(model, **parallel)
    return model, layers, checkpoint.num_bytes_read


def is_sampling_rank(model: Llama, layers: range) -> bool:
    """Whether this rank gets the logits of a step and samples: the first rank of the last stage does."""
    group = getattr(model.lm_head, "group", None)
    return layers.stop == model.config.num_hidden_layers and (group is None or group.rank == 0)


def make_cache(config: EngineConfig, model: Llama, layers: range, kv_cache_dtype: str = "auto") -> PagedKVCache:
    """Allocate the blocks of a model's keys and values. kv_cache_dtype: "auto" (as the weights) or "int8"."""
    kind = PagedKVCache
    if kv_cache_dtype == "int8":
        from solutions.quantization import Int8KVCache as kind
    return kind(model, config.num_blocks, config.block_size, config.num_host_blocks, layers, config.dtype)


def build_runner(config: EngineConfig, model: Llama, layers: range) -> ModelRunner:
    """Make the runner that computes one rank's part of each step.

    Draft tokens are proposed and verified on the rank that samples, and a draft model is loaded only there. Its weights
    have the target's dtype and are never quantized; it has its own cache, which is never INT8.
    """
    # Exercise 8.11: call `make_cache`. Return a `ModelRunner` if nothing is proposed on this rank. Make the proposer;
    # for a draft, call `load_model` with the target's dtype, device and max_model_len. Return a `SpeculativeRunner`.
    # `config.num_speculative_tokens` counts as 8 if it is None.
    cache = make_cache(config, model, layers, config.kv_cache_dtype)
    if config.speculative is None or not is_sampling_rank(model, layers):
        return ModelRunner(model, cache)
    proposer = NgramProposer()
    if config.draft is not None:
        same = {name: getattr(config, name) for name in ("dtype", "device", "max_model_len")}
        draft, draft_layers, _ = load_model(EngineConfig(model=config.draft, **same))
        proposer = DraftProposer(draft, make_cache(config, draft, draft_layers))
    adaptive = AdaptiveSpeculation(config.num_speculative_tokens or 8, config.adaptive_speculation)
    return SpeculativeRunner(model, cache, proposer, adaptive)


def start_executor(config: EngineConfig, load: Callable, build: Callable) -> Executor:
    """Load a model and build a runner in this process, or start a grid of ranks and do so on each.

    load(coordinates, group), both None in one process, returns (model, layers, bytes read); build(model, layers)
    returns a runner. They must be picklable for other ranks.
    """
    if config.tensor_parallel * config.pipeline_parallel == 1:
        model, layers, _ = load()
        return LocalExecutor(kernels.accelerate(build(model, layers), config))
    from solutions.parallelism import ParallelExecutor

    return ParallelExecutor(config, load, build)


class InferenceEngine(Engine):
    """An engine with the options of all lessons, in any combination that is possible.

    model: a name, a folder, a `.gguf` file or `org/name`. max_batch_size: the number of requests that run at once. The
    other options are those of `EngineConfig`, which refuses an impossible combination, with the reason.
    """

    def __init__(self, model: str = "smollm2-135m", max_batch_size: int = 64, **options):
        check_option(EngineConfig.__dataclass_fields__["max_num_seqs"], max_batch_size, "max_batch_size")
        config, tokenizer = resolve(EngineConfig(model=model, **{"max_num_seqs": max_batch_size, **options}))
        executor = start_executor(config, partial(load_model, config), partial(build_runner, config))
        super().__init__(executor, tokenizer, config)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> RequestOutput:
        """Answer a conversation. messages: turns with "role" (system, user or assistant) and "content"; the last is the
        user's. They are not changed, and nothing is printed. chat_template_kwargs: further variables of the template,
        such as {"enable_thinking": False}. Raises ValueError if the model has no chat template: it was not trained to
        converse.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError("This model has no chat template: it continues text. Use generate.")
        values = check_names(chat_template_kwargs or {}, "chat_template_kwargs")
        # Exercise 8.12: apply the template, with `values` as keyword arguments. It writes special tokens into the text,
        # so encode the text without adding them. Then generate the answer.
        text = self.tokenizer.apply_chat_template(messages, **values)
        return self.generate([self.tokenizer.encode(text, add_special_tokens=False)], params, progress=False)[0]
