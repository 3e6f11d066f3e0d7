"""Lesson 2: a real Llama or Qwen, in PyTorch, from a checkpoint on disk to text on the screen.

The model is written here once and never edited again. Two seams make that possible:

- `attend(layer, q, k, v)` is handed in at every call. The model computes queries, keys and values; who remembers
  keys and values, and how, is not its business. Here nothing is remembered; every later lesson hands in another.
- A linear layer has the name that its weight has in the checkpoint, and a `method` that stores the weight and
  multiplies by it. Lesson 6 cuts the layer, lesson 7 changes the method; both before the weights are read.

This file does not know about: caches, batches of requests, other processes.
"""

from __future__ import annotations

import codecs
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import kernels
from common.checkpoints import Checkpoint, CheckpointError, find_checkpoint
from common.tokenizer import Tokenizer, load_tokenizer
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

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, q (T, H, D), k (T, K, D), v (T, K, D)) -> (T, H, D): attention, and the memory of K and V."""


# ---------------------------------------------------------------------------------------------------------------
# What the checkpoint says about the model
# ---------------------------------------------------------------------------------------------------------------


def check_supported(config: Mapping) -> None:
    """Refuse a `config.json` that asks for something this model does not compute: better no answer than a wrong one."""
    if config.get("model_type") not in ("llama", "qwen2", "qwen3"):
        raise CheckpointError(
            f"config.json: model_type is {config.get('model_type')!r}; this engine runs 'llama', 'qwen2' and 'qwen3'."
        )
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise CheckpointError(f"config.json: {key} must be a positive integer, and is {config.get(key)!r}.")
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"config.json: hidden_act is {config['hidden_act']!r}; this engine computes 'silu'.")
    if config.get("use_sliding_window"):
        raise CheckpointError("config.json: use_sliding_window is true; this engine attends to the whole context.")
    if config.get("quantization_config"):
        raise CheckpointError("config.json: quantization_config is set; load the unquantized checkpoint instead.")
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise CheckpointError(f"config.json: RoPE scaling of type {rope_type!r}; this engine knows 'llama3'.")


def parse_config(config: Mapping) -> ModelConfig:
    """Read a Hugging Face `config.json` of Llama 2 or 3, Qwen2, Qwen2.5 or Qwen3.

    Families differ in what they leave out. When absent: `num_key_value_heads` is `num_attention_heads`;
    `head_dim` is hidden_size // num_attention_heads; `rms_norm_eps` is 1e-6; `rope_theta` is 10000;
    `max_position_embeddings` is 2048; `tie_word_embeddings`, `attention_bias` and `mlp_bias` are false. A key
    whose value is null is absent. Newer files keep `rope_theta` and the scaling together in `rope_parameters`,
    older ones beside each other, with the scaling in `rope_scaling`.

    Biases: `attention_bias` gives one to q, k, v and o; Qwen2 has one on q, k and v whatever its file says, and
    none on o. Only Llama reads `mlp_bias`. QK norm is Qwen3's. `rope_scaling` is None for plain RoPE, and
    otherwise the mapping with its `factor`. Raises CheckpointError for what the engine cannot run.
    """
    check_supported(config)
    # Exercise 2.1: fill a ModelConfig; mind what is absent or null, and that head_dim need not be hidden / heads.
    given = {key: value for key, value in config.items() if value is not None}
    family = given["model_type"]
    heads = given["num_attention_heads"]
    rope = {"rope_theta": given.get("rope_theta", 10_000.0), **given.get("rope_scaling", {})}
    rope |= given.get("rope_parameters", {})
    attention_bias = given.get("attention_bias", False)
    return ModelConfig(
        vocab_size=given["vocab_size"],
        hidden_size=given["hidden_size"],
        intermediate_size=given["intermediate_size"],
        num_hidden_layers=given["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=given.get("num_key_value_heads", heads),
        head_dim=given.get("head_dim", given["hidden_size"] // heads),
        rms_norm_eps=given.get("rms_norm_eps", 1e-6),
        rope_theta=rope["rope_theta"],
        rope_scaling=rope if "factor" in rope else None,
        max_position_embeddings=given.get("max_position_embeddings", 2048),
        tie_word_embeddings=given.get("tie_word_embeddings", False),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=family != "qwen2" and attention_bias,
        mlp_bias=family == "llama" and given.get("mlp_bias", False),
        qk_norm=family == "qwen3",
    )


def scaled_frequencies(config: ModelConfig) -> Tensor:
    """The rotary frequencies, stretched as Llama 3 does to see further than it was trained. Returns (D / 2,) float32.

    `config.rope_scaling` has `factor`, `low_freq_factor`, `high_freq_factor` and
    `original_max_position_embeddings`, the context of the first training. A pair of dimensions that makes more
    than `high_freq_factor` turns within that context keeps its frequency; one that makes fewer than
    `low_freq_factor` is slowed down by `factor`; between the two the frequency is a mixture, linear in the turns.
    """
    frequencies = rotary_frequencies(config.head_dim, config.rope_theta)
    if config.rope_scaling is None:
        return frequencies
    # Exercise 2.2: how many turns does each pair make in the original context? What share of its speed is kept?
    scaling = config.rope_scaling
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])


# ---------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------


def causal_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The simplest `attend`: these tokens are the whole sequence, nothing was there before and nothing is kept.

    q: (T, H, D); k, v: (T, K, D). Returns (T, H, D). Every token attends to itself and to all before it.
    """
    # Exercise 2.3: lesson 1 has both parts. (`layer` is for those who remember something between calls.)
    num_tokens = q.shape[0]
    return grouped_query_attention(q, k, v, causal_mask(num_tokens, num_tokens, q.device))


