"""A server that answers as OpenAI's does, with words from a list: the page is tested against it. Standard library only.

What it answers follows from the last message: a number asks for so many words; `refuse`, `full`, `break`, `late error`
and `markup` stand for what their names say.
"""

from __future__ import annotations

import contextlib
import json
import mimetypes
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).parents[2] / "serving" / "page"
MARKUP = """\
<img src=x onerror="window.harmed = 1"><script>window.harmed = 1</script> **bold**
```js
let a = '<b>';
```
end"""
METRICS = """\
# HELP vllm:num_requests_running Requests that run.
vllm:num_requests_running{engine="0"} 1.0
vllm:num_requests_running{engine="1"} 2.0
vllm:num_requests_waiting{model_name="fake"} 2.0
vllm:kv_cache_usage_perc{engine="0"} 0.1
vllm:kv_cache_usage_perc{engine="1"} 0.4
vllm:generation_tokens_total{model_name="fake"} 100.0
vllm:prefix_cache_queries_total{model_name="fake"} 200.0
vllm:prefix_cache_hits_total{model_name="fake"} 50.0
vllm:spec_decode_num_draft_tokens_total{model_name="fake"} 10.0
vllm:spec_decode_num_accepted_tokens_total{model_name="fake"} 8.0
"""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass

    def answer(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, status: int, message: str, **headers: str) -> None:
        self.answer(status, json.dumps({"error": {"message": message}}).encode(), **headers)

    def is_refused(self) -> bool:
        key = self.server.fake.key
        if key is None or self.headers.get("Authorization") == f"Bearer {key}":
            return False
        self.refuse(401, "No such key.")
        return True

    def do_GET(self) -> None:
        path = self.path.lstrip("/")
        file = PAGE / (path.removeprefix("static/") or "index.html")
        if file.is_file():
            self.answer(200, file.read_bytes(), mimetypes.guess_type(file)[0])
        elif not self.is_refused():
            if path == "v1/models":
                self.answer(200, b'{"object": "list", "data": [{"id": "fake"}]}')
            elif path == "metrics":
                self.answer(200, METRICS.encode(), "text/plain")
            else:
                self.refuse(404, f"There is no {path} here.")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.is_refused():
            return
        self.server.fake.bodies.append(body)
        wish = body["messages"][-1]["content"]
        if wish == "refuse":
            self.refuse(400, "top_p must be above 0.")
        elif wish == "full":
            self.refuse(429, "64 requests wait.", Retry_After="7")
        else:
            self.stream(wish)

    def stream(self, wish: str) -> None:
        fake = self.server.fake
        pieces = (
            [MARKUP] if wish == "markup" else [f"word{number} " for number in range(int(wish) if wish.isdigit() else 3)]
        )
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        with fake.counted():
            try:
                self.send(choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}}])
                for number, piece in enumerate(pieces):
                    if number == 10:
                        fake.goes_on.wait(600)
                    self.send(choices=[{"index": 0, "delta": {"content": piece}}])
                    time.sleep(0.02)
                if wish == "late error":
                    self.send(error={"message": "the engine has stopped.", "code": 500})
                if wish in ("break", "late error"):
                    return
                self.send(choices=[{"index": 0, "delta": {}, "finish_reason": "length" if wish.isdigit() else "stop"}])
                self.send(choices=[], usage={"completion_tokens": 10 * len(pieces)})
                self.wfile.write(b"data: [DONE]\n\n")
            except OSError:
                fake.num_aborted += 1

    def send(self, **chunk) -> None:
        self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())


class FakeServer:
    """Runs in threads until the `with` ends. key: what it asks for."""

    def __init__(self, key: str | None = None):
        self.key = key
        self.goes_on = threading.Event()  # until it is set, longer answers stop before their eleventh word
        self.goes_on.set()
        self.bodies: list[dict] = []
        self.num_streams = self.most_streams = self.num_aborted = 0
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.fake = self
        self.url = f"http://127.0.0.1:{self.server.server_port}/"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self.goes_on.set()
        self.server.shutdown()
        self.server.server_close()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a stream while it lasts."""
        with self.lock:
            self.num_streams += 1
            self.most_streams = max(self.most_streams, self.num_streams)
        try:
            yield
        finally:
            with self.lock:
                self.num_streams -= 1
