#!/bin/sh
# xgrammar 0.2.9: `allOf` of two schemas, which is how generators of schemas write inheritance.
# llguidance 1.9.1 merges the two, and one would guess a merged schema or an error. Observed: the compiler logs that
# "support is still ongoing" and goes on, and the grammar allows any JSON at all, a string in place of the object too.
# (`allOf` of one schema is obeyed.) The same with `oneOf` and branches that overlap is `anyOf`.
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

one = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
other = {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}
for text in ('{"a": 1, "b": 2}', '{"a": 1}', '{"b": "no number"}', '"no object"'):
    assert accepts({"allOf": [one, other]}, text)
assert not accepts({"allOf": [one]}, '"no object"')
EOF
"$dir/venv/bin/python" "$dir/observe.py"
