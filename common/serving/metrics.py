"""What the server measures, for Prometheus, under vLLM's names.

Gauges and most counters are read from the engine when they are asked for. Times are observed by the engine's thread.
`grafana.json` in this folder is a dashboard of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
LABELS = ("model_name", "engine")


class Metrics:
    """The metrics of one engine. The engine's thread says what happens to requests; `output` is a RequestOutput."""

    def __init__(self, engine: Any, model_name: str):
        self.engine = engine
        self.labels = (model_name, "0")
        self.registry = CollectorRegistry()
        self.registry.register(self)
        ProcessCollector(registry=self.registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"vllm:{name}", help, LABELS, registry=self.registry, buckets=buckets)
            return made.labels(*self.labels)

        self.first = histogram("time_to_first_token_seconds", "From arrival to the first token.", SECONDS)
        self.between = histogram("inter_token_latency_seconds", "Between two steps that brought tokens.", SECONDS)
        self.whole = histogram("e2e_request_latency_seconds", "From arrival to the end.", SECONDS)
        self.queued = histogram("request_queue_time_seconds", "From arrival to the first step.", SECONDS)
        self.prefill = histogram("request_prefill_time_seconds", "From the first step to the first token.", SECONDS)
        self.decode = histogram("request_decode_time_seconds", "From the first token to the end.", SECONDS)
        self.prompt_lengths = histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self.answer_lengths = histogram("request_generation_tokens", "Tokens of an answer.", TOKENS)

        def counter(name: str, help: str) -> Counter:
            return Counter(f"vllm:{name}", help, LABELS, registry=self.registry).labels(*self.labels)

        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, those found in the prefix cache included.")
        self.queries = counter("prefix_cache_queries", "Tokens of prompts that were looked up in the prefix cache.")
        self.hits = counter("prefix_cache_hits", "Tokens of prompts that were found there.")
        self.ended = Counter(
            "vllm:request_success", "Requests that have ended.", (*LABELS, "finished_reason"), registry=self.registry
        )

    def collect(self) -> Iterator[Metric]:
        """What the engine itself knows. Called in the event loop's thread; it reads lengths and numbers only."""
        scheduler, totals = self.engine.scheduler, self.engine.totals
        pool = scheduler.manager.pool
        gauges = {
            "num_requests_running": ("Requests that take part in steps.", len(scheduler.running)),
            "num_requests_waiting": ("Requests that wait for their first step, or again.", len(scheduler.waiting)),
            "kv_cache_usage_perc": ("Blocks in use, of all: 0 to 1.", 1 - pool.num_free_blocks / len(pool.blocks)),
        }
        counters = {
            "generation_tokens": ("Tokens of answers.", totals.num_output_tokens),
            "num_preemptions": ("Requests that had to give their blocks back.", totals.num_preemptions),
            "spec_decode_num_draft_tokens": ("Draft tokens that were verified.", totals.num_draft_tokens),
            "spec_decode_num_accepted_tokens": ("Of these, those that were accepted.", totals.num_accepted_tokens),
        }
        for family, metrics in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (help, value) in metrics.items():
                metric = family(f"vllm:{name}", help, labels=LABELS)
                metric.add_metric(self.labels, value)
                yield metric

    def on_tokens(self, output: Any, seconds: float | None) -> None:
        """A step has added tokens. seconds: since the step before that did; None for the first."""
        if seconds is None:
            self.first.observe(output.metrics.time_to_first_token or 0.0)
            self.queued.observe(output.metrics.queue_time or 0.0)
            self.prompt_tokens.inc(len(output.prompt_token_ids))
            self.queries.inc(len(output.prompt_token_ids))
            self.hits.inc(output.metrics.num_cached_tokens)
        else:
            self.between.observe(seconds)

    def on_end(self, output: Any, reason: str) -> None:
        """A request has ended: "stop", "length", "error" or "abort"."""
        self.ended.labels(*self.labels, reason).inc()
        now, times = time.perf_counter(), output.metrics
        self.whole.observe(now - times.arrival_time)
        if times.first_token_time is not None:
            self.prefill.observe(times.first_token_time - times.first_scheduled_time)
            self.decode.observe(now - times.first_token_time)
        self.prompt_lengths.observe(len(output.prompt_token_ids))
        self.answer_lengths.observe(len(output.token_ids))

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
