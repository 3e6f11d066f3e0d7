#!/bin/sh
# jinja2 3.1.6 and transformers 5.23.0: `{{ tools | tojson }}`, which chat templates with tools contain.
# Chat templates are Jinja, so one would guess that Jinja renders them as transformers does.
# Observed: Jinja's own `tojson` is made for HTML: it writes < as a six-character escape, escapes all that is not ASCII
# and sorts the keys; transformers replaces the filter by plain `json.dumps` in the given order. The model would read a
# prompt that it was not trained on. Jinja also keeps the line after a block tag, which transformers trims.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check jinja2==3.1.6 transformers==5.23.0
cat > "$dir/observe.py" <<'EOF'
import jinja2
from transformers.utils.chat_template_utils import _compile_jinja_template

tools = [{"type": "function", "name": "a<b", "about": "\N{LATIN SMALL LETTER E WITH ACUTE}"}]
template = "{{ tools | tojson }}"
plain = jinja2.Environment().from_string(template).render(tools=tools)
theirs = _compile_jinja_template(template).render(tools=tools)
print(ascii(plain))
print(ascii(theirs))
assert plain == r'[{"about": "\u00e9", "name": "a\u003cb", "type": "function"}]'
assert theirs == '[{"type": "function", "name": "a<b", "about": "\N{LATIN SMALL LETTER E WITH ACUTE}"}]'
loop = "{% for m in messages %}\n<{{ m }}>\n{% endfor %}"
assert jinja2.Environment().from_string(loop).render(messages=[1]) == "\n<1>\n"
assert _compile_jinja_template(loop).render(messages=[1]) == "<1>\n"
EOF
"$dir/venv/bin/python" "$dir/observe.py"
