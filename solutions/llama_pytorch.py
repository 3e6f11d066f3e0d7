"""Lesson 2: a real Llama or Qwen in PyTorch, from a checkpoint on disk to text on the screen.

Later lessons use this model without editing it. Two interfaces make that possible:

- `attend(layer, q, k, v)` is an argument of every call. The model computes queries, keys and values, and `attend`
  decides which of them to keep for later calls. Here it keeps none; later lessons pass other functions.
- A linear layer has the name that its weight has in the checkpoint, and a `method` that stores the weight and
  multiplies by it. Lesson 6 cuts the layer and lesson 7 changes the method, both before the weights are read.

This file does not know about caches, batches of requests or other processes.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import kernels, rope
from common.checkpoints import Checkpoint, CheckpointError, check_config, find_checkpoint
from common.machine import choose_device
from common.sampling import SamplingParams, check_prompt, stable_hash
from common.tokenizer import Tokenizer, load_tokenizer
from common.windows import window_attention
from solutions.llm_basics import (
    ModelConfig,
    apply_rotary,
    causal_mask,
    grouped_query_attention,
    rms_norm,
    rotary_frequencies,
    rotary_tables,
    upcast,
)
from solutions.mixture_of_experts import SparseMoeBlock

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, q (T, H, D), k (T, K, D), v (T, K, D)) -> (T, H, D): attention, which may remember k and v.

A layer with a sliding window passes it as well: attend(layer, q, k, v, window=4096)."""


# --- Configuration ----------------------------------------------------------------------------------------------------


def parse_config(config: Mapping) -> ModelConfig:
    """Read a Hugging Face `config.json` of Llama 2 or 3, Mistral, Qwen2, Qwen2.5, Qwen3 or Qwen3-MoE.

    `check_config`, which is given, checks every value and fills in each family's defaults. In its result
    `num_key_value_heads` may be None, which means `num_attention_heads`, and `head_dim` may be None, which means
    hidden_size // num_attention_heads. `rope_scaling` and `moe` are None if the model has none. All others have values.

    `attention_bias` adds a bias to q, k, v and o, but Qwen2 always has one on q, k and v and never on o. Only Llama
    reads `mlp_bias`. Only Qwen3 and its MoE have QK norm. Raises CheckpointError for a model that cannot be run.
    """
    given = check_config(config)
    # Exercise 2.1: fill a ModelConfig. Replace the values that may be None, and set those that depend on the family.
    family, heads = given.model_type, given.num_attention_heads
    return ModelConfig(
        vocab_size=given.vocab_size,
        hidden_size=given.hidden_size,
        intermediate_size=given.intermediate_size,
        num_hidden_layers=given.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=given.num_key_value_heads or heads,
        head_dim=given.head_dim or given.hidden_size // heads,
        rms_norm_eps=given.rms_norm_eps,
        rope_theta=given.rope_theta,
        rope_scaling=given.rope_scaling,
        max_position_embeddings=given.max_position_embeddings,
        tie_word_embeddings=given.tie_word_embeddings,
        qkv_bias=family == "qwen2" or given.attention_bias,
        o_bias=family != "qwen2" and given.attention_bias,
        mlp_bias=family == "llama" and given.mlp_bias,
        qk_norm=family in ("qwen3", "qwen3_moe"),
        layer_windows=given.layer_windows,
        moe=given.moe,
    )


def scaled_frequencies(config: ModelConfig, length: int = 0) -> Tensor:
    """Return the rotary frequencies, scaled for contexts longer than in training: (D / 2,) float32.

    Rules other than Llama 3's are given, in `common/rope.py`; two of them depend on `length`, the length of the text.
    For Llama 3.1, `config.rope_scaling` has `factor`, `low_freq_factor`, `high_freq_factor` and
    `original_max_position_embeddings`, the context in training. A pair of dimensions that makes more than
    `high_freq_factor` turns within that context keeps its frequency. One that makes fewer than `low_freq_factor` turns
    has it divided by `factor`. In between, mix both frequencies, linearly in the number of turns.
    """
    frequencies, scaling = rotary_frequencies(config.head_dim, config.rope_theta), config.rope_scaling
    if scaling is None:
        return frequencies
    if rule := rope.RULES.get(scaling.get("rope_type")):
        return rule(frequencies, scaling, config.rope_theta, length)
    # Exercise 2.2: compute each pair's turns in the original context, then the share (0 to 1) of its frequency to keep.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


