"""Fused layers, which compute what lesson 2's layers compute in fewer, larger steps.

An operator of torch takes 2 microseconds however little it computes, and a decoder layer has dozens of them. So
products with the same input become one here, and so do the rotations of queries and keys. With compiled kernels, and if
the blocks of keys and values are known (`PagedAttend`), a layer is two operators (cpu.cpp).

Lessons pass their classes to `pack`; this package imports no lesson. Nothing in it has gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.kernels import build, huge_pages
from common.kernels.attention import PagedAttend
from common.kernels.products import FusedLinear, enabled, has_kernel, native, row_major_product, share_table, use

NO_WINDOW = 1 << 62


class FastNorm(nn.Module):
    """Lesson 1's `rms_norm` in four steps, not eight. (..., size) -> (..., size).

    weight: (size,), or (heads, size) where each head has its own.
    """

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.eps = torch.tensor(eps)

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = torch.addcmul(self.eps, length, length, value=1 / x.shape[-1]).rsqrt_()
        return (x * scale).mul_(self.weight)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Lesson 1's `apply_rotary`, written straight into its result. x: (T, heads, D); cos, sin: (T, D / 2)."""
    cos, sin = cos[:, None], sin[:, None]
    result = x.new_empty(x.shape)
    (a, b), (new_a, new_b) = x.chunk(2, dim=-1), result.chunk(2, dim=-1)
    torch.mul(a, cos, out=new_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=new_b).addcmul_(a, sin)
    return result


class FusedAttention(nn.Module):
    """Lesson 2's `Attention` with one product for q, k and v, and one norm and one rotation for all their heads."""

    def __init__(self, plain: nn.Module):
        super().__init__()
        projections = (plain.q_proj, plain.k_proj, plain.v_proj)
        self.layer, self.head_dim = plain.layer, plain.head_dim
        self.num_heads, self.num_kv_heads, _ = (p.out_features // self.head_dim for p in projections)
        # The cache computes the number of heads from a projection's width.
        self.q_proj, self.k_proj, self.v_proj = (SimpleNamespace(out_features=p.out_features) for p in projections)
        self.qkv_proj = FusedLinear(projections)
        self.o_proj = plain.o_proj
        self.qk_norm = nn.Identity()
        if not isinstance(plain.q_norm, nn.Identity):
            q_weight, k_weight = plain.q_norm.weight, plain.k_norm.weight
            weights = [q_weight.expand(self.num_heads, -1), k_weight.expand(self.num_kv_heads, -1)]
            self.qk_norm = FastNorm(torch.cat(weights), plain.q_norm.eps)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Callable) -> Tensor:
        """hidden: (T, hidden_size); cos, sin: (T, D / 2). Returns (T, hidden_size)."""
        heads = self.qkv_proj(hidden).unflatten(-1, (-1, self.head_dim))
        qk, v = heads.tensor_split((self.num_heads + self.num_kv_heads,), dim=1)
        q, k = rotate(self.qk_norm(qk), cos, sin).tensor_split((self.num_heads,), dim=1)
        return self.o_proj(attend(self.layer, q, k, v).flatten(1))


class FusedMLP(nn.Module):
    """Lesson 2's `MLP` with one product for gate and up. (T, hidden_size) -> (T, hidden_size)."""

    whole_panels = True  # as the compiled kernel needs it

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.gate_up_proj = FusedLinear((plain.gate_proj, plain.up_proj), self.whole_panels)
        self.down_proj = plain.down_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate).mul_(up)[..., : self.down_proj.in_features])


