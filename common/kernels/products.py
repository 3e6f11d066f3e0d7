"""Packed weights: what takes the place of a linear layer's `apply`.

A row-major matrix does not suit the loops that multiply by it. The compiled kernels have an order of their own, panels
of 16 outputs (linear.h). It also allows a row to be looked up, so that an embedding table that is the head as well is
in memory once. Where nothing can be compiled, oneDNN, the library beneath torch, has an order that suits the processor.
Two private operators of torch ask for it; where they are missing too, a matrix stays as it is.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common.kernels import build

ROWS_HINT = 32
"""The number of rows for which oneDNN chooses its order. Its choice for 8 rows or more is as good for 1 row and for
256; its choice for a single row takes half as long again with 4 rows."""

PANEL = 16
"""Outputs in a panel, as linear.h has it."""

FLOATS, INT8, W8A8, INT4, BFLOATS, W4A8 = range(6)  # linear.h's kinds


def enabled() -> bool:
    """Whether the fast paths are wanted: yes, unless the environment says KERNELS=plain. It is asked at every call."""
    choice = os.environ.get("KERNELS", "")
    if choice not in ("", "fast", "plain", "triton"):
        raise ValueError(
            f"KERNELS={choice}: this environment variable is 'plain', 'fast', 'triton', or not set (which is 'fast')."
        )
    return choice != "plain"


def use(layer: nn.Module, **functions: Callable) -> None:
    """Give a layer another `apply` (or `embed`). Its method keeps all else; other layers keep theirs."""
    layer.method = copy.copy(layer.method)
    vars(layer.method).update(functions)


def has_kernel(layer: nn.Module) -> bool:
    return "apply" in vars(layer.method)


def native(layer: nn.Module):
    """Returns a layer's matrix as the compiled kernels have it, or None."""
    return vars(layer.method).get("native")


def can_pack() -> bool:
    """Whether this torch has the two private operators that arrange a float32 matrix as oneDNN wants it."""
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)


# ---------------------------------------------------------------------------------------------------------------
# In panels
# ---------------------------------------------------------------------------------------------------------------


def panels(matrix: Tensor) -> Tensor:
    """Rows in panels of sixteen, each transposed: (N, K) -> (panels, K, 16). The last one is filled up with 0."""
    whole = F.pad(matrix.detach(), (0, 0, 0, -len(matrix) % PANEL))
    return whole.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def pairs(matrix: Tensor, size: int = 2) -> Tensor:
    """Panels in which `size` inputs of an output are neighbours: (N, K) -> (panels, K / size rounded up, 16, size)."""
    whole = panels(F.pad(matrix.detach(), (0, -matrix.shape[1] % size)))
    return whole.unflatten(1, (-1, size)).transpose(2, 3).contiguous()


def in_panels(layer: nn.Module, kind: int, embed: Callable, group_size: int = 0, **tensors: Tensor) -> None:
    """Replace these tensors of a layer, and multiply by them with the compiled kernel."""
    for name, tensor in tensors.items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    given = [getattr(layer, name, None) for name in ("weight", "weight_scale", "weight_minimum")]
    if kind in (INT8, W8A8):
        given[1] = F.pad(given[1].detach(), (0, -layer.out_features % PANEL))
    matrix = build.compiled().Linear(kind, layer.out_features, layer.in_features, *given, group_size)
    if kind in (W8A8, W4A8) and len(layer.columns) < layer.shape[1]:
        use(layer, apply=partial(product_of_part, matrix))
    else:
        use(layer, apply=native_product, embed=embed, native=matrix)


