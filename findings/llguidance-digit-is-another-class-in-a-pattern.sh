#!/bin/sh
# llguidance 1.9.1: `\d` in a regex grammar and in the `pattern` of a JSON schema.
# One library and one class of characters, so one would guess the same digits in both.
# Observed: in a regex grammar `\d` is Unicode's, so the model may answer with Arabic-Indic digits, which a program that
# expects 0 to 9 cannot use; in a schema's `pattern` it is 0 to 9, as in ECMAScript. `[0-9]` is the same in both.
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


def accepts(grammar, text):
    matcher = LLMatcher(tokenizer, grammar)
    return matcher.validate_tokens(list(text.encode())) == len(text.encode())


def schema(pattern):
    return LLMatcher.grammar_from_json_schema(json.dumps({"type": "string", "pattern": pattern}))


three = "\u0663"
found = {
    "regex": accepts(LLMatcher.grammar_from_regex(r"\d"), three),
    "pattern": accepts(schema(r"^\d$"), f'"{three}"'),
    "regex [0-9]": accepts(LLMatcher.grammar_from_regex("[0-9]"), three),
}
print("the Arabic-Indic digit three is accepted by", found)
assert found == {"regex": True, "pattern": False, "regex [0-9]": False}
assert accepts(schema(r"^\d$"), '"3"')
EOF
"$dir/venv/bin/python" "$dir/observe.py"
