"""Lesson 7: fewer bits. Weights in eight or four bits, activations, keys and values in eight, and layers on disk.

Decoding reads every weight in every step. A quarter of the bytes is read in a quarter of the time, and fits into less
memory. A weight keeps its name, and its scales are stored beside it (`q_proj.weight`, `q_proj.weight_scale`). So a
quantized model is a checkpoint like any other, and a rank reads its part of it.

From Dettmers et al., "LLM.int8()" (2022); for activations, Xiao et al., "SmoothQuant" (2023). Lin et al., "AWQ" (2024),
quantize weights with their inputs in mind. Groups of four bits are as in llama.cpp's Q4_0 and Q4_1.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from common import kernels
from common.checkpoints import Checkpoint, CheckpointError
from common.config import EngineConfig
from solutions.llama_pytorch import Attend, Linear, LinearMethod, Llama, layers_of, load_weights, reader
from solutions.llm_basics import upcast
from solutions.mixture_of_experts import SparseMoeBlock
from solutions.paged_attention import PagedKVCache, cdiv
from solutions.parallelism import Absent

# --- Eight bits ------------------------------------------------------------------------------------------------------


def quantize_int8(weight: Tensor, absmax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round each row to whole numbers from -127 to 127, with one scale for the row. weight: (out, in).

    absmax: (out,), the largest magnitude in each row; by default that of `weight`, which may be only a part of it.
    Returns the numbers, int8 (out, in), and the scales, (out,): number x scale approximates the weight. A scale that
    would be 0, as for a row of zeros, is 1. A row with a NaN has the scale NaN, so that the fault is noticed.
    """
    # Exercise 7.1: a row's scale is its largest magnitude / 127. (-128 is not used, so every number has a negative.)
    absmax = weight.abs().amax(dim=1) if absmax is None else absmax
    scale = absmax / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def quantize_activations(x: Tensor, absmax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize activations, with a scale for each token. x: (T, in). Returns int8 (T, in) and scales (T,).

    absmax: (T,), the largest magnitude of each token, if x has only a part of its channels.
    """
    # Exercise 7.2: each token is a row, as each output is a row in 7.1: call `quantize_int8`.
    return quantize_int8(x, absmax)


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply two matrices of int8 exactly. a: (T, in); b: (out, in). Returns (T, out) int32.

    On a CPU torch has no fast product of whole numbers. float32 has one, and it is exact up to 2**24: the sum of 1024
    products of at most 127 x 127 is less.
    """
    total = torch.zeros(len(a), len(b), dtype=torch.int32, device=a.device)
    for left, right in zip(a.split(1024, dim=1), b.split(1024, dim=1)):
        total += (left.float() @ right.float().T).to(torch.int32)
    return total


def whole_row_absmax(layer: Linear, x: Tensor) -> Tensor:
    """Return the largest magnitude in each row, over all ranks that have a part of it. x: (rows, columns) -> (rows,).
    x has the layer's columns: it is the layer's part of its matrix, or the layer's inputs.
    """
    absmax = x.abs().amax(dim=1)
    is_part = len(layer.columns) < layer.shape[1]
    return layer.group.all_reduce(absmax, dist.ReduceOp.MAX) if is_part else absmax


class QuantizedMethod(LinearMethod):
    """A linear layer's matrix in fewer bits. Subclasses define `parts`, `quantized` and `product`.

    is_saved: the checkpoint was written by `save_quantized`. Otherwise its floats are quantized as they are read.
    """

    dtypes: Mapping[str, torch.dtype] = {"weight": torch.int8}  # dtypes of tensors that differ from the activations'

    def __init__(self, is_saved: bool = False):
        self.is_saved = is_saved

    def create_weights(self, layer: Linear, like: Tensor) -> None:
        for name, part in self.parts(layer.rows, layer.columns).items():
            tensor = like.new_empty([len(axis) for axis in part], dtype=self.dtypes.get(name))
            setattr(layer, name, nn.Parameter(tensor, requires_grad=False))

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
    """Weights in eight bits, with a scale for each output. Activations stay in floats."""

    def parts(self, rows: range, columns: range) -> dict[str, tuple[range, ...]]:
        return {"weight": (rows, columns), "weight_scale": (rows,)}

    def quantized(self, layer: Linear, read: Callable[..., Tensor]) -> dict[str, Tensor]:
        """Return the layer's tensors, by name. `read(rows, columns)` reads a part of the matrix, in floats."""
        weight = upcast(read(layer.rows, layer.columns))
        numbers, scale = quantize_int8(weight, whole_row_absmax(layer, weight))
        return {"weight": numbers, "weight_scale": scale}

    def product(self, layer: Linear, x: Tensor) -> Tensor:
        """Multiply x (T, in) by the matrix that numbers and scales stand for. Returns (T, out) in x's dtype."""
        # Exercise 7.3: multiply by the numbers, in x's dtype, and then each output by its scale.
        return F.linear(x, layer.weight.to(x.dtype)) * layer.weight_scale

    def embed(self, layer: Linear, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, layer.weight) * layer.weight_scale[token_ids, None]

    def process_weights_after_loading(self, layer: Linear) -> None:
        kernels.pack_int8(layer)


class W8A8Method(Int8Method):
    """Matrix and activations in eight bits: whole numbers are multiplied, and the result is scaled at the end."""

    def product(self, layer: Linear, x: Tensor) -> Tensor:
        """Multiply as `Int8Method` does. Ranks that have parts of the same token use the same scale for it."""
        # Exercise 7.4: quantize the tokens, with `whole_row_absmax(layer, x)`; multiply with `int8_matmul`; then apply
        # each token's scale and each output's. The sums are too large for float16: `upcast` the scales first.
        numbers, scale = quantize_activations(x, whole_row_absmax(layer, x))
        total = int8_matmul(numbers, layer.weight)
        return (total * upcast(scale)[:, None] * upcast(layer.weight_scale)).to(x.dtype)

    def process_weights_after_loading(self, layer: Linear) -> None:
        kernels.pack_w8a8(layer)


# --- Four bits -------------------------------------------------------------------------------------------------------


def pack_int4(numbers: Tensor) -> Tensor:
    """Pack two neighbouring numbers, 0 to 15, in a byte: the first in its low half, the second in its high half.

    numbers: (out, in) uint8, `in` even. Returns (out, in / 2) uint8.
    """
    # Exercise 7.5: shift the second of each pair by four bits, and combine it with the first.
    return numbers[:, 0::2] | numbers[:, 1::2] << 4


def unpack_int4(packed: Tensor) -> Tensor:
    """Undo `pack_int4`. packed: (out, in / 2) uint8. Returns (out, in) uint8, from 0 to 15."""
    # Exercise 7.6: take the low half and the high half of each byte, and put them side by side again.
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)