class FusedBlock(nn.Module):
    """Lesson 2's `Block`, each half of which is one compiled operator if that is possible.

    Other halves, such as a mixture of experts or a rank's part of a layer with activations in eight bits, are computed
    by their modules. row: lesson 6's class of layers whose outputs are added over all ranks, or None.
    """

    def __init__(self, plain: nn.Module, row: type | None):
        super().__init__()
        self.window = plain.window
        self.input_layernorm, self.self_attn = plain.input_layernorm, plain.self_attn
        self.post_attention_layernorm, self.mlp = plain.post_attention_layernorm, plain.mlp
        self.row = row
        self.native_attention, self.native_mlp = self.make_attention(), self.make_mlp()

    def operands(self, norm: nn.Module, *layers: nn.Module) -> list | None:
        """Returns the norm's weight and eps, and each layer's matrix and bias, for the compiled kernels, or None."""
        if not isinstance(norm, FastNorm) or any(native(layer) is None for layer in layers):
            return None
        found = [norm.weight.detach(), float(norm.eps)]
        for layer in layers:  # the bias of a row layer is added later, once for all ranks
            has_bias = layer.bias is not None and type(layer) is not self.row
            found += [native(layer), layer.bias.detach() if has_bias else None]
        return found

    def make_attention(self):
        """Returns the compiled first half, or None."""
        attention = self.self_attn
        if not isinstance(attention, FusedAttention):
            return None
        shape = attention.num_heads, attention.num_kv_heads, attention.head_dim, self.window or NO_WINDOW
        qk_norm = self.operands(attention.qk_norm) or (None, 0.0)
        operands = self.operands(self.input_layernorm, attention.qkv_proj, attention.o_proj)
        return None if operands is None else build.compiled().AttentionLayer(*operands, *shape, *qk_norm)

    def make_mlp(self):
        """Returns the compiled second half, or None."""
        if not isinstance(self.mlp, FusedMLP):
            return None
        operands = self.operands(self.post_attention_layernorm, self.mlp.gate_up_proj, self.mlp.down_proj)
        return None if operands is None else build.compiled().MLPLayer(*operands)

    def add_up(self, hidden: Tensor, layer: nn.Module, compute: Callable) -> Tensor:
        """Returns hidden plus a compiled half's output, added over all ranks.

        layer: the last one of that half. compute: the half; its argument says whether it adds hidden itself.
        """
        if type(layer) is not self.row:
            return compute(True)
        total = layer.group.all_reduce(compute(False)).add_(hidden)
        return total if layer.bias is None else total.add_(layer.bias)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Callable) -> Tensor:
        if self.native_attention is not None and isinstance(attend, PagedAttend) and attend.has_floats:
            given = hidden, cos, sin, attend.native, self.self_attn.layer - attend.cache.layers.start
            hidden = self.add_up(hidden, self.self_attn.o_proj, lambda add: self.native_attention.forward(*given, add))
        else:
            normed = self.input_layernorm(hidden)
            windowed = attend if self.window is None else partial(attend, window=self.window)
            hidden = hidden + self.self_attn(normed, cos, sin, windowed)
        if self.native_mlp is not None:
            return self.add_up(hidden, self.mlp.down_proj, lambda add: self.native_mlp.forward(hidden, add))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def fuse_forward(runner) -> None:
    """Let lesson 5's model runner compute all layers in one call, if both halves of each are compiled."""
    model, cache, plain_forward = runner.model, runner.cache, runner.forward
    blocks = [model.model.layers[index] for index in cache.layers]
    if cache.keys.dtype not in (torch.float32, torch.bfloat16) or not all(
        type(block) is FusedBlock
        and block.native_attention is not None
        and block.native_mlp is not None
        and type(block.self_attn.o_proj) is not block.row
        for block in blocks
    ):
        return
    layers = build.compiled().Layers()
    for block in blocks:
        layers.append(block.native_attention, block.native_mlp)

    def forward(batch, hidden: Tensor | None) -> Tensor:
        """Returns the last layer's output, (T, hidden_size). hidden: (T, hidden_size), or None at the first layer."""
        if not enabled():
            return plain_forward(batch, hidden)
        hidden = model.embed(batch.token_ids) if hidden is None else hidden
        return layers.forward(hidden, *model.rotary(batch.positions), PagedAttend(cache, batch.metadata).native)

    runner.forward = forward


