"""Fast paths beside the exercises' plain ones: what a processor can do when it is asked in its own way.

The exercises' code is written to be read; what is here computes the same, sooner. Two doors lead in and no other:
`pack` rearranges a loaded model's weights once and for all, and `attention` serves many requests in one call.
`KERNELS=plain` in the environment asks for neither, so that graded code is the student's own.

What there is to gain, in float32 on two cores with a model of 135 M parameters:

- A row-major matrix does not suit the loops that multiply by it. oneDNN, the library beneath torch, has an order of
  its own, which suits this processor. Asking for it takes two operators that torch keeps private: this is the only
  file that calls them, and where they are missing the model stays as it is.
- An operator on one token's numbers costs 2 microseconds however little it computes, and a layer has dozens of them.
  So products with the same input become one, and so do the rotations of queries and keys.
- Attention over all requests at once needs neither copies of the keys for each query head nor a matrix of scores.

This file does not know about: block tables, schedulers, other processes. Nothing in it has
gradients.
"""

from __future__ import annotations

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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoints import cache_folder

ROWS_HINT = 32
"""For how many rows oneDNN shall choose its order. What it chooses for 8 rows or more is as good at 1 row, and at 256;
what it chooses for a single row takes half as long again at 4 rows."""

QUERY_BLOCK = 128
"""A prefill chunk is cut into so many queries at a time, and the first of them need not look as far as the last."""

FEW_QUERIES = 16
"""Two to so many queries of a request (verification) read their keys once for a group's heads if these are one matrix.
A single one shares less than it costs: nine heads are dealt to the cores more evenly than three groups."""


def enabled() -> bool:
    """Whether the fast paths are wanted: yes, unless the environment says KERNELS=plain. It is asked at every call."""
    choice = os.environ.get("KERNELS", "")
    if choice not in ("", "fast", "plain"):
        raise ValueError(
            f"KERNELS={choice}: this environment variable is 'plain', 'fast', or not set (which is 'fast')."
        )
    return choice != "plain"


# ---------------------------------------------------------------------------------------------------------------
# Weights in the processor's own order
# ---------------------------------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A linear layer whose matrix lies as oneDNN wants it. (..., in_features) -> (..., out_features).

    `weight` still tells its shape (out_features, in_features), dtype and device, but its numbers cannot be read one
    by one any more. It is no parameter: what is packed is never saved.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS_HINT)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def can_pack(*modules: nn.Module) -> bool:
    """Whether all of these are plain linear layers, and each is where packing helps: in float32 on a CPU.

    A subclass of `nn.Linear` is left alone: it is somebody's own, and does more than multiply.
    """
    operators = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(
        type(module) is nn.Linear
        and (module.weight.device.type, module.weight.dtype) == ("cpu", torch.float32)
        and all(hasattr(torch.ops.mkldnn, name) for name in operators)
        for module in modules
    )


def fuse(projections: Sequence[nn.Module]) -> nn.Module:
    """Several layers with the same input as one, their outputs side by side."""
    biases = [projection.bias for projection in projections]
    bias = None if biases[0] is None else torch.cat(biases)
    if type(projections[0]) is nn.Linear:
        return PackedLinear(torch.cat([projection.weight for projection in projections]), bias)
    return CompiledLinear(projections, bias)


# ---------------------------------------------------------------------------------------------------------------
# Weights of eight bits and four
# ---------------------------------------------------------------------------------------------------------------


@functools.cache
def compiled():
    """The operators of cpu.cpp, compiled for this processor: once, then kept. None where there is no compiler."""
    from torch.utils import cpp_extension

    from common.machine import cpu_name

    source = Path(__file__).with_suffix(".cpp")
    made_for = (torch.__version__, sys.version, cpu_name(), source.read_text(encoding="utf-8"))
    folder = cache_folder() / f"kernels-{hashlib.sha256(repr(made_for).encode()).hexdigest()[:12]}"
    tools = Path(sys.executable).parent  # ninja is installed beside this Python, which need not be on the PATH
    wide = ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []
    before = os.environ.get("PATH", "")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / "lock"
        if lock.exists() and time.time() - lock.stat().st_mtime > STALE_SECONDS:
            lock.unlink()  # of a process that was killed while it compiled; torch would wait for it for ever
        os.environ["PATH"] = f"{tools}{os.pathsep}{before}"
        cpp_extension.load(
            name="inference_course",
            sources=[str(source)],
            extra_cflags=["-O3", "-march=native", "-ffast-math", *wide],
            build_directory=str(folder),
            is_python_module=False,
        )
        return torch.ops.inference_course
    except Exception as error:  # no compiler, no ninja, a folder that cannot be written, a system it does not know, ...
        reason = str(error).strip().partition("\n")[0]
        print(
            f"Quantized layers run without kernels, slowly: they cannot be compiled here ({reason}).", file=sys.stderr
        )
        return None
    finally:
        os.environ["PATH"] = before


