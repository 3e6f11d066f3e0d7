#!/bin/sh
# tiktoken 0.14.0 and tokenizers 0.23.3: one vocabulary, the bytes and "abc", which no merge of two tokens can build since
# neither "ab" nor "bc" is a token. One would guess that byte-pair encoding never arrives at "abc".
# Observed: tiktoken looks a whole word of its pattern up first, so "abc" is one token while "abcd" and "abcabc" are bytes.
# tokenizers' BPE gives the bytes, unless it was made with `ignore_merges=True`, which Llama 3's tokenizer.json therefore has.
# A conversion that drops this flag changes the ids of such words only.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check tiktoken==0.14.0 tokenizers==0.23.3
cat > "$dir/observe.py" <<'EOF'
import tiktoken
from tokenizers import Tokenizer, models

ranks = {bytes([byte]): byte for byte in range(256)} | {b"abc": 256}
encoding = tiktoken.Encoding("own", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={})
vocabulary = {"a": 97, "b": 98, "c": 99, "d": 100, "abc": 256}
plain = Tokenizer(models.BPE(vocabulary, []))
ignoring = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
for text in ("abc", "abcd", "abcabc"):
    print(f"{text:7} tiktoken {encoding.encode(text)}  BPE {plain.encode(text).ids}  ignore_merges {ignoring.encode(text).ids}")
assert encoding.encode("abc") == ignoring.encode("abc").ids == [256]
assert plain.encode("abc").ids == [97, 98, 99]
assert encoding.encode("abcd") == ignoring.encode("abcd").ids == plain.encode("abcd").ids == [97, 98, 99, 100]
assert encoding.encode("abcabc") == [97, 98, 99] * 2
EOF
"$dir/venv/bin/python" "$dir/observe.py"
