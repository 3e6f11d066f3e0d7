#!/bin/sh
# transformers 5.23.0 with a SentencePiece `tokenizer.model` that has control and user-defined symbols, such as the
# <|im_start|> of a chat format, and a `tokenizer_config.json` that adds one more special token.
# One would guess that the list adds to the model's own symbols. Observed: with `extra_special_tokens` (or the older
# `additional_special_tokens`) as a list, <|im_start|> is no token any more: it is cut into letters, and the characters
# that the vocabulary lacks are lost. With the same token as a mapping from role to token it stays one. No warning.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 sentencepiece==0.2.3 protobuf==7.36.2
cat > "$dir/observe.py" <<'EOF'
import json
import os
import tempfile

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import sentencepiece
from transformers import AutoTokenizer

folder = tempfile.mkdtemp()
with open(f"{folder}/text.txt", "w") as file:
    file.write("\n".join(f"the quick brown fox jumps over the lazy dog number {i}" for i in range(200)))
sentencepiece.SentencePieceTrainer.train(
    input=f"{folder}/text.txt", model_prefix=f"{folder}/tokenizer", vocab_size=120, model_type="bpe",
    control_symbols=["<|im_start|>"], hard_vocab_limit=False, minloglevel=2,
)
with open(f"{folder}/config.json", "w") as file:
    json.dump({"model_type": "llama"}, file)


def tokens(**settings):
    with open(f"{folder}/tokenizer_config.json", "w") as file:
        json.dump({"tokenizer_class": "LlamaTokenizer", **settings}, file)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.convert_ids_to_tokens(tokenizer.encode("<|im_start|>the", add_special_tokens=False))


plain = tokens()
as_list = tokens(extra_special_tokens=["<tool>"])
as_roles = tokens(extra_special_tokens={"tool_token": "<tool>"})
print("plain:", plain, "\na list:", as_list, "\nroles:", as_roles)
assert plain[0] == as_roles[0] == "<|im_start|>"
assert "<|im_start|>" not in as_list and len(as_list) > 8
EOF
"$dir/venv/bin/python" "$dir/observe.py"