def swapping(makers: dict[type, Callable], linear: tuple[type | None, ...]) -> Callable[[nn.Module], nn.Module]:
    """Returns a function that maps a module to its substitute, or to itself if there is none.

    makers: lesson 2's classes of attention, MLP and norm, in this order, and the functions that make the substitutes of
    modules of exactly these classes. linear: the classes of linear layers that can be fused, if all have the same class
    and the same method; otherwise attention and MLP are left as they are.
    """
    attention, mlp, norm = makers

    def can_fuse(*layers: nn.Module) -> bool:
        return type(layers[0]) in linear and all(
            type(layer) is type(layers[0]) and type(layer.method) is type(layers[0].method) for layer in layers
        )

    def fits(module: nn.Module) -> bool:
        if type(module) is attention:
            has_known_norms = {type(module.q_norm), type(module.k_norm)} in ({nn.Identity}, {norm})
            return has_known_norms and can_fuse(module.q_proj, module.k_proj, module.v_proj)
        return type(module) is not mlp or can_fuse(module.gate_proj, module.up_proj)

    return lambda module: makers[type(module)](module) if type(module) in makers and fits(module) else module


def is_on_disk(module: nn.Module) -> bool:
    """Whether a part of the module's weights is read from the disk in each step, so that it cannot be packed."""
    return any(parameter.is_meta for parameter in module.parameters())


def widen(model: nn.Module) -> None:
    """Convert a model in bfloat16 to float32, except for the matrices of layers. Embeddings become float32, too."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dtype == torch.bfloat16 and not (name == "weight" and hasattr(module, "method")):
                setattr(module, name, nn.Parameter(parameter.float(), requires_grad=False))
    if hasattr(table := model.model.embed_tokens, "method"):
        use(table, embed=lambda layer, ids, embed=table.method.embed: embed(layer, ids).float())


def pack_for_cpu(
    model: nn.Module, linear: type, attention: type, mlp: type, norm: type, block: type,
    column: type | None = None, row: type | None = None,
) -> None:  # fmt: skip
    """`pack` (gpu.py) for a CPU. Changes only models in float32 and bfloat16 that have not been packed yet.

    Attention and MLP are fused if their first layers are exactly of class `linear` or `column` and have one method;
    other linear layers are packed by their method. A model in bfloat16 keeps its matrices; all else is converted to
    float32 and computed in it. Without a compiler, or with layers on the disk, such a model stays in bfloat16 as it is.
    """
    sample = model.model.norm.weight
    if sample.device.type != "cpu" or sample.dtype not in (torch.float32, torch.bfloat16):
        return
    if sample.dtype == torch.bfloat16:
        if build.compiled() is None or is_on_disk(model.model.layers):
            return
        widen(model)

    makers = {attention: FusedAttention, mlp: FusedMLP, norm: lambda plain: FastNorm(plain.weight, plain.eps)}
    fast = swapping(makers, (linear, column))

    def swap_children(parent: nn.Module) -> None:
        for name, child in list(parent.named_children()):
            if not is_on_disk(child):
                setattr(parent, name, fast(child))
            swap_children(getattr(parent, name))

    table, head = model.model.embed_tokens, model.lm_head
    with torch.no_grad():
        weight = getattr(table, "weight", None)
        is_tied = weight is not None and hasattr(head, "method") and head.weight is weight
        if is_tied and weight.dtype == torch.float32 and not has_kernel(head) and build.compiled() is None:
            use(head, apply=row_major_product)
        swap_children(model)
        for module in model.modules():
            if hasattr(module, "method") and module is not table and not (has_kernel(module) or module.weight.is_meta):
                module.method.process_weights_after_loading(module)
        if is_tied:
            share_table(table, head)
        huge_pages.move(model)
        if build.compiled() is not None:
            for index, layer in enumerate(model.model.layers):
                if type(layer) is block and not is_on_disk(layer):
                    model.model.layers[index] = FusedBlock(layer, row)
    model.requires_grad_(False)


def held_bytes(model: nn.Module) -> int:
    """The bytes of all weights of a model in memory, including packed ones. A shared weight counts once."""
    weights = [module.weight for module in model.modules() if getattr(module, "weight", None) is not None]
    weights = [weight for weight in weights if weight.layout == torch._mkldnn]  # oneDNN's, which are no parameters
    weights += [parameter for parameter in model.parameters() if not parameter.is_meta]
    return sum(weight.numel() * weight.element_size() for weight in weights)