class Layer(nn.Module):
    """A module with tensors of its own, which it reads from a checkpoint by itself."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors that this layer needs from a checkpoint: name in this layer -> shape in the checkpoint."""
        return {name: tuple(tensor.shape) for name, tensor in self.named_parameters(recurse=False)}

    def load(self, read: Callable[..., Tensor]) -> None:
        """Replace every tensor by the checkpoint's.

        `read(name)` returns a tensor in the checkpoint's dtype; `read(name, *part)` the part of it that lies in these
        ranges, one for each axis.
        """
        for name in self.shapes():
            self.put(name, read(name))

    def put(self, name: str, tensor: Tensor) -> None:
        """Set one tensor, in the dtype that the layer has for it."""
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
    """How a linear layer stores its matrix and multiplies by it: here in floats. Lesson 7 has methods with fewer bits.

    The tensors belong to the layer, so that their names are those of the checkpoint. After vLLM's `LinearMethodBase`.
    """

    def parts(self, rows: range, columns: range) -> dict[str, tuple[range, ...]]:
        """Where a checkpoint stores these rows and columns of the matrix: tensor name -> a range for each axis."""
        return {"weight": (rows, columns)}

    def create_weights(self, layer: Linear, like: Tensor) -> None:
        """Give the layer its tensors, with any values. like: a tensor of the dtype and device that the layer has."""
        bound = len(layer.columns) ** -0.5
        weight = torch.empty(len(layer.rows), len(layer.columns), dtype=like.dtype, device=like.device)
        layer.weight = nn.Parameter(weight.uniform_(-bound, bound))

    def shapes(self, layer: Linear) -> dict[str, tuple[int, ...]]:
        """The tensors that the layer needs from a checkpoint for its matrix, with their shapes there."""
        parts = self.parts(*(range(size) for size in layer.shape))
        return {name: tuple(len(axis) for axis in part) for name, part in parts.items()}

    def load(self, layer: Linear, read: Callable[..., Tensor]) -> None:
        """Read the layer's rows and columns from a checkpoint, as `Layer.load` says."""
        for name, part in self.parts(layer.rows, layer.columns).items():
            layer.put(name, read(name, *part))

    def apply(self, layer: Linear, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply by the matrix and add the bias. x: (T, in_features). Returns (T, out_features)."""
        return F.linear(x, layer.weight, bias)

    def embed(self, layer: Linear, token_ids: Tensor) -> Tensor:
        """Look up rows of the matrix. token_ids: (T,). Returns (T, in_features)."""
        return F.embedding(token_ids, layer.weight)

    def process_weights_after_loading(self, layer: Linear) -> None:
        """Rearrange the loaded tensors for this processor, where a kernel is faster that way."""
        kernels.pack_floats(layer)


class Linear(Layer):
    """A linear layer, whose `method` stores the matrix and multiplies by it. (T, in_features) -> (T, out_features).

    shape: of the matrix in the checkpoint. rows, columns: the part of it that this layer has; all, until lesson 6.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.shape = (out_features, in_features)
        self.rows, self.columns = range(out_features), range(in_features)
        self.method = LinearMethod()
        self.method.create_weights(self, like=torch.empty(0))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self.method.shapes(self)
        return shapes if self.bias is None else {**shapes, "bias": self.shape[:1]}

    def load(self, read: Callable[..., Tensor]) -> None:
        self.method.load(self, read)
        if self.bias is not None:
            self.put("bias", read("bias", self.rows))

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x, self.bias)


