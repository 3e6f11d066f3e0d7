"""The metrics under vLLM's names, and the dashboard that draws them."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

from common.course import ROOT  # noqa: E402
from common.tests.serving.conftest import eventually, held, make_engine, serving  # noqa: E402

PARTS = ("request_prefill_time", "request_decode_time")
PROMPT = "There was once a thoughtful toad. " * 8


def read(url: str) -> dict[str, float]:
    """All samples, by name and, where there is one, the last label."""
    found = {}
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if match := re.fullmatch(r"vllm:(\w+)\{(.*)\} (\S+)", line):
            reason = re.search(r'finished_reason="(\w+)"', match[2])
            bucket = re.search(r'le="([^"]+)"', match[2])
            suffix = reason or bucket
            found[match[1] + (f" {suffix[1]}" if suffix else "")] = float(match[3])
            assert 'model_name="tales"' in match[2]
    return found


def test_what_is_counted():
    with serving(make_engine(speculative="tales-draft", adaptive_speculation=False)) as (url, server):
        before = read(url)
        assert before["num_requests_running"] == before["kv_cache_usage_perc"] == before["generation_tokens_total"] == 0
        body = {"prompt": PROMPT, "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        usages = [httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()["usage"] for _ in range(2)]
        after = read(url)
        num_prompt_tokens = usages[0]["prompt_tokens"]
        assert after["prompt_tokens_total"] == after["prefix_cache_queries_total"] == 2 * num_prompt_tokens
        assert after["prefix_cache_hits_total"] == usages[1]["prompt_tokens_details"]["cached_tokens"] > 0
        assert after["generation_tokens_total"] == 40 and after["request_success_total length"] == 2
        assert 0 < after["spec_decode_num_accepted_tokens_total"] <= after["spec_decode_num_draft_tokens_total"]
        for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", *PARTS):
            assert after[f"{name}_seconds_count"] == after[f"{name}_seconds_bucket +Inf"] == 2
            assert after[f"{name}_seconds_sum"] > 0
        parts = sum(after[f"{name}_seconds_sum"] for name in ("request_queue_time", *PARTS))
        assert parts == pytest.approx(after["e2e_request_latency_seconds_sum"], abs=1e-6)
        assert 2 <= after["inter_token_latency_seconds_count"] <= 38  # a step may bring several tokens
        assert after["request_generation_tokens_bucket 20.0"] == 2 == after["request_prompt_tokens_count"]

        body = {**body, "max_tokens": 800, "stream": True}
        with (
            held(server.loop.engine),
            httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            during = read(url)
            assert during["num_requests_running"] == 1 and 0 < during["kv_cache_usage_perc"] < 1
        eventually(lambda: read(url).get("request_success_total abort") == 1)
        eventually(lambda: read(url)["num_requests_running"] == 0)


def test_the_dashboard_draws_what_is_measured(url):
    dashboard = json.loads((ROOT / "common" / "serving" / "grafana.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    drawn = {name for expression in expressions for name in re.findall(r"vllm:(\w+)", expression)}
    text = httpx.get(f"{url}/metrics").text
    known = {name for _, name, _ in re.findall(r"^# TYPE (vllm:(\w+)) (\w+)$", text, re.MULTILINE)}
    known |= {f"{name}_bucket" for name in known}
    assert len(dashboard["panels"]) >= 8 and drawn <= known, drawn - known
    places = [tuple(panel["gridPos"].values()) for panel in dashboard["panels"]]
    assert len(set(places)) == len(places) and len({panel["id"] for panel in dashboard["panels"]}) == len(places)
