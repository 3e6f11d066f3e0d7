"""`make serve`, before it serves: each wrong option is named in a sentence, and the addresses that it prints exist."""

from __future__ import annotations

import socket

import pytest

pytest.importorskip("fastapi")

from common.__main__ import main
from common.serving.command import is_loopback, listen
from common.serving.server import threads_of_each
from common.start import OptionError


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    monkeypatch.setenv("COURSE_PYTHON", "here")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("common.serving.command.ensure", lambda *arguments: pytest.fail("the extra was installed"))
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
        (["--replicas", "9999"], "too few processors for REPLICAS=9999: each needs 1 of one machine, and the machine "),
        (["--replicas", "2", "--keys", "nowhere.toml"], "nowhere.toml: No such file"),
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


def test_replicas_get_as_many_threads_as_the_machines_of_a_cluster_have_processors_for():
    assert threads_of_each(4, [2, 2], None) == 1
    assert threads_of_each(3, [16, 8], None) == 8
    assert threads_of_each(2, [3, 5], None) == 3 and threads_of_each(2, [3, 5], 2) == 2
    for too_many in ((5, [2, 2], None), (2, [3, 5], 4), (2, [0, 1], None)):
        with pytest.raises(OptionError, match=f"too few processors for REPLICAS={too_many[0]}"):
            threads_of_each(*too_many)


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