class Embedding(Linear):
    """A matrix of which rows are looked up, instead of multiplied by. (T,) token ids -> (T, in_features)."""

    def forward(self, token_ids: Tensor) -> Tensor:
        return self.method.embed(self, token_ids)


class Attention(nn.Module):
    """Projections to queries, keys and values; rotation; attention, by whoever is handed in; projection back."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        q_width, kv_width = (
            heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = Linear(config.hidden_size, q_width, bias=config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = Linear(q_width, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """hidden: (T, hidden_size); cos, sin: (T, D / 2). Returns (T, hidden_size).

        The number of heads is not asked of the config but of the projections' widths, so that a layer that was
        given a slice of the heads works unchanged. `q_norm` and `k_norm` act on each head's vector; where the
        family has none they are the identity.
        """
        # Exercise 2.4: project, split into heads of `head_dim`, norm q and k, rotate them, attend, join, project.
        q, k, v = (proj(hidden).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = apply_rotary(self.q_norm(q), cos, sin)
        k = apply_rotary(self.k_norm(k), cos, sin)
        return self.o_proj(attend(self.layer, q, k, v).flatten(1))


class MLP(nn.Module):
    """Lesson 1's `swiglu`, its matrices as modules. (T, hidden_size) -> (T, hidden_size)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Lesson 1's `block`, its parts as modules. (T, hidden_size) -> (T, hidden_size)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Llama(nn.Module):
    """Llama, Qwen2 or Qwen3, as the config says. Each parameter bears the name that it has in a checkpoint.

    Its parts can be called one by one: a pipeline stage (lesson 6) runs some layers, and only the tokens that
    are to be sampled need logits.
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

    def tie_weights(self) -> None:
        """If the config says so, the output head shares the embedding table: the same tensors, used twice."""
        if self.config.tie_word_embeddings:
            for name, tensor in self.model.embed_tokens.named_parameters(recurse=False):
                setattr(self.lm_head, name, tensor)

    def embed(self, token_ids: Tensor) -> Tensor:
        """(T,) token ids -> (T, hidden_size)."""
        return self.model.embed_tokens(token_ids)

    def run_layers(self, hidden: Tensor, positions: Tensor, attend: Attend, layers: range) -> Tensor:
        """Pass through the layers with these numbers. hidden: (T, hidden_size). Returns (T, hidden_size).

        positions: (T,), each token's place in its own sequence; they need not start at 0 nor be neighbours.
        """
        # Exercise 2.15: make the cos and sin tables once, for all layers, then call each layer in turn.
        cos, sin = rotary_tables(positions, self.frequencies.to(hidden.device))
        for layer in layers:
            hidden = self.model.layers[layer](hidden, cos, sin, attend)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The last layer's output, for the R tokens that matter, to scores. (R, hidden_size) -> (R, V)."""
        # Exercise 2.16: the final norm, then the head.
        return self.lm_head(self.model.norm(hidden))

    def forward(self, token_ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """(T,) token ids at (T,) positions -> (T, hidden_size), the last layer's output, not yet normed."""
        # Exercise 2.5: embed, then run all the layers there are.
        return self.run_layers(self.embed(token_ids), positions, attend, range(self.config.num_hidden_layers))


# ---------------------------------------------------------------------------------------------------------------
# From the disk into the model
# ---------------------------------------------------------------------------------------------------------------


def layers_of(module: nn.Module) -> dict[str, Layer]:
    """All layers of a tree of modules that have tensors, by their names in it."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, Layer)}


def reader(checkpoint: Checkpoint, path: str) -> Callable[..., Tensor]:
    """The `read` that `Layer.load` calls, for the layer with this name in the checkpoint."""

    def read(name: str, *part: range) -> Tensor:
        index = tuple(slice(axis.start, axis.stop) for axis in part)
        return checkpoint.read(f"{path}.{name}", index or ...)

    return read


def load_weights(model: Llama, checkpoint: Checkpoint) -> None:
    """Let every layer read its tensors from a checkpoint. The model may stand on the meta device.

    A tied head is not read: it shares the embedding table. The checkpoint's own `lm_head.weight` is ignored then, and
    so are the `...rotary_emb.inv_freq` of old Llama checkpoints.

    Raises CheckpointError, before anything is read, with the names of all tensors that the model needs and the
    checkpoint lacks, or that the checkpoint has and the model does not know; or with the name, both shapes and the
    file of the first tensor whose shape is not what its layer expects.
    """
    # Exercise 2.6: collect the `shapes()` of all `layers_of(model)` under their full names. Compare names, then shapes.
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


def use_kernels(model: Llama) -> None:
    """Swap parts of a loaded model for faster ones that compute the same, unless KERNELS=plain is set."""
    if kernels.enabled():
        kernels.pack(model, linear=Linear, attention=Attention, mlp=MLP, norm=RMSNorm)


def load(name: str, dtype: torch.dtype | None = None, device: str | None = None) -> tuple[Llama, Tokenizer]:
    """The model and the tokenizer of a checkpoint: `tales`, `smollm2-135m`, a folder, a `.gguf` file or `org/name`.

    Without `device`: the GPU if there is one. Without `dtype`: bfloat16 on a GPU and float32 on a CPU, each the
    fastest there. Raises CheckpointError with what is wrong and in which file.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    checkpoint = Checkpoint(find_checkpoint(name))
    config = parse_config(checkpoint.config)
    tokenizer = load_tokenizer(checkpoint.folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.folder}: the tokenizer has {tokenizer.vocab_size} tokens and the embedding "
            f"{config.vocab_size} rows; they are not of one model."
        )
    with torch.device("meta"):  # shapes without memory: each tensor is allocated when it is read, once
        model = Llama(config).to(dtype)
    load_weights(model, checkpoint)
    return model.to(device), tokenizer


