"""Lesson 7: fewer bits. Weights in eight bits or four, activations in eight, keys and values in eight, layers on disk.

Decoding reads every weight in every step. A weight of a quarter of the bytes is read in a quarter of the time, and a
model of a quarter of the bytes fits where the whole one did not. What this costs is measured: perplexity, and the
distance between two models' predictions.

    QuantizedMethod  how a linear layer stores fewer bits: Int8Method, W8A8Method, Int4Method
    quantize         chooses a method for each layer of a model on the meta device
    Int8KVCache      lesson 4's blocks, in eight bits
    OffloadedLlama   a model some of whose layers stay on disk until they are needed

A weight keeps its name, and its scales are stored beside it (`q_proj.weight`, `q_proj.weight_scale`). So a quantized
model is a checkpoint like any other, and a rank reads its slices of it.

From Dettmers et al., "LLM.int8()" (2022); Xiao et al., "SmoothQuant" (2023), for activations; Lin et al., "AWQ" (2024),
for weights that are quantized with their inputs in mind; llama.cpp's Q4_0 and Q4_1, for groups of four bits.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from solutions.llama_pytorch import (
    Attend,
    Linear,
    LinearMethod,
    Llama,
    ModelConfig,
    layers_of,
    load_weights,
    parse_config,
    reader,
    use_kernels,
)
from solutions.llm_basics import rotary_tables, upcast
from solutions.paged_attention import PagedKVCache, cdiv
from solutions.parallelism import Absent

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
    scale = absmax / 127
    scale = torch.where(scale > 0, scale, 1.0)
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


def whole_row_absmax(layer: Linear, x: Tensor) -> Tensor:
    """The largest magnitude in each row, over all ranks that have a part of the row. x: (rows, columns) -> (rows,).

    x has the columns that the layer has of its matrix: it is a part of the matrix, or of the layer's inputs.
    """
    absmax = x.abs().amax(dim=1)
    is_part = len(layer.columns) < layer.shape[1]
    return layer.group.all_reduce(absmax, dist.ReduceOp.MAX) if is_part else absmax


class QuantizedMethod(LinearMethod):
    """What the methods of this lesson have in common.

    is_saved: whether the checkpoint has what `save_quantized` wrote. Otherwise it has floats, and each matrix is
    quantized as it is read. Subclasses say in `parts` and `dtypes` what they store, make it in `quantized` out of
    floats, and multiply in `product`.
    """

    dtypes: Mapping[str, torch.dtype] = {"weight": torch.int8}  # others have the dtype of the activations

    def __init__(self, is_saved: bool = False):
        self.is_saved = is_saved

    def create_weights(self, layer: Linear, like: Tensor) -> None:
        for name, part in self.parts(layer.rows, layer.columns).items():
            dtype = self.dtypes.get(name, like.dtype)
            empty = torch.empty([len(axis) for axis in part], dtype=dtype, device=like.device)
            setattr(layer, name, nn.Parameter(empty, requires_grad=False))

    def shapes(self, layer: Linear) -> dict[str, tuple[int, ...]]:
        return super().shapes(layer) if self.is_saved else {"weight": layer.shape}

    def load(self, layer: Linear, read: Callable[..., Tensor]) -> None:
        if self.is_saved:
            super().load(layer, read)
            return
        for name, tensor in self.quantized(layer, partial(read, "weight")).items():
            layer.put(name, tensor)

    def apply(self, layer: Linear, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y = self.product(layer, x)
        return y if bias is None else y + bias


class Int8Method(QuantizedMethod):
    """The matrix in eight bits, with a scale for each output. Activations stay as they are."""

    def parts(self, rows: range, columns: range) -> dict[str, tuple[range, ...]]:
        return {"weight": (rows, columns), "weight_scale": (rows,)}

    def quantized(self, layer: Linear, read: Callable[..., Tensor]) -> dict[str, Tensor]:
        """The layer's tensors. `read(rows, columns)` returns this part of the float matrix."""
        weight = upcast(read(layer.rows, layer.columns))
        numbers, scale = quantize_int8(weight, whole_row_absmax(layer, weight))
        return {"weight": numbers, "weight_scale": scale}

    def product(self, layer: Linear, x: Tensor) -> Tensor:
        """x: (T, in). Returns (T, out): x times the matrix that the numbers and scales stand for."""
        # Exercise 7.2: a scale belongs to an output. So when is it cheapest to multiply by it?
        return F.linear(x, layer.weight.to(x.dtype)) * layer.weight_scale

    def embed(self, layer: Linear, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, layer.weight) * layer.weight_scale[token_ids, None]

    def process_weights_after_loading(self, layer: Linear) -> None:
        kernels.pack_int8(layer)


