"""`make quantize`: a checkpoint with fewer bits, written as a checkpoint of its own.

    make quantize MODEL=smollm2-135m QUANT=int4 GROUP=64 OUT=smollm2-int4
    make run MODEL=smollm2-int4

With --activation-aware the weights are scaled by the activations on some text first (exercise 7.11). This makes INT4
better, and the file no larger.
"""

from __future__ import annotations

import os
from pathlib import Path

import click

from common.checkpoints import Checkpoint, find_checkpoint
from common.course import CourseError, activate
from common.options import engine_option, folder, mine, option
from common.start import option_errors


@click.command()
@engine_option("model")
@engine_option("quantization", default="int8", flag="--kind")
@engine_option("group_size")
@engine_option("symmetric")
@click.option("--activation-aware", is_flag=True, help="scale weights by activations on some text first")
@option("--out", "OUT", type=folder, required=True, metavar="FOLDER", help="the folder for the new checkpoint")
@mine()
def quantize_command(model: str, mine: str, out: Path, **settings) -> None:
    """Write a checkpoint with fewer bits, as a checkpoint of its own."""
    if out.exists() and any(out.iterdir()):
        raise CourseError(f"{out} is there and not empty: name another folder, or remove it.")
    activate(mine)
    os.environ["KERNELS"] = "plain"  # packed weights cannot be saved
    with option_errors():
        quantize(model, out=out, **settings)


def quantize(name: str, quantization: str, group_size: int, symmetric: bool, activation_aware: bool, out: Path) -> None:
    import torch

    from common.config import EngineConfig
    from solutions.engine import load_model
    from solutions.llama_pytorch import causal_attend, load
    from solutions.quantization import (
        Quantization,
        quantization_of,
        quantized_copy,
        save_quantized,
        scale_for_activations,
        weight_bytes,
    )

    kind = Quantization(quantization, group_size, symmetric)
    source = find_checkpoint(name)
    if quantization_of(Checkpoint(source)) is not None:
        raise CourseError(f"{name} is quantized already.")
    if activation_aware:
        from common.bench.quality import text_of_python

        print("Reading some text, and looking for scales: this takes a while.", flush=True)
        with torch.inference_mode():
            model, tokenizer = load(name, torch.float32, "cpu")
            token_ids = tokenizer.encode(text_of_python())
            half = len(token_ids) // 2
            length = min(512, model.config.max_position_embeddings)
            scale_for_activations(model, token_ids[half : half + length], kind, causal_attend)
            model = quantized_copy(model, kind)
    else:
        options = {"quantization": quantization, "group_size": group_size, "symmetric": symmetric}
        model, *_ = load_model(EngineConfig(model=name, dtype="float32", device="cpu", **options))
    save_quantized(model, kind, source, out)
    before = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(f"{out}: {weight_bytes(model) / 1e6:.1f} MB of weights ({name}: {before / 1e6:.1f} MB). make run MODEL={out}")