def quantize_int4(weight: Tensor, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Round each group of `group_size` neighbours in a row to whole numbers from 0 to 15. weight: (out, in).

    The last group of a row may be shorter. number x scale + minimum approximates it. Asymmetric: 0 stands for the
    group's smallest weight and 15 for its largest. Symmetric: 8 stands for 0, and 15 and 1 for the largest magnitude
    and its negative, so the minimum is -8 scales. Scales and minima are rounded to float16, as they are stored, before
    the numbers are chosen. A scale that would be 0 in float16 is 1.

    Returns the numbers, uint8 (out, in), the scales and the minima, both float16 (out, groups).
    """
    # Exercise 7.7: fill the last group with copies of the last weight, which change no extreme. View as groups.
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
    """Return the weights that numbers stand for: (out, in), in the scale's dtype. numbers: (out, in).

    scale, minimum: (out, groups); a minimum of None is -8 scales. first_column: the position of the first column in
    its group, which is not 0 if a rank's columns begin within a group.
    """
    # Exercise 7.8: find the bug. The answers of one process are good. Those of three ranks are good with groups of 32
    # and of 64, and nonsense with groups of 128.

    group_of = (torch.arange(numbers.shape[1], device=numbers.device) + first_column) // group_size
    if minimum is None:
        minimum = -8 * scale
    return numbers * scale[:, group_of] + minimum[:, group_of]


class Int4Method(QuantizedMethod):
    """Weights in four bits, two in a byte, with a scale and (unless symmetric) a minimum for each group of a row."""

    dtypes = {"weight": torch.uint8, "weight_scale": torch.float16, "weight_minimum": torch.float16}

    def __init__(self, group_size: int, symmetric: bool, is_saved: bool = False):
        super().__init__(is_saved)
        self.group_size, self.symmetric = group_size, symmetric

    def groups(self, columns: range) -> range:
        """Return the groups that these columns belong to. The first and the last may be shared with other ranks."""
        return range(columns.start // self.group_size, cdiv(columns.stop, self.group_size))

    def parts(self, rows: range, columns: range) -> dict[str, tuple[range, ...]]:
        if self.is_saved and columns.start % 2:
            raise ValueError(f"int4 saves columns in pairs; this rank's columns begin with number {columns.start}.")
        names = ["weight_scale"] if self.symmetric else ["weight_scale", "weight_minimum"]
        pairs = range(columns.start // 2, columns.start // 2 + cdiv(len(columns), 2))
        return {"weight": (rows, pairs), **dict.fromkeys(names, (rows, self.groups(columns)))}

    def quantized(self, layer: Linear, read: Callable[..., Tensor]) -> dict[str, Tensor]:
        """Return the layer's tensors, by name, from the whole groups that the layer's columns belong to."""
        groups, columns = self.groups(layer.columns), layer.columns
        whole = range(groups.start * self.group_size, min(groups.stop * self.group_size, layer.shape[1]))
        weight = upcast(read(layer.rows, whole))
        numbers, scale, minimum = quantize_int4(weight, self.group_size, self.symmetric)
        numbers = numbers[:, columns.start - whole.start : columns.stop - whole.start]
        tensors = {"weight": pack_int4(F.pad(numbers, (0, len(columns) % 2))), "weight_scale": scale}
        return tensors if self.symmetric else {**tensors, "weight_minimum": minimum}

    def product(self, layer: Linear, x: Tensor) -> Tensor:
        """Multiply x (T, in) by the matrix that the bytes stand for. Returns (T, out) in x's dtype."""
        # Exercise 7.9: unpack (an odd number of columns was padded with one more) and `dequantize_int4` in x's dtype.
        # The layer's columns may begin within a group: its first one is column `layer.columns.start` of the matrix.
        numbers = unpack_int4(layer.weight)[:, : layer.in_features]
        minimum = None if self.symmetric else layer.weight_minimum.to(x.dtype)
        first_column = layer.columns.start % self.group_size
        weight = dequantize_int4(numbers, layer.weight_scale.to(x.dtype), minimum, self.group_size, first_column)
        return F.linear(x, weight)

    def process_weights_after_loading(self, layer: Linear) -> None:
        kernels.pack_int4(layer, self.group_size)


class W4A8Method(Int4Method):
    """Weights in four bits and activations in eight, with a scale for each token. (The name is vLLM's.)"""

    def product(self, layer: Linear, x: Tensor) -> Tensor:
        numbers, scale = quantize_activations(x, whole_row_absmax(layer, x))
        return (super().product(layer, upcast(numbers.to(x.dtype))) * upcast(scale)[:, None]).to(x.dtype)

    def process_weights_after_loading(self, layer: Linear) -> None:
        kernels.pack_w4a8(layer, self.group_size)


# --- A model and its checkpoint --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantization:
    """Says how a model's matrices are stored. kind: "int8", "w8a8", "int4" or "w4a8". The rest is for four bits."""

    kind: str
    group_size: int = 64
    symmetric: bool = False

    def __post_init__(self):
        # An engine's options have the same names, so its config checks them.
        EngineConfig(quantization=self.kind or "", group_size=self.group_size, symmetric=self.symmetric)

    def method(self, is_saved: bool) -> LinearMethod:
        """Return the method for the linear layers of a model's blocks."""
        if self.kind in ("int4", "w4a8"):
            return {"int4": Int4Method, "w4a8": W4A8Method}[self.kind](self.group_size, self.symmetric, is_saved)
        return {"int8": Int8Method, "w8a8": W8A8Method}[self.kind](is_saved)


def set_method(layer: Linear, method: LinearMethod) -> None:
    """Give a layer on the meta device another method, and the tensors for it."""
    layer.method = method
    method.create_weights(layer, like=layer.weight)


def quantize(model: Llama, quantization: Quantization, is_saved: bool = False) -> None:
    """Choose how a model on the meta device stores its matrices. is_saved: as in `QuantizedMethod`.

    The linear layers of the blocks get the quantization's method. The head is the most sensitive and always gets
    `Int8Method`. The embedding table stays in floats, except in a tied model: there it shares the head's eight bits.
    """
    # Exercise 7.10: `set_method` for each of `layers_of(model.model.layers)` that has a `method` (norms have none),
    # then for the head and, if tied, the table. `set_method` makes new tensors, so tie them again.
    method, head_method = quantization.method(is_saved), Int8Method(is_saved)
    for layer in layers_of(model.model.layers).values():
        if hasattr(layer, "method"):
            set_method(layer, method)
    set_method(model.lm_head, head_method)
    if model.config.tie_word_embeddings:
        set_method(model.model.embed_tokens, head_method)
    model.tie_weights()


METHOD = "inference-course"  # by which a config.json says that its checkpoint was quantized here


def quantization_of(checkpoint: Checkpoint) -> Quantization | None:
    """Return how a checkpoint was quantized by `save_quantized`, or None if it has floats."""
    if (said := checkpoint.config.get("quantization_config")) is None:
        return None
    if not isinstance(said, dict) or said.get("quant_method") != METHOD:
        method = said.get("quant_method") if isinstance(said, dict) else said
        raise CheckpointError(
            f"{checkpoint.folder}/config.json: quantized by {method!r:.80}; this engine reads its own quantized "
            "checkpoints and unquantized ones."
        )
    try:
        return Quantization(*(said.get(field.name) for field in fields(Quantization)))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder}/config.json: quantization_config: {error}") from None


