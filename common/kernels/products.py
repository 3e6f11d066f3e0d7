"""Packs the weights of linear layers, and replaces their `apply`.

A row-major matrix is slow to multiply by. The compiled kernels use panels of 16 outputs (linear.h), in which a row can
still be looked up: so a table that is both embedding and head is in memory once. Without a compiler, oneDNN, the
library below torch, has its own order for the processor. Two private operators of torch convert a matrix to it; if they
are missing, a matrix stays as it is.
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
256; its choice for a single row takes 1.5 times as long with 4 rows."""

PANEL = 16  # outputs in a panel, as linear.h has it

FLOATS, INT8, W8A8, INT4, BFLOATS, W4A8 = range(6)  # linear.h's kinds


def enabled() -> bool:
    """Whether kernels are used: yes, unless KERNELS=plain is in the environment, which is read at every call.

    Raises ValueError for an unknown value of KERNELS.
    """
    choice = os.environ.get("KERNELS", "")
    if choice not in ("", "fast", "plain", "triton"):
        raise ValueError(
            f"KERNELS={choice}: this environment variable is 'plain', 'fast', 'triton', or not set (which is 'fast')."
        )
    return choice != "plain"


def use(layer: nn.Module, **functions: Callable) -> None:
    """Replace functions of a layer's method, such as `apply`, for this layer only."""
    layer.method = copy.copy(layer.method)
    vars(layer.method).update(functions)


def has_kernel(layer: nn.Module) -> bool:
    """Whether `use` has replaced the layer's `apply`."""
    return "apply" in vars(layer.method)


def native(layer: nn.Module):
    """Returns the compiled kernels' object for a layer's matrix, or None."""
    return vars(layer.method).get("native")


def can_pack() -> bool:
    """Whether this torch has the two private operators that use oneDNN's order of a float32 matrix."""
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)


# --- In panels --------------------------------------------------------------------------------------------------------


def panels(matrix: Tensor) -> Tensor:
    """Divide rows into panels of 16 and transpose each: (N, K) -> (panels, K, 16). The last one is padded with 0."""
    whole = F.pad(matrix.detach(), (0, 0, 0, -len(matrix) % PANEL))
    return whole.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def pairs(matrix: Tensor, size: int = 2) -> Tensor:
    """Panels with `size` inputs of an output side by side: (N, K) -> (panels, K / size rounded up, 16, size)."""
    whole = panels(F.pad(matrix.detach(), (0, -matrix.shape[1] % size)))
    return whole.unflatten(1, (-1, size)).transpose(2, 3).contiguous()


def in_panels(layer: nn.Module, kind: int, embed: Callable, group_size: int = 0, **tensors: Tensor) -> None:
    """Replace these tensors of a layer, and use the compiled kernel for its product.

    kind: of linear.h. embed: looks up rows in the new weight. group_size: the inputs with one scale, in four bits.
    """
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
    """The product of a rank's part of a layer in eight bits. Ranks first agree on each token's scale, so such a layer
    is not fused with others."""
    return matrix.apply(x, bias, layer.group.all_reduce(x.abs().amax(-1), dist.ReduceOp.MAX))


def pack_floats(layer: nn.Module) -> None:
    """Pack a layer's matrix of floats in panels or, without a compiler, in oneDNN's order. The old one is freed.

    A matrix in bfloat16 keeps its dtype. Its products are added in float32. If the processor has an instruction that
    multiplies two bfloat16, the inputs are rounded to bfloat16.

    oneDNN's matrix keeps its shape, dtype and device, but its elements cannot be read, and it is no parameter: it is
    never saved.
    """
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
    """Pack a layer's `weight` (out, in) int8, with `weight_scale` (out,), if there are compiled kernels.

    An instruction that multiplies four pairs of numbers needs weights without a sign, so 128 is added to each. The
    activations are then rounded to whole numbers of sixteen bits, with one scale for each row.
    """
    if build.compiled() is None:
        return
    if torch.ops.inference_course.has_quads():
        in_panels(layer, kind, look_up_quads, weight=pairs(layer.weight.view(torch.uint8) ^ 128, 4))
    else:
        in_panels(layer, kind, look_up_int8, weight=pairs(layer.weight))


pack_w8a8 = partial(pack_int8, kind=W8A8)  # with activations in eight bits


def look_up_pairs(layer: nn.Module, token_ids: Tensor) -> Tensor:
    """Rows of a matrix in pairs or quads, as float32: (T,) -> (T, K)."""
    return layer.weight[token_ids // PANEL, :, token_ids % PANEL].flatten(1)[:, : layer.in_features].float()


def look_up_int8(layer: nn.Module, token_ids: Tensor) -> Tensor:
    return look_up_pairs(layer, token_ids) * layer.weight_scale[token_ids, None]


def look_up_quads(layer: nn.Module, token_ids: Tensor) -> Tensor:
    return (look_up_pairs(layer, token_ids) - 128) * layer.weight_scale[token_ids, None]


def pack_int4(layer: nn.Module, group_size: int, kind: int = INT4) -> None:
    """Pack a layer's `weight` (out, in / 2) uint8, `weight_scale` and, if it has one, `weight_minimum`, both
    (out, groups) float16, if there are compiled kernels and the layer begins with a whole group.
    """
    fits = layer.in_features % 2 == 0 and layer.columns.start % group_size == 0
    if fits and build.compiled() is not None:
        names = [name for name in ("weight_scale", "weight_minimum") if hasattr(layer, name)]
        tensors = {name: panels(getattr(layer, name)) for name in names}
        size, count = group_size // 2, len(tensors["weight_scale"][0])  # bytes of a group; groups of a row
        rows = F.pad(layer.weight.detach(), (0, size * count - layer.weight.shape[1]))
        groups = F.pad(rows.unflatten(1, (count, size)), (0, -size % 4))  # whole eights of inputs: four bytes
        numbers = torch.stack([groups & 15, groups >> 4], dim=-1).flatten(1).unflatten(1, (-1, 2, 4))
        octs = panels((numbers[:, :, 0] | numbers[:, :, 1] << 4).flatten(1)).unflatten(1, (-1, 4))
        octs = octs.transpose(2, 3).contiguous()
        in_panels(layer, kind, layer.method.embed, group_size, weight=octs, **tensors)


pack_w4a8 = partial(pack_int4, kind=W4A8)  # with activations in eight bits


def share_table(table: nn.Module, head: nn.Module) -> None:
    """Let the embedding of a tied model use the tensors that were packed for the head."""
    if native(head) is not None:
        for name, tensor in head.named_parameters(recurse=False):
            setattr(table, name, tensor)
        table.method = head.method


def row_major_product(layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """`apply` without a compiler. For a matrix of many rows it is faster than `F.linear`."""
    return torch.mm(layer.weight, x.T).T


class FusedLinear(nn.Module):
    """Several linear layers with the same input as one. Its output, (T, out_features), has theirs side by side.

    whole_panels: pad each layer's outputs to whole panels, so that a panel has outputs of one layer only.
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

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x, self.bias)
