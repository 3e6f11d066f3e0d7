#!/bin/sh
# tokenizers 0.23.3: `decode` of an id that the vocabulary does not have.
# Embedding tables are padded to round sizes, so a model's logits have more entries than its tokenizer has tokens (Qwen2.5:
# 151,936 and 151,665), and an engine can sample one of the rest. One would guess an error, or a replacement character.
# Observed: the id disappears, and `decode` of all the others is what remains; the text shows nothing, though the model
# has read the token. `id_to_token` returns None for it.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
cat > "$dir/observe.py" <<'EOF'
from tokenizers import Tokenizer, decoders, models

tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
tokenizer.decoder = decoders.Fuse()
print("decode([0, 1]):", repr(tokenizer.decode([0, 1])), "decode([0, 7, 1]):", repr(tokenizer.decode([0, 7, 1])))
assert tokenizer.decode([0, 7, 1]) == tokenizer.decode([0, 1]) == "ab"
assert tokenizer.id_to_token(7) is None
EOF
"$dir/venv/bin/python" "$dir/observe.py"
