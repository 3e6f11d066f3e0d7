#!/bin/sh
# transformers 5.23.0 with torch 2.13.0 on a CPU: a mixture-of-experts model in float64, the precision of a reference.
# Qwen3 computes in float64 if it is told to, so one would guess that Qwen3-MoE, which differs in its MLP, does as well.
# Observed: RuntimeError, "Expected mat_a to be Float32, BFloat16 or Float16 matrix, got Double". The default way of running
# experts is a grouped product that does not know float64; `experts_implementation="eager"` (or "batched_mm") computes.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 torch==2.13.0 numpy==2.4.6
cat > "$dir/observe.py" <<'EOF'
import os

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
sizes |= dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8)
experts = Qwen3MoeConfig(**sizes, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2)
tokens = torch.tensor([[1, 2, 3]])


def attempt(name, model):
    try:
        with torch.no_grad():
            result = str(model.double().eval()(tokens).logits.dtype)
    except RuntimeError as error:
        result = str(error)
    print(f"{name}: {result}")
    return result


assert attempt("Qwen3", Qwen3ForCausalLM(Qwen3Config(**sizes))) == "torch.float64"
default = Qwen3MoeForCausalLM(experts)
assert "got Double" in attempt(f"Qwen3-MoE, {default.config._experts_implementation}", default)
eager = Qwen3MoeForCausalLM._from_config(experts, experts_implementation="eager")
assert attempt("Qwen3-MoE, eager", eager) == "torch.float64"
EOF
"$dir/venv/bin/python" "$dir/observe.py"
