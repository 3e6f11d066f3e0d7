#!/bin/sh
# tokenizers 0.23.3: the `id` of each entry of `added_tokens` in a tokenizer.json, where ids before it are unused (an embedding
# whose size was rounded up before tokens were added), or where the entries stand in another order than their ids.
# The file states the ids, so one would guess that the tokens have them, or that loading fails.
# Observed: they are ignored. Tokens are numbered as they stand in the file, from the first free id on; `decode` of a stated
# id is empty, or is another token, and saving writes the new numbers as if they had always been there. No error and no
# warning. An engine reads the wrong row of the embedding, or never sees the model's end token: compare the ids after loading.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
cat > "$dir/observe.py" <<'EOF'
import json
from tokenizers import Tokenizer, models

written = Tokenizer(models.BPE({"a": 0, "b": 1, "c": 2}, []))
written.add_special_tokens(["<start>", "<end>"])

def load(start, end):
    """The ids of <start> and <end> that the library gives to a file which states these."""
    file = json.loads(written.to_str())
    file["added_tokens"][0]["id"], file["added_tokens"][1]["id"] = start, end
    read = Tokenizer.from_str(json.dumps(file))
    ids, text = read.encode("<start><end>").ids, read.decode([end], skip_special_tokens=False)
    saved = [token["id"] for token in json.loads(read.to_str())["added_tokens"]]
    print("stated", [start, end], "encoded as", ids, f"and saved as {saved}; decode([{end}]) is", repr(text))
    assert saved == ids
    return ids, text

assert load(3, 4) == ([3, 4], "<end>")
assert load(3, 10) == ([3, 4], "")
assert load(4, 3) == ([3, 4], "<start>")
EOF
"$dir/venv/bin/python" "$dir/observe.py"
