"""Lesson 2's layers with the GPU's kernels, and lesson 4's `attend` for a batch whose block tables are on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from common.kernels import triton_ops as ops
from common.kernels.attention import Cache
from common.kernels.groups import Metadata
from common.kernels.layers import FusedAttention, FusedMLP, is_on_disk, swapping
from common.rope import depends_on_length


@dataclass(frozen=True)
class DeviceMetadata:
    """Lesson 4's `AttentionMetadata` as tensors of dtype long on the GPU. For padding of the batch, a token's slot is
    negative and a request's context is 0."""

    query_start: Tensor  # (R + 1)
    context_lens: Tensor  # (R)
    slot_mapping: Tensor  # (T)
    block_tables: Tensor  # (R, blocks of the longest)
    max_query_len: int  # the largest number of tokens of a request

    @classmethod
    def of(cls, batch: Metadata) -> DeviceMetadata:
        """Copy all numbers of a batch to the GPU in one transfer."""
        width = max(map(len, batch.block_tables))
        numbers = [*batch.query_start, *batch.context_lens]
        for table in batch.block_tables:
            numbers += table + [0] * (width - len(table))
        sizes = len(batch.query_start), len(batch.context_lens), width * len(batch.block_tables)
        start, lens, tables = torch.tensor(numbers, device=batch.slot_mapping.device).split(sizes)
        longest = max(end - begin for begin, end in zip(batch.query_start, batch.query_start[1:]))
        return cls(start, lens, batch.slot_mapping, tables.view(-1, width), longest)


@dataclass(frozen=True)
class DeviceAttend:
    """Lesson 4's `attend` for a batch: writes keys and values into their blocks, then attends to these in place."""

    cache: Cache
    batch: DeviceMetadata

    def pools(self, layer: int) -> tuple[Tensor, Tensor]:
        index = layer - self.cache.layers.start
        return self.cache.keys[index], self.cache.values[index]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        self.cache.write(layer, self.batch.slot_mapping, k, v)
        return self.mix(layer, q.contiguous(), window)

    def mix(self, layer: int, q: Tensor, window: int | None) -> Tensor:
        """Attention of queries, (T, H, D), to keys and values that have been written. Returns (T, H, D)."""
        batch = self.batch
        given = batch.block_tables, batch.query_start, batch.context_lens, batch.max_query_len
        return ops.paged_attention(q, *self.pools(layer), *given, window)


class TritonNorm(nn.Module):
    """Lesson 2's `RMSNorm`. (..., size) -> (..., size)."""

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.weight, self.eps = plain.weight, plain.eps

    def forward(self, x: Tensor) -> Tensor:
        return self.add(x, None)[1]

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns x + residual, and its norm."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


class TritonAttention(FusedAttention):
    """Lesson 2's `Attention`: one product for q, k and v, and one kernel that norms, rotates and stores them."""

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Callable) -> Tensor:
        """hidden: (T, hidden_size); cos, sin: (T, D / 2). Returns (T, hidden_size)."""
        attend, window = (attend.func, attend.keywords["window"]) if isinstance(attend, partial) else (attend, None)
        qkv = self.qkv_proj(hidden).unflatten(-1, (-1, self.head_dim))
        norm = (None, 0.0) if isinstance(self.qk_norm, nn.Identity) else (self.qk_norm.weight, float(self.qk_norm.eps))
        given = qkv, cos, sin, *norm
        if isinstance(attend, DeviceAttend):
            pools = attend.pools(self.layer)
            mixed = attend.mix(self.layer, ops.rotate_and_store(*given, attend.batch.slot_mapping, *pools), window)
        else:  # any other `attend` gets keys and values as tensors, which are written to slots 0, 1, ... here
            k, v = (qkv.new_empty(len(qkv), self.num_kv_heads, self.head_dim) for _ in range(2))
            q = ops.rotate_and_store(*given, torch.arange(len(qkv), device=qkv.device), k, v)
            mixed = attend(self.layer, q, k, v, **({} if window is None else {"window": window}))
        return self.o_proj(mixed.flatten(1))


class TritonMLP(FusedMLP):
    """Lesson 2's `MLP`: one product for gate and up, then one kernel, then `down_proj`. (T, size) -> (T, size)."""

    whole_panels = False

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(ops.silu_mul(self.gate_up_proj(x)))


class TritonBlock(nn.Module):
    """Lesson 2's `Block`, with the first addition in the kernel of the second norm."""

    def __init__(self, plain: nn.Module):
        super().__init__()
        self.window = plain.window
        self.input_layernorm, self.self_attn = plain.input_layernorm, plain.self_attn
        self.post_attention_layernorm, self.mlp = plain.post_attention_layernorm, plain.mlp

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Callable) -> Tensor:
        if self.window is not None:
            attend = partial(attend, window=self.window)
        mixed = self.self_attn(self.input_layernorm(hidden), cos, sin, attend)
        hidden, normed = self.post_attention_layernorm.add(mixed, hidden)
        return hidden + self.mlp(normed)

    @property
    def is_capturable(self) -> bool:
        """Whether it never waits for the GPU. A mixture of experts does, to learn which experts the tokens have."""
        return type(self.self_attn) is TritonAttention and type(self.mlp) is TritonMLP


def pack_for_gpu(
    model: nn.Module, attention: type, mlp: type, norm: type, block: type, linear: tuple[type, ...]
) -> None:
    """`pack` (gpu.py) for a GPU. linear: the classes of layers that can be fused. Layers on the disk do not change."""
    fast = swapping({attention: TritonAttention, mlp: TritonMLP, norm: TritonNorm}, linear)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            if type(layer) is block and not is_on_disk(layer):
                for name, child in list(layer.named_children()):
                    setattr(layer, name, fast(child))
                model.model.layers[index] = TritonBlock(layer)
        model.model.norm = fast(model.model.norm)
        tabulate_rotary(model)
    model.requires_grad_(False)


def tabulate_rotary(model: nn.Module) -> None:
    """Compute the rotary tables of all positions once, and keep them on the GPU. The frequencies are on the CPU."""
    if depends_on_length(model.config.rope_scaling) and model.max_length is None:
        return  # the tables depend on the text
    length = model.max_length or model.config.max_position_embeddings
    cos, sin = model.rotary(torch.arange(length, device=model.model.norm.weight.device))
    model.rotary = lambda positions: (cos[positions], sin[positions])
