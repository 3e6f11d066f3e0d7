#!/bin/sh
# outlines-core 0.2.14: the regular expression that it makes of a JSON schema, to constrain a model's answers.
# One would guess that it matches every text which is JSON and fits the schema. Observed: an exponent needs a sign, so
# 1e+5 matches and 1e5 does not; of the escapes in a string \u is missing, so the text that json.dumps writes for "é" does not
# match; between tokens a single space may stand and no newline, so indented JSON does not match. A checker of finished
# answers must not be built on it, and a model used to other spellings is pushed off its habits.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check outlines-core==0.2.14
cat > "$dir/observe.py" <<'EOF'
import json
import re
from outlines_core.json_schema import build_regex_from_schema

def matches(schema, text):
    json.loads(text)  # it is JSON
    return re.fullmatch(build_regex_from_schema(json.dumps(schema)), text) is not None

number, string = {"type": "number"}, {"type": "string"}
pair = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
cases = [
    (number, "1e+5", True), (number, "1e5", False), (number, "1.5E-3", True), (number, "1.5E3", False),
    (string, r'"a\n"', True), (string, json.dumps("\u00e9"), False), (string, '"\u00e9"', True),
    (pair, '{"a": 1}', True), (pair, json.dumps({"a": 1}, indent=1), False), (pair, '{"a":  1}', False),
]
for schema, text, expected in cases:
    print(f"{text!r:22} {matches(schema, text)}")
    assert matches(schema, text) is expected
EOF
"$dir/venv/bin/python" "$dir/observe.py"
