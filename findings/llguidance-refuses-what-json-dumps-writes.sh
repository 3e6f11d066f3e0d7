#!/bin/sh
# llguidance 1.9.1: a string in a JSON schema, and the spellings of it that JSON allows.
# {"type": "string"} says nothing of spelling, so one would guess that whatever a JSON library writes is accepted.
# Observed: a letter beyond ASCII must stand there itself. Python's `json.dumps` writes it as an escape of six characters
# unless told otherwise, and that is refused, as is the escaped slash of PHP's encoder. Examples in a prompt that were
# written with `json.dumps` show the model a spelling that its grammar forbids.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1
cat > "$dir/observe.py" <<'EOF'
import json

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper


class Bytes:
    """A tokenizer with a token for each byte."""

    eos_token_id, bos_token_id, special_token_ids = 256, None, [256]
    tokens = [bytes([i]) for i in range(256)] + [b"<end>"]

    def __call__(self, text):
        return list(text.encode() if isinstance(text, str) else text)


tokenizer = LLTokenizer(TokenizerWrapper(Bytes()))
grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": "string"}))


def accepts(text):
    matcher = LLMatcher(tokenizer, grammar)
    return matcher.validate_tokens(list(text.encode())) == len(text.encode())


for text in (json.dumps("é", ensure_ascii=False), json.dumps("é"), json.dumps("😀"), '"a/b"', '"a\\/b"', '"\\n"'):
    assert isinstance(json.loads(text), str)
    print(text, "accepted" if accepts(text) else "refused")
assert accepts('"é"') and accepts('"a/b"') and accepts('"\\n"')
assert not accepts(json.dumps("é")) and not accepts(json.dumps("😀")) and not accepts('"a\\/b"')
EOF
"$dir/venv/bin/python" "$dir/observe.py"