# ---------------------------------------------------------------------------------------------------------------
# From scores to a token
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop. The names are vLLM's; so are the meanings, but for two defaults:
    temperature is 0 (always the likeliest token) and max_tokens 128.
    """

    temperature: float = 0.0  # 0: the likeliest token, always; 1: as the model says; above: more even
    top_k: int = 0  # keep the k likeliest tokens; 0: all
    top_p: float = 1.0  # keep the likeliest tokens that together have this probability
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the likeliest
    seed: int | None = None  # the same seed draws the same tokens; None: another every time
    n: int = 1  # how many samples of one prompt
    max_tokens: int = 128
    min_tokens: int = 0  # no end of sequence and no stop token before so many tokens
    stop: str | Sequence[str] = ()  # strings that end the text; they are not part of it
    stop_token_ids: Sequence[int] = ()  # tokens that end it, as the end of sequence does
    ignore_eos: bool = False  # go on after an end of sequence
    logprobs: int | None = None  # report this many of the likeliest tokens at each step, and the chosen one
    repetition_penalty: float = 1.0  # above 1: divides the positive scores of tokens seen in prompt or output
    presence_penalty: float = 0.0  # subtracted once from the score of each token in the output
    frequency_penalty: float = 0.0  # subtracted as often as the token occurs in the output

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        rules = {
            "temperature": (math.isfinite(self.temperature) and self.temperature >= 0, "a number of at least 0"),
            "top_k": (self.top_k >= 0, "at least 0 (0 keeps all)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "seed": (self.seed is None or isinstance(self.seed, int), "an integer or None"),
            "n": (self.n >= 1, "at least 1"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "min_tokens": (0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens"),
            "stop": (all(isinstance(s, str) and s for s in stop), "strings that are not empty"),
            "logprobs": (self.logprobs is None or self.logprobs >= 0, "None or at least 0"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "presence_penalty": (math.isfinite(self.presence_penalty), "a finite number"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a finite number"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise ValueError(f"SamplingParams: {name} must be {rule}; it is {getattr(self, name)!r}.")

    def children(self) -> list[SamplingParams]:
        """The n samples as requests of their own. The first keeps the seed; siblings get others made from it."""
        return [
            replace(self, n=1, seed=self.seed if self.seed is None or not child else stable_hash(self.seed, child))
            for child in range(self.n)
        ]


def stable_hash(*numbers: int) -> int:
    """Mix whole numbers into a seed of 63 bits, the same in every process and on every machine."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k highest scores, set all others to -inf. logits: (V,); k >= 1. Returns (V,), a new tensor.

    All that tie with the k-th are kept; k may exceed V. From Fan et al., "Hierarchical Neural Story Generation" (2018).
    """
    # Exercise 2.7: what is the lowest score that stays?
    threshold = logits.topk(min(k, logits.shape[-1])).values[-1]
    return logits.masked_fill(logits < threshold, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest tokens whose probabilities reach p together, set all others to -inf.

    logits: (V,); 0 < p <= 1. Returns (V,). The token that crosses p is kept, so one at least always is. Also
    called nucleus sampling: Holtzman et al., "The Curious Case of Neural Text Degeneration" (2020).
    """
    # Exercise 2.8: sort by score; a token stays if those before it have not reached p yet; undo the sorting.
    ordered, token_ids = logits.sort(descending=True)
    probabilities = upcast(ordered).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    return torch.empty_like(logits).scatter(-1, token_ids, ordered.masked_fill(before >= p, -math.inf))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep the tokens at least p times as likely as the likeliest, set all others to -inf. logits: (V,). Returns (V,).

    Where the model is sure this keeps few, where it is not, many. From Nguyen et al., "Min-p Sampling" (2024).
    """
    # Exercise 2.9: compare probabilities with p times the highest.
    probabilities = upcast(logits).softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.max(), -math.inf)


def sample(logits: Tensor, params: SamplingParams, index: int) -> int:
    """Choose output token number `index` of a request. logits: (V,). Returns a token id.

    At temperature 0 that is the likeliest token. Otherwise it is drawn from `sampling_probs`, with randomness
    that depends on (params.seed, index) and on nothing else. There is no state to save: a request that was
    interrupted, moved or computed beside others draws what it would have drawn alone.
    """
    # Exercise 2.10: the likeliest, or a draw (`torch.multinomial`) with the generator for this seed and index.
    if params.temperature == 0:
        return int(logits.argmax())
    probabilities = sampling_probs(logits, params).cpu()
    return int(torch.multinomial(probabilities, 1, generator=draw_generator(params.seed, index)))


def sampling_probs(logits: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that a token is drawn from, at a temperature above 0. logits: (V,). Returns (V,), summing to 1.

    Temperature comes first; then top_k, top_p and min_p, each on what the one before left, and only where set
    (0, 1 and 0 mean unset). In float32 at least.
    """
    # Exercise 2.14: the order matters: top_p of the flattened distribution keeps other tokens than of the sharp one.
    logits = upcast(logits) / params.temperature
    if params.top_k > 0:
        logits = keep_top_k(logits, params.top_k)
    if params.top_p < 1:
        logits = keep_top_p(logits, params.top_p)
    if params.min_p > 0:
        logits = keep_min_p(logits, params.min_p)
    return logits.softmax(-1)


