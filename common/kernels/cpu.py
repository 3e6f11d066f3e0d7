"""Fast paths that compute what the exercises compute, arranged for this processor.

Graded code never runs them: `KERNELS=plain` in the environment turns them off. There are two entries, and no other:
`pack` rearranges the weights of a loaded model, once, and `attention` serves many requests in one call. Lessons hand in
their classes and call these functions; this package imports no lesson.

What there is to gain, in float32 on two cores with a model of 135 M parameters:

- A row-major matrix does not suit the loops that multiply by it. oneDNN, the library beneath torch, has an order of
  its own, which suits this processor. It takes two private operators of torch to ask for it. Where they are missing,
  the matrix stays as it is.
- An embedding table that is the head as well must be looked up, which oneDNN's order does not allow. cpu.cpp has a
  product for an order that allows both, so that the largest matrix is in memory once.
- An operator costs 2 microseconds however little it computes, and a layer has dozens of them. So products with the same
  input become one, and so do the rotations of queries and keys.
- Attention over all requests at once needs neither copies of the keys for each query head nor a matrix of scores.

This package does not know about block tables, schedulers or other processes. Nothing in it has gradients.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoints import cache_folder

ROWS_HINT = 32
"""The number of rows for which oneDNN chooses its order. Its choice for 8 rows or more is as good for 1 row and for
256; its choice for a single row takes half as long again with 4 rows."""

QUERY_BLOCK = 128
"""Queries of a prefill chunk that are computed at a time: the first ones have fewer keys than the last."""

FEW_QUERIES = 16
"""With 2 to this number of queries in a request (verification), a group's heads form one matrix, and its keys are read
once. With a single query that is slower: nine heads are divided over the cores more evenly than three groups."""


def enabled() -> bool:
    """Whether the fast paths are wanted: yes, unless the environment says KERNELS=plain. It is asked at every call."""
    choice = os.environ.get("KERNELS", "")
    if choice not in ("", "fast", "plain"):
        raise ValueError(
            f"KERNELS={choice}: this environment variable is 'plain', 'fast', or not set (which is 'fast')."
        )
    return choice != "plain"


# ---------------------------------------------------------------------------------------------------------------
# Products: what takes the place of a linear method's `apply`
# ---------------------------------------------------------------------------------------------------------------


def use(layer: nn.Module, **functions: Callable) -> None:
    """Give a layer another `apply` (or `embed`). Its method keeps all else; other layers keep theirs."""
    layer.method = copy.copy(layer.method)
    vars(layer.method).update(functions)


def has_kernel(layer: nn.Module) -> bool:
    return "apply" in vars(layer.method)


def can_pack() -> bool:
    """Whether this torch has the two private operators that arrange a float32 matrix as oneDNN wants it."""
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in operators)


def pack_floats(layer: nn.Module) -> None:
    """Rearrange a layer's matrix of floats for oneDNN, if there is one.

    `weight` keeps its shape (out_features, in_features), dtype and device, but its numbers cannot be read one by one
    any more. It is no parameter: what is packed is never saved.
    """
    if can_pack() and not has_kernel(layer):
        replace_weight(torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS_HINT), layer)
        use(layer, apply=packed_product)


def packed_product(layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, layer.weight, bias, "none", [], "")


def pack_int8(layer: nn.Module) -> None:
    """Multiply by a layer's `weight` (out, in) int8 and `weight_scale` (out,) with the compiled kernel."""
    if compiled() is not None:
        use(layer, apply=int8_product)


