"""Chooses the kernels: the CPU's, or on a GPU Triton's. With KERNELS=triton a CPU interprets Triton's kernels."""

from __future__ import annotations

import importlib.util
import os
from functools import partial

import torch
from torch import Tensor, nn

from common.kernels.attention import PagedAttend
from common.kernels.build import compiled
from common.kernels.greedy import draw as draw_greedy
from common.kernels.layers import fuse_forward, pack_for_cpu
from common.kernels.products import enabled


def on_triton(tensor: Tensor) -> bool:
    """Whether Triton's kernels are used for this tensor."""
    if not enabled() or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    is_asked_for = os.environ.get("KERNELS") == "triton"
    return is_asked_for or (tensor.is_cuda and importlib.util.find_spec("triton") is not None)


def pack(model: nn.Module, linear: type, attention: type, mlp: type, norm: type, block: type, **parallel: type) -> None:
    """Rearrange a loaded model's weights, in place, and swap modules for faster ones that compute the same.

    linear, attention, mlp, norm, block: lesson 2's classes. parallel: lesson 6's classes `column` and `row`, which are
    parts of a linear layer, if ranks share the model. It cannot be undone: a plain weight is freed once it is packed.
    """
    if not on_triton(model.model.norm.weight):
        return pack_for_cpu(model, linear, attention, mlp, norm, block, **parallel)
    from common.kernels.triton_layers import pack_for_gpu

    return pack_for_gpu(model, attention, mlp, norm, block, (linear, parallel.get("column", linear)))


def paged(cache, metadata):
    """Returns lesson 4's `attend` for a batch of a cache: `cache.attend(metadata)`, or an object that is faster.

    metadata: lesson 4's, or `DeviceMetadata` while a graph is recorded.
    """
    if on_triton(cache.keys):
        from common.kernels.triton_layers import DeviceAttend, DeviceMetadata

        return DeviceAttend(cache, metadata if isinstance(metadata, DeviceMetadata) else DeviceMetadata.of(metadata))
    on_cpu = enabled() and cache.keys.device.type == "cpu"
    return PagedAttend(cache, metadata) if on_cpu else cache.attend(metadata)


def accelerate(runner, config):
    """Let the model runner of a single rank compute a step in few calls, and sample a whole batch at once.

    On a CPU one call computes all layers, on a GPU a CUDA graph a whole decoding step. runner: lesson 5's
    `ModelRunner`. config: a resolved `EngineConfig`. Returns the runner.
    """
    model, cache = runner.model, runner.cache
    if not on_triton(model.model.norm.weight):
        if enabled() and compiled() is not None:
            fuse_forward(runner)
            if config.speculative is None:
                runner.draw = draw_greedy
        return runner
    from common.kernels.sampler import draw
    from common.kernels.triton_layers import TritonBlock

    if config.speculative is None:  # draft tokens are verified by lesson 2's sampling
        runner.draw = draw
    is_capturable = all(type(layer) is TritonBlock and layer.is_capturable for layer in model.model.layers)
    if cache.keys.is_cuda and is_capturable and on_triton(cache.keys):
        from common.kernels.graphs import DecodingGraphs, capture

        blocks = -(-config.max_model_len // config.block_size)
        record = partial(capture, torch.cuda.graph_pool_handle())
        runner.forward = DecodingGraphs(runner.forward, model.model.norm.weight, config.max_num_seqs, blocks, record)
    return runner