def quantize_for(model: Llama, checkpoint: Checkpoint, quantization: Quantization | None) -> None:
    """Choose how a model on the meta device stores a checkpoint's matrices: as `quantization` says, or, if the
    checkpoint is quantized already, as it is. If they contradict each other, this raises ValueError.
    """
    saved = quantization_of(checkpoint)
    if saved and quantization and saved != quantization:
        raise ValueError(f"{checkpoint.folder} is quantized already: {saved}. It cannot be loaded as {quantization}.")
    if saved or quantization:
        quantize(model, saved or quantization, is_saved=saved is not None)


def quantized_copy(model: Llama, quantization: Quantization) -> Llama:
    """Return a quantized copy of a loaded model in floats, which is left as it is."""
    with torch.device("meta"):
        copied = Llama(model.config).to(model.model.norm.weight.dtype)
    quantize(copied, quantization)
    for path, layer in layers_of(copied).items():
        original = model.get_submodule(path)
        layer.load(lambda name, *part, original=original: getattr(original, name).detach())
    copied.tie_weights()
    return copied


def save_quantized(model: Llama, quantization: Quantization, source: Path, folder: Path) -> None:
    """Write a quantized model as a checkpoint: its tensors, and the source's config and tokenizer."""
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
    """Return the bytes of all parameters in memory. A shared one counts once; one that oneDNN has packed does not."""
    return sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_meta)


