#!/bin/sh
# nbval 0.11.0 with ipykernel 7.4.0: checking a notebook whose stored output is a picture, with `pytest --nbval`.
# One would guess that another picture makes the cell fail, as other text and other HTML do.
# Observed: pictures are left out of the comparison. A stored "picture" of three bytes passes beside a real PNG; what has to
# agree is the text beside it, such as "<Figure size 640x480 with 1 Axes>". A plot that shows other numbers is not noticed.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check nbval==0.11.0 ipykernel==7.4.0 nbformat==5.11.1 pytest==9.2.0
cat > "$dir/observe.py" <<'EOF'
import base64
import subprocess
import sys
import tempfile
import nbformat.v4 as v4
import nbformat

picture = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)

def result(source, data):
    '''The exit status of pytest for a notebook with one cell, of which this output is stored.'''
    output = v4.new_output("display_data", data=data)
    cell = v4.new_code_cell("from IPython.display import HTML, Image, display\n" + source, outputs=[output], execution_count=1)
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    file = tempfile.mktemp(suffix=".ipynb")
    nbformat.write(v4.new_notebook(cells=[cell], metadata=metadata), file)
    command = [sys.executable, "-m", "pytest", "--nbval", "-q", "-p", "no:cacheprovider", file]
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode

shown = f"import base64; display(Image(base64.b64decode('{picture}')))"
stored = base64.b64encode(b"no!").decode()
other_picture = result(shown, {"image/png": stored, "text/plain": "<IPython.core.display.Image object>"})
other_text = result(shown, {"image/png": picture, "text/plain": "<another object>"})
other_html = result("display(HTML('<b>1</b>'))", {"text/html": "<b>2</b>", "text/plain": "<IPython.core.display.HTML object>"})
print("another picture:", other_picture, "  another text:", other_text, "  other HTML:", other_html, "  (0: passes)")
assert (other_picture, other_text, other_html) == (0, 1, 1)
EOF
PATH="$dir/venv/bin:$PATH" JUPYTER_PATH= "$dir/venv/bin/python" "$dir/observe.py"
