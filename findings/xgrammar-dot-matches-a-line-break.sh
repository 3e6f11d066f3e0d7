#!/bin/sh
# xgrammar 0.2.9: `.` in a regular expression that constrains an answer.
# One would guess that it matches all but a line break, as in Python, in ECMAScript and in llguidance 1.9.1 without a flag.
# Observed: it matches a line break, too; "[^\n]" is what keeps to one line. A model that is asked for one line with ".*" may
# go on over many of them, up to its limit of tokens, and a program that reads a line gets the first of several.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6 pydantic==2.14.4 transformers==5.23.0 apache-tvm-ffi==0.1.15.post2 llguidance==1.9.1
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check --no-deps xgrammar==0.2.9  # without Triton, which needs a GPU
cat > "$dir/observe.py" <<'EOF'
import re
import llguidance
import xgrammar

END = 256
TOKENS = [*(bytes([i]) for i in range(END)), b"</s>"]

class Bytes:  # what llguidance asks of a tokenizer
    eos_token_id, bos_token_id, special_token_ids, tokens = END, None, [END], TOKENS

    def __call__(self, text):
        return list(text.encode() if isinstance(text, str) else text)

tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
compiler = xgrammar.GrammarCompiler(
    xgrammar.TokenizerInfo(TOKENS, vocab_type=xgrammar.VocabType.RAW, stop_token_ids=[END])
)

def accepts(pattern, text):
    matcher = xgrammar.GrammarMatcher(compiler.compile_regex(pattern))
    first = all(matcher.accept_token(byte) for byte in text.encode()) and matcher.accept_token(END)
    other = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_regex(pattern))
    assert not other.get_error()
    second = other.validate_tokens([*text.encode(), END]) == len(text) + 1
    print(f"{pattern!r:12} {text!r:8} xgrammar {first}, llguidance {second}, re {bool(re.fullmatch(pattern, text))}", flush=True)
    return first, second, bool(re.fullmatch(pattern, text))

assert accepts(r"a.b", "a-b") == (True, True, True)
assert accepts(r"a.b", "a\nb") == (True, False, False)
assert accepts(r".*", "a\n\nb") == (True, False, False)
assert accepts(r"[^\n]*", "a\nb") == (False, False, False)
EOF
"$dir/venv/bin/python" "$dir/observe.py"
