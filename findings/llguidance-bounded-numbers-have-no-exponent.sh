#!/bin/sh
# llguidance 1.9.1: exponents in JSON numbers.
# One would guess that adding `minimum` and `maximum` to {"type": "number"} changes which values are allowed and not how
# they may be written. Observed: 1e-3 is accepted without bounds and refused within 0 to 1, where only 0.001 is left; and
# {"type": "integer"} refuses 1.0, which JSON Schema counts as an integer.
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

assert accepts({"type": "number"}, "1e-3")
bounded = {"type": "number", "minimum": 0, "maximum": 1}
assert accepts(bounded, "0.001")
assert not accepts(bounded, "1e-3")
assert not accepts({"type": "integer"}, "1.0")
EOF
"$dir/venv/bin/python" "$dir/observe.py"