def draw_generator(seed: int | None, index: int) -> torch.Generator:
    """The randomness for output token `index` of a request with this seed; with seed None, fresh every time."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(stable_hash(seed, index))
    return generator


def adjust_logits(
    logits: Tensor, params: SamplingParams, prompt: Sequence[int], output: Sequence[int], stop_ids: Sequence[int]
) -> Tensor:
    """Apply the penalties, and forbid an end before `min_tokens`. logits: (V,). Returns (V,), a new tensor if changed.

    The repetition penalty divides positive scores and multiplies negative ones: both make the token less likely.
    """
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted({*prompt, *output}), device=logits.device)
        scores = logits[seen]
        penalised = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
        logits = logits.index_copy(0, seen, penalised)
    if output and (params.presence_penalty or params.frequency_penalty):
        counts = torch.bincount(torch.tensor(output), minlength=logits.shape[-1]).to(logits)
        logits = logits - params.frequency_penalty * counts - params.presence_penalty * (counts > 0)
    if stop_ids and len(output) < params.min_tokens:
        logits = logits.index_fill(0, torch.tensor(sorted(stop_ids), device=logits.device), -math.inf)
    return logits


def top_logprobs(logits: Tensor, token_id: int, k: int) -> dict[int, float]:
    """Natural log-probabilities by token id: of the chosen token, which is first, and the k likeliest. logits: (V,)."""
    logprobs = upcast(logits).log_softmax(-1)
    best = logprobs.topk(k)
    return {token_id: logprobs[token_id].item(), **dict(zip(best.indices.tolist(), best.values.tolist()))}


# ---------------------------------------------------------------------------------------------------------------
# From tokens to text
# ---------------------------------------------------------------------------------------------------------------


class TextStream:
    """Turns tokens into text as they come. A token is a piece of bytes, and a character may need several tokens."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.held = b""  # bytes that do not make a whole character yet

    def push(self, token_id: int) -> str:
        """Take one token; return the text that is certain now, and hold back the bytes of an unfinished character.

        Bytes that can never become a character give U+FFFD, at once.
        """
        # Exercise 2.11: add `tokenizer.token_bytes(token_id)` to what is held, decode as far as it is whole.
        # A decoder from `codecs.getincrementaldecoder("utf-8")` knows the difference, and `getstate()` tells it.
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        text = decoder.decode(self.held + self.tokenizer.token_bytes(token_id))
        self.held, _ = decoder.getstate()
        return text

    def flush(self) -> str:
        """No token will follow: whatever is held can no longer become whole, and is given as U+FFFD."""
        text, self.held = self.held.decode(errors="replace"), b""
        return text


