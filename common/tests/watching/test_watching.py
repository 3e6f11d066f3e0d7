"""The recorder, its trace and what follows from it, beside what the engine itself says."""

from __future__ import annotations

import io
import json
import random
from dataclasses import asdict
from itertools import pairwise
from types import SimpleNamespace

import pytest

from common.authoring.soak.load import Pipelined
from common.authoring.soak.requests import Letters, random_model
from common.config import EngineConfig
from common.course import CourseError
from common.watching import read_trace, recording, totals
from common.watching.chrome import chrome_events
from common.watching.trace import Replay
from solutions.batching import Engine
from solutions.llama_pytorch import SamplingParams
from solutions.paged_attention import PagedKVCache
from solutions.speculative import AdaptiveSpeculation, DraftProposer, SpeculativeRunner


class HalfRight(DraftProposer):
    """Proposes what the target itself would say, or, half of the time, anything."""

    def __init__(self, model, cache):
        super().__init__(model, cache)
        self.rng = random.Random(0)

    def draw(self, draft, logits):
        return self.rng.randrange(4, 40) if self.rng.random() < 0.5 else int(logits.argmax()), None


def tiny_engine(depth: int = 1, window: int | None = None, **options) -> Engine:
    """Random weights; a few draft tokens after each token, half of them right; a pool that is too small for all."""
    model = random_model(**({"model_type": "mistral", "sliding_window": window} if window else {}))
    options = {"num_blocks": 24, "block_size": 4, "max_num_batched_tokens": 24, "max_model_len": 64, **options}
    config = EngineConfig(**options).resolve(model.config, 1)
    caches = [PagedKVCache(model, config.num_blocks, config.block_size, config.num_host_blocks) for _ in range(2)]
    speculation = HalfRight(model, caches[1]), AdaptiveSpeculation(3, is_adaptive=False)
    return Engine(Pipelined(SpeculativeRunner(model, caches[0], *speculation), depth), Letters(), config)


def ask(engine: Engine, num_requests: int = 32) -> None:
    """Prompts of which many begin alike, one of them with four samples."""
    rng = random.Random(1)
    stem = [rng.randint(4, 39) for _ in range(12)]
    for i in range(num_requests):
        prompt = stem[: rng.choice([4, 8, 12])] + rng.choices(range(4, 39), k=rng.randint(1, 6))
        params = SamplingParams(max_tokens=rng.randint(4, 16), n=4 if i == 3 else 1, temperature=i % 2, seed=i)
        engine.add_request(prompt, params, tenant="ab"[i % 2], priority=i % 3)


def run(engine: Engine, file: io.TextIOBase, **options) -> list[str]:
    with recording(engine, file, **options):
        ask(engine)
        found = {}
        while engine.has_unfinished_requests:
            found |= {output.request_id: output.text for output in engine.step() if output.finish_reason}
    return sorted(found.items())


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"preemption": "swap", "scheduling_policy": "fair"},
        {"preemption": "swap", "num_host_blocks": 3, "scheduling_policy": "priority"},
        {"depth": 3},
        {"kv_cache_policy": "contiguous", "num_blocks": 6},
    ],
    ids=["recompute", "swap", "few on the host", "three in flight", "contiguous"],
)
def recorded(request, tmp_path_factory):
    """An engine after its run, and its trace."""
    engine, file = tiny_engine(**request.param), tmp_path_factory.mktemp("trace") / "run.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        run(engine, lines)
    return engine, file


def assert_same_numbers(engine: Engine, file) -> None:
    trace = read_trace(file)
    expected, found = asdict(engine.metrics()), asdict(totals(trace))
    assert found.pop("seconds") == pytest.approx(expected.pop("seconds"), abs=1e-6 * len(trace.steps))
    assert found == expected
    assert trace.lines[-1]["metrics"].items() >= expected.items()
    assert all(step.lost == step.miscounted == 0 for step in trace.steps)


def test_the_trace_says_what_the_engine_says(recorded):
    engine, file = recorded
    assert_same_numbers(engine, file)
    metrics = engine.metrics()
    assert metrics.num_finished == 35 and 0 < metrics.num_accepted_tokens < metrics.num_draft_tokens
    if engine.config.kv_cache_policy == "paged":
        assert metrics.num_preemptions > 2 and metrics.num_cached_tokens > 50


def test_after_every_step_the_trace_has_the_engine_s_tables_counts_and_waiting_line(tmp_path):
    engine, states, file = tiny_engine(preemption="swap", scheduling_policy="fair"), [], tmp_path / "run.jsonl"
    with file.open("w", encoding="utf-8") as lines, recording(engine, lines) as recorder:
        ask(engine)
        while engine.has_unfinished_requests:
            engine.step()
            tables = {recorder.number[id]: engine.manager.block_table(id) for id in engine.manager.block_tables}
            computed = {recorder.number[id]: each.num_computed_tokens for id, each in engine.scheduler.requests.items()}
            counts = [block.ref_cnt for block in engine.manager.pool.blocks]
            cached = {block.block_id for block in engine.manager.pool.blocks if block.block_hash}
            line = sorted(engine.scheduler.waiting, key=engine.scheduler.rank)
            states.append((tables, counts, cached, computed, [recorder.number[each.request_id] for each in line]))
    replay, seen = Replay(24), []
    for line in read_trace(file).lines:
        replay.apply(line)
        if "result" in line:
            tables = {k: table for k, table in replay.tables.items() if table}
            seen.append((tables, list(replay.counts), set(replay.cached), dict(replay.computed), replay.waiting))
    assert seen == states and len({tuple(line) for *_, line in states}) > 20


