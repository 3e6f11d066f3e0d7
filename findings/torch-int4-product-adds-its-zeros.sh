#!/bin/sh
# torch 2.13.0 on a CPU: `torch.ops.aten._weight_int4pack_mm_for_cpu`, which multiplies with weights of four bits, 0 to 15,
# and takes a scale and a zero for each group. GPTQ, AWQ and ONNX mean (weight - zero) * scale, so one would guess that.
# Observed: it computes (weight - 8) * scale + zero, with the zero in the unit of the dequantized weights. Zeros of all 8, which mean
# "symmetric" elsewhere, add 8 to every weight; a checkpoint's zeros must be passed as (8 - zero) * scale. Nothing checks
# the range, and a model with the wrong ones answers nonsense.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import torch

GROUP, ROWS, COLUMNS = 32, 32, 64
weights = torch.arange(ROWS * COLUMNS, dtype=torch.int32).view(ROWS, COLUMNS) % 16
packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weights, 1)

def dequantized(scale, zero):  # a product with the identity
    scales_and_zeros = torch.tensor([scale, zero]).expand(COLUMNS // GROUP, ROWS, 2).bfloat16().contiguous()
    identity = torch.eye(COLUMNS, dtype=torch.bfloat16)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(identity, packed, GROUP, scales_and_zeros).T.float()

for scale, zero in ((1.0, 0.0), (1.0, 8.0), (0.5, 8.0), (0.5, 3.0)):
    result = dequantized(scale, zero)
    print(f"scale {scale} zero {zero}: 0 stands for {result[0, 0]}, 15 for {result[0, 15]}", flush=True)
    assert torch.equal(result, (weights - 8) * scale + zero)
    assert not torch.equal(result, (weights - zero) * scale)
assert torch.equal(dequantized(0.5, (8 - 3) * 0.5), (weights - 3) * 0.5)
EOF
"$dir/venv/bin/python" "$dir/observe.py"
