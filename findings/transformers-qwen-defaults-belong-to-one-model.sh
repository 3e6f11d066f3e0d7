#!/bin/sh
# transformers 5.23.0: what a Qwen `config.json` means that leaves out `num_key_value_heads` or `head_dim`.
# Llama's rule is known: as many KV heads as attention heads, and hidden_size / heads. One would guess it for relatives.
# Observed: Qwen2 and Qwen3 take 32 KV heads and Mistral takes 8, whatever number of attention heads the file has (here 4),
# Qwen3-MoE takes 4, and Qwen3's head_dim is 128 with a hidden size of 64. A reader needs a table of defaults a family.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
cat > "$dir/observe.py" <<'EOF'
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

sizes = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
found = {}
for family in (LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig):
    config = family(**sizes)
    found[config.model_type] = config.num_key_value_heads
    print(config.model_type, "KV heads", config.num_key_value_heads, "head_dim", getattr(config, "head_dim", None))
assert found == {"llama": 4, "mistral": 8, "qwen2": 32, "qwen3": 32, "qwen3_moe": 4}
assert Qwen3Config(**sizes).head_dim == 128
EOF
"$dir/venv/bin/python" "$dir/observe.py"
