"""`make watch-N.M`: a failing check, recorded call by call, beside the reference's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click import unstyle

from common.__main__ import main
from common.course import CourseError
from common.course.catalogue import apply, load_answers
from common.course.exercises import find_exercise
from common.grading.results import Result
from common.student import grade, watch_exercise
from common.student.watch_exercise import RECORDED, parting, watch
from common.watching import read_trace


def planted(id: str, folder: Path, old: str, new: str) -> tuple:
    """The arguments of `watch` for the reference with an edit, which must be one."""
    lesson, exercise = find_exercise(id)
    source = lesson.solution.read_text(encoding="utf-8")
    assert source.count(old) == 1
    file = folder / lesson.module.name
    file.write_text(source.replace(old, new), encoding="utf-8")
    return lesson, file, exercise


def parted(found) -> list[str]:
    return parting(*(recorder.calls for recorder in found[2]))


def test_one_request_too_many_is_seen_in_the_call_that_admits_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COURSE_PYTHON", "here")
    _, file, _ = planted(
        "5.7", tmp_path, "len(self.running) < self.max_num_seqs", "len(self.running) <= self.max_num_seqs"
    )
    page = tmp_path / "page.html"
    assert main(["watch-5.7", "--file", str(file), "--out", str(page)]) == 1
    said = capsys.readouterr().out
    assert "test_max_num_seqs" in said and "are ['a', 'b', 'c'], expected ['a', 'b']" in said
    assert "part in call 4 of 4: schedule_waiting(plan, 16)" in said
    assert re.search(r"yours: +running: \[a, b, c]", said) and re.search(r"reference's: +waiting: \[c]", said)
    assert "Where the runs part" in page.read_text(encoding="utf-8")


def test_a_shared_block_that_is_never_freed_is_seen(tmp_path):
    arguments = planted("4.8", tmp_path, "            self.pool.free_blocks([shared])\n", "")
    title, sentence, (mine, reference) = watch(*arguments)
    first = parting(mine.calls, reference.calls)
    assert "copy_on_write" in title and "part in call" in first[0] and "holders" in "".join(first)
    file = tmp_path / "run.jsonl"
    file.write_text(mine.file.getvalue(), encoding="utf-8")
    trace = read_trace(file)
    assert [step.plan["call"] for step in trace.steps] == [call[0] for call in mine.calls]
    assert trace.steps[-1].num_free == mine.manager.pool.num_free_blocks and trace.lines[-1]["failure"] == sentence
    assert trace.steps[-1].miscounted == 1 and trace.steps[-1].lost == 0


def test_an_endless_loop_is_stopped_and_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(watch_exercise, "SECONDS", 0.5)
    arguments = planted("5.7", tmp_path, "budget -= self.admit(request, budget, plan)", "self.admit")
    found = watch(*arguments)
    assert "did not end within 0.5 s" in found[1] and "raises Endless" in "".join(parted(found))


def test_an_engine_is_watched_with_what_it_asks_of_its_executor(tmp_path):
    found = watch(*planted("5.16", tmp_path, "plan = self.in_flight.popleft()", "plan = self.in_flight.pop()"))
    calls = [call[0] for call in found[2][0].calls]
    assert "part in call" in parted(found)[0] and {"submit(plan)", "collect()", "schedule()"} <= set(calls)


def test_what_cannot_be_watched_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COURSE_PYTHON", "here")
    lesson, _ = find_exercise("5.9")
    assert main(["watch-5.1"]) == 2 and "has no sequence of calls" in capsys.readouterr().err
    assert main(["watch-5.9", "--file", str(lesson.solution)]) == 0 and "no check fails" in capsys.readouterr().out
    assert main(["watch-5.9"]) == 2 and "still to do" in capsys.readouterr().err
    assert main(["watch-5.9", "--out", "a.pdf"]) == 2 and ".html" in capsys.readouterr().err


def test_a_broken_check_is_no_mistake_of_the_student_s(tmp_path, monkeypatch):
    def broken(*arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(watch_exercise, "both_runs", broken)
    lesson, exercise = find_exercise("5.9")
    with pytest.raises(CourseError, match="ZeroDivisionError"):
        watch(lesson, lesson.solution, exercise)


@pytest.mark.parametrize(("id", "is_offered"), [("5.7", True), ("5.1", False)])
def test_the_grader_offers_it(id, is_offered, capsys):
    lesson, exercise = find_exercise(id)
    grade.report(lesson, lesson.module, Result(id, exercise.function, "wrong", sentence="x is 1."), verbose=False)
    assert (f"make watch-{id}" in unstyle(capsys.readouterr().out)) == is_offered


@pytest.mark.slow
@pytest.mark.parametrize("id", RECORDED)
def test_a_wrong_answer_parts_from_the_reference(id, tmp_path):
    lesson, exercise = find_exercise(id)
    wrong = [each for each in load_answers(lesson) if each.exercise == id and not each.is_right]
    file = tmp_path / lesson.module.name
    source = lesson.solution.read_text(encoding="utf-8")
    for answer in reversed(wrong):  # the last or, where the calls do not show what it does, one before it
        file.write_text(apply(answer, source, exercise), encoding="utf-8")
        if "part in call" in parted(watch(lesson, file, exercise))[0]:
            return
    raise AssertionError(f"None of the wrong answers to {id} parts from the reference.")
