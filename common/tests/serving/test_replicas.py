"""Two replicas behind nginx, with the configuration that the README recommends."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from common.bench.serving import complete
from common.tests.serving.conftest import accepts, begin, eventually, held, is_empty, make_engine, serving

NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
CONFIGURATION = Path(__file__).parents[2] / "serving" / "nginx.conf"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path(NGINX).exists(), reason="needs nginx, which apt-get install nginx-light brings"),
]
BODY = {"prompt": [7] * 64, "max_tokens": 8, "ignore_eos": True, "temperature": 0}
LONG = {**BODY, "max_tokens": 400}


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def balanced(folder: Path, urls: list[str]) -> Iterator[int]:
    """nginx before two servers, until the `with` ends. Yields its port."""
    folder.chmod(0o777)
    for _ in range(5):  # another process may take the port before nginx does
        port = free_port()
        text = CONFIGURATION.read_text().replace("listen 127.0.0.1:8000", f"listen 127.0.0.1:{port}")
        for number, url in enumerate(urls, 1):
            text = text.replace(f"127.0.0.1:800{number}", url.removeprefix("http://"))
        (folder / "nginx.conf").write_text(text)
        process = subprocess.Popen([NGINX, "-p", folder, "-c", folder / "nginx.conf", "-g", "daemon off;"])
        eventually(lambda port=port, process=process: process.poll() is not None or accepts(port))
        if process.poll() is None:
            break
    try:
        assert process.poll() is None, "nginx did not start"
        yield port
    finally:
        process.terminate()
        process.wait(120)


def ask(port: int, body: dict = BODY):
    return asyncio.run(asyncio.wait_for(complete(port, body), 120))


def test_a_client_stays_with_its_replica_and_moves_when_it_is_gone(tmp_path) -> None:
    replicas = [contextlib.ExitStack(), contextlib.ExitStack()]
    with replicas[0], replicas[1]:
        urls, servers = zip(*(stack.enter_context(serving(make_engine())) for stack in replicas))
        engines = [server.loop.engine for server in servers]
        with balanced(tmp_path, urls) as port:
            expected = ask(port)
            for _ in range(4):
                answer = ask(port)
                assert answer.text == expected.text
            served = [engine.totals.num_finished for engine in engines]
            assert sorted(served) == [0, 5]  # all at one, whose prefix cache knows the prompt
            assert answer.usage["prompt_tokens_details"]["cached_tokens"] > 0
            used = served.index(5)
            with held(engines[used]):  # its second step comes after the client has left with the first one's token
                asyncio.run(asyncio.wait_for(complete(port, BODY, leave_after=1), 120))
            eventually(lambda: is_empty(engines[used]))
            engines[used].step = lambda: 1 / 0  # its engine dies: status 503, and nginx asks the other one
            assert ask(port).text == expected.text
            replicas[used].close()  # and then it refuses connections
            assert ask(port).text == expected.text
            assert engines[1 - used].totals.num_finished == 2


def test_an_answer_that_has_begun_is_not_begun_again(tmp_path) -> None:
    """A replica that dies in mid-answer: the client is told, since another replica cannot continue its tokens."""
    with serving(make_engine()) as (url1, server1), serving(make_engine()) as (url2, server2):
        with balanced(tmp_path, [url1, url2]) as port:
            stepped = []

            def die_at_the_second_step(engine, step):
                if engine in stepped[:1]:  # the other one does not
                    raise ZeroDivisionError
                stepped.append(engine)
                return step()

            async def die_in_the_middle() -> None:
                for server in (server1, server2):
                    engine = server.loop.engine
                    engine.step = partial(die_at_the_second_step, engine, engine.step)
                with pytest.raises(RuntimeError, match="the engine has stopped"):  # perhaps before `begin` looks again
                    await asyncio.wait_for(await begin(port, LONG), 120)

            asyncio.run(die_in_the_middle())
            assert ask(port).finish_reason == "length"
