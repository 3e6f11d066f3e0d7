#!/bin/sh
# xgrammar 0.2.9: keywords of a JSON schema that its compiler does not know, or that stand without a `type` beside them.
# It logs a warning for `multipleOf` of a number, and llguidance 1.9.1 refuses most of these, so one would guess one or
# the other. Observed: `not`, `uniqueItems` and `dependentRequired` are skipped without a word, and so are `required`,
# `minimum` and `maxLength` if no `type` says that they are about an object, a number or a string.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 pydantic==2.14.4 transformers==5.23.0 apache-tvm-ffi==0.1.15.post2
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps xgrammar==0.2.9  # without Triton, which needs a GPU
cat > "$dir/observe.py" <<'EOF'
import json
import xgrammar

END = 256
tokens = xgrammar.TokenizerInfo(
    [*(bytes([i]) for i in range(END)), b"</s>"], vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[END]
)

def accepts(schema, text):
    matcher = xgrammar.GrammarMatcher(xgrammar.GrammarCompiler(tokens).compile_json_schema(json.dumps(schema)))
    accepted = all(matcher.accept_token(byte) for byte in text.encode()) and matcher.accept_token(END)
    print("accepts" if accepted else "refuses", text, "for", json.dumps(schema), flush=True)
    return accepted

typed = [
    ({"not": {"type": "string"}}, '"a string"'),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "[1, 1]"),
    ({"type": "object", "properties": {"a": {}, "b": {}}, "dependentRequired": {"a": ["b"]}}, '{"a": 1}'),
]
untyped = [({"required": ["a"]}, "{}"), ({"minimum": 3}, "1"), ({"maxLength": 1}, '"two"')]
for schema, text in typed + untyped:
    assert accepts(schema, text)
assert not accepts({"type": "integer", "minimum": 3}, "1")
assert not accepts({"type": "string", "maxLength": 1}, '"two"')
EOF
"$dir/venv/bin/python" "$dir/observe.py" 2> "$dir/log"
test ! -s "$dir/log"
