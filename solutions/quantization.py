"""Lesson 7: fewer bits. Weights in eight bits or four, activations in eight, keys and values in eight, layers on disk.

Decoding reads every weight for every step, so a weight of a quarter the bytes is read in a quarter of the time, and a
model of a quarter the bytes fits where it did not. What it costs is measured: perplexity, and the distance between two
models' predictions.

    QuantizedLinear       a linear layer with another weight: Int8Linear, W8A8Linear, Int4Linear
    quantize              walks the tree and swaps; the model still stands on the meta device
    QuantizingCheckpoint  what `load_weights` reads from: each tensor is quantized as it is read
    Int8KVCache           lesson 4's blocks, in eight bits
    OffloadedLlama        layers that stay on disk until their turn
    QuantizedEngine       lesson 6's engine with all of these

A weight keeps its name; its scales stand beside it (`q_proj.weight`, `q_proj.weight_scale`), so a quantized model is a
checkpoint like any other, and a rank reads its slices of it.

From Dettmers et al., "LLM.int8()" (2022); Xiao et al., "SmoothQuant" (2023), for activations; Lin et al., "AWQ" (2024),
for weights that are quantized with their inputs in mind; llama.cpp's Q4_0 and Q4_1, for groups of four bits.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from common import kernels
from common.checkpoints import Checkpoint, CheckpointError, find_checkpoint
from common.config import EngineConfig
from solutions.batching import ModelRunner
from solutions.llama_pytorch import Attend, Llama, ModelConfig, load_weights, parse_config
from solutions.llm_basics import rotary_tables, upcast
from solutions.paged_attention import PagedKVCache
from solutions.parallelism import (
    Absent,
    ColumnParallelLinear,
    Group,
    ParallelEngine,
    ParallelLMHead,
    RankCoordinates,
    RowParallelLinear,
    Shard,
    ShardedCheckpoint,
    VocabParallelEmbedding,
    shard,
)

# ---------------------------------------------------------------------------------------------------------------
# Eight bits
# ---------------------------------------------------------------------------------------------------------------


def quantize_int8(weight: Tensor, absmax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127, and for each row what one of them is worth. weight: (out, in).

    absmax: (out,), the largest magnitude in each row, if `weight` is only a part of the rows; None: look. Returns int8
    (out, in) and the scales (out,), such that number x scale is about the weight. A row of zeros has scale 1.
    """
    # Exercise 7.1: the largest magnitude of a row becomes 127. -128 is not used, so that every number has its negative.
    absmax = weight.abs().amax(dim=1) if absmax is None else absmax
    scale = torch.where(absmax > 0, absmax / 127, 1.0)
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def quantize_activations(x: Tensor, absmax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same for activations, a scale for each token: it is made anew in every step. x: (T, in).

    absmax: (T,), if x is only a part of each token's row. Returns int8 (T, in) and scales (T,).
    """
    # Exercise 7.3: rows are rows.
    return quantize_int8(x, absmax)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The exact product of two matrices of int8, summed in 32 bits. a: (T, in); b: (out, in). Returns (T, out) int32.

    Processors have instructions for this, torch on a CPU has no fast way to ask for them. So float32 does it, in pieces
    short enough to be exact: it holds every whole number up to 2**24, and 1024 products of at most 127 x 127 are less.
    """
    total = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    for left, right in zip(a.split(1024, dim=1), b.split(1024, dim=1)):
        total += (left.float() @ right.float().T).to(torch.int32)
    return total


class QuantizedLinear(nn.Module):
    """What quantized linear layers have in common: their size, their bias, and their share if there are ranks.

    plain: the layer that it takes the place of, on the meta device. Subclasses have a `product`, what `plain` would
    compute without its bias, and a `quantized`, which makes their tensors out of a float weight: the part of it that
    `float_shard` says. `shards`, as in lesson 6: which parts of its tensors a rank reads where a checkpoint has them.
    """

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.out_features, self.in_features = plain.weight.shape
        self.dtype = plain.weight.dtype  # of activations, bias and result
        self.bias = getattr(plain, "bias", None)
        self.is_row_parallel = isinstance(plain, RowParallelLinear)
        self.group = getattr(plain, "group", Group())
        self.vocab_size = plain.vocab_size if isinstance(plain, ParallelLMHead) else None
        whole = Shard(1 if self.is_row_parallel else 0, range(plain.weight.shape[1 if self.is_row_parallel else 0]))
        self.float_shard = getattr(plain, "shards", {}).get("weight", whole)
        self.is_sharded = hasattr(plain, "shards")
        self.shards = {"bias": plain.shards["bias"]} if "bias" in getattr(plain, "shards", {}) else {}

    def forward(self, x: Tensor) -> Tensor:
        """x: (T, in). Returns (T, out), or what the layer of lesson 6 would return."""
        y = self.product(x)
        if self.is_row_parallel:
            y = self.group.all_reduce(y)
        if self.vocab_size is not None:
            parts = self.group.gather(y)
            y = x.new_empty(0, self.vocab_size) if parts is None else torch.cat(parts, -1)[:, : self.vocab_size]
        return y if self.bias is None else y + self.bias

    @property
    def float_shape(self) -> tuple[int, int]:
        """Of the weight that `quantized` wants."""
        return self.out_features, len(self.float_shard.part) if self.is_row_parallel else self.in_features

    def allocate(self, **tensors: tuple[tuple[int, ...], torch.dtype]) -> None:
        """Make a place on the meta device for each of these, by name: its shape and dtype."""
        for name, (shape, dtype) in tensors.items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def whole_row_absmax(self, x: Tensor) -> Tensor:
        """The largest magnitude in each row, over all ranks that have a part of it. x: (rows, columns) -> (rows,)."""
        absmax = x.abs().amax(dim=1)
        return self.group.all_reduce(absmax, dist.ReduceOp.MAX) if self.is_row_parallel else absmax


class Int8Linear(QuantizedLinear):
    """A weight in eight bits, a scale for each output. Activations stay as they are."""

    def __init__(self, plain: nn.Module):
        super().__init__(plain)
        self.allocate(
            weight=((self.out_features, self.in_features), torch.int8),
            weight_scale=((self.out_features,), self.dtype),
        )
        if self.is_sharded:
            self.shards["weight"] = self.float_shard
            if not self.is_row_parallel:
                self.shards["weight_scale"] = self.float_shard

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        numbers, scale = quantize_int8(weight, self.whole_row_absmax(weight))
        return {"weight": numbers, "weight_scale": scale}

    def product(self, x: Tensor) -> Tensor:
        """x: (T, in). Returns (T, out): x times the weight that the numbers and scales stand for."""
        # Exercise 7.2: a scale belongs to an output. So when is it cheapest to multiply by it?
        return F.linear(x, self.weight.to(x.dtype)) * self.weight_scale


class W8A8Linear(Int8Linear):
    """Weight and activations in eight bits: whole numbers are multiplied and added up, and scaled once at the end."""

    def product(self, x: Tensor) -> Tensor:
        """x: (T, in). Returns (T, out). Ranks that have parts of the same tokens scale them alike."""
        # Exercise 7.4: quantize the tokens with `whole_row_absmax`; `int8_matmul`; then each token's scale and each
        # output's.
        numbers, scale = quantize_activations(x, self.whole_row_absmax(x))
        total = int8_matmul(numbers, self.weight)
        return total.to(x.dtype) * scale[:, None] * self.weight_scale


# ---------------------------------------------------------------------------------------------------------------
# Four bits
# ---------------------------------------------------------------------------------------------------------------


def pack_int4(numbers: Tensor) -> Tensor:
    """Two numbers of 0 to 15 in a byte. numbers: (out, in) uint8, `in` even. Returns (out, in / 2) uint8.

    The first of two neighbours is in the byte's low half.
    """
    # Exercise 7.5: shift one of them by four bits.
    return numbers[:, 0::2] | numbers[:, 1::2] << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """Undo `pack_int4`. packed: (out, in / 2) uint8. Returns (out, in) uint8, from 0 to 15."""
    # Exercise 7.6: the low half and the high half of each byte, side by side again.
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def quantize_int4(weight: Tensor, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers from 0 to 15, with a scale and a minimum for each group of a row. weight: (out, in).

    A group is `group_size` neighbours in a row; the last may be shorter. number x scale + minimum is about the weight.
    Asymmetric: 0 stands for the group's smallest weight and 15 for its largest. Symmetric: 8 stands for a weight of 0,
    and 15 and 1 for the largest magnitude and its negative; the minimum is -8 scales and need not be stored. Scales
    and minima are rounded to float16 first, for that is how they are kept, and the numbers are chosen for those. A
    scale that would be 0 (all are alike; symmetric: all are 0) is 1.

    Returns uint8 (out, in), scales and minima, two of (out, groups) float16.
    """
    # Exercise 7.7: fill the last group up with copies of the last weight, which changes no extreme; view as groups.
    out, columns = weight.shape
    missing = -columns % group_size
    groups = torch.cat([weight, weight[:, -1:].expand(out, missing)], dim=1).unflatten(1, (-1, group_size))
    if symmetric:
        scale = groups.abs().amax(-1) / 7
    else:
        scale = (groups.amax(-1) - groups.amin(-1)) / 15
    scale = torch.where(scale > 0, scale, 1.0).half()
    minimum = -8 * scale if symmetric else groups.amin(-1).half()
    wide = scale[..., None].to(weight.dtype), minimum[..., None].to(weight.dtype)
    numbers = ((groups - wide[1]) / wide[0]).round().clamp(0, 15).to(torch.uint8)
    return numbers.flatten(1)[:, :columns], scale, minimum


def dequantize_int4(
    numbers: Tensor, scale: Tensor, minimum: Tensor | None, group_size: int, first_column: int = 0
) -> Tensor:
    """The weight that numbers, scales and minima stand for. numbers: (out, in); the others: (out, groups).

    minimum: None where it is -8 scales. first_column: how far into its first group the first column stands, where a
    rank's share of the columns begins in the middle of one. Returns (out, in) in the scale's dtype.
    """
    # Exercise 7.14: find the bug. One process says what it should. On three ranks all is well with groups of 32 and 64;
    # with groups of 128 the model talks nonsense.

    group_of = (torch.arange(numbers.shape[1], device=numbers.device) + first_column) // group_size
    if minimum is None:
        minimum = -8 * scale
    return numbers * scale[:, group_of] + minimum[:, group_of]


class Int4Linear(QuantizedLinear):
    """A weight in four bits, two numbers in a byte, with a scale (and a minimum) for each group of a row."""

    def __init__(self, plain: nn.Module, group_size: int, symmetric: bool):
        super().__init__(plain)
        self.group_size, self.symmetric = group_size, symmetric
        part = self.float_shard.part if self.is_row_parallel else range(self.in_features)
        if part.start % 2:
            raise ValueError(f"int4 packs columns in pairs; this rank's share begins with column {part.start}.")
        groups = range(part.start // group_size, -(-part.stop // group_size))
        self.first_column = part.start % group_size
        scales = (self.out_features, len(groups)), torch.float16
        self.allocate(
            weight=((self.out_features, -(-self.in_features // 2)), torch.uint8),
            weight_scale=scales,
            **({} if symmetric else {"weight_minimum": scales}),
        )
        if self.is_row_parallel:
            # Whole groups are read, though the first and the last may be another rank's in part.
            self.float_shard = Shard(
                1, range(groups.start * group_size, min(groups.stop * group_size, plain.whole_in_features))
            )
            self.shards["weight"] = Shard(1, range(part.start // 2, -(-part.stop // 2)))
            self.shards["weight_scale"] = self.shards["weight_minimum"] = Shard(1, groups)
        elif self.is_sharded:
            self.shards |= dict.fromkeys(("weight", "weight_scale", "weight_minimum"), self.float_shard)

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        numbers, scale, minimum = quantize_int4(weight, self.group_size, self.symmetric)
        numbers = numbers[:, self.first_column : self.first_column + self.in_features]
        tensors = {"weight": pack_int4(F.pad(numbers, (0, self.in_features % 2))), "weight_scale": scale}
        return tensors if self.symmetric else {**tensors, "weight_minimum": minimum}

    def product(self, x: Tensor) -> Tensor:
        """x: (T, in). Returns (T, out): x times the weight that the bytes stand for."""
        # Exercise 7.8: unpack (an odd number of columns was padded with one more), `dequantize_int4`, in x's dtype.
        numbers = unpack_int4(self.weight)[:, : self.in_features]
        minimum = None if self.symmetric else self.weight_minimum.to(x.dtype)
        weight = dequantize_int4(numbers, self.weight_scale.to(x.dtype), minimum, self.group_size, self.first_column)
        return F.linear(x, weight)


# ---------------------------------------------------------------------------------------------------------------
# The tree
# ---------------------------------------------------------------------------------------------------------------


class Int8Embedding(nn.Module):
    """An embedding table in eight bits, a scale for each token. Where it is the head as well, both use its numbers."""

    def __init__(self, plain: nn.Embedding | VocabParallelEmbedding):
        super().__init__()
        self.group = getattr(plain, "group", Group())
        self.part = getattr(plain, "part", range(plain.weight.shape[0]))
        self.shards = (
            {"weight": plain.shards["weight"], "weight_scale": plain.shards["weight"]}
            if hasattr(plain, "shards")
            else {}
        )
        self.weight = nn.Parameter(
            torch.empty(plain.weight.shape, dtype=torch.int8, device="meta"), requires_grad=False
        )
        self.weight_scale = nn.Parameter(plain.weight.new_empty(len(plain.weight), device="meta"), requires_grad=False)

    @property
    def float_shape(self) -> tuple[int, int]:
        return tuple(self.weight.shape)

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        numbers, scale = quantize_int8(weight)
        return {"weight": numbers, "weight_scale": scale}

    def forward(self, token_ids: Tensor) -> Tensor:
        """(T,) -> (T, hidden_size), on every rank."""
        ours = (token_ids >= self.part.start) & (token_ids < self.part.stop)
        rows = (token_ids - self.part.start).where(ours, 0)
        found = F.embedding(rows, self.weight).to(self.weight_scale.dtype) * self.weight_scale[rows, None]
        return self.group.all_reduce(found.where(ours[:, None], 0))


@dataclass(frozen=True)
class Quantization:
    """How weights are kept. kind: "int8", "w8a8" or "int4"; the last two fields are for int4."""

    kind: str
    group_size: int = 64
    symmetric: bool = False

    def __post_init__(self):
        if self.kind not in ("int8", "w8a8", "int4"):
            raise ValueError(f"quantization must be one of int8, w8a8, int4; it is {self.kind!r}.")
        if not isinstance(self.group_size, int) or self.group_size < 2 or self.group_size % 2:
            raise ValueError(f"group_size must be an even number of at least 2; it is {self.group_size!r}.")

    def layer(self, plain: nn.Module) -> QuantizedLinear:
        """The layer that takes the place of a plain one."""
        if self.kind == "int4":
            return Int4Linear(plain, self.group_size, self.symmetric)
        return {"int8": Int8Linear, "w8a8": W8A8Linear}[self.kind](plain)


LINEAR = (nn.Linear, ColumnParallelLinear, RowParallelLinear)


def quantize(module: nn.Module, quantization: Quantization) -> None:
    """Swap every linear layer in a tree of modules, in place, for its quantized kind. Norms and tables stay.

    Only exactly these classes: a layer that is quantized already, or somebody's own, is left as it is.
    """
    # Exercise 7.9: `named_children`, `setattr`, and the children's children.
    for name, child in list(module.named_children()):
        if type(child) in LINEAR:
            setattr(module, name, quantization.layer(child))
        else:
            quantize(child, quantization)


def quantize_model(model: Llama, quantization: Quantization) -> None:
    """Swap the linear layers of a model that stands on the meta device, and its head, which is always "int8".

    The head has the last word on every token, and is the most sensitive. Where it is the embedding table as well, there
    is one table, in eight bits, for both.
    """
    quantize(model.model.layers, quantization)
    if type(model.lm_head) in (nn.Linear, ParallelLMHead):
        model.lm_head = Int8Linear(model.lm_head)
    if model.config.tie_word_embeddings and type(model.model.embed_tokens) in (nn.Embedding, VocabParallelEmbedding):
        model.model.embed_tokens = Int8Embedding(model.model.embed_tokens)
        model.tie_weights = partial(tie_quantized, model)
        model.tie_weights()


def tie_quantized(model: Llama) -> None:
    """One table, two uses: its numbers and its scales. Where another stage has the head there are no scales to tie."""
    model.lm_head.weight = model.model.embed_tokens.weight
    if isinstance(model.lm_head, Int8Linear):
        model.lm_head.weight_scale = model.model.embed_tokens.weight_scale


class QuantizingCheckpoint:
    """A float checkpoint as a quantized model sees it: every tensor is quantized as it is read, one at a time.

    It answers what lesson 2's `load_weights` asks.
    """

    def __init__(self, checkpoint: Checkpoint, model: Llama):
        self.plain = ShardedCheckpoint(checkpoint, model)
        self.folder = checkpoint.folder
        self.layers = {name: each for name, each in model.named_modules() if hasattr(each, "quantized")}
        self.waiting: dict[str, Tensor] = {}  # what was made of a weight, until it is asked for
        for name, layer in self.layers.items():
            if isinstance(layer, QuantizedLinear):
                self.plain.shards.pop(f"{name}.weight", None)
                if layer.is_sharded:
                    self.plain.shards[f"{name}.weight"] = layer.float_shard

    def parts(self, name: str) -> list[str]:
        """What the model has instead of this tensor of the checkpoint."""
        layer, _, attribute = name.rpartition(".")
        if attribute != "weight" or layer not in self.layers:
            return [name]
        return [f"{layer}.{each}" for each, _ in self.layers[layer].named_parameters() if each != "bias"]

    def names(self) -> list[str]:
        return [part for name in self.plain.names() for part in self.parts(name)]

    def source(self, name: str) -> str:
        """The tensor of the checkpoint that this one is made of."""
        layer, _, attribute = name.rpartition(".")
        return f"{layer}.weight" if layer in self.layers and attribute != "bias" else name

    def file(self, name: str) -> Path:
        return self.plain.file(self.source(name))

    def shape(self, name: str) -> tuple[int, ...]:
        layer, _, attribute = name.rpartition(".")
        found = self.plain.shape(self.source(name))
        if self.parts(self.source(name)) == [name] or found != self.layers[layer].float_shape:
            return found  # a weight of the wrong shape is shown as it is, and refused
        return tuple(getattr(self.layers[layer], attribute).shape)

    def read(self, name: str) -> Tensor:
        layer = name.rpartition(".")[0]
        if name not in self.waiting:
            tensor = self.plain.read(self.source(name))
            if self.source(name) == name and self.parts(name) == [name]:
                return tensor  # it is not quantized
            dtype = torch.promote_types(tensor.dtype, torch.float32)
            made = self.layers[layer].quantized(tensor.to(dtype))
            self.waiting |= {f"{layer}.{each}": value for each, value in made.items()}
        return self.waiting.pop(name)


def quantization_of(checkpoint: Checkpoint) -> Quantization | None:
    """How a checkpoint's weights are kept, if they were quantized by `save_quantized`."""
    said = checkpoint.config.get("quantization_config")
    if said is None:
        return None
    if said.get("quant_method") != METHOD:
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: quantized by {said.get('quant_method')!r}; this engine reads its own "
            "quantized checkpoints and unquantized ones."
        )
    try:
        return Quantization(said["kind"], said["group_size"], said["symmetric"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{checkpoint.folder}/config.json: quantization_config: {error}") from None


METHOD = "inference-course"
"""By which a `config.json` says that its checkpoint was quantized here."""


def plain_config(checkpoint: Checkpoint) -> ModelConfig:
    """The model's config, of which lesson 2 would refuse a quantized checkpoint's."""
    return parse_config({key: value for key, value in checkpoint.config.items() if key != "quantization_config"})


def load_quantized(
    name: str,
    quantization: Quantization | None,
    dtype: torch.dtype,
    device: str,
    coordinates: RankCoordinates = RankCoordinates(0, 1, 1),  # noqa: B008  (frozen)
    group: Group | None = None,
    offload: int | None = None,
) -> tuple[Llama, range, int]:
    """What lesson 6's `load_share` does, quantized on the way: the whole model never stands in memory.

    A checkpoint that is quantized already is read as it is, and `quantization` must be None or the same. offload: how
    many bytes of weights may stand in memory; None: all.
    """
    checkpoint = Checkpoint(find_checkpoint(name))
    saved = quantization_of(checkpoint)
    if saved and quantization and saved != quantization:
        raise ValueError(f"{name} is quantized already: {saved}. It cannot be loaded as {quantization}.")
    with torch.device("meta"):
        model = (Llama if offload is None else OffloadedLlama)(plain_config(checkpoint)).to(dtype)
    layers = shard(model, coordinates, group or Group())
    if saved or quantization:
        quantize_model(model, saved or quantization)
    view = partial(QuantizingCheckpoint if quantization and not saved else ShardedCheckpoint, checkpoint)
    if offload is None:
        load_weights(model, view(model))
        model = model.to(device)
    else:
        model.stream_from(view, offload)
    if kernels.enabled():
        kernels.pack(model)
    return model, layers, checkpoint.num_bytes_read


class LoadedCheckpoint:
    """A model in memory, seen as a checkpoint."""

    def __init__(self, model: Llama):
        self.tensors = dict(model.named_parameters())
        self.folder = Path("a model in memory")

    def names(self) -> list[str]:
        return list(self.tensors)

    def file(self, name: str) -> Path:
        return self.folder

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self.tensors[name].detach()


def quantized_copy(model: Llama, quantization: Quantization) -> Llama:
    """A loaded, plain model, quantized; the model itself stays as it is."""
    with torch.device("meta"):
        copied = Llama(model.config).to(model.model.norm.weight.dtype)
    quantize_model(copied, quantization)
    load_weights(copied, QuantizingCheckpoint(LoadedCheckpoint(model), copied))
    return copied


def save_quantized(model: Llama, quantization: Quantization, source: Path, folder: Path) -> None:
    """Write a quantized model as a checkpoint: its tensors, and the source's config and tokenizer beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".model", ".jinja", ".txt") and "index" not in file.name:
            shutil.copy(file, folder / file.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {"quant_method": METHOD, **asdict(quantization)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters in memory, a shared one counted once. What oneDNN has packed is no parameter any more."""
    return sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_meta)


# ---------------------------------------------------------------------------------------------------------------
# Weights quantized with their inputs in mind
# ---------------------------------------------------------------------------------------------------------------


def activation_aware_scales(
    x: Tensor, weights: Sequence[Tensor], round_trip: Callable[[Tensor], Tensor], num_trials: int = 20
) -> Tensor:
    """A factor for each input channel, such that quantizing the scaled weights changes the outputs least.

    x: (T, in), inputs that the layer really gets. weights: matrices (out, in) that read this input. round_trip: what is
    left of a weight when it has been quantized and read back. A channel with large activations matters more: its
    weights are multiplied by its factor before they are rounded, and the input is divided by it.

    Tried are the factors mean |x| ** (i / num_trials), for i from 0 (no scaling at all) to num_trials - 1, each divided
    by the square root of (its largest x its smallest); means below 1e-4 count as 1e-4. The error is the mean square
    of the outputs' differences, summed over the weights. Returns the best, (in,). From Lin et al., "AWQ" (2024).
    """
    # Exercise 7.10: for each i: the factors; for each weight, x @ (what is left of weight x factors, / factors).
    magnitude = x.abs().mean(dim=0).clamp(min=1e-4)
    wanted = [x @ weight.T for weight in weights]
    best, least = torch.ones_like(magnitude), float("inf")
    for i in range(num_trials):
        factors = magnitude ** (i / num_trials)
        factors = factors / (factors.max() * factors.min()).sqrt()
        left = [round_trip(weight * factors) / factors for weight in weights]
        error = sum(float((x @ each.T - target).square().mean()) for each, target in zip(left, wanted))
        if error < least:
            best, least = factors, error
    return best


def scale_for_activations(model: Llama, token_ids: Sequence[int], quantization: Quantization, attend: Attend) -> None:
    """Prepare a plain model for quantization, in place, with a text for it to read; its outputs stay what they were.

    What a layer's inputs are divided by is taken out of whatever makes them: of the norm in front of q, k and v and of
    gate and up, and of up's outputs in front of down. (In front of o is attention, which mixes; it is left alone.)
    """

    def round_trip(weight: Tensor) -> Tensor:
        if quantization.kind == "int4":
            numbers, scale, minimum = quantize_int4(weight, quantization.group_size, quantization.symmetric)
            return dequantize_int4(numbers, scale.to(weight.dtype), minimum.to(weight.dtype), quantization.group_size)
        numbers, scale = quantize_int8(weight)
        return numbers * scale[:, None]

    inputs: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, arguments: tuple) -> None:
        inputs[module] = arguments[0]

    hidden = model.embed(torch.tensor(token_ids))
    positions = torch.arange(len(token_ids))
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        pairs = (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            (mlp.up_proj, (mlp.down_proj,)),
        )
        hooks = [readers[0].register_forward_pre_hook(note) for _, readers in pairs]
        following = model.run_layers(hidden, positions, attend, range(number, number + 1))
        for hook in hooks:
            hook.remove()
        for maker, readers in pairs:
            factors = activation_aware_scales(inputs[readers[0]], [each.weight for each in readers], round_trip)
            for reader in readers:
                reader.weight.mul_(factors)
            maker.weight.div_(factors[:, None] if isinstance(maker, nn.Linear) else factors)
            if getattr(maker, "bias", None) is not None:
                maker.bias.div_(factors)
        inputs.clear()
        hidden = following


# ---------------------------------------------------------------------------------------------------------------
# Keys and values in eight bits
# ---------------------------------------------------------------------------------------------------------------


class Int8KVCache(PagedKVCache):
    """Lesson 4's blocks in eight bits, with one scale for each slot and head.

    A token is quantized once, when it is written, and its scale is never revised. So it does not matter in which chunks
    a prompt was computed, or whether it was computed twice: everyone reads back the same.
    """

    def __init__(
        self, model: Llama, num_blocks: int, block_size: int, num_host_blocks: int = 0, layers: range | None = None
    ):
        super().__init__(model, num_blocks, block_size, num_host_blocks, layers, torch.int8)
        self.dtype = model.model.norm.weight.dtype

        def scales_of(tensor: Tensor) -> Tensor:
            pin = tensor.is_pinned()
            return torch.zeros(tensor.shape[:-1], dtype=self.dtype, device=tensor.device, pin_memory=pin)

        self.scales = [scales_of(self.keys), scales_of(self.values)]
        self.host_scales = [scales_of(self.host_keys), scales_of(self.host_values)]

    @property
    def device_tensors(self) -> list[Tensor]:
        return [self.keys, self.values, *self.scales]

    @property
    def host_tensors(self) -> list[Tensor]:
        return [self.host_keys, self.host_values, *self.host_scales]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Keep the keys and values of T tokens. slots: (T,); k, v: (T, K, D)."""
        # Exercise 7.11: a row of D numbers for each slot and head; `quantize_int8` knows rows. As in lesson 4, a
        # layer's memory is indexed by slot; so are its scales.
        index = layer - self.layers.start
        for store, scales, new in zip((self.keys, self.values), self.scales, (k, v)):
            numbers, scale = quantize_int8(new.flatten(0, 1))
            store[index].flatten(0, 1).index_copy_(0, slots, numbers.view(new.shape))
            scales[index].flatten(0, 1).index_copy_(0, slots, scale.view(new.shape[:-1]))

    def gather(self, layer: int, block_tables: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Read positions start to end of B sequences: two of (B, end - start, K, D), in the model's dtype."""
        # Exercise 7.15: which blocks, which slots? Lesson 4 had the numbers; the scales stand at the same places.
        index, first, last = layer - self.layers.start, start // self.block_size, -(-end // self.block_size)
        low, high = start - first * self.block_size, end - first * self.block_size
        block_ids = block_tables[:, first:last].flatten()
        found = []
        for store, scales in zip((self.keys, self.values), self.scales):
            numbers = store[index].index_select(0, block_ids).to(self.dtype)
            whole = numbers * scales[index].index_select(0, block_ids)[..., None]
            found.append(whole.view(len(block_tables), -1, *whole.shape[2:])[:, low:high])
        return found[0], found[1]


# ---------------------------------------------------------------------------------------------------------------
# Layers that stay on disk
# ---------------------------------------------------------------------------------------------------------------


def stream_layers(numbers: Iterable[int], read: Callable[[int], nn.Module]) -> Iterator[tuple[int, nn.Module]]:
    """Yield (number, layer) for each number, in order; while one computes, the next is being read.

    read(number) reads a layer from the disk, and takes its time. Two layers at most are in memory: the one that was
    yielded last and the one that is being read. Whatever `read` raises is raised here.
    """
    # Exercise 7.12: `pool.submit(read, number)` reads in a thread of its own, and `result()` waits for it. When may the
    # next but one be begun?
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = None
        for number in numbers:
            following = number, pool.submit(read, number)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()


class OffloadedLlama(Llama):
    """A model of which only the first layers stand in memory; the others are read from the disk at every step."""

    def stream_from(self, view: Callable[[Llama], ShardedCheckpoint], limit: int) -> None:
        """Read as many layers as may stand in memory, and whatever is no layer. limit: bytes of all weights.

        Raises ValueError if there is no room for what must be there: all that is no layer, and two layers.
        """
        self.checkpoint, layers = view(self), self.model.layers  # a view of all layers; below, of what stays
        present = [number for number, layer in enumerate(layers) if not isinstance(layer, Absent)]
        sizes = {number: sum(tensor.nbytes for tensor in layers[number].parameters()) for number in present}
        each = max(sizes.values())
        rest = sum(tensor.nbytes for tensor in self.parameters()) - sum(sizes.values())
        if limit < rest + 2 * each:
            raise ValueError(
                f"offload is {limit} bytes; this model needs {rest + 2 * each} at least: {rest} for all that is no "
                f"layer, and twice {each} for a layer."
            )
        # The layers that do not stay take turns in the room of two.
        num_resident = len(present) if limit >= rest + len(present) * each else (limit - rest) // each - 2
        self.prototypes = {number: layers[number] for number in present[num_resident:]}
        for number in self.prototypes:
            layers[number] = Absent()
        load_weights(self, view(self))
        for number, prototype in self.prototypes.items():
            layers[number] = prototype  # still on the meta device, for whoever wants to know its shapes

    def read_layer(self, number: int) -> nn.Module:
        """A layer, with its weights: from memory, or from the disk."""
        prototype = self.model.layers[number]
        if number not in self.prototypes:
            return prototype
        groups = {id(module.group): module.group for module in prototype.modules() if hasattr(module, "group")}
        layer = copy.deepcopy(prototype, groups)  # on the meta device, so only shapes; groups are shared
        for name, empty in prototype.named_parameters():
            owner, _, attribute = name.rpartition(".")
            tensor = self.checkpoint.read(f"model.layers.{number}.{name}").to(
                self.model.norm.weight.device, empty.dtype
            )
            setattr(layer.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
        return layer

    def run_layers(self, hidden: Tensor, positions: Tensor, attend: Attend, layers: range) -> Tensor:
        cos, sin = rotary_tables(positions, self.frequencies.to(hidden.device))
        for _, layer in stream_layers(layers, self.read_layer):
            hidden = layer(hidden, cos, sin, attend)
            del layer  # or there would be three: this one, the next, and the one that is begun when we ask for the next
        return hidden


# ---------------------------------------------------------------------------------------------------------------
# What it costs
# ---------------------------------------------------------------------------------------------------------------


def kl_divergence(logits: Tensor, other_logits: Tensor) -> Tensor:
    """How far another model's predictions are from a model's, in nats a token: 0 where they are the same.

    logits, other_logits: (T, V), of the model and the other one on the same tokens. Returns the mean over the tokens of
    sum p log (p / q), where p is the model's distribution and q the other's. From Kullback and Leibler (1951).
    """
    # Exercise 7.13: log-probabilities of both, `upcast` first; where p is nearly 0 so is its share.
    p, q = upcast(logits).log_softmax(-1), upcast(other_logits).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()


# ---------------------------------------------------------------------------------------------------------------
# The engine
# ---------------------------------------------------------------------------------------------------------------


def make_quantized_runner(config: EngineConfig, kv_cache_dtype: str, model: Llama, layers: range) -> ModelRunner:
    """Lesson 6's `make_runner`, with blocks in eight bits if they are asked for."""
    kind = Int8KVCache if kv_cache_dtype == "int8" else PagedKVCache
    return ModelRunner(model, kind(model, config.num_blocks, config.block_size, config.num_host_blocks or 0, layers))


class QuantizedEngine(ParallelEngine):
    """Lesson 6's engine, with fewer bits.

    quantization: None, "int8", "w8a8" or "int4" (with group_size and symmetric), or a `Quantization`. kv_cache_dtype:
    "auto", as the model's, or "int8". offload: None, or how many bytes of weights may stand in memory.
    """

    def __init__(
        self,
        name: str,
        quantization: str | Quantization | None = None,
        group_size: int = 64,
        symmetric: bool = False,
        kv_cache_dtype: str = "auto",
        offload: int | None = None,
        **settings,
    ):
        if isinstance(quantization, str):
            quantization = Quantization(quantization, group_size, symmetric)
        if kv_cache_dtype not in ("auto", "int8"):
            raise ValueError(f"kv_cache_dtype must be one of auto, int8; it is {kv_cache_dtype!r}.")
        if offload is not None and (not isinstance(offload, int) or offload < 1):
            raise ValueError(f"offload must be a number of bytes; it is {offload!r}.")
        self.quantization, self.kv_cache_dtype, self.offload = quantization, kv_cache_dtype, offload
        super().__init__(name, **settings)

    def read_config(self, checkpoint: Checkpoint) -> ModelConfig:
        return plain_config(checkpoint)

    def cache_share(self, config: ModelConfig, dtype: torch.dtype, *grid: int) -> float:
        """In eight bits a slot's head takes head_dim bytes and a scale, instead of head_dim numbers."""
        share, size = super().cache_share(config, dtype, *grid), dtype.itemsize
        return share * (config.head_dim + size) / (config.head_dim * size) if self.kv_cache_dtype == "int8" else share

    def loader(self, folder: str, dtype: torch.dtype, device: str) -> Callable:
        return partial(load_quantized, folder, self.quantization, dtype, device, offload=self.offload)

    def maker(self) -> Callable:
        return partial(make_quantized_runner, self.config, self.kv_cache_dtype)
