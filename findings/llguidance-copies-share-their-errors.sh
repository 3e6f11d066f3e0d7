#!/bin/sh
# llguidance 1.9.1: two copies of a matcher, of which one comes to a place that is too hard to compute.
# deep_copy promises a copy of its own, so one would guess that the other goes on.
# Observed: copies share a lexer, and with it the error. The other copy then refuses tokens that it would have accepted,
# and so do copies that are made later, until the grammar is compiled again. A new matcher accepts them.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1 tokenizers==0.23.3
cat > "$dir/observe.py" <<'EOF'
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*letters, "</s>"])}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(["</s>"])
tokens = LLTokenizer(tokenizer.to_str(), eos_token=len(letters))
limits = LLParserLimits(initial_lexer_fuel=200_000, step_lexer_fuel=20_000, verbose_errors=False)

def new():
    return LLMatcher(tokens, LLMatcher.grammar_from_regex("(b{1,9}|xa{9999999})c"), limits=limits, log_level=0)

def follows(matcher, text):
    for token in tokenizer.encode(text).ids:
        matcher.compute_bitmask()
        if matcher.try_consume_tokens([token]) != 1:
            return False
    return not matcher.is_error()

matcher = new()
print("a copy follows bb:", before := follows(matcher.deep_copy(), "bb"))
print("another one follows xaaaa:", hard := follows(matcher.deep_copy(), "xaaaa"))
print("a third one follows bb:", after := follows(matcher.deep_copy(), "bb"))
print("a new matcher follows bb:", again := follows(new(), "bb"))
assert before and not hard and not after and again
EOF
"$dir/venv/bin/python" "$dir/observe.py"