# --- The model --------------------------------------------------------------------------------------------------------


def causal_attend(layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """The simplest `attend`: these tokens are the whole sequence, and no key or value is kept.

    q: (T, H, D); k, v: (T, K, D). Returns (T, H, D). Every token attends to itself and to all before it, or, with a
    window, to the last `window` of these.
    """
    if window is not None:
        positions = torch.arange(len(q), device=q.device)
        return window_attention(q[None], k[None], v[None], positions[None], 0, window)[0]
    # Exercise 2.3: combine two functions of lesson 1. (`layer` is for functions that keep k and v.)
    num_tokens = q.shape[0]
    return grouped_query_attention(q, k, v, causal_mask(num_tokens, num_tokens, q.device))


class Layer(nn.Module):
    """A module that has tensors and reads them from a checkpoint itself."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the names (within this layer) of the tensors that it reads, and their shapes in the checkpoint."""
        return {name: tuple(tensor.shape) for name, tensor in self.named_parameters(recurse=False)}

    def load(self, read: Callable[..., Tensor]) -> None:
        """Replace every tensor by the checkpoint's.

        `read(name)` returns a tensor in the checkpoint's dtype. `read(name, *part)`, with a range for each axis,
        returns a part of it.
        """
        for name in self.shapes():
            self.put(name, read(name))

    def put(self, name: str, tensor: Tensor) -> None:
        """Replace one tensor; the dtype stays the layer's."""
        setattr(self, name, nn.Parameter(tensor.to(getattr(self, name).dtype), requires_grad=False))


class RMSNorm(Layer):
    """`rms_norm` with its weight. (..., size) -> (..., size)."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LinearMethod:
    """Says how a linear layer stores its matrix and multiplies by it: here in floats, in lesson 7 in fewer bits.

    The tensors are attributes of the layer, with their names in the checkpoint. Like vLLM's `LinearMethodBase`.
    """

    def parts(self, rows: range, columns: range) -> dict[str, tuple[range, ...]]:
        """Where a checkpoint stores these rows and columns of the matrix: tensor name -> a range for each axis."""
        return {"weight": (rows, columns)}

    def create_weights(self, layer: Layer, like: Tensor) -> None:
        """Give the layer its tensors, with arbitrary values, and dtype and device as `like` has them."""
        bound = len(layer.columns) ** -0.5
        weight = torch.empty(len(layer.rows), len(layer.columns), dtype=like.dtype, device=like.device)
        # (`normal_` would import torch's compiler first, for seconds, if this is the meta device.)
        layer.weight = nn.Parameter(weight.uniform_(-bound, bound))

    def shapes(self, layer: Layer) -> dict[str, tuple[int, ...]]:
        """Return names and shapes, in the checkpoint, of the tensors that hold the matrix."""
        whole = self.parts(*(range(size) for size in layer.shape))
        return {name: tuple(len(axis) for axis in part) for name, part in whole.items()}

    def load(self, layer: Layer, read: Callable[..., Tensor]) -> None:
        """Read the layer's rows and columns, as in `Layer.load`."""
        for name, part in self.parts(layer.rows, layer.columns).items():
            layer.put(name, read(name, *part))

    def apply(self, layer: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply by the matrix and add the bias. x: (T, in_features). Returns (T, out_features)."""
        return F.linear(x, layer.weight, bias)

    def embed(self, layer: Layer, token_ids: Tensor) -> Tensor:
        """Look up rows of the matrix. token_ids: (T,). Returns (T, in_features)."""
        return F.embedding(token_ids, layer.weight)

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Arrange the loaded matrix for a faster `apply`, if there is a kernel for this processor."""
        kernels.pack_floats(layer)


class Linear(Layer):
    """A linear layer, whose `method` stores the matrix and multiplies by it. (T, in_features) -> (T, out_features).

    shape: of the matrix in the checkpoint. rows, columns: this layer's part of it, which is all of it until lesson 6.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features, self.shape = in_features, out_features, (out_features, in_features)
        self.rows, self.columns = range(out_features), range(in_features)
        self.method = LinearMethod()
        self.method.create_weights(self, like=torch.empty(0))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.method.shapes(self) | ({} if self.bias is None else {"bias": self.shape[:1]})

    def load(self, read: Callable[..., Tensor]) -> None:
        self.method.load(self, read)
        if self.bias is not None:
            self.put("bias", read("bias", self.rows))

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x, self.bias)


class Embedding(Linear):
    """A matrix whose rows are looked up. (T,) token ids -> (T, in_features)."""

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.method.embed(self, token_ids)


class Attention(nn.Module):
    """Projections to queries, keys and values, rotation, attention by the given `attend`, output projection."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_width, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = Linear(q_width, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """hidden: (T, hidden_size); cos, sin: (T, D / 2). Returns (T, hidden_size).

        The number of heads follows from the projections' widths, not from the config, so that a layer with a slice of
        the heads works unchanged. `q_norm` and `k_norm` apply to each head's vector; without QK norm they do nothing.
        """
        # Exercise 2.4: project, split into heads of `head_dim`, norm q and k, rotate them, attend, join heads, project.
        q, k, v = (proj(hidden).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = apply_rotary(self.q_norm(q), cos, sin)
        k = apply_rotary(self.k_norm(k), cos, sin)
        return self.o_proj(attend(self.layer, q, k, v).flatten(1))


class MLP(nn.Module):
    """Lesson 1's `swiglu` as a module. (T, hidden_size) -> (T, hidden_size)."""

    def __init__(self, config: ModelConfig, intermediate_size: int):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(Layer):
    """The scores of a layer's experts, in floats even where lesson 7 quantizes. (T, hidden_size) -> (T, experts)."""

    def __init__(self, hidden_size: int, num_experts: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_experts, hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def feed_forward(config: ModelConfig, layer: int) -> nn.Module:
    """The feed-forward part of a layer: an `MLP`, or in a mixture of experts many, of which a token uses a few."""
    if (moe := config.moe) is None or layer not in moe.layers:
        return MLP(config, config.intermediate_size)
    experts = [MLP(config, moe.moe_intermediate_size) for _ in range(moe.num_experts)]
    gate = Router(config.hidden_size, moe.num_experts)
    return SparseMoeBlock(gate, experts, moe.num_experts_per_tok, moe.norm_topk_prob)


class Block(nn.Module):
    """Lesson 1's `block` as a module. (T, hidden_size) -> (T, hidden_size)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.window = config.layer_windows[layer] if config.layer_windows else None
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = feed_forward(config, layer)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        if self.window is not None:
            attend = partial(attend, window=self.window)
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Llama(nn.Module):
    """Llama, Mistral, Qwen2, Qwen3 or Qwen3-MoE, as the config says. Parameters have a checkpoint's names.

    `embed`, `run_layers` and `logits` can be called separately: a pipeline stage (lesson 6) runs only some layers, and
    only tokens that will be sampled need logits.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = Embedding(config.hidden_size, config.vocab_size)
        self.model.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        # Neither a parameter nor a buffer: `model.to(torch.bfloat16)` must leave it in float32, and building the
        # model on the meta device must leave it real.
        with torch.device("cpu"):
            self.frequencies = scaled_frequencies(config)
        # If the frequencies depend on the length of the text: the length to assume; None: what the positions say. A
        # cache holds keys that were rotated earlier, so an engine assumes the longest text that it accepts, as vLLM.
        self.max_length: int | None = None

    def tie_weights(self) -> None:
        """If the config says so, the output head shares the embedding table: the same tensors, used twice."""
        if self.config.tie_word_embeddings:
            for name, tensor in self.model.embed_tokens.named_parameters(recurse=False):
                setattr(self.lm_head, name, tensor)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the `rotary_tables` of these positions, (T,), on their device, scaled as the config says."""
        frequencies, scaling = self.frequencies, self.config.rope_scaling
        if rope.depends_on_length(scaling):
            frequencies = scaled_frequencies(self.config, self.max_length or int(positions.max()) + 1)
        factor = rope.attention_factor(scaling)
        cos, sin = rotary_tables(positions, frequencies.to(positions.device))
        return cos * factor, sin * factor

    def embed(self, token_ids: Tensor) -> Tensor:
        """(T,) token ids -> (T, hidden_size)."""
        return self.model.embed_tokens(token_ids)

    def run_layers(self, hidden: Tensor, positions: Tensor, attend: Attend, layers: range) -> Tensor:
        """Run the layers with these indices. hidden: (T, hidden_size). Returns (T, hidden_size).

        positions: (T,), of each token in its own sequence; they need not start at 0 or be consecutive.
        """
        # Exercise 2.5: make the `rotary` tables once, then call each layer in turn.
        cos, sin = self.rotary(positions)
        for layer in layers:
            hidden = self.model.layers[layer](hidden, cos, sin, attend)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the scores of the next token from the last layer's output. (R, hidden_size) -> (R, V)."""
        # Exercise 2.6: apply the final norm, then the head.
        return self.lm_head(self.model.norm(hidden))

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """(T,) token ids at (T,) positions -> (T, hidden_size), the last layer's output, not yet normed."""
        # Exercise 2.7: embed, then run all layers.
        return self.run_layers(self.embed(token_ids), positions, attend, range(self.config.num_hidden_layers))


# --- Loading ----------------------------------------------------------------------------------------------------------


def layers_of(module: nn.Module) -> dict[str, Layer]:
    """Return the layers of a tree of modules, by their names in the tree."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, Layer)}


def reader(checkpoint: Checkpoint, path: str) -> Callable[..., Tensor]:
    """Return the `read` of `Layer.load`, for the layer with this name in the checkpoint."""

    def read(name: str, *part: range) -> Tensor:
        return checkpoint.read(f"{path}.{name}", tuple(slice(axis.start, axis.stop) for axis in part) or ...)

    return read


def load_weights(model: Llama, checkpoint: Checkpoint) -> None:
    """Let every layer read its tensors from a checkpoint. The model may be on the meta device.

    A tied head is not read: it shares the embedding table. The checkpoint's own `lm_head.weight` is ignored then, and
    so are the `...rotary_emb.inv_freq` of old Llama checkpoints.

    Raises CheckpointError before it reads anything. The error names every tensor that is missing from the checkpoint,
    or every tensor that the model does not have. Or it names the first tensor whose shape differs from its layer's,
    with both shapes and the file.
    """
    # Exercise 2.8: collect the `shapes()` of all `layers_of(model)` under their full names. Compare names, then shapes.
    # Then let each layer `load` with its `reader`, and tie the head at the end.
    is_tied = model.config.tie_word_embeddings
    layers = {path: layer for path, layer in layers_of(model).items() if not (is_tied and path == "lm_head")}
    wanted = {f"{path}.{name}": shape for path, layer in layers.items() for name, shape in layer.shapes().items()}
    present = {name for name in checkpoint.names() if not name.endswith("rotary_emb.inv_freq")}
    if is_tied:
        present -= {"lm_head.weight"}

    if missing := sorted(wanted.keys() - present):
        raise CheckpointError(f"{checkpoint.folder}: the model needs {', '.join(missing)}; the checkpoint lacks them.")
    if unknown := sorted(present - wanted.keys()):
        raise CheckpointError(f"{checkpoint.folder}: the model does not know {', '.join(unknown)}.")
    for name, expected in sorted(wanted.items()):
        if (found := checkpoint.shape(name)) != expected:
            raise CheckpointError(f"{checkpoint.file(name)}: {name} has shape {found}, config.json implies {expected}.")

    for path, layer in layers.items():
        layer.load(reader(checkpoint, path))
    model.tie_weights()


def use_kernels(model: Llama, **parallel: type) -> None:
    """Swap parts of a loaded model for faster ones that compute the same, unless KERNELS=plain is set. parallel: lesson
    6's classes of linear layers, `column` and `row`.
    """
    if kernels.enabled():
        kernels.pack(model, linear=Linear, attention=Attention, mlp=MLP, norm=RMSNorm, block=Block, **parallel)


def check_tokenizer(tokenizer: Tokenizer, checkpoint: Checkpoint, config: ModelConfig) -> None:
    """Raise CheckpointError if the tokenizer of a checkpoint has ids without a row in the embedding table."""
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.folder}: the tokenizer has {tokenizer.vocab_size} tokens and the embedding "
            f"{config.vocab_size} rows; they are not of one model."
        )


def load(name: str, dtype: torch.dtype | None = None, device: str | None = None) -> tuple[Llama, Tokenizer]:
    """Load the model and tokenizer of a checkpoint: `tales`, `smollm2-135m`, a folder, a `.gguf` file or `org/name`.

    Default device: the GPU if there is one. Default dtype: bfloat16 on a GPU, float32 on a CPU, the fastest on each.
    Raises CheckpointError with the file and its fault, and ValueError for a device that does not exist.
    """
    device = choose_device(device)
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    checkpoint = Checkpoint(find_checkpoint(name))
    config = parse_config(checkpoint.config)
    tokenizer = load_tokenizer(checkpoint.folder)
    check_tokenizer(tokenizer, checkpoint, config)
    with torch.device("meta"):  # shapes without memory: each tensor is allocated when it is read, once
        model = Llama(config).to(dtype)
    load_weights(model, checkpoint)
    return model.to(device), tokenizer


# --- Sampling ---------------------------------------------------------------------------------------------------------


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k highest scores and set all others to -inf. logits: (V,); k >= 1. Returns (V,), a new tensor.

    Scores equal to the k-th are kept too; k may exceed V. From Fan et al., "Hierarchical Neural Story Generation"
    (2018).
    """
    # Exercise 2.9: find the k-th highest score, and keep every score that is not lower.
    threshold = logits.topk(min(k, logits.shape[-1])).values[-1]
    return logits.masked_fill(logits < threshold, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of likeliest tokens whose total probability is at least p; set all others to -inf.

    logits: (V,); 0 < p <= 1. Returns (V,), a new tensor. The token that crosses p is kept, so at least one is. Also
    called nucleus sampling: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020).
    """
    # Exercise 2.10: sort by score, keep a token if those before it sum to less than p, and undo the sorting.
    ordered, token_ids = logits.sort(descending=True)
    probabilities = upcast(ordered).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    return torch.empty_like(logits).scatter(-1, token_ids, ordered.masked_fill(before >= p, -math.inf))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens at least p times as likely as the likeliest; set all others to -inf.

    logits: (V,). Returns (V,), a new tensor. It keeps few tokens if the model is certain, and many if it is not. From
    Nguyen et al., "Min-p Sampling" (2024).
    """
    # Exercise 2.11: compare probabilities with p times the highest probability.
    probabilities = upcast(logits).softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.max(), -math.inf)


def sampling_probs(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return the distribution to draw a token from, for a temperature above 0. logits: (V,). Returns (V,), sum 1.

    Apply the temperature first, then top_k, top_p and min_p, each to the result of the one before, and only if it is
    set (0, 1 and 0 mean unset). Compute in float32 or better.
    """
    # Exercise 2.12: keep this order, because the temperature changes which tokens top_p keeps.
    logits = upcast(logits) / params.temperature
    if params.top_k > 0:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = keep_top_p(logits, params.top_p)
    if params.min_p > 0:
        logits = keep_min_p(logits, params.min_p)
    return logits.softmax(-1)


def draw_generator(seed: int | None, index: int) -> torch.Generator:
    """Return the generator for output token `index` of a request with this seed; for seed None, a random one."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(stable_hash(seed, index))
    return generator


def sample(logits: Tensor, params: SamplingParams, index: int) -> int:
    """Choose output token number `index` of a request. logits: (V,). Returns a token id.

    At temperature 0, return the likeliest token. Otherwise draw from `sampling_probs`, with random numbers that depend
    only on params.seed and index. So there is no state to save: a request that is preempted, moved or batched draws
    the same tokens as alone.
    """
    # Exercise 2.13: return the likeliest, or draw (`torch.multinomial`, on the CPU) with this index's `draw_generator`.
    if params.temperature == 0:
        return int(logits.argmax())
    probabilities = sampling_probs(logits, params).cpu()
    return int(torch.multinomial(probabilities, 1, generator=draw_generator(params.seed, index)))


def adjust_logits(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], stop_ids: Sequence[int]
) -> Tensor:
    """Apply the request's own processors and the penalties, and forbid stop tokens before `min_tokens`.

    logits: (V,), left unchanged. Returns new ones. Processors are for example grammars, which forbid tokens. The
    repetition penalty divides positive scores and multiplies negative ones: both make the token less likely.
    """
    logits = params.process(output, logits)
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *output}), device=logits.device)
        scores = logits[seen]
        penalised = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
        logits = logits.index_copy(0, seen, penalised)
    if output and (params.presence_penalty or params.frequency_penalty):
        counts = torch.bincount(torch.tensor(output), minlength=logits.shape[-1]).to(logits)
        logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    if len(output) < params.min_tokens:
        stop_ids = [token_id for token_id in stop_ids if token_id < logits.shape[-1]]
        logits = logits.index_fill(0, torch.tensor(stop_ids, dtype=torch.long, device=logits.device), -math.inf)
    return logits


