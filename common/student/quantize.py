"""`make quantize`: a checkpoint with fewer bits, written as a checkpoint of its own.

    make quantize MODEL=smollm2-135m QUANT=int4 GROUP=64 OUT=smollm2-int4
    make run MODEL=smollm2-int4

With --activation-aware the weights are prepared by letting the model read some text first (lesson 7.10): better for
INT4, and no byte larger.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from common.checkpoints import Checkpoint, CheckpointError, find_checkpoint
from common.course import CourseError, activate


def main(argv: list[str]) -> int:
    variable = os.environ.get
    parser = argparse.ArgumentParser(prog="python -m common quantize", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=variable("MODEL") or "smollm2-135m", help="a name, a folder, a .gguf file")
    parser.add_argument("--kind", default=variable("QUANT") or "int8", help="int8, w8a8 or int4; default int8")
    parser.add_argument("--group-size", type=int, default=variable("GROUP") or 64, help="of int4; default 64")
    parser.add_argument("--symmetric", action="store_true", help="int4 without minima")
    parser.add_argument("--activation-aware", action="store_true", help="let the model read some text first")
    parser.add_argument("--out", type=Path, default=variable("OUT") or None, help="the folder for the new checkpoint")
    parser.add_argument("--mine", default=variable("MINE") or "", metavar="0-7", help="use your modules of these")
    settings = parser.parse_args(argv)
    try:
        if settings.out is None:
            raise CourseError("Where to? OUT=folder (or --out) names the folder for the new checkpoint.")
        if settings.out.exists() and any(settings.out.iterdir()):
            raise CourseError(f"{settings.out} is there and not empty: name another folder, or remove it.")
        activate(settings.mine)
        os.environ["KERNELS"] = "plain"  # packed weights cannot be saved
        quantize(settings)
    except (CheckpointError, CourseError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def quantize(settings: argparse.Namespace) -> None:
    import torch

    from solutions.llama_pytorch import causal_attend, load
    from solutions.quantization import (
        Quantization,
        load_quantized,
        quantization_of,
        quantized_copy,
        save_quantized,
        scale_for_activations,
        weight_bytes,
    )

    kind = Quantization(settings.kind, settings.group_size, settings.symmetric)
    source = find_checkpoint(settings.model)
    if quantization_of(Checkpoint(source)) is not None:
        raise CourseError(f"{settings.model} is quantized already.")
    if settings.activation_aware:
        from common.bench.quality import text_of_python

        print("Reading some text, and looking for scales: this takes a while.", flush=True)
        with torch.inference_mode():
            model, tokenizer = load(settings.model, torch.float32, "cpu")
            token_ids = tokenizer.encode(text_of_python())
            half = len(token_ids) // 2
            length = min(512, model.config.max_position_embeddings)
            scale_for_activations(model, token_ids[half : half + length], kind, causal_attend)
            model = quantized_copy(model, kind)
    else:
        model = load_quantized(settings.model, kind, torch.float32, "cpu")
    save_quantized(model, kind, source, settings.out)
    before = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    print(
        f"{settings.out}: {weight_bytes(model) / 1e6:.1f} MB of weights ({settings.model}: {before / 1e6:.1f} MB). "
        f"make run MODEL={settings.out}"
    )