class W8A8Method(Int8Method):
    """Matrix and activations in eight bits: whole numbers are multiplied and added up, and scaled once at the end."""

    def product(self, layer: Linear, x: Tensor) -> Tensor:
        """x: (T, in). Returns (T, out) in x's dtype. Ranks that have parts of the same tokens scale them alike."""
        # Exercise 7.4: quantize the tokens, with `whole_row_absmax(layer, x)`; multiply with `int8_matmul`; then apply
        # each token's scale and each output's. Sums are far larger than float16 can hold: `upcast` the scales first.
        numbers, scale = quantize_activations(x, whole_row_absmax(layer, x))
        total = int8_matmul(numbers, layer.weight)
        return (total * upcast(scale)[:, None] * upcast(layer.weight_scale)).to(x.dtype)

    def process_weights_after_loading(self, layer: Linear) -> None:
        """Nothing: torch has no fast product of whole numbers on a CPU."""


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
    step = groups.abs().amax(-1) / 7 if symmetric else (groups.amax(-1) - groups.amin(-1)) / 15
    scale = torch.where(step.half() > 0, step.half(), 1.0)
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


class Int4Method(QuantizedMethod):
    """The matrix in four bits, two numbers in a byte, with a scale (and a minimum) for each group of a row."""

    dtypes = {"weight": torch.uint8, "weight_scale": torch.float16, "weight_minimum": torch.float16}

    def __init__(self, group_size: int, symmetric: bool, is_saved: bool = False):
        super().__init__(is_saved)
        self.group_size, self.symmetric = group_size, symmetric

    def groups(self, columns: range) -> range:
        """The groups of which these columns are. The first and the last may be another rank's in part."""
        return range(columns.start // self.group_size, cdiv(columns.stop, self.group_size))

    def parts(self, rows: range, columns: range) -> dict[str, tuple[range, ...]]:
        if columns.start % 2:
            raise ValueError(f"int4 packs columns in pairs; this rank's columns begin with number {columns.start}.")
        names = ["weight_scale"] if self.symmetric else ["weight_scale", "weight_minimum"]
        pairs = range(columns.start // 2, cdiv(columns.stop, 2))
        return {"weight": (rows, pairs), **dict.fromkeys(names, (rows, self.groups(columns)))}

    def quantized(self, layer: Linear, read: Callable[..., Tensor]) -> dict[str, Tensor]:
        """The layer's tensors. `read(rows, columns)` returns this part of the float matrix: whole groups are read."""
        groups, columns = self.groups(layer.columns), layer.columns
        whole = range(groups.start * self.group_size, min(groups.stop * self.group_size, layer.shape[1]))
        weight = upcast(read(layer.rows, whole))
        numbers, scale, minimum = quantize_int4(weight, self.group_size, self.symmetric)
        numbers = numbers[:, columns.start - whole.start : columns.stop - whole.start]
        tensors = {"weight": pack_int4(F.pad(numbers, (0, len(columns) % 2))), "weight_scale": scale}
        return tensors if self.symmetric else {**tensors, "weight_minimum": minimum}

    def product(self, layer: Linear, x: Tensor) -> Tensor:
        """x: (T, in). Returns (T, out): x times the matrix that the bytes stand for."""
        # Exercise 7.8: unpack (an odd number of columns was padded with one more), `dequantize_int4`, in x's dtype.
        # The layer's columns may begin within a group: its first column is number `layer.columns.start` of the matrix.
        numbers = unpack_int4(layer.weight)[:, : layer.in_features]
        minimum = None if self.symmetric else layer.weight_minimum.to(x.dtype)
        first_column = layer.columns.start % self.group_size
        weight = dequantize_int4(numbers, layer.weight_scale.to(x.dtype), minimum, self.group_size, first_column)
        return F.linear(x, weight)

    def process_weights_after_loading(self, layer: Linear) -> None:
        kernels.pack_int4(layer, self.group_size)


# ---------------------------------------------------------------------------------------------------------------
# The tree
# ---------------------------------------------------------------------------------------------------------------


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

    def method(self, is_saved: bool) -> LinearMethod:
        """How the linear layers of a model's blocks store their matrices."""
        if self.kind == "int4":
            return Int4Method(self.group_size, self.symmetric, is_saved)
        return {"int8": Int8Method, "w8a8": W8A8Method}[self.kind](is_saved)


def set_method(layer: Linear, method: LinearMethod) -> None:
    """Let a layer on the meta device store its matrix in another way."""
    layer.method = method
    method.create_weights(layer, like=layer.weight)


def quantize(model: Llama, quantization: Quantization, is_saved: bool = False) -> None:
    """Choose how a model on the meta device stores its matrices. is_saved: as in `QuantizedMethod`.

    The linear layers of its blocks get the quantization's method. The head always gets `Int8Method`: it has the last
    word on every token, and is the most sensitive. An embedding table is left in floats, unless it is the head as well:
    then there is one table, in eight bits, for both. Norms stay.
    """
    # Exercise 7.9: `layers_of(model.model.layers)` are the blocks' layers; linear ones have a `method`. `set_method`
    # makes new tensors: what was tied before is to be tied again.
    method, head_method = quantization.method(is_saved), Int8Method(is_saved)
    for layer in layers_of(model.model.layers).values():
        if hasattr(layer, "method"):
            set_method(layer, method)
    set_method(model.lm_head, head_method)
    if model.config.tie_word_embeddings:
        set_method(model.model.embed_tokens, head_method)
    model.tie_weights()


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


def quantize_for(model: Llama, checkpoint: Checkpoint, quantization: Quantization | None) -> None:
    """Choose how a model on the meta device stores a checkpoint's matrices, whether they are quantized yet or not.

    A checkpoint that is quantized already is read as it is: `quantization` must be None or the same, or this raises
    ValueError.
    """
    saved = quantization_of(checkpoint)
    if saved and quantization and saved != quantization:
        raise ValueError(f"{checkpoint.folder} is quantized already: {saved}. It cannot be loaded as {quantization}.")
    if saved or quantization:
        quantize(model, saved or quantization, is_saved=saved is not None)


def load_quantized(
    name: str, quantization: Quantization | None, dtype: torch.dtype, device: str, offload: int | None = None
) -> Llama:
    """Load a model as lesson 2's `load` does, quantized on the way: the whole model never stands in memory.

    offload: the largest number of bytes of weights that may stand in memory; None: all.
    """
    checkpoint = Checkpoint(find_checkpoint(name))
    with torch.device("meta"):
        model = (Llama if offload is None else OffloadedLlama)(plain_config(checkpoint)).to(dtype)
    quantize_for(model, checkpoint, quantization)
    if offload is None:
        load_weights(model, checkpoint)
        model = model.to(device)
    else:
        model.stream_from(checkpoint, range(model.config.num_hidden_layers), offload)
    use_kernels(model)
    return model


def quantized_copy(model: Llama, quantization: Quantization) -> Llama:
    """A loaded, plain model, quantized; the model itself stays as it is."""
    with torch.device("meta"):
        copied = Llama(model.config).to(model.model.norm.weight.dtype)
    quantize(copied, quantization)
    for path, layer in layers_of(copied).items():
        original = model.get_submodule(path)
        layer.load(lambda name, *part, original=original: getattr(original, name).detach())
    copied.tie_weights()
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
    for number, block in enumerate(model.model.layers):
        attention, mlp = block.self_attn, block.mlp
        pairs = (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            (mlp.up_proj, (mlp.down_proj,)),
        )
        hooks = [readers[0].register_forward_pre_hook(note) for _, readers in pairs]
        following = model.run_layers(hidden, positions, attend, range(number, number + 1))
        for hook in hooks:
            hook.remove()
        for maker, readers in pairs:
            factors = activation_aware_scales(inputs[readers[0]], [each.weight for each in readers], round_trip)
            for layer in readers:
                layer.weight.mul_(factors)
            maker.weight.div_(factors[:, None] if maker.weight.ndim == 2 else factors)
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
        index, first, last = layer - self.layers.start, start // self.block_size, cdiv(end, self.block_size)
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

    def stream_from(self, checkpoint: Checkpoint, numbers: range, limit: int) -> None:
        """Read as many layers as may stand in memory, and all that is no layer. limit: bytes of all weights.

        Raises ValueError if the limit is too small for what must be there: all that is no layer, and two layers.
        """
        self.checkpoint, layers = checkpoint, self.model.layers
        sizes = {number: sum(tensor.nbytes for tensor in layers[number].parameters()) for number in numbers}
        largest = max(sizes.values())
        rest = sum(tensor.nbytes for tensor in self.parameters()) - sum(sizes.values())
        if limit < rest + 2 * largest:
            raise ValueError(
                f"offload is {limit} bytes; this model needs {rest + 2 * largest} at least: {rest} for all that is no "
                f"layer, and twice {largest} for a layer."
            )
        # The layers that do not stay take turns in the space of two.
        stays_whole = limit >= rest + len(sizes) * largest
        num_resident = len(sizes) if stays_whole else (limit - rest) // largest - 2
        self.prototypes = {number: layers[number] for number in numbers[num_resident:]}
        for number, prototype in self.prototypes.items():
            layers[number] = Absent(prototype)
        load_weights(self, checkpoint)
        for number, prototype in self.prototypes.items():
            layers[number] = prototype  # still on the meta device: it tells its shapes

    def read_layer(self, number: int) -> nn.Module:
        """A layer, with its weights: from memory, or from the disk."""
        prototype = self.model.layers[number]
        if number not in self.prototypes:
            return prototype
        groups = {id(module.group): module.group for module in prototype.modules() if hasattr(module, "group")}
        layer = copy.deepcopy(prototype, groups)  # on the meta device, so only shapes; groups are shared
        for path, part in layers_of(layer).items():
            part.load(reader(self.checkpoint, f"model.layers.{number}.{path}"))
        return layer.to(self.model.norm.weight.device)

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
