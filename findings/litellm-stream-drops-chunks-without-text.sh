#!/bin/sh
# litellm 1.110.2 before openai 3.57.0: a streamed chat answer with log-probabilities, from a server that speaks OpenAI's API.
# A token can have no text of its own: the first half of a character, or what a parser of tool calls holds back. vLLM sends a
# chunk for it with empty text and its log-probability, and one would guess that a proxy passes it on, as openai's client does.
# Observed: litellm drops every chunk without text, so the log-probabilities of these tokens are missing and the rest no longer
# line up with the tokens; with n = 2 it drops the `finish_reason` of the second answer. One that stands in a chunk with text, or in
# the last chunk with its `finish_reason`, gets through: a server can keep log-probabilities until then.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check litellm==1.110.2 openai==3.57.0
cat > "$dir/observe.py" <<'EOF'
import http.server
import json
import os
import threading
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # do not fetch prices
import litellm
import openai

def event(text, token=None, reason=None, index=0):
    scores = {"content": [{"token": token, "logprob": -1.0, "bytes": None, "top_logprobs": []}]} if token else None
    choice = {"index": index, "delta": {"content": text}, "logprobs": scores, "finish_reason": reason}
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        self.wfile.write(self.server.answer + b"data: [DONE]\n\n")

    def log_message(self, *arguments):
        pass

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1"
request = dict(messages=[{"role": "user", "content": "hello"}], stream=True, logprobs=True)

def streamed(*events, n=1):
    """Of both clients, the tokens with a log-probability and the reasons for finishing."""
    server.answer = b"".join(events)
    direct = openai.OpenAI(base_url=url, api_key="x").chat.completions.create(model="m", n=n, **request)
    proxied = litellm.completion(model="openai/m", api_base=url, api_key="x", n=n, **request)
    found = []
    for name, chunks in (("openai", direct), ("litellm", proxied)):
        choices = [choice for chunk in chunks for choice in chunk.choices]
        scores = [getattr(choice, "logprobs", None) for choice in choices]
        tokens = [token.token for score in scores if score for token in score.content]
        reasons = [(choice.index, choice.finish_reason) for choice in choices if choice.finish_reason]
        print(f"{name:8}", tokens, reasons, flush=True)
        found.append((tokens, reasons))
    return found

end = [(0, "stop")]
halves = event("a", "a"), event("", "<0xC3>"), event("\u00e9", "<0xA9>")
assert streamed(*halves, event("", reason="stop")) == [(["a", "<0xC3>", "<0xA9>"], end), (["a", "<0xA9>"], end)]
assert streamed(event("a", "a"), event("", "</s>", "stop")) == [(["a", "</s>"], end)] * 2
two = event("a"), event("b", index=1), event("", reason="stop"), event("", reason="length", index=1)
assert streamed(*two, n=2) == [([], [(0, "stop"), (1, "length")]), ([], end)]
EOF
"$dir/venv/bin/python" "$dir/observe.py"
