#!/bin/sh
# tokenizers 0.23.3: `DecodeStream`, which gives a model's answer piece by piece.
# It holds text back while it ends in U+FFFD, since bytes of a character may follow. One would guess that the end can be
# asked for. Observed: it has no method for that. An answer whose last tokens spell U+FFFD itself, or that was cut off within
# a character, streams fewer characters than `decode` returns for the same ids; a client has to compare lengths at the end.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
cat > "$dir/observe.py" <<'EOF'
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream

vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"hi": 256, "<unk>": 257}
tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])

def both(ids):
    stream = DecodeStream()
    return "".join(stream.step(tokenizer, token_id) or "" for token_id in ids), tokenizer.decode(ids)

spelled, cut_off = [256, *"\ufffd".encode()], [256, *"\u20ac".encode()[:2]]
for name, ids in (("U+FFFD spelled out", spelled), ("cut off within a character", cut_off), ("followed by text", [*spelled, 256])):
    print(f"{name:26} streamed and decoded: {both(ids)}")
assert both(spelled) == ("hi", "hi\ufffd")
assert both(cut_off) == ("hi", "hi\ufffd\ufffd")
assert both([*spelled, 256]) == ("hi\ufffdhi", "hi\ufffdhi")
assert {name for name in dir(DecodeStream) if not name.startswith("_")} == {"step"}
EOF
"$dir/venv/bin/python" "$dir/observe.py"
