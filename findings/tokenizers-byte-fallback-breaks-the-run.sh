#!/bin/sh
# tokenizers 0.23.3: decoding a text that was cut in the middle of a character, with the byte-fallback decoder of Llama 2
# and Mistral (a token for each byte that the vocabulary lacks).
# One would guess that whole characters before the cut stay, and that only the unfinished one becomes U+FFFD.
# Observed: every byte token of the unbroken run becomes U+FFFD, the finished characters too; the next token brings them
# back. `DecodeStream` on the same ids shows the first character, so streamed and decoded text disagree.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
cat > "$dir/observe.py" <<'EOF'
from tokenizers import Tokenizer, decoders, models
from tokenizers.decoders import DecodeStream

vocab = {"<unk>": 0, "x": 1, **{f"<0x{byte:02X}>": byte + 2 for byte in range(256)}}
tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
ids = tokenizer.encode("x\N{GRINNING FACE}\N{GRINNING FACE}").ids  # one token and twice four bytes
whole, cut = tokenizer.decode(ids[:5]), tokenizer.decode(ids[:6])
stream = DecodeStream()
streamed = "".join(piece or "" for piece in (stream.step(tokenizer, token_id) for token_id in ids[:6]))
print("five tokens", ascii(whole), "| six tokens", ascii(cut), "| six tokens streamed", ascii(streamed))
assert whole == streamed == "x\N{GRINNING FACE}"
assert cut == "x" + 5 * "\N{REPLACEMENT CHARACTER}"
EOF
"$dir/venv/bin/python" "$dir/observe.py"