def test_blocks_that_a_sliding_window_has_passed_are_free_and_not_lost(tmp_path):
    engine, file, states = tiny_engine(window=8), tmp_path / "run.jsonl", []
    with file.open("w", encoding="utf-8") as lines, recording(engine, lines) as recorder:
        ask(engine)
        while engine.has_unfinished_requests:
            engine.step()
            manager = engine.manager
            tables = {
                recorder.number[id]: [-1 if block is manager.dropped else block.block_id for block in table]
                for id, table in manager.block_tables.items()
            }
            states.append((tables, manager.pool.num_free_blocks))
    assert_same_numbers(engine, file)
    replay, seen = Replay(24), []
    for line in read_trace(file).lines:
        replay.apply(line)
        if "result" in line:
            seen.append(({k: table for k, table in replay.tables.items() if table}, line["free"]))
    assert seen == states and engine.metrics().num_preemptions > 0
    assert any(table[:2] == [-1, -1] for tables, _ in seen for table in tables.values())


def test_what_is_recorded_says_why(recorded):
    engine, file = recorded
    trace, is_recomputed = read_trace(file), False
    for step in trace.steps:
        for victim, cause, lacks, free, candidates in step.plan.get("preempt", ()):
            assert lacks > free
            numbers, ranks = [number for number, *_ in candidates], [rank for _, *rank in candidates]
            assert numbers[-1] == victim and cause in numbers and ranks == sorted(ranks)
            assert len(ranks[0]) == (2 if engine.config.scheduling_policy == "fcfs" else 3)
            assert victim not in {entry.request for entry in step.entries}
            is_recomputed |= str(victim) not in step.plan.get("host", {})
        if "refused" in step.plan:
            _, num_blocks = step.plan["refused"]
            assert num_blocks > step.plan["free"] or engine.config.enable_prefix_caching
    kinds = {entry.kind for step in trace.steps for entry in step.entries}
    assert {"prefill", "decode", "verify"} <= kinds and ("recompute" in kinds) == is_recomputed


def test_an_engine_is_the_same_with_a_recorder_and_afterwards(tmp_path):
    plain, watched = tiny_engine(), tiny_engine()
    ask(plain)
    found = {}
    while plain.has_unfinished_requests:
        found |= {output.request_id: output.text for output in plain.step() if output.finish_reason}
    assert run(watched, io.StringIO()) == sorted(found.items())
    for owner in ("scheduler", "executor", "totals"):
        assert vars(getattr(watched, owner)).keys() == vars(getattr(plain, owner)).keys()
    assert vars(watched.manager.pool).keys() == vars(plain.manager.pool).keys()


def test_a_trace_names_models_and_not_the_folders_in_which_they_lie():
    engine, lines = tiny_engine(), io.StringIO()
    engine.config = SimpleNamespace(**{**vars(engine.config), "model": "/a/tales", "speculative": "/b/draft"})
    with recording(engine, lines):
        pass
    head = json.loads(lines.getvalue().splitlines()[0])
    assert (head["model"], head["config"]["speculative"]) == ("tales", "draft")


def test_an_interrupted_step_and_an_abort_leave_no_gap(tmp_path):
    engine, file = tiny_engine(), tmp_path / "run.jsonl"
    execute, calls = engine.executor.runner.execute, iter(range(10**6))

    def interrupted(plan, hidden=None):
        if next(calls) == 12:
            raise KeyboardInterrupt
        return execute(plan, hidden)

    engine.executor.runner.execute = interrupted
    with file.open("w", encoding="utf-8") as lines, recording(engine, lines):
        ask(engine)
        engine.abort("request-20")  # before any step
        while engine.has_unfinished_requests:
            try:
                engine.step()
            except KeyboardInterrupt:
                engine.abort("request-1")
        engine.add_request([5, 6], SamplingParams(max_tokens=2), request_id="request-1")  # an id of old
        while engine.has_unfinished_requests:
            engine.step()
    trace = read_trace(file)
    assert sum("reset" in line for line in trace.lines) == 1 and sum(step.result is None for step in trace.steps) == 1
    assert_same_numbers(engine, file)


def test_texts_are_the_outputs(recorded):
    _, file = recorded
    pieces, vocab = {}, {}
    trace = read_trace(file)
    for line in trace.lines:
        vocab |= line.get("vocab", {})
    for step in trace.steps:
        for entry in step.entries:
            own = step.result.get("text", {}).get(str(entry.request))
            text = "".join(vocab[str(token)] for token in entry.sampled) if own is None else own
            pieces[entry.request] = pieces.get(entry.request, "") + text
    found = {trace.requests[k]["id"]: text for k, text in pieces.items()}
    again = tiny_engine(num_blocks=400, max_num_batched_tokens=400)  # never short of blocks: the same texts
    assert sorted(found.items()) == run(again, io.StringIO())