# --- Weights quantized with their inputs in mind ---------------------------------------------------------------------


def activation_aware_scales(
    x: Tensor, weights: Sequence[Tensor], round_trip: Callable[[Tensor], Tensor], num_trials: int = 20
) -> Tensor:
    """Find a factor for each input channel, such that quantizing the scaled weights changes the outputs least.

    x: (T, in), real inputs. weights: the matrices (out, in) that are multiplied by them. round_trip(weight) quantizes
    a weight and dequantizes it again. Weights are multiplied by the factors before they are rounded, and inputs are
    divided by them.

    The candidates are mean |x| ** (i / num_trials), for i from 0 (no scaling) to num_trials - 1, divided by the square
    root of (their largest x their smallest); means below 1e-4 count as 1e-4. The error of a candidate is the mean
    square of the change in the outputs, summed over the weights. Returns the best one, (in,), the first of equals.
    """
    # Exercise 7.11: for each candidate and weight, compare x @ weight.T with the outputs after rounding: round_trip
    # (weight x factors), divided by the factors again.
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
    """Scale a model in floats for a quantization, in place, by its activations on a text. Its outputs stay the same.

    Inputs are divided by their factors where they are made: in the norm before q, k and v and before gate and up, and
    in up's outputs before down. The inputs of o come from attention, which mixes them, so o is not scaled.
    """

    def round_trip(weight: Tensor) -> Tensor:
        if quantization.kind in ("int4", "w4a8"):
            numbers, scale, minimum = quantize_int4(weight, quantization.group_size, quantization.symmetric)
            return dequantize_int4(numbers, scale.to(weight.dtype), minimum.to(weight.dtype), quantization.group_size)
        numbers, scale = quantize_int8(weight)
        return numbers * scale[:, None]

    pairs: list[tuple[nn.Module, list[Linear]]] = []  # what makes inputs, and the layers that read them
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        pairs.append((block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        experts = list(getattr(mlp, "experts", [mlp]))
        router = [mlp.gate] if hasattr(mlp, "gate") else []
        gates = [layer for expert in experts for layer in (expert.gate_proj, expert.up_proj)]
        pairs.append((block.post_attention_layernorm, [*router, *gates]))
        pairs += [(expert.up_proj, [expert.down_proj]) for expert in experts]
    inputs: dict[nn.Module, Tensor] = {}
    note = lambda module, arguments: inputs.update({module: arguments[0]})  # noqa: E731
    hooks = [readers[0].register_forward_pre_hook(note) for _, readers in pairs]
    model(torch.tensor(token_ids), torch.arange(len(token_ids)), attend)
    for hook in hooks:
        hook.remove()
    for maker, readers in pairs:
        if readers[0] not in inputs:
            continue  # an expert that no token of the text has chosen
        weights = [layer.weight for layer in readers if hasattr(layer, "method")]  # a router stays in floats
        factors = activation_aware_scales(inputs.pop(readers[0]), weights, round_trip)
        for layer in readers:
            layer.weight.mul_(factors)
        maker.weight.div_(factors[:, None] if maker.weight.ndim == 2 else factors)
        if getattr(maker, "bias", None) is not None:
            maker.bias.div_(factors)


# --- Keys and values in eight bits -----------------------------------------------------------------------------------


class Int8KVCache(PagedKVCache):
    """Lesson 4's blocks in eight bits, with one scale for each slot and head.

    A token is quantized once, when it is written, and its scale never changes. So every request reads the same numbers,
    however its prompt was cut into chunks, and even if it was computed twice.
    """

    stored_dtype = torch.int8

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)

        def scales_of(tensor: Tensor) -> Tensor:
            return tensor.new_zeros(tensor.shape[:-1], dtype=self.dtype, pin_memory=tensor.is_pinned())

        self.scales = [scales_of(self.keys), scales_of(self.values)]
        self.device_tensors += self.scales
        self.host_tensors += [scales_of(self.host_keys), scales_of(self.host_values)]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store the keys and values of T tokens. slots: (T,); k, v: (T, K, D)."""
        # Exercise 7.12: each slot and head has a row of D numbers for `quantize_int8`. As in lesson 4, a layer's memory
        # is indexed by slot; so are its scales.
        index = layer - self.layers.start
        for store, scales, new in zip((self.keys, self.values), self.scales, (k, v)):
            numbers, scale = quantize_int8(new.flatten(0, 1))
            store[index].flatten(0, 1).index_copy_(0, slots, numbers.view(new.shape))
            scales[index].flatten(0, 1).index_copy_(0, slots, scale.view(new.shape[:-1]))

    def gather(self, layer: int, block_tables: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Read positions start to end of B sequences: two of (B, end - start, K, D), in the model's dtype."""
        # Exercise 7.13: select the blocks of these positions as in lesson 4, multiply by the scales, cut off both ends.
        index, first, last = layer - self.layers.start, start // self.block_size, cdiv(end, self.block_size)
        low, high = start - first * self.block_size, end - first * self.block_size
        block_ids = block_tables[:, first:last].flatten()
        found = []
        for store, scales in zip((self.keys, self.values), self.scales):
            numbers = store[index].index_select(0, block_ids).to(self.dtype)
            whole = numbers * scales[index].index_select(0, block_ids)[..., None]
            found.append(whole.view(len(block_tables), -1, *whole.shape[2:])[:, low:high])
        return found[0], found[1]


# --- Layers that stay on disk ----------------------------------------------------------------------------------------


def stream_layers(numbers: Iterable[int], read: Callable[[int], nn.Module]) -> Iterator[tuple[int, nn.Module]]:
    """Yield (number, layer) for each number, in order, and read the next layer while the caller computes with this one.

    read(number) reads a layer from the disk, which takes a while. At most two layers are in memory: the one that was
    yielded last, and the one that is being read. An error of `read` is raised here.
    """
    # Exercise 7.14: `pool.submit(read, number)` reads in another thread; `.result()` waits for it. Submit each layer
    # just before you yield the layer before it.
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = None
        for number in numbers:
            following = number, pool.submit(read, number)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = following
        if waiting is not None:
            yield waiting[0], waiting[1].result()


def num_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's weights."""
    return sum(tensor.nbytes for tensor in module.parameters())


def experts_of(layer: nn.Module) -> list[nn.ModuleList]:
    """Return the experts of a layer, in a list for each mixture of them: none or one."""
    return [module.experts for module in layer.modules() if isinstance(module, SparseMoeBlock)]


class OnDisk(nn.Module):
    """A module that is read from the disk whenever it is called, and not kept afterwards."""

    def __init__(self, read: Callable[[], nn.Module]):
        super().__init__()
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read()(x)


class OffloadedLlama(Llama):
    """A model of which only the first layers stay in memory. The others are read from the disk in every step; of a
    mixture of experts, those experts that a token of the step has chosen.
    """

    def stream_from(self, checkpoint: Checkpoint, numbers: range, limit: int) -> None:
        """Read what stays in memory: everything outside the layers, and the first of these layers. limit: bytes of all
        weights. Raises ValueError if it is too small for everything outside the layers and two layers, with one expert.
        """
        self.checkpoint, layers = checkpoint, self.model.layers
        sizes = {number: num_bytes(layers[number]) for number in numbers}
        largest, rest = max(sizes.values()), num_bytes(self) - sum(sizes.values())
        absent = {number: sum(num_bytes(each[1:]) for each in experts_of(layers[number])) for number in numbers}
        streamed = max(sizes[number] - absent[number] for number in numbers)
        if limit < rest + 2 * streamed:
            raise ValueError(
                f"offload is {limit} bytes; this model needs {rest + 2 * streamed} at least: {rest} for all that is no "
                f"layer, and twice {streamed} for a layer."
            )
        # The layers that do not stay take turns in the space of two.
        stays_whole = limit >= rest + len(sizes) * largest
        num_resident = len(sizes) if stays_whole else (limit - rest - 2 * streamed) // largest
        self.prototypes = {number: layers[number] for number in numbers[num_resident:]}
        for number, prototype in self.prototypes.items():
            layers[number] = Absent(prototype)
        load_weights(self, checkpoint)
        for number, prototype in self.prototypes.items():
            layers[number] = prototype  # still on the meta device: it tells its shapes
            for experts in experts_of(prototype):
                for i, expert in enumerate(experts):
                    experts[i] = OnDisk(partial(self.read_module, expert, f"model.layers.{number}.mlp.experts.{i}"))

    def read_layer(self, number: int) -> nn.Module:
        """Return a layer with its weights, from memory or from the disk. Its experts are read when they are called."""
        layer = self.model.layers[number]
        return self.read_module(layer, f"model.layers.{number}") if number in self.prototypes else layer

    def read_module(self, prototype: nn.Module, path: str) -> nn.Module:
        """Return a copy of a module on the meta device with its weights, which have this path in the checkpoint."""
        modules = list(prototype.modules())
        shared = [each.group for each in modules if hasattr(each, "group")]
        shared += [each for each in modules if isinstance(each, OnDisk)]
        module = copy.deepcopy(prototype, {id(each): each for each in shared})
        for name, part in layers_of(module).items():
            part.load(reader(self.checkpoint, f"{path}.{name}"))
        return module.to(self.model.norm.weight.device)

    def run_layers(self, hidden: Tensor, positions: Tensor, attend: Attend, layers: range) -> Tensor:
        cos, sin = self.rotary(positions)
        for _, layer in stream_layers(layers, self.read_layer):
            hidden = layer(hidden, cos, sin, attend)
            del layer  # or three layers would be in memory when the next one is asked for
        return hidden


# --- What it costs ---------------------------------------------------------------------------------------------------


def kl_divergence(logits: Tensor, other_logits: Tensor) -> Tensor:
    """Measure how far another model's predictions are from a model's, in nats for each token; 0 if they are the same.

    logits, other_logits: (T, V), the scores of both models on the same tokens. Returns the mean over the tokens of
    sum p log (p / q), where p is the model's distribution and q the other's. From Kullback and Leibler (1951).
    """
    # Exercise 7.15: take log-probabilities of both, `upcast` first. p log (p / q) is a product of p and a difference.
    p, q = upcast(logits).log_softmax(-1), upcast(other_logits).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean()
