#!/bin/sh
# gguf 0.19.0: reading a BF16 tensor and an F16 tensor of the same shape with GGUFReader.
# One would guess arrays of that shape, of some 16-bit type. Observed: F16 comes as float16 in the shape, but BF16 comes
# as uint8 with the last axis twice as long, as quantized blocks do; and `tensor.shape` of both is the shape backwards, so
# it equals `tensor.data.shape` of neither. `.view(numpy.uint16)` gives the numbers' upper halves.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import os
import tempfile
import gguf
import numpy as np

file = os.path.join(tempfile.mkdtemp(), "two.gguf")
numbers = np.array([[1, -2, 3], [0.5, 100, -0.25]], dtype=np.float32)
writer = gguf.GGUFWriter(file, "llama")
halves = (numbers.view(np.uint32) >> 16).astype(np.uint16)
writer.add_tensor("bf16", halves.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
writer.add_tensor("f16", numbers.astype(np.float16))
writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
bf16, f16 = gguf.GGUFReader(file).tensors
for tensor in (bf16, f16):
    print(tensor.name, "shape", tensor.shape.tolist(), "data", tensor.data.dtype, tensor.data.shape)
assert bf16.shape.tolist() == f16.shape.tolist() == [3, 2]
assert (bf16.data.dtype, bf16.data.shape) == (np.uint8, (2, 6))
assert (f16.data.dtype, f16.data.shape) == (np.float16, (2, 3))
assert ((bf16.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32) == numbers).all()
EOF
"$dir/venv/bin/python" "$dir/observe.py"
