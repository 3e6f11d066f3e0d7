#!/bin/sh
# openai 3.57.0 (the Python client): an answer that is streamed and ends without "[DONE]" and without a `finish_reason`, as a
# server sends it that dies or is stopped behind a proxy which closes the response in an orderly way.
# One would guess an error, as there is one when bytes of the response are missing. Observed: the loop just ends, with half
# an answer; the helper `chat.completions.stream` returns it as the final completion, with `finish_reason` None. An error
# within the stream is raised only if its data has the key "error": a bare {"object": "error", ...} is handed over as a chunk
# without choices. Clients have to look at `finish_reason`; a server has to send {"error": ...}, closing is no message.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check openai==3.57.0
cat > "$dir/observe.py" <<'EOF'
import http.server
import json
import threading
import openai

def event(data):
    return b"data: " + json.dumps(data).encode() + b"\n\n"

def text(content):
    choice = {"index": 0, "delta": {"content": content}, "finish_reason": None}
    return event({"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]})

class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("transfer-encoding", "chunked")
        self.end_headers()
        body, is_whole = self.server.answer
        self.wfile.write(b"%x\r\n%s\r\n" % (len(body), body) + (b"0\r\n\r\n" if is_whole else b""))
        self.close_connection = True

    def log_message(self, *arguments):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="x", max_retries=0)
request = dict(model="m", messages=[{"role": "user", "content": "hello"}])

def streamed(*events, is_whole=True):
    server.answer = b"".join(events), is_whole
    chunks = []
    try:
        for chunk in client.chat.completions.create(stream=True, **request):
            chunks.append(chunk.choices[0].delta.content if chunk.choices else chunk.choices)
        end = "no error"
    except openai.APIError as error:
        end = type(error).__name__
    print(chunks, end, flush=True)
    return chunks, end

half = text("Half"), text(" an")
assert streamed(*half, is_whole=False)[1] == "APIConnectionError"
assert streamed(*half) == (["Half", " an"], "no error")
assert streamed(*half, event({"error": {"message": "the engine died"}})) == (["Half", " an"], "APIError")
assert streamed(*half, event({"object": "error", "message": "the engine died"})) == (["Half", " an", None], "no error")
server.answer = b"".join(half), True
with client.chat.completions.stream(**request) as stream:
    choice = stream.get_final_completion().choices[0]
print("the helper's final completion:", choice.message.content, choice.finish_reason)
assert (choice.message.content, choice.finish_reason) == ("Half an", None)
EOF
"$dir/venv/bin/python" "$dir/observe.py"
