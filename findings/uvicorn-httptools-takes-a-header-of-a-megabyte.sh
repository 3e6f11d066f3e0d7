#!/bin/sh
# uvicorn 0.54: a request whose header has a megabyte, with either of its two parsers of HTTP.
# One would guess that both refuse it: h11 does, above 64 KB, and a package that makes a server faster changes no limit.
# Observed: once httptools is installed, as `uvicorn[standard]` or another package brings it, uvicorn takes it without
# being told, and the application gets the whole header. `h11_max_incomplete_event_size` has no counterpart there.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --disable-pip-version-check uvicorn==0.54.0 httptools==0.9.0
cat > "$dir/observe.py" <<'EOF'
import asyncio
import socket
import uvicorn

async def app(scope, receive, send):
    body = str(sum(len(value) for name, value in scope["headers"] if name == b"x-long")).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})

def ask(port):
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(20)
        try:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Long: " + b"x" * 2**20 + b"\r\n\r\n")
        except ConnectionError:
            pass  # refused before all was sent
        try:
            return client.makefile("rb").read()
        except ConnectionError:
            return b"(closed)"

async def observe(**options):
    config = uvicorn.Config(app, port=0, lifespan="off", log_level="critical", **options)
    listening = config.bind_socket()
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started:
        await asyncio.sleep(0.01)
    answer = await asyncio.to_thread(ask, listening.getsockname()[1])
    server.should_exit = True
    await task
    return answer.split(b"\r\n")[0].decode(), answer.split(b"\r\n\r\n")[-1].decode()[-40:]

h11, default = asyncio.run(observe(http="h11")), asyncio.run(observe())
print("h11:", *h11, "| with httptools installed:", *default)
assert "200" not in h11[0] and default == ("HTTP/1.1 200 OK", str(2**20)), (h11, default)
EOF
"$dir/venv/bin/python" "$dir/observe.py"
