#!/bin/sh
# lm-format-enforcer 0.11.3: the characters of a string, and the items of an array, of a schema that limits neither.
# One would guess that whatever JSON allows is allowed. Observed: of the characters outside an escape only 91 are, all of
# them ASCII. A model can write no letter with an accent, no Chinese, and none of "|" and "~" (no Markdown table); it must
# spell them \u00e9, or gives up on the word. `.` in a regular expression means the same 91. An array ends after 20 items.
# Neither is in its README: it takes an `alphabet` and a `max_json_array_length` in a CharacterLevelParserConfig.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check lm-format-enforcer==0.11.3 interegular==0.3.3 pydantic==2.14.4
cat > "$dir/observe.py" <<'EOF'
import json
from lmformatenforcer import CharacterLevelParserConfig, JsonSchemaParser, RegexParser

def accepts(parser, text):
    for character in text:
        if character not in parser.get_allowed_characters():
            print("refuses", character, "in", text)
            return False
        parser = parser.add_character(character)
    return parser.can_end()

STRING, ARRAY = {"type": "string"}, {"type": "array", "items": {"type": "integer"}}
assert accepts(JsonSchemaParser(STRING), '"cafe"')
assert accepts(JsonSchemaParser(STRING), json.dumps("caf\u00e9"))  # as an escape
for text in ("caf\u00e9", "\u4f60", "|", "~"):
    assert not accepts(JsonSchemaParser(STRING), json.dumps(text, ensure_ascii=False))
allowed = set(JsonSchemaParser(STRING).add_character('"').get_allowed_characters()) - set('"\\')
print(len(allowed), "characters besides the quotation mark and the backslash")
assert len(allowed) == 91 and "".join(allowed).isascii()
assert accepts(RegexParser(".."), "ab") and not accepts(RegexParser(".."), "a\u00e9")
assert accepts(JsonSchemaParser(ARRAY), json.dumps([1] * 20)) and not accepts(JsonSchemaParser(ARRAY), json.dumps([1] * 21))
longer = CharacterLevelParserConfig(max_json_array_length=21)
assert accepts(JsonSchemaParser(ARRAY, longer), json.dumps([1] * 21))
EOF
"$dir/venv/bin/python" "$dir/observe.py"
