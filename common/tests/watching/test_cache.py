"""Lesson 3's cache, watched through a conversation, and the pictures of a trace."""

from __future__ import annotations

import pytest

from common.course import CourseError
from common.watching import read_trace, totals
from common.watching.cache import record_cache, watch_cache
from common.watching.figure import COLORS, draw_run
from solutions import kv_cache


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("cache") / "run.jsonl"
    text = record_cache(file)
    assert text.startswith("There was once a small owl who lived by the sea.") and "The owl" in text
    return file


def test_each_turn_computes_what_is_not_in_the_cache(file):
    trace = read_trace(file)
    prefills = [entry for step in trace.steps for entry in step.entries if entry.kind == "prefill"]
    first, second, third = (request["prompt"] for request in trace.requests)
    shared = next(i for i, (a, b) in enumerate(zip(first, second)) if a != b)
    assert [entry.start for entry in prefills] == [0, shared, len(second) + 11]  # the newest token was never computed
    assert [entry.start + entry.num_tokens for entry in prefills] == [len(first), len(second), len(third)]
    assert totals(trace).num_output_tokens == 36 and totals(trace).num_finished == 3
    assert all(step.lost == 0 and step.num_free == 48 - step.num_stored for step in trace.steps if step.num_stored)


def test_the_page_is_written_and_an_attend_without_append_is_said(tmp_path, monkeypatch):
    def forgetful(self, layer, q, k, v, window=None):
        self.lengths[layer] += len(k)
        return q

    monkeypatch.setattr(kv_cache.KVCache, "attend", forgetful)
    with pytest.raises(CourseError, match="never called `append`"):
        watch_cache(tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


def test_the_picture_shows_every_entry_in_its_kind_s_colour(file):
    timeline, pool = draw_run(file).axes
    trace, kinds = read_trace(file), {"prefill": 3, "decode": 33}
    from matplotlib.colors import to_hex

    bars = [to_hex(bar.get_facecolor()).upper() for bar in timeline.patches]
    assert len(bars) == len(trace.steps) and {kind: bars.count(COLORS[kind]) for kind in kinds} == kinds
    assert pool.images[0].get_array().shape == (48, 36)
