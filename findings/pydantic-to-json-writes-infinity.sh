#!/bin/sh
# pydantic 2.14.4: `pydantic_core.to_json(value)`, the function behind a model's `model_dump_json`.
# JSON has no infinity and no NaN, and a model writes null for them, so one would guess that `to_json` does, too.
# Observed: it writes Infinity and NaN, which are no JSON: browsers, jq and Go refuse the whole document. With
# `inf_nan_mode="null"` it writes what a model writes. A log-probability of minus infinity is where a server meets this.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check pydantic==2.14.4
cat > "$dir/observe.py" <<'EOF'
import math

from pydantic import BaseModel
from pydantic_core import to_json


class Token(BaseModel):
    logprob: float


for value in (-math.inf, math.nan):
    print("a model:", Token(logprob=value).model_dump_json())
    print("to_json:", to_json({"logprob": value}).decode())
    print("to_json, inf_nan_mode='null':", to_json({"logprob": value}, inf_nan_mode="null").decode())
EOF
"$dir/venv/bin/python" "$dir/observe.py"