def native_product(layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return native(layer).apply(x, bias, None)


def product_of_part(matrix, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Ranks that have parts of the same tokens in eight bits agree on each token's scale before they multiply, so such
    a layer is not fused with others."""
    return matrix.apply(x, bias, layer.group.all_reduce(x.abs().amax(-1), dist.ReduceOp.MAX))


def pack_floats(layer: nn.Module) -> None:
    """Rearrange a layer's matrix of floats, in panels or, without a compiler, for oneDNN. The old one is freed.

    A matrix in bfloat16 stays so. Its products are added up in float32. Where the processor multiplies two bfloat16,
    the inputs are rounded to it.

    oneDNN's matrix keeps its shape, dtype and device, but its numbers cannot be read one by one any more, and it is no
    parameter: it is never saved.
    """
    if has_kernel(layer):
        return
    if build.compiled() is not None and layer.weight.dtype == torch.bfloat16:
        in_panels(layer, BFLOATS, look_up_pairs, weight=pairs(layer.weight))
    elif build.compiled() is not None:
        in_panels(layer, FLOATS, look_up, weight=panels(layer.weight))
    elif can_pack():
        weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS_HINT)
        del layer.weight
        layer.weight = weight
        use(layer, apply=packed_product)


def packed_product(layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, bias, "none", [], "")


def look_up(layer: nn.Module, token_ids: Tensor) -> Tensor:
    return layer.weight[token_ids // PANEL, :, token_ids % PANEL]


def pack_int8(layer: nn.Module, kind: int = INT8) -> None:
    """Rearrange a layer's `weight` (out, in) int8, for its `weight_scale` (out,), if there are compiled kernels.

    Where one instruction multiplies four numbers by four, those of the weight have no sign: 128 is added to each. The
    activations are then rounded to whole numbers of sixteen bits, with one scale for each row.
    """
    if build.compiled() is None or has_kernel(layer):
        return
    if torch.ops.inference_course.has_quads():
        in_panels(layer, kind, look_up_quads, weight=pairs(layer.weight.view(torch.uint8) ^ 128, 4))
    else:
        in_panels(layer, kind, look_up_int8, weight=pairs(layer.weight))


def pack_w8a8(layer: nn.Module) -> None:
    """As `pack_int8`, for activations in eight bits."""
    pack_int8(layer, W8A8)


def look_up_pairs(layer: nn.Module, token_ids: Tensor) -> Tensor:
    """Rows of a matrix in pairs or quads, as float32: (T,) -> (T, K)."""
    return layer.weight[token_ids // PANEL, :, token_ids % PANEL].flatten(1)[:, : layer.in_features].float()


def look_up_int8(layer: nn.Module, token_ids: Tensor) -> Tensor:
    return look_up_pairs(layer, token_ids) * layer.weight_scale[token_ids, None]


def look_up_quads(layer: nn.Module, token_ids: Tensor) -> Tensor:
    return (look_up_pairs(layer, token_ids) - 128) * layer.weight_scale[token_ids, None]


def pack_int4(layer: nn.Module, group_size: int, kind: int = INT4) -> None:
    """Rearrange a layer's `weight` (out, in / 2) uint8, `weight_scale` and, if it has one, `weight_minimum`, both
    (out, groups) float16. The layer begins with a whole group, and has whole bytes.
    """
    fits = layer.in_features % 2 == 0 and layer.columns.start % group_size == 0
    if fits and build.compiled() is not None and not has_kernel(layer):
        names = [name for name in ("weight_scale", "weight_minimum") if hasattr(layer, name)]
        tensors = {name: panels(getattr(layer, name)) for name in names}
        size, count = group_size // 2, len(tensors["weight_scale"][0])  # bytes of a group; groups of a row
        rows = F.pad(layer.weight.detach(), (0, size * count - layer.weight.shape[1]))
        groups = F.pad(rows.unflatten(1, (count, size)), (0, -size % 4))  # whole eights of inputs: four bytes
        numbers = torch.stack([groups & 15, groups >> 4], dim=-1).flatten(1).unflatten(1, (-1, 2, 4))
        octs = panels((numbers[:, :, 0] | numbers[:, :, 1] << 4).flatten(1)).unflatten(1, (-1, 4))
        octs = octs.transpose(2, 3).contiguous()
        in_panels(layer, kind, layer.method.embed, group_size, weight=octs, **tensors)


def pack_w4a8(layer: nn.Module, group_size: int) -> None:
    """As `pack_int4`, for activations in eight bits."""
    pack_int4(layer, group_size, W4A8)


def share_table(table: nn.Module, head: nn.Module) -> None:
    """Let the table of a tied model, which is looked up, share what was packed for the head, which is multiplied by."""
    if native(head) is not None:
        for name, tensor in head.named_parameters(recurse=False):
            setattr(table, name, tensor)
        table.method = head.method


def row_major_product(layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Without a compiler: for a table of many rows this order of the two is faster than `F.linear`'s."""
    return torch.mm(layer.weight, x.T).T


class FusedLinear(nn.Module):
    """Several linear layers with the same input as one: their tensors one below the other, outputs side by side.

    whole_panels: each layer's outputs are filled up to whole panels, so that a panel has outputs of one layer only.
    """

    def __init__(self, layers: Sequence[nn.Module], whole_panels: bool = False):
        super().__init__()
        first, missing = layers[0], [-layer.out_features % PANEL if whole_panels else 0 for layer in layers]
        self.in_features = first.in_features
        self.out_features = sum(layer.out_features for layer in layers) + sum(missing)
        self.shape = (self.out_features, first.shape[1])
        self.columns, self.method, self.bias = first.columns, first.method, None
        for name, _ in first.named_parameters(recurse=False):
            parts = [getattr(layer, name) for layer in layers]
            parts = [F.pad(part, (*(0, 0) * (part.ndim - 1), 0, rows)) for part, rows in zip(parts, missing)]
            setattr(self, name, nn.Parameter(torch.cat(parts), requires_grad=False))
        self.method.process_weights_after_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x, self.bias)
