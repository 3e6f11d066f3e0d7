#!/bin/sh
# xgrammar 0.2.9: `minLength`, `maxLength` and `pattern` of a string, and characters that JSON can only write as an escape.
# One would guess that a limit on the length changes how long a string may be, and that the two characters \n count as
# the one that they stand for. Observed: with any of the three no escape is allowed at all. A model that is asked for a
# string of at least one character can write no line break, quotation mark or backslash in it.
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

for text in ('"a\\n"', '"a\\""', '"a\\\\"'):
    assert len(json.loads(text)) == 2
    assert accepts({"type": "string"}, text)
    for limit in ({"minLength": 1}, {"maxLength": 9}, {"pattern": "^[^b]+$"}):
        assert accepts({"type": "string", **limit}, '"aa"')
        assert not accepts({"type": "string", **limit}, text)
EOF
"$dir/venv/bin/python" "$dir/observe.py"