def test_a_leaked_block_is_seen_in_the_step_in_which_it_leaks(tmp_path):
    engine, file = tiny_engine(num_blocks=60), tmp_path / "run.jsonl"
    manager, steps = engine.manager, []

    def leaking(request) -> None:
        table = manager.block_tables.pop(request.request_id, [])
        if len(steps) < 3 and len(table) > 1 and table[-1].ref_cnt == 1:
            table = table[:-1]
            steps.append(engine.scheduler.step_id)
        manager.pool.free_blocks(reversed(table))
        manager.block_hashes.pop(request.request_id, None)

    manager.free = leaking
    with file.open("w", encoding="utf-8") as lines:
        run(engine, lines)
    lost = {step.number: step.lost for step in read_trace(file).steps if step.lost == step.miscounted}
    assert steps and all(lost[step - 1] < lost[step] for step in set(steps)) and max(lost.values()) == len(steps)


def test_chrome_events_are_spans_within_their_steps(recorded):
    _, file = recorded
    trace = read_trace(file)
    events = json.loads(json.dumps(chrome_events(trace)))["traceEvents"]
    assert all({"ph", "name", "pid", "tid", "ts"} <= each.keys() and each["ts"] >= 0 for each in events)
    spans = [each for each in events if each["ph"] == "X" and each["pid"] == 3]
    assert len(spans) == sum(len(step.entries) for step in trace.steps)
    assert sum(each["args"]["tokens"] for each in spans) == totals(trace).num_computed_tokens
    assert {each["ph"] for each in events} == {"M", "X", "C", "i"}
    # What the format asks of each kind. Spans of a thread may be nested; Perfetto drops one that overlaps another.
    for each in events:
        assert all(isinstance(each[name], int) for name in ("ts", "pid", "tid")), each
        assert each["ph"] != "i" or each["s"] in ("g", "p", "t"), each
        assert each["ph"] != "C" or all(isinstance(value, int) for value in each["args"].values()), each
        assert each["ph"] != "M" or (each["name"] in ("process_name", "thread_name") and each["args"]["name"]), each
    threads = {(each["pid"], each["tid"]) for each in events if each["ph"] == "X"}
    assert not {tid for _, tid in threads} & {0, 1, 2, 3}  # Perfetto takes 0 and a process' own id for one thread
    for thread in threads:
        own = [each for each in events if each["ph"] == "X" and (each["pid"], each["tid"]) == thread]
        times = sorted((each["ts"], each["ts"] + each["dur"]) for each in own)
        assert all(one[1] <= other[0] for one, other in pairwise(times)), thread


@pytest.mark.parametrize("text", ["", "{}", '{"trace": 2, "config": {}}', "<html>", "[1]"])
def test_another_file_is_refused_in_a_sentence(tmp_path, text):
    file = tmp_path / "a.jsonl"
    file.write_text(text)
    with pytest.raises(CourseError, match=r"a\.jsonl is (not a trace|a trace of version 2)"):
        read_trace(file)


def test_a_trace_that_breaks_off_is_read_as_far_as_it_goes(recorded, tmp_path):
    _, file = recorded
    lines = file.read_text(encoding="utf-8").splitlines()
    part = tmp_path / "part.jsonl"
    part.write_text("\n".join(lines[:21]))
    trace = read_trace(part)
    assert 0 < len(trace.steps) <= 20 and totals(trace).num_steps > 0


def test_the_command_records_compares_and_explains(tmp_path, capsys, monkeypatch):
    from common.__main__ import main

    monkeypatch.setenv("COURSE_PYTHON", "here")

    def call(*words: str) -> tuple[int, str]:
        code = main(["watch-engine", "--model", "tales", "--max-tokens", "4", *words])
        return code, "".join(capsys.readouterr())

    tmp_path = tmp_path / "new"
    page, other, events = tmp_path / "a.html", tmp_path / "b.html", tmp_path / "a.json"
    code, said = call("--out", str(page), "--trace", str(events), "--samples", "2", "--num-blocks", "50")
    assert code == 0 and f"Open {page}" in said, said
    assert len(read_trace(tmp_path / "a.jsonl").requests) == 16
    assert json.loads(events.read_text())["traceEvents"]
    code, said = call("--out", str(other), "--compare", str(tmp_path / "a.jsonl"), "--num-blocks", "30")
    assert code == 0, said
    html = other.read_text(encoding="utf-8")
    assert "http:" not in html and "https:" not in html and "src=" not in html
    assert len(html) > len(page.read_text(encoding="utf-8"))
    assert call("--out", str(page), "--compare", str(tmp_path / "a.jsonl"))[0] == 2
    assert call("--out", "page.pdf")[0] == 2 and call("--max-model-len", "2", "--out", str(page))[0] == 2
