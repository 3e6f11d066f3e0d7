"""The mutation run: it makes the changes that it names, and tells a gap from a check that holds."""

from __future__ import annotations

import ast
import json

import pytest

from common.authoring.mutants import mutants_of
from common.authoring.mutate import ASKED, SUMMARY, summary, try_all, unknown_equivalents
from common.course import MODULES
from common.course.catalogue import load_equivalents
from common.tests.sample_lesson import write_lesson

CHANGES = {
    "x[-1] > 2": {"x[-1] >= 2", "x[-1] <= 2", "x[-2] > 2", "x[-0] > 2", "x[1] > 2", "x[-1] > 3", "x[-1] > 1"},
    "x if n and m else -n": {
        "x if n or m else -n",
        "x if n else -n",
        "x if m else -n",
        "x",
        "-n",
        "x if n and m else n",
    },
    "torch.cat((x, x), dim=0)": {
        "(x, x)",
        "torch.cat((x, x))",
        "torch.cat((x, x), dim=1)",
        "torch.cat((x, x), dim=-1)",
    },
    "x[1:n]": {"x[:n]", "x[1:]", "x[2:n]", "x[0:n]"},
    "x.to(torch.int64)": {"x", "x.to(torch.int32)"},
}


@pytest.mark.parametrize("expression", CHANGES)
def test_each_part_is_changed_by_itself(expression, tmp_path):
    lesson = write_lesson(tmp_path, ["one"])
    lesson.solution.write_text(lesson.solution.read_text().replace("return 2 * x\n", f"return {expression}\n").replace(
        f"def helper(x):\n    return {expression}", "def helper(x):\n    return 2 * x"))  # fmt: skip
    mutants = mutants_of(lesson)
    bodies = {ast.unparse(ast.parse(each.source).body[-1].body[-1]).removeprefix("return ") for each in mutants}
    assert bodies == CHANGES[expression] | {"pass"}
    assert len({each.change for each in mutants}) == len(mutants)


@pytest.mark.slow
def test_mutants_of_the_course_are_modules_and_none_is_the_reference():
    for lesson in MODULES:
        reference = normal(lesson.solution.read_text())
        for each in mutants_of(lesson)[::40]:  # one after the other would take minutes
            assert normal(each.source) != reference, str(each)


def normal(source: str) -> str:
    """The code without its layout; that of docstrings moves too when a function is written out again."""
    return " ".join(ast.unparse(ast.parse(source)).split())


@pytest.mark.slow
def test_a_gap_in_the_checks_survives_and_an_endless_loop_does_not(tmp_path):
    lesson = write_lesson(tmp_path, ["one"])
    body = (
        "total = 0\n    while total < 0.5 * len(x):\n        total += 0.5\n    return x * 2 if len(x) > 1 else x + x\n"
    )
    head, _, tail = lesson.solution.read_text().rpartition("return 2 * x\n")
    lesson.solution.write_text(head + body + tail)
    lesson.answers.write_text(
        "from common.course.catalogue import equivalent\n"
        "ANSWERS = []\n"
        "CHANGE = 'x * 2 if len(x) > 1 else x + x -> x * 2'\n"
        "EQUIVALENT = [equivalent('9.1', 'both give the same', CHANGE, 'gone -> away')]\n"
    )
    everything = mutants_of(lesson)
    caught = try_all(lesson, everything, 1, lambda count: None)
    found = summary(lesson, everything, caught)
    why = {each.change: reason for each, reason in caught.items()}
    assert "total += 0.5 -> total -= 0.5" in why, why
    assert "Overtime" in why["total += 0.5 -> total -= 0.5"]
    assert any("len(x) > 1" in each for each in found["survived"])  # no check looks at one value only
    assert found["equivalent"] == 1 and found["mutants"] == len(everything)
    assert unknown_equivalents(lesson, everything) == ["9.1: gone -> away"]


@pytest.mark.slow
def test_the_committed_summary_is_of_these_answers_and_good_enough():
    """Whoever changes an answer runs `make mutate-lesson-N` again."""
    committed = json.loads(SUMMARY.read_text())
    for lesson in MODULES:
        mutants = mutants_of(lesson)
        found = committed[lesson.slug]
        assert found["mutants"] == len(mutants), f"make mutate-lesson-{lesson.number}"
        assert found["equivalent"] == len(load_equivalents(lesson)), f"make mutate-lesson-{lesson.number}"
        assert found["caught_share"] >= ASKED
        assert unknown_equivalents(lesson, mutants) == []
