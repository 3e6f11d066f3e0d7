"""Our own OpenAPI page, fuzzed: nothing fails, and every answer is one that the page announces."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")
schemathesis = pytest.importorskip("schemathesis")

from hypothesis import HealthCheck, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import CHECKS, load_all_checks  # noqa: E402

from common.tests.serving.conftest import eventually, is_empty, make_engine, serving  # noqa: E402

WANTED = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")


@pytest.fixture(scope="module")
def small():
    """Answers are short, since the context is."""
    with serving(make_engine(max_model_len=64), max_waiting=150) as found:
        yield found


def fuzz(small, num_examples: int) -> int:
    """Send this many valid and as many invalid requests to each route. Returns how many were answered with success."""
    url, _ = small
    load_all_checks()
    checks = [CHECKS.get_one(name) for name in WANTED]
    num_successes = 0
    for result in schemathesis.openapi.from_url(f"{url}/openapi.json").get_all_operations():
        operation = result.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not list(operation.body):
                continue  # it takes nothing that could be wrong

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=num_examples,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            def ask(case):
                nonlocal num_successes
                if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):  # noqa: B023
                    case.body.pop("model", None)  # a random name would be refused before anything else is looked at
                response = case.call(timeout=60)
                case.validate_response(response, checks=checks)
                num_successes += response.status_code == 200

            ask()
    return num_successes


@pytest.mark.slow(30)
def test_many_requests_of_each_kind(small):
    assert fuzz(small, 100) > 100
    eventually(lambda: is_empty(small[1].loop.engine))
    assert small[1].loop.error is None and not small[1].loop.streams
