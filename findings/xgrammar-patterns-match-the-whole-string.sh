#!/bin/sh
# xgrammar 0.2.9: `pattern` and `patternProperties` in a JSON schema.
# JSON Schema says that a pattern may match anywhere in the string, and one would guess that "a" allows "bab", as
# llguidance 1.9.1 does. Observed: the pattern must match the whole string, also one that begins with "^", so that
# "^x" among `patternProperties` allows the one name "x". Nothing is refused or logged.
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

assert accepts({"type": "string", "pattern": "a"}, '"a"')
assert not accepts({"type": "string", "pattern": "a"}, '"bab"')
assert not accepts({"type": "string", "pattern": "^a"}, '"ab"')
assert accepts({"type": "string", "pattern": "^a.*"}, '"ab"')
names = {"type": "object", "patternProperties": {"^x": {"type": "integer"}}, "additionalProperties": False}
assert accepts(names, '{"x": 1}')
assert not accepts(names, '{"x1": 1}')
EOF
"$dir/venv/bin/python" "$dir/observe.py"