STALE_SECONDS = 300
"""Nobody compiles for so long."""


class CompiledLinear(nn.Module):
    """Lesson 7's `Int8Linear` or `Int4Linear`, one or several with the same input, with cpu.cpp's product."""

    def __init__(self, plain: Sequence[nn.Module], bias: Tensor | None):
        super().__init__()
        first = plain[0]
        self.in_features, self.out_features = first.in_features, sum(each.out_features for each in plain)
        self.group_size = getattr(first, "group_size", None)
        names = [name for name, _ in first.named_parameters(recurse=False) if name != "bias"]
        for name in names:
            tensors = [getattr(each, name) for each in plain]
            whole = tensors[0] if len(tensors) == 1 else nn.Parameter(torch.cat(tensors), requires_grad=False)
            self.register_parameter(name, whole)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if self.group_size is None:
            y = compiled().int8_linear(x, self.weight, self.weight_scale)
        else:
            minimum = getattr(self, "weight_minimum", None)
            y = compiled().int4_linear(x, self.weight, self.weight_scale, minimum, self.group_size)
        return y if self.bias is None else y.add_(self.bias)


def can_compile(*modules: nn.Module) -> bool:
    """Whether these are lesson 7's layers, all of one kind, whole (no rank's share), in memory, with float32 around."""
    from solutions import quantization

    first = type(modules[0])
    return (
        first in (quantization.Int8Linear, quantization.Int4Linear)
        and all(type(each) is first and not each.is_sharded for each in modules)
        and all((each.weight.device.type, each.dtype) == ("cpu", torch.float32) for each in modules)
        and (first is quantization.Int8Linear or modules[0].in_features % 2 == 0)
        and compiled() is not None
    )


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
        # Whoever wants to know how many heads there are asks for a projection's width.
        self.q_proj, self.k_proj, self.v_proj = (SimpleNamespace(out_features=p.out_features) for p in projections)
        self.qkv_proj = fuse(projections)
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
        self.gate_up_proj = fuse((plain.gate_proj, plain.up_proj))
        self.down_proj = plain.down_proj

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate).mul_(up))


def pack(model: nn.Module) -> None:
    """Swap a loaded model's modules, in place, for faster ones that compute the same.

    There is no way back: each plain weight is freed once it is packed, so that the model never stands in memory twice.
    Only an embedding table that is the head as well stays, for look-up, beside its packed copy. What is not exactly
    lesson 2's class or an `nn.Linear`, or not float32 on a CPU, stays as it is, so calling it again does nothing.
    """
    from solutions.llama_pytorch import MLP, Attention, RMSNorm  # whoever's lesson 2 it is that runs here

    # A model without quantized layers needs no lesson 7.
    QuantizedLinear = getattr(sys.modules.get("solutions.quantization"), "QuantizedLinear", ())

    def fast(module: nn.Module) -> nn.Module:
        if type(module) is Attention and can_fuse(module.q_proj, module.k_proj, module.v_proj):
            if {type(module.q_norm), type(module.k_norm)} in ({nn.Identity}, {RMSNorm}):
                return FusedAttention(module)
        if type(module) is MLP and can_fuse(module.gate_proj, module.up_proj):
            return FusedMLP(module)
        if type(module) is RMSNorm and (module.weight.device.type, module.weight.dtype) == ("cpu", torch.float32):
            return FastNorm(module.weight, module.eps)
        if can_pack(module):
            return PackedLinear(module.weight, module.bias)
        if isinstance(module, QuantizedLinear) and can_compile(module):
            return CompiledLinear([module], module.bias)
        return module

    def can_fuse(*projections: nn.Module) -> bool:
        return can_pack(*projections) or (isinstance(projections[0], QuantizedLinear) and can_compile(*projections))

    def swap_children(parent: nn.Module) -> None:
        for name in [name for name, _ in parent.named_children()]:
            setattr(parent, name, fast(getattr(parent, name)))
            swap_children(getattr(parent, name))

    with torch.no_grad():
        swap_children(model)
    model.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------


def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    """Attention of B requests, T queries of each, over keys and values that were gathered and padded to one length.

    q: (B, T, H, D); k, v: (B, S, K, D), with K dividing H; positions: (B, T) integers, 0 to S - 1. Key s of a request
    is seen from position s on, so what pads its end is not; but it must be finite there: what a new tensor happens to
    hold may be NaN, and NaN times a weight of 0 is NaN. Returns (B, T, H, D). Query head h looks at key/value head
    h // (H / K).
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
