#!/bin/sh
# gguf 0.19.0: a big-endian file, written and read by the library itself, with a float32 tensor.
# `GGUFReader` says that the file is big-endian, and `tensor.data` has the right numbers (its dtype is swapped). One would
# guess that `gguf.quants.dequantize`, the documented way from a tensor to float32, gives them as well.
# Observed: it reads the bytes as little-endian; 1.0 becomes 4.6e-41, with no error.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import tempfile
import gguf
import numpy as np

path = tempfile.mktemp(suffix=".gguf")
writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
writer.add_tensor("x", np.array([1.0, -1.0, 0.5, 2.0], dtype=np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
reader = gguf.GGUFReader(path)
tensor = reader.tensors[0]
data, values = tensor.data, gguf.quants.dequantize(tensor.data, tensor.tensor_type)
print(reader.endianess.name, "data", data.tolist(), "dequantized", values.tolist())
assert data.tolist() == [1.0, -1.0, 0.5, 2.0]
assert abs(values[0]) < 1e-40
EOF
"$dir/venv/bin/python" "$dir/observe.py"
