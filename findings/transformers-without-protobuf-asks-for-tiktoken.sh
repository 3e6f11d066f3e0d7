#!/bin/sh
# transformers 5.23.0 and sentencepiece 0.2.3, without protobuf: a Llama model's `tokenizer.model`, which is SentencePiece's.
# sentencepiece is installed and opens the file, so one would guess that it is all that is needed.
# Observed: `AutoTokenizer` takes the file for one of tiktoken's and asks to install `tiktoken`, which cannot read it either.
# What is missing is `protobuf`, which the message does not name; with it the same call works.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 sentencepiece==0.2.3
cat > "$dir/observe.py" <<'EOF'
import json
import os
import sys
import tempfile

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import sentencepiece
from transformers import AutoTokenizer

folder = tempfile.mkdtemp()
with open(f"{folder}/text.txt", "w") as file:
    file.write("\n".join(f"the quick brown fox jumps over the lazy dog number {i}" for i in range(200)))
sentencepiece.SentencePieceTrainer.train(
    input=f"{folder}/text.txt", model_prefix=f"{folder}/tokenizer", vocab_size=120, model_type="bpe",
    hard_vocab_limit=False, minloglevel=2,
)
for name, content in (("config", {"model_type": "llama"}), ("tokenizer_config", {"tokenizer_class": "LlamaTokenizer"})):
    with open(f"{folder}/{name}.json", "w") as file:
        json.dump(content, file)
print("sentencepiece:", sentencepiece.SentencePieceProcessor(model_file=f"{folder}/tokenizer.model").encode("the fox"))
try:
    print("transformers:", AutoTokenizer.from_pretrained(folder).encode("the fox"))
    found = "works"
except ValueError as error:
    print("transformers:", error)
    found = "tiktoken" if "tiktoken" in str(error) and "protobuf" not in str(error) else "another error"
assert found == sys.argv[1], found
EOF
"$dir/venv/bin/python" "$dir/observe.py" tiktoken
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check protobuf==7.36.2
"$dir/venv/bin/python" "$dir/observe.py" works