class StopChecker:
    """Lets text pass until a stop string occurs in it, even one that arrives in several pieces."""

    def __init__(self, stop: Sequence[str]):
        self.stop = tuple(stop)
        self.held = ""  # the end of the text so far, where it could be the beginning of a stop string
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take the next piece; return what may be shown for certain.

        When a stop string is complete, `found` is set and what stands before it is returned; of several, the one
        that begins first counts. What could still become a stop string is held back, and nothing else.
        """
        # Exercise 2.12: look for whole stop strings first; then hold back the longest end of the text that is the
        # beginning of one.
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
        """No text will follow: what was held back is no stop string after all."""
        text, self.held = self.held, ""
        return text


# ---------------------------------------------------------------------------------------------------------------
# The loop
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class RequestOutput:
    """What a request has brought forth so far. `token_ids` has the end-of-sequence token too; `text` does not."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None  # "stop": by a token or string that ends it; "length": no room for more
    logprobs: list[dict[int, float]] = field(default_factory=list)  # of each token, as `top_logprobs` gives them


def check_prompt(prompt_token_ids: Sequence[int], config: ModelConfig, params: SamplingParams) -> None:
    """Refuse what cannot be generated from, with the reason."""
    if not prompt_token_ids:
        raise ValueError("The prompt is empty: there is no token to continue from.")
    if len(prompt_token_ids) >= config.max_position_embeddings:
        raise ValueError(
            f"The prompt has {len(prompt_token_ids)} tokens; the model sees {config.max_position_embeddings}, and "
            "one at least must be left for the answer."
        )
    if wrong := [token_id for token_id in prompt_token_ids if not 0 <= token_id < config.vocab_size]:
        raise ValueError(f"The prompt has token id {wrong[0]}; the vocabulary ends at {config.vocab_size - 1}.")
    if params.n != 1:
        raise ValueError(f"SamplingParams: n is {params.n}; generate makes one sample: call it for params.children().")


def recompute(model: Llama, token_ids: Sequence[int]) -> Tensor:
    """Scores of what follows these tokens: (V,). Nothing is remembered, so all of them are computed, every time."""
    # Exercise 2.17: positions 0, 1, ...; forward with `causal_attend`; logits of the last token, and of no other.
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
    """Continue a prompt, token by token; `on_text` is called with each piece of text as soon as it is certain.

    It ends at one of the tokenizer's `eos_token_ids` (unless `ignore_eos`), at a stop token or a stop string
    ("stop"), after `max_tokens`, or when the context is full ("length"); where both are true of one token, it is
    "stop". `next_logits` is called with all tokens so far and returns the scores (V,) of the next: by default it is
    `recompute`, and every step computes the whole sequence again, which is what lesson 3 is about.
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

    # Exercise 2.13: until there is a finish_reason: `next_logits` of prompt and output, `adjust_logits`, `sample`,
    # append. A stop token adds no text; any other goes through `stream`, then `checker`. When it ends
    # otherwise than by a stop string, `show` what both still hold. Where `params.logprobs` is set, report
    # `top_logprobs` of the model's own logits.
    while output.finish_reason is None:
        logits = next_logits([*prompt_token_ids, *output.token_ids])
        adjusted = adjust_logits(logits, params, prompt_token_ids, output.token_ids, stop_ids)
        token_id = sample(adjusted, params, index=len(output.token_ids))
        output.token_ids.append(token_id)
        if params.logprobs is not None:
            output.logprobs.append(top_logprobs(logits, token_id, params.logprobs))
        if token_id not in stop_ids:
            show(checker.push(stream.push(token_id)))
        if token_id in stop_ids or checker.found:
            output.finish_reason = "stop"
        elif len(output.token_ids) == room:
            output.finish_reason = "length"

    if not checker.found:
        show(checker.push(stream.flush()))
        show(checker.flush())
    return output
