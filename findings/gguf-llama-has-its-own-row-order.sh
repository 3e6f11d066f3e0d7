#!/bin/sh
# transformers 5.23.0 with gguf 0.19.0: the same matrices in a file of architecture `llama` and in one of `qwen2`.
# One would guess that a tensor means the same in both. Observed: of a llama, and only of q and k, transformers reorders
# the rows: it takes rows 0, 2, 1, 3 of a head of four as 0, 1, 2, 3. llama.cpp's converter stores a Llama's q and k with the two
# halves of each head interleaved, since its rotation there turns neighbours; for qwen2 it turns halves, as transformers
# does. Nothing in the file says which order it has: a reader has to know the architecture.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.13.0 numpy==2.4.6 gguf==0.19.0 accelerate==1.12.0
cat > "$dir/observe.py" <<'EOF'
import logging
import tempfile
import gguf
import numpy as np
from transformers import AutoModelForCausalLM

def loaded_rows(architecture):
    folder = tempfile.mkdtemp()
    w = gguf.GGUFWriter(f"{folder}/model.gguf", architecture)
    w.add_block_count(1), w.add_context_length(32), w.add_embedding_length(8), w.add_feed_forward_length(8)
    w.add_head_count(2), w.add_head_count_kv(2), w.add_layer_norm_rms_eps(1e-5), w.add_rope_freq_base(1e4), w.add_vocab_size(4)
    w.add_tokenizer_model("gpt2"), w.add_token_list(["a", "b", "c", "d"]), w.add_token_merges([])
    w.add_bos_token_id(0), w.add_eos_token_id(1)
    shapes = {"token_embd.weight": (4, 8), "output_norm.weight": (8,), "output.weight": (4, 8)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}.weight"] = (8, 8)
    for name in ("attn_norm", "ffn_norm"):
        shapes[f"blk.0.{name}.weight"] = (8,)
    for name in ("attn_q", "attn_k", "attn_v") if architecture == "qwen2" else ():
        shapes[f"blk.0.{name}.bias"] = (8,)
    for name, shape in shapes.items():  # a row of a matrix begins with 8 times its number
        w.add_tensor(name, np.arange(np.prod(shape), dtype=np.float32).reshape(shape))
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    attention = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf").model.layers[0].self_attn
    layers = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}
    return {name: (layer.weight[:, 0] / 8).int().tolist() for name, layer in layers.items()}

logging.disable(logging.WARNING)
llama, qwen2 = loaded_rows("llama"), loaded_rows("qwen2")
print("llama", llama)
print("qwen2", qwen2)
stored, interleaved = list(range(8)), [0, 2, 1, 3, 4, 6, 5, 7]
assert llama == {"q": interleaved, "k": interleaved, "v": stored}
assert qwen2 == {"q": stored, "k": stored, "v": stored}
EOF
"$dir/venv/bin/python" "$dir/observe.py"
