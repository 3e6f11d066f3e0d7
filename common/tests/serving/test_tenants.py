"""Keys, limits, fair shares, and caches that do not tell."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from common.serving.errors import QueueFull  # noqa: E402
from common.serving.tenants import Tenant, Tenants, load_tenants  # noqa: E402
from common.start import OptionError  # noqa: E402
from common.tests.serving.conftest import eventually, held, make_engine, serving  # noqa: E402

LONG = {"prompt": "There was once a", "max_tokens": 300, "ignore_eos": True, "temperature": 0}


def keyed(key: str) -> dict:
    return {"headers": {"Authorization": f"Bearer {key}"}, "timeout": 60}


def test_keys_name_tenants():
    tenants = Tenants([Tenant("alice", "a-key"), Tenant("bob", "b-key")])
    assert tenants.find("Bearer a-key").name == "alice" and tenants.find("bearer b-key").name == "bob"
    for wrong in (None, "", "Bearer", "Bearer a-ke", "Bearer a-key2", "Basic a-key", "a-key", "Bearer é"):
        assert tenants.find(wrong) is None, wrong
    assert Tenants([]).find(None).name == "default"


def test_a_file_of_keys(tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text('[alice]\nkey = "x"\nmax_concurrent_requests = 2\n[bob]\nkey = "y"\nisolate_prefix_cache = false\n')
    alice, bob = load_tenants(file).tenants
    assert (alice.name, alice.max_concurrent_requests, alice.tokens_per_minute) == ("alice", 2, None)
    assert (
        alice.salt(None) == "alice" and alice.salt("s") == "alice/s" and bob.salt(None) == "" and bob.salt("s") == "s"
    )
    for text, words in (
        ("", "no tenant is in it"),
        ("[alice]\n", "alice.* has no key"),
        ('key = "x"\n', "stands outside of a table"),
        ('[alice]\nkey = ""\n', "key must be a text that is not empty"),
        ('[alice]\nkey = "x"\ntokens = 5\n', "has the field tokens; the fields are key, "),
        ('[alice]\nkey = "x"\ntokens_per_minute = 0\n', "must be a whole number of at least 1; it is 0"),
        ('[a]\nkey = "x"\n[b]\nkey = "x"\n', "two tenants have the same key"),
        ("[a\n", "keys.toml"),
    ):
        file.write_text(text)
        with pytest.raises(OptionError, match=words):
            load_tenants(file)
    with pytest.raises(OptionError, match="nowhere"):
        load_tenants(tmp_path / "nowhere")


def test_tokens_come_back_evenly():
    now = [0.0]
    tenant = Tenant("alice", "x", tokens_per_minute=60, clock=lambda: now[0])
    tenant.admit()
    tenant.spend(90)  # an answer may be longer than what is left; then it is owed
    with pytest.raises(QueueFull, match="has used its 60 tokens a minute") as refused:
        tenant.admit()
    assert refused.value.headers == {"Retry-After": "30"}
    now[0] = 29.0
    with pytest.raises(QueueFull):
        tenant.admit()
    now[0] = 31.0
    tenant.admit()
    now[0] = 1000.0
    tenant.spend(0)
    assert tenant.tokens_left == 60  # what is not used is not saved up


@pytest.fixture(scope="module")
def office():
    """Two tenants at one engine that serves one request at a time."""
    tenants = Tenants([Tenant("alice", "a", 2), Tenant("bob", "b", tokens_per_minute=1000)])
    with serving(make_engine(max_batch_size=1, scheduling_policy="fair"), tenants) as found:
        yield found


def test_every_route_but_health_and_the_page_needs_a_key(office):
    url, _ = office
    paths = httpx.get(f"{url}/openapi.json", **keyed("a")).json()["paths"]
    for path, operations in paths.items():
        for method in operations:
            for headers in ({}, {"Authorization": "Bearer c"}, {"Authorization": "a"}):
                answer = httpx.request(method, url + path.replace("{model}", "tales"), headers=headers)
                is_open = path in ("/health", "/ping")
                assert answer.status_code == (200 if is_open else 401), (path, headers)
                assert is_open or answer.json()["error"]["code"] == "invalid_api_key"
    for path in ("/docs", "/openapi.json", "/nothing"):
        assert httpx.get(url + path).status_code == 401
    assert httpx.get(f"{url}/").status_code in (200, 404)
    assert httpx.get(f"{url}/v1/models", **keyed("b")).status_code == 200


def test_a_tenant_s_limit_of_requests_is_its_own(office):
    url, server = office
    threads = [
        threading.Thread(target=httpx.post, args=(f"{url}/v1/completions",), kwargs={"json": LONG, **keyed("a")})
        for _ in range(2)
    ]
    alice = server.tenants.tenants[0]
    with held(server.loop.engine):
        for thread in threads:
            thread.start()
        eventually(lambda: alice.num_requests == 2)
        refused = httpx.post(f"{url}/v1/completions", json=LONG, **keyed("a"))
    assert refused.status_code == 429 and refused.headers["Retry-After"] and "alice" in refused.text
    assert httpx.post(f"{url}/v1/completions", json={**LONG, "max_tokens": 2}, **keyed("b")).status_code == 200
    for thread in threads:
        thread.join()
    eventually(lambda: alice.num_requests == 0)


def test_a_tenant_that_asks_for_much_does_not_hold_up_another(office, monkeypatch):
    """Two of alice's requests wait for one place; bob's comes last and is served before the second."""
    url, server = office
    ended: list[int] = []
    on_end = server.loop.metrics.on_end
    monkeypatch.setattr(
        server.loop.metrics,
        "on_end",
        lambda output, reason: (ended.append(len(output.token_ids)), on_end(output, reason)),
    )
    threads = []
    with held(server.loop.engine):  # until all three are there
        for key, num_tokens in (("a", 30), ("a", 40), ("b", 5)):
            body = {**LONG, "max_tokens": num_tokens}
            threads.append(
                threading.Thread(
                    target=httpx.post, args=(f"{url}/v1/completions",), kwargs={"json": body, **keyed(key)}
                )
            )
            threads[-1].start()
            eventually(lambda: server.loop.num_sequences == len(threads))
    for thread in threads:
        thread.join()
    assert ended == [30, 5, 40]


def test_tokens_a_minute_over_http(office):
    url, server = office
    bob = server.tenants.tenants[1]
    bob.spend(2000)
    refused = httpx.post(f"{url}/v1/completions", json=LONG, **keyed("b"))
    assert refused.status_code == 429 and int(refused.headers["Retry-After"]) > 30
    bob.tokens_left = 1000.0
    before = bob.tokens_left
    usage = httpx.post(f"{url}/v1/completions", json={**LONG, "max_tokens": 50}, **keyed("b")).json()["usage"]
    assert bob.tokens_left < before and usage["total_tokens"] == 55


def test_one_tenant_does_not_see_what_another_has_asked(office):
    url, _ = office
    body = {"prompt": "The cat and the fox sat by the fire. " * 4, "max_tokens": 2}

    def cached(key: str, **options) -> int:
        answer = httpx.post(f"{url}/v1/completions", json={**body, **options}, **keyed(key))
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("a") == 0 and cached("b") == 0 and cached("a") == cached("b") > 0
    assert cached("a", cache_salt="mine") == 0 and cached("a", cache_salt="mine") > 0
