#!/bin/sh
# llguidance 1.9.1: an object that has the right properties in another order than the schema lists them.
# JSON objects have no order, and JSON Schema asks for none, so one would guess that both are accepted.
# Observed: only the schema's order is. A model that would rather begin with the second property is forced away from its
# likeliest token, and existing answers cannot be re-validated with the grammar that would generate them.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1 tokenizers==0.23.3
cat > "$dir/observe.py" <<'EOF'
import json
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*letters, "</s>"])}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(["</s>"])
tokens = LLTokenizer(tokenizer.to_str(), eos_token=len(letters))

def accepts(schema, text):
    matcher = LLMatcher(tokens, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.encode(text).ids
    accepted = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
    print("accepts" if accepted else "refuses", text, "for", json.dumps(schema))
    return accepted

schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a", "b"]}
assert accepts(schema, '{"a":1,"b":"x"}')
assert not accepts(schema, '{"b":"x","a":1}')
EOF
"$dir/venv/bin/python" "$dir/observe.py"
