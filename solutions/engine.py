"""The engine: nine lessons, assembled. It computes nothing itself; it decides which parts stand behind which seam.

    with InferenceEngine("smollm2-135m", tensor_parallel=2, quantization="int8", speculative="ngram") as engine:
        outputs = engine.generate(prompts, SamplingParams(max_tokens=64))

What happens when: lesson 5's `Engine` takes requests in and steps; lesson 6's `ParallelEngine` starts the ranks, each
of which loads its share of the checkpoint, quantized on the way by lesson 7; each then calls `InferenceEngine.build`
for what computes its part of a step. Everything else is in the lessons' own files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from common.checkpoints import Checkpoint, find_checkpoint
from common.config import EngineConfig
from common.tokenizer import load_tokenizer
from solutions.batching import ModelRunner, RequestOutput
from solutions.kv_cache import cache_bytes
from solutions.llama_pytorch import Llama, ModelConfig, SamplingParams
from solutions.paged_attention import PagedKVCache
from solutions.parallelism import Group
from solutions.quantization import Int8KVCache, Quantization, QuantizedEngine, load_quantized, plain_config
from solutions.speculative import AdaptiveSpeculation, DraftProposer, NgramProposer, SpeculativeRunner


@dataclass(frozen=True)
class Speculation:
    """How draft tokens are made."""

    draft: str | None = None  # the draft model's folder; None: n-grams of the text itself
    num_speculative_tokens: int = 8  # at most, for a request in a step
    is_adaptive: bool = True  # fewer where they do not pay; False: always as many

    def __post_init__(self):
        if not isinstance(self.num_speculative_tokens, int) or self.num_speculative_tokens < 1:
            raise ValueError(
                f"num_speculative_tokens must be a whole number of at least 1; it is {self.num_speculative_tokens!r}."
            )


def check_draft(draft: Checkpoint, target: Checkpoint) -> None:
    """Raise ValueError if a token id does not mean the same to both models."""
    sizes = [plain_config(each).vocab_size for each in (draft, target)]
    tokenizers = [load_tokenizer(each.folder) for each in (draft, target)]
    pieces = [[each.token_bytes(token_id) for token_id in range(each.vocab_size)] for each in tokenizers]
    if sizes[0] != sizes[1] or pieces[0] != pieces[1]:
        raise ValueError(
            f"speculative: {draft.folder.name} has another vocabulary than {target.folder.name} ({sizes[0]} and "
            f"{sizes[1]} tokens); a draft proposes token ids, and they must mean the same to both."
        )


def is_sampling_rank(model: Llama, layers: range) -> bool:
    """Whether the logits of a step come together on this rank: the first of the last stage."""
    return layers.stop == model.config.num_hidden_layers and getattr(model.lm_head, "group", Group()).rank == 0


class InferenceEngine(QuantizedEngine):
    """Every option of every lesson, in any combination that makes sense; one that makes none is refused with a reason.

    model: a name, a folder, a `.gguf` file or `org/name`. max_batch_size: requests that run at once. speculative: None,
    "ngram", or a draft model by name or folder. num_speculative_tokens: at most, for a request in a step; how
    many are made depends on what they bring and what they cost, unless adaptive_speculation is False: only then does a
    seed, with a draft and a temperature, give the same text again. Further settings are those of `QuantizedEngine`
    (group_size, kv_cache_dtype, offload, ...), `ParallelEngine` and `EngineConfig`.
    """

    def __init__(
        self,
        model: str = "smollm2-135m",
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        max_batch_size: int = 64,
        kv_cache_policy: str = "paged",
        quantization: str | Quantization | None = None,
        speculative: str | None = None,
        num_speculative_tokens: int | None = None,
        adaptive_speculation: bool = True,
        **settings,
    ):
        self.speculation = None
        if speculative is not None:
            draft = None if speculative == "ngram" else str(find_checkpoint(speculative))
            most = Speculation.num_speculative_tokens if num_speculative_tokens is None else num_speculative_tokens
            self.speculation = Speculation(draft, most, adaptive_speculation)
        elif num_speculative_tokens is not None:
            raise ValueError(
                'num_speculative_tokens: nothing is proposed; set speculative="ngram", or name a draft model.'
            )
        super().__init__(
            model,
            quantization,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            max_num_seqs=max_batch_size,
            kv_cache_policy=kv_cache_policy,
            **settings,
        )
        if self.has_draft:
            self.scheduler.num_lookahead_tokens = self.speculation.num_speculative_tokens

    @property
    def has_draft(self) -> bool:
        return self.speculation is not None and self.speculation.draft is not None

    def read_config(self, checkpoint: Checkpoint) -> ModelConfig:
        if self.has_draft:
            check_draft(Checkpoint(find_checkpoint(self.speculation.draft)), checkpoint)
        return super().read_config(checkpoint)

    def cache_share(self, config: ModelConfig, dtype: torch.dtype, *grid: int) -> float:
        """What a rank's keys and values take, of what those of a whole model take, in `dtype`. With a draft, its own
        come on top: it stands on one rank, whole and never quantized, and has as many blocks as that rank's share.
        """
        share = super().cache_share(config, dtype, *grid)
        if not self.has_draft:
            return share
        # Exercise 8.10: a token's keys and values in the draft, against those in the whole target.
        draft = plain_config(Checkpoint(find_checkpoint(self.speculation.draft)))
        return share + cache_bytes(draft, 1, dtype.itemsize) / cache_bytes(config, 1, dtype.itemsize)

    def maker(self) -> Callable:
        return partial(self.build, self.config, self.kv_cache_dtype, self.speculation)

    @staticmethod
    def build(
        config: EngineConfig, kv_cache_dtype: str, speculation: Speculation | None, model: Llama, layers: range
    ) -> ModelRunner:
        """What computes one rank's part of each step: its blocks, and its runner. Each rank calls it, for its layers.

        Draft tokens are made and verified where tokens are sampled, and nowhere else: on all other ranks, and without
        speculation, the runner is lesson 5's and no draft is loaded.
        """

        def blocks_for(owner: Llama, kind: type[PagedKVCache], own_layers: range) -> PagedKVCache:
            return kind(owner, config.num_blocks, config.block_size, config.num_host_blocks or 0, own_layers)

        # Exercise 8.9: the blocks, in eight bits if they are asked for; then, where draft tokens are made: n-grams, or
        # `load_draft` with blocks of its own; and the runner around it all.
        cache = blocks_for(model, Int8KVCache if kv_cache_dtype == "int8" else PagedKVCache, layers)
        if speculation is None or not is_sampling_rank(model, layers):
            return ModelRunner(model, cache)
        proposer = NgramProposer()
        if speculation.draft is not None:
            draft, draft_layers = load_draft(speculation.draft, model)
            proposer = DraftProposer(draft, blocks_for(draft, PagedKVCache, draft_layers))
        adaptive = AdaptiveSpeculation(speculation.num_speculative_tokens, speculation.is_adaptive)
        return SpeculativeRunner(model, cache, proposer, adaptive)

    def chat(self, messages: Sequence[Mapping[str, str]], params: SamplingParams | None = None) -> RequestOutput:
        """Answer a conversation. messages: turns with "role" (system, user or assistant) and "content", the last one
        the user's; they are left as they are, and nothing is printed. Raises ValueError if the model was not trained to
        converse: it has no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise ValueError("This model has no chat template: it continues text. Use generate.")
        # Exercise 8.12: the template makes the conversation one text, special tokens and all; so the tokenizer must not
        # add its own.
        text = self.tokenizer.apply_chat_template(messages)
        return self.generate([self.tokenizer.encode(text, add_special_tokens=False)], params, progress=False)[0]


def load_draft(name: str, target: Llama) -> tuple[Llama, range]:
    """A draft model beside a target, whole, in its dtype and on its device, and the numbers of its layers."""
    weight = target.model.norm.weight
    draft, layers, _ = load_quantized(name, None, weight.dtype, str(weight.device))
    return draft, layers
