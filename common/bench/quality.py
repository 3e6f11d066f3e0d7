"""The quality of quantized weights: perplexity, and KL divergence to float32, of every kind of quantization.

The text is `pydoc_data.topics`, which Python's `help` shows: English prose with code in it, the same on every machine
with the same version of Python. Scales for activations are chosen on another part of it.
"""

from __future__ import annotations

import copy
import math
import platform
import pydoc_data.topics
import statistics
from dataclasses import asdict

import torch
import torch.nn.functional as F

from common.kernels.products import use
from solutions.llama_pytorch import causal_attend, load
from solutions.quantization import Quantization, kl_divergence, quantized_copy, scale_for_activations, weight_bytes


def text_of_python() -> str:
    """The topics, in the order of their names."""
    topics = pydoc_data.topics.topics
    return "\n".join(topics[name] for name in sorted(topics))


def windows(token_ids: list[int], length: int, count: int) -> list[torch.Tensor]:
    """Return `count` pieces of `length` tokens, evenly spread over the text."""
    stride = (len(token_ids) - length) // count
    return [torch.tensor(token_ids[i * stride : i * stride + length]) for i in range(count)]


def predictions(model, tokens: torch.Tensor, attend=causal_attend) -> torch.Tensor:
    """Return the logits (T, V) of a text."""
    return model.logits(model(tokens, torch.arange(len(tokens)), attend))


@torch.inference_mode()
def measure_quality(name: str, quick: bool) -> dict:
    """Perplexity, KL and bytes of each kind, plain and with scales for activations."""
    model, tokenizer = load(name, torch.float32, "cpu")
    token_ids = tokenizer.encode(text_of_python())
    length, count = (16, 1) if quick else (512, 4)
    half = len(token_ids) // 2
    measured, calibration = windows(token_ids[:half], length, count), token_ids[half : half + length]
    exact = [predictions(model, tokens) for tokens in measured]
    rows: list[dict] = []

    def add(about: dict, other, attend=causal_attend) -> None:
        """Measure another model, and add a row that begins with what it is."""
        losses, distances = [], []
        for tokens, reference in zip(measured, exact):
            logits = predictions(other, tokens, attend)
            losses.append(float(F.cross_entropy(logits[:-1], tokens[1:])))
            distances.append(float(kl_divergence(reference, logits)))
        rows.append({**about, "perplexity": math.exp(statistics.mean(losses)), "kl": statistics.mean(distances)})
        print(rows[-1], flush=True)

    def rounded(layer: int, q, k, v, **window):
        """Attention to keys and values in bfloat16."""
        return causal_attend(layer, q, k.bfloat16().float(), v.bfloat16().float(), **window)

    add({"kind": "float32", "bytes": weight_bytes(model)}, model)
    halved, _ = load(name, torch.bfloat16, "cpu")
    about = {"kind": "bfloat16", "bytes": weight_bytes(halved)}
    # As the kernels compute it, without and with a processor's product of two bfloat16 numbers, and as torch computes
    # it, which rounds the result of each operation.
    wide = copy.deepcopy(halved).float()
    add({**about, "bits_of_sums": 32, "bits_of_inputs": 32}, wide, rounded)
    for layer in wide.modules():
        if hasattr(layer, "method"):
            use(layer, apply=lambda layer, x, bias=None: F.linear(x.bfloat16().float(), layer.weight, bias))
    add({**about, "bits_of_sums": 32, "bits_of_inputs": 16}, wide, rounded)
    add({**about, "bits_of_sums": 16, "bits_of_inputs": 16}, halved)
    sizes = (32,) if quick else (32, 64, 128)
    in_groups = [Quantization("int4", size, symmetric) for size in sizes for symmetric in (False, True)]
    in_groups += [Quantization("w4a8", size) for size in sizes]
    for kind in (Quantization("int8"), Quantization("w8a8"), *in_groups):
        quantized = quantized_copy(model, kind)
        add({**asdict(kind), "activation_aware": False, "bytes": weight_bytes(quantized)}, quantized)
    for kind in in_groups:
        source, _ = load(name, torch.float32, "cpu")
        scale_for_activations(source, calibration, kind, causal_attend)
        quantized = quantized_copy(source, kind)
        add({**asdict(kind), "activation_aware": True, "bytes": weight_bytes(quantized)}, quantized)
    return {
        "model": name,
        "text": f"pydoc_data.topics of Python {platform.python_version()}",
        "num_tokens": length * count,
        "rows": rows,
    }
