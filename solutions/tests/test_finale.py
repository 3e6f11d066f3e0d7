"""What a finished lesson is told to be worth: counted, and the counts are as the lesson promises."""

from __future__ import annotations

import re

import pytest

from common.course import LESSONS
from common.student import finale

pytestmark = pytest.mark.slow


def number(text: str) -> float:
    return float(re.search(r"[\d,.]+\d|\d", text)[0].replace(",", ""))


@pytest.fixture(scope="module")
def rows():
    """By lesson: the rows of its measurement, (before, now) by what they are about."""
    measured: dict[int, dict[str, tuple[str, str]]] = {}

    def of(lesson: int) -> dict[str, tuple[str, str]]:
        if lesson not in measured:
            measured[lesson] = {what: (before, now) for what, before, now in finale.MEASUREMENTS[lesson]().rows}
        return measured[lesson]

    return of


@pytest.mark.parametrize("lesson", [lesson.number for lesson in LESSONS])
def test_each_lesson_s_measurement_runs_and_changes_no_token(lesson, rows, monkeypatch):
    monkeypatch.setenv("KERNELS", "plain")
    told = rows(lesson)
    assert 2 <= len(told) <= 5 and all(now for _, now in told.values())
    assert all(len(what) <= 52 for what in told), "the table fits 80 columns"
    same = told.get("the same tokens as before")
    assert (same is not None) == (lesson in (3, 5, 6, 8))
    if same:
        got, of, wanted = same[1].split()
        assert of == "of" and got == wanted


def test_counts_are_as_the_lessons_promise(rows, monkeypatch):
    monkeypatch.setenv("KERNELS", "plain")
    before, now = rows(3)["tokens computed, to say 96"]
    prompt = number(now) - 95  # the prompt, and every token but the last, once
    assert number(before) == sum(prompt + i for i in range(96))
    for before, now in rows(4).values():
        assert number(now) < number(before) / 3
    assert [number(each) for each in rows(5)["steps, to answer 8 people"]] == [256, 32]
    one, two = rows(6)["bytes of weights that one of them holds"]
    assert number(one) < 2.1 * number(two)
    for name, factor in {"8 bits": 3.5, "4 bits": 6}.items():
        assert number(rows(7)[f"weights, {name}"][0]) > factor * number(rows(7)[f"weights, {name}"][1])
        before, now = map(number, rows(7)[f"perplexity on unseen stories, {name}"])
        assert now < 1.02 * before
    before, now = rows(8)["steps, to say 64 tokens"]
    assert number(before) == 64 and number(now) < 32
    assert number(rows(1)["numbers in the model, by your formula"][1]) == 2_439_840