def int8_product(layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    y = compiled().int8_linear(x.contiguous(), layer.weight, layer.weight_scale)
    return y if bias is None else y.add_(bias)


def pack_int4(layer: nn.Module, group_size: int) -> None:
    """Multiply by a layer's `weight` (out, in / 2) uint8, `weight_scale` and, if it has one, `weight_minimum`
    (out, groups) float16 with the compiled kernel. The layer begins with a whole group, and has whole bytes.
    """
    if layer.in_features % 2 == 0 and layer.columns.start % group_size == 0 and compiled() is not None:
        use(layer, apply=functools.partial(int4_product, group_size))


def int4_product(group_size: int, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    minimum = getattr(layer, "weight_minimum", None)
    y = compiled().int4_linear(x.contiguous(), layer.weight, layer.weight_scale, minimum, group_size)
    return y if bias is None else y.add_(bias)


def share_table(table: nn.Module, head: nn.Module) -> None:
    """Rearrange the embedding table of a tied model, which is looked up and multiplied by, once for both uses.

    oneDNN's order allows no look-up, and a second copy of the largest matrix would be 113 MB of SmolLM2's 538. Rows in
    blocks of sixteen, each block transposed, allow both, and the compiled kernel is no slower than oneDNN there.
    """
    if has_kernel(table):
        return
    if compiled() is None:
        use(table)
        use(head, apply=row_major_product)
        return
    weight = table.weight.detach()
    padded = F.pad(weight, (0, 0, 0, -len(weight) % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).transpose(1, 2).contiguous()
    replace_weight(nn.Parameter(blocks, requires_grad=False), table, head)
    use(table, apply=blocked_product, embed=blocked_rows)
    head.method = table.method


BLOCK = 16
"""Rows in a block of a shared table, as cpu.cpp has it."""


def blocked_product(layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return compiled().blocked_linear(x.contiguous(), layer.weight, layer.out_features)


def blocked_rows(layer: nn.Module, token_ids: Tensor) -> Tensor:
    return layer.weight[token_ids // BLOCK, :, token_ids % BLOCK]


def row_major_product(layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Without a compiler: for a table of many rows this order of the two is faster than `F.linear`'s."""
    return torch.mm(layer.weight, x.T).T


def replace_weight(weight: Tensor, *layers: nn.Module) -> None:
    """Let layers that have one weight in common have another one; the old one is freed."""
    for layer in layers:
        del layer.weight
        layer.weight = weight


@functools.cache
def compiled():
    """The operators of cpu.cpp, compiled for this processor: once, then kept. None where there is no compiler."""
    from common.machine import cpu_name

    text = Path(__file__).with_suffix(".cpp").read_text(encoding="utf-8")
    made_for = repr((torch.__version__, sys.version, cpu_name(), text))
    folder = cache_folder() / f"kernels-{hashlib.sha256(made_for.encode()).hexdigest()[:12]}"
    try:
        if not (folder / "whole").exists():
            compile_into(folder, text)
        torch.ops.load_library(folder / f"{LIBRARY}{'.pyd' if os.name == 'nt' else '.so'}")
        return torch.ops.inference_course
    except Exception as error:  # no compiler, no ninja, a folder that cannot be written, a system it does not know, ...
        reason = str(error).strip().partition("\n")[0]
        print(f"Some layers run without kernels, slowly: they cannot be compiled here ({reason}).", file=sys.stderr)
        return None


def compile_into(folder: Path, text: str) -> None:
    """Compile this C++ source in a folder. In the end there is a file `whole` in it.

    The source is copied there, or each copy of the course would compile it again for the sake of its path.
    """
    from torch.utils import cpp_extension

    folder.mkdir(parents=True, exist_ok=True)
    source, lock = folder / "cpu.cpp", folder / "lock"
    if lock.exists() and time.time() - lock.stat().st_mtime > STALE_SECONDS:
        lock.unlink()  # of a process that was killed while it compiled; torch would wait for it for ever
    if not source.exists():
        source.write_text(text, encoding="utf-8")
    tools = Path(sys.executable).parent  # ninja is installed beside this Python, which need not be on the PATH
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    with mock.patch.dict(os.environ, PATH=f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"):
        cpp_extension.load(
            name=LIBRARY,
            sources=[str(source)],
            extra_cflags=["-O3", "-march=native", "-ffast-math", *wide],
            build_directory=str(folder),
            is_python_module=False,
        )
    (folder / "whole").touch()


LIBRARY = "inference_course"
STALE_SECONDS = 300
"""Compiling takes less than this: an older lock is that of a process that was killed."""


class FusedLinear(nn.Module):
    """Several linear layers with the same input as one: their tensors one below the other, outputs side by side."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        first = layers[0]
        self.in_features, self.out_features = first.in_features, sum(layer.out_features for layer in layers)
        self.shape = (self.out_features, self.in_features)
        self.columns, self.method, self.bias = first.columns, first.method, None
        for name, _ in first.named_parameters(recurse=False):
            whole = torch.cat([getattr(layer, name) for layer in layers])
            setattr(self, name, nn.Parameter(whole, requires_grad=False))
        self.method.process_weights_after_loading(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.method.apply(self, x, self.bias)


# ---------------------------------------------------------------------------------------------------------------
# Layers with fewer, larger steps
# ---------------------------------------------------------------------------------------------------------------


class FastNorm(nn.Module):
    """Lesson 1's `rms_norm` in four steps, not eight. (..., size) -> (..., size).

    `weight` is (size,), or has further axes in front, as for the heads of a layer, each with a weight of its own.
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
        # The number of heads follows from a projection's width, for the cache too.
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

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.gate_up_proj = FusedLinear((plain.gate_proj, plain.up_proj))
        self.down_proj = plain.down_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate).mul_(up))


def pack(model: nn.Module, linear: type, attention: type, mlp: type, norm: type) -> None:
    """Rearrange a loaded model's weights, in place, and swap modules for faster ones that compute the same.

    linear, attention, mlp, norm: lesson 2's classes. Attention and MLP are fused where their layers are exactly of
    class `linear` and have one method; other linear layers are left to their method. There is no way back: each plain
    weight is freed once it is packed. A model that is not in float32 on a CPU stays as it is, and so does one that
    was packed already.
    """
    sample = model.model.norm.weight
    if (sample.device.type, sample.dtype) != ("cpu", torch.float32):
        return

    def can_fuse(*layers: nn.Module) -> bool:
        return all(type(layer) is linear and type(layer.method) is type(layers[0].method) for layer in layers)

    def fast(module: nn.Module) -> nn.Module:
        if type(module) is attention and can_fuse(module.q_proj, module.k_proj, module.v_proj):
            if {type(module.q_norm), type(module.k_norm)} in ({nn.Identity}, {norm}):
                return FusedAttention(module)
        if type(module) is mlp and can_fuse(module.gate_proj, module.up_proj):
            return FusedMLP(module)
        return FastNorm(module.weight, module.eps) if type(module) is norm else module

    def swap_children(parent: nn.Module) -> None:
        for name, child in list(parent.named_children()):
            if not any(parameter.is_meta for parameter in child.parameters()):  # a layer that stays on the disk
                setattr(parent, name, fast(child))
            swap_children(getattr(parent, name))

    table, head = model.model.embed_tokens, model.lm_head
    with torch.no_grad():
        shared = getattr(table, "weight", None)
        is_tied = shared is not None and hasattr(head, "method") and head.weight is shared
        if is_tied and shared.dtype == torch.float32:
            share_table(table, head)
        swap_children(model)
        for module in model.modules():
            if hasattr(module, "method") and module is not table and not (has_kernel(module) or module.weight.is_meta):
                module.method.process_weights_after_loading(module)
    model.requires_grad_(False)


def held_bytes(model: nn.Module) -> int:
    """Bytes of all weights of a model in memory, packed ones too; a shared one counts once."""
    packed = [module.weight for module in model.modules() if getattr(module, "weight", None) is not None]
    packed = [weight for weight in packed if weight.layout == torch._mkldnn]
    parameters = [parameter for parameter in model.parameters() if not parameter.is_meta]
    return sum(weight.numel() * weight.element_size() for weight in [*packed, *parameters])


# ---------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Attention of B requests, T queries of each, over keys and values that were gathered and padded to one length.

    q: (B, T, H, D); k, v: (B, S, K, D), with K dividing H; positions: (B, T) integers, 0 to S - 1. Query head h
    attends to key/value head h // (H / K). Key s of a request is seen from position s on, so padding at its end is not
    seen. It must be finite nevertheless: NaN in a new tensor times a weight of 0 is NaN. Returns (B, T, H, D).
    """
    batch, num_queries, num_heads, head_dim = q.shape
    if num_queries > QUERY_BLOCK:
        blocks = zip(q.split(QUERY_BLOCK, dim=1), repeat(k), repeat(v), positions.split(QUERY_BLOCK, dim=1))
        return torch.cat([attention(*block) for block in blocks], dim=1)

    mask = None
    if q.device.type == "cpu":  # a GPU would first have to finish all it was asked for before it could answer
        seen = int(positions.max()) + 1
        k, v = k[:, :seen], v[:, :seen]
    if q.device.type != "cpu" or positions.numel() > 1:
        mask = (torch.arange(k.shape[1], device=k.device) <= positions[:, :, None])[:, None]  # (B, 1, T, S)

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not 1 < num_queries <= FEW_QUERIES:
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True).transpose(1, 2)
    # Lesson 3's folding: the queries of a group's heads one below the other, in one matrix (B, K, H / K * T, D).
    num_kv_heads = k.shape[1]
    group_size = num_heads // num_kv_heads
    folded = q.reshape(batch, num_kv_heads, group_size * num_queries, head_dim)
    if mask is not None:
        mask = mask.expand(-1, group_size, -1, -1).flatten(1, 2)[:, None]
    mixed = F.scaled_dot_product_attention(folded, k, v, mask)
    return mixed.reshape(batch, num_heads, num_queries, head_dim).transpose(1, 2)
