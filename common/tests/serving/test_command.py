"""`make serve`, before it serves: each wrong option is named in a sentence, and the addresses that it prints exist."""

from __future__ import annotations

import socket

import pytest

pytest.importorskip("fastapi")

from common.__main__ import main
from common.serving.command import is_loopback, listen


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    monkeypatch.setenv("COURSE_PYTHON", "here")
    monkeypatch.setattr("common.serving.server.load_server", lambda *arguments: None)
    monkeypatch.setattr("common.serving.api.create_app", lambda server: None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--port", "abc"], "--port: 'abc' is not a valid integer"),
        (["--port", "65536"], "--port: 65536 is not in the range"),
        (["--host", "0.0.0.0"], "HOST=0.0.0.0 would let in anybody"),
        (["--host", "nowhere.invalid"], "would let in anybody"),
        (["--host", "127.0.0.1.5"], "would let in anybody"),
        (["--keys", "nowhere.toml"], "nowhere.toml: No such file"),
        (["--threads", "99999999999"], "--threads: 99999999999 is not in the range"),
        (["--replicas", "0"], "--replicas: it must be a whole number of at least 1"),
        (["--host", "nowhere.invalid", "--keys", "KEYS"], "HOST=nowhere.invalid PORT=8000 cannot be used: "),
        (["--host", "192.0.2.1", "--keys", "KEYS"], "HOST=192.0.2.1 PORT=8000 cannot be used: "),  # is another's
    ],
)
def test_a_wrong_option_is_named_in_a_sentence(options, words, tmp_path, capsys) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text('[alice]\nkey = "x"\n')
    assert main(["serve", *(str(keys) if each == "KEYS" else each for each in options)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


def test_a_port_that_is_taken_is_named(capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 2
    assert f"HOST=127.0.0.1 PORT={port} cannot be used: Address already in use." in capsys.readouterr().err


ADDRESSES = [("127.0.0.1", "localhost"), ("127.0.0.2", "127.0.0.2"), ("::1", "[::1]")]
ADDRESSES += [(each, socket.gethostname()) for each in ("0.0.0.0", "::")]


@pytest.mark.parametrize(("host", "shown"), ADDRESSES)
def test_the_printed_address_leads_to_the_server(host, shown) -> None:
    listening, url = listen(host, 0)
    with listening:
        port = listening.getsockname()[1]
        assert url == f"http://{shown}:{port}"
        assert is_loopback(host) == (host not in ("0.0.0.0", "::"))
        socket.create_connection((shown.strip("[]"), port)).close()
        if host in ("0.0.0.0", "::"):
            socket.create_connection(("127.0.0.1", port)).close()