def top_logprobs(logits: Tensor, token_id: int, k: int) -> dict[int, float]:
    """Return natural log-probabilities by token id: of the chosen token, then of the k likeliest. logits: (V,)."""
    logprobs = upcast(logits).log_softmax(-1)
    best = logprobs.topk(min(k, logits.shape[-1]))
    return {token_id: logprobs[token_id].item(), **dict(zip(best.indices.tolist(), best.values.tolist()))}


# --- Text -------------------------------------------------------------------------------------------------------------


class TextStream:
    """Converts tokens to text as they come. A token stands for some bytes, and a character may need several tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.held = b""  # the bytes of an unfinished character

    def push(self, token_id: int) -> str:
        """Add one token and return the new text, except the bytes of an unfinished character, which are held back.

        Bytes that can never become a character give U+FFFD at once.
        """
        # Exercise 2.14: append `tokenizer.token_bytes(token_id)` to `held` and decode all whole characters. A decoder
        # from `codecs.getincrementaldecoder("utf-8")` does that; its `getstate()` has the bytes that are left.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        text = decoder.decode(self.held + self.tokenizer.token_bytes(token_id))
        self.held, _ = decoder.getstate()
        return text

    def flush(self) -> str:
        """Return the held bytes as U+FFFD, because no token follows that could complete them."""
        text, self.held = self.held.decode(errors="replace"), b""
        return text


class StopChecker:
    """Returns text until a stop string occurs, even one that arrives in several pieces."""

    def __init__(self, stop: Sequence[str]):
        self.stop = tuple(stop)
        self.held = ""  # the end of the text so far, if it may be the beginning of a stop string
        self.found: str | None = None  # the stop string that occurred

    def push(self, text: str) -> str:
        """Add a piece of text and return what can be shown now.

        If a stop string is complete, set `found` and return the text before it; of several, the one that begins first
        counts. Otherwise hold back only the end of the text that may be the beginning of a stop string.
        """
        # Exercise 2.15: look for whole stop strings first; then find the longest end of the text that is the beginning
        # of one.
        text = self.held + text
        starts = [(text.find(stop), stop) for stop in self.stop if stop in text]
        if starts:
            start, self.found = min(starts)
            self.held = ""
            return text[:start]
        held = max((n for stop in self.stop for n in range(len(stop)) if text.endswith(stop[:n])), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held]

    def flush(self) -> str:
        """Return the text that was held back, because no text follows that could complete a stop string."""
        text, self.held = self.held, ""
        return text


# --- Generation -------------------------------------------------------------------------------------------------------


@dataclass
class RequestOutput:
    """The output of a request so far."""

    token_ids: list[int] = field(default_factory=list)  # with the token that ended it
    text: str = ""  # without the token or string that ended it
    finish_reason: str | None = None  # "stop": a stop token or string; "length": max_tokens, or the context is full
    logprobs: list[dict[int, float]] = field(default_factory=list)  # per token, from `top_logprobs`


def recompute(model: Llama, token_ids: Sequence[int]) -> Tensor:
    """Return the scores (V,) of the token after these. Nothing is kept: every call computes all tokens."""
    # Exercise 2.16: run the model at positions 0, 1, ... with `causal_attend`; compute logits only of the last token.
    token_ids = torch.tensor(token_ids, device=model.model.norm.weight.device)
    hidden = model(token_ids, torch.arange(len(token_ids), device=token_ids.device), causal_attend)
    return model.logits(hidden[-1:])[0]


@torch.inference_mode()
def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    on_text: Callable[[str], None] = lambda piece: None,
    next_logits: Callable[[Sequence[int]], Tensor] | None = None,
) -> RequestOutput:
    """Continue a prompt token by token, calling `on_text` with each piece of text as soon as it is certain.

    The answer ends with "stop" at one of the tokenizer's `eos_token_ids` (unless `ignore_eos`), a stop token or a stop
    string. It ends with "length" after `max_tokens` or in a full context; if both hold, with "stop". Text of the first
    `min_tokens` tokens is not searched for stop strings. `next_logits` maps all tokens so far to the scores (V,) of the
    next; the default, `recompute`, computes the whole sequence at every step, which lesson 3 changes.
    """
    next_logits = next_logits or partial(recompute, model)
    check_prompt(prompt_token_ids, model.config, params)
    stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else tokenizer.eos_token_ids)}
    room = min(params.max_tokens, model.config.max_position_embeddings - len(prompt_token_ids))
    output, stream, checker = RequestOutput(), TextStream(tokenizer), StopChecker(params.stop)

    def show(piece: str) -> None:
        if piece:
            output.text += piece
            on_text(piece)

    # Exercise 2.17: until there is a finish_reason, take `next_logits` of prompt and output, `adjust_logits`, `sample`
    # and append. A stop token adds no text; push others through `stream`, and then through `checker` unless they are
    # among the first `min_tokens`. At the end, unless a stop string was found, flush both and `show` that text. If
    # `params.logprobs` is set (it may be 0), append `top_logprobs` of the model's own logits.
    while output.finish_reason is None:
        logits = next_logits([*prompt_token_ids, *output.token_ids])
        adjusted = adjust_logits(logits, params, prompt_token_ids, output.token_ids, stop_ids)
        token_id = sample(adjusted, params, index=len(output.token_ids))
        output.token_ids.append(token_id)
        if params.logprobs is not None:
            output.logprobs.append(top_logprobs(logits, token_id, params.logprobs))
        if token_id not in stop_ids:
            text = stream.push(token_id)
            show(text if len(output.token_ids) <= params.min_tokens else checker.push(text))
        if token_id in stop_ids or checker.found:
            output.finish_reason = "stop"
        elif len(output.token_ids) == room:
            output.finish_reason = "length"

    if not checker.found:
        show(checker.push(stream.flush()))
        show(checker.flush())
    return output
