"""`make watch-lesson-N`: what a save may have changed, how saves are seen, and what is said after one."""

from __future__ import annotations

import os
from functools import partial

import pytest

from common.course import CourseError
from common.grading import results, runner
from common.grading.results import Result
from common.grading.runner import Worker
from common.student import watch
from common.student.watch import Watched, edited, saves, stamp, take
from common.tests.sample_lesson import write_lesson

TODO = '"""A sample."""\n\nimport torch\n\n\ndef helper(x):\n    return 2 * x\n' + "".join(
    f'\n\ndef {name}(x):\n    """Twice x."""\n    # TODO 9.{i}: double.\n    raise NotImplementedError("TODO 9.{i}")\n'
    for i, name in enumerate(("one", "two"), 1)
)


@pytest.fixture
def lesson(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "GRADES", tmp_path / "grades")
    lesson = write_lesson(tmp_path, ["one", "two"])
    lesson.module.write_text(TODO)
    return lesson


def answered(text: str, id: str, line: str) -> str:
    assert text.count(f'raise NotImplementedError("TODO {id}")') == 1
    return text.replace(f'raise NotImplementedError("TODO {id}")', line)


def test_only_what_a_save_may_have_changed_is_graded(lesson):
    one = answered(TODO, "9.1", "return x + x")
    assert edited(lesson, TODO, one) == ["9.1"]
    assert edited(lesson, TODO, answered(one, "9.2", "return x")) == ["9.1", "9.2"]
    assert edited(lesson, TODO, TODO.replace("def one(x)", "def one(x, y=0)")) == ["9.1"]
    assert edited(lesson, TODO, TODO.replace("# TODO", "# todo") + "\n\n# a note\n") == []
    assert edited(lesson, TODO, TODO.replace("return 2 * x", "return x")) is None, "a helper may touch all of them"
    assert edited(lesson, TODO, TODO.replace("import torch", "import torch, math")) is None
    assert edited(lesson, TODO, TODO.replace("def two", "def deux")) is None


def test_every_way_to_save_is_seen_once(tmp_path, monkeypatch):
    """Written over, put in its place by renaming, deleted, and written anew; the other file is left alone."""
    monkeypatch.setattr(watch, "PAUSE", 0.02)
    file, other = tmp_path / "a.py", tmp_path / "b.py"
    file.write_text("1")
    other.write_text("1")
    known = {file: stamp(file), other: stamp(other)}
    seen = saves(known)

    def rename():
        (tmp_path / "new").write_text("3")
        os.replace(tmp_path / "new", file)

    for save in (lambda: file.write_text("22"), rename, file.unlink, lambda: file.write_text("4")):
        save()
        assert next(seen) == file and known[file] == stamp(file)
    other.write_text("22")
    assert next(seen) == other


@pytest.fixture
def graded(monkeypatch):
    """Gives exercises the verdict that their answers spell, without a worker; returns what was graded."""
    calls: list[list[str] | None] = []

    def grade(lesson, file, only=None, on_result=lambda result: None, start=None):
        text = file.read_text()
        parts = {
            f"9.{i}": text.partition(f"def {name}(")[2].partition("\n\n\n")[0]
            for i, name in enumerate(("one", "two"), 1)
        }
        status = {
            id: "to do" if "NotImplemented" in part else "wrong" if "- x" in part else "passed"
            for id, part in parts.items()
        }
        results = [Result(id, ("one", "two")[int(id[2]) - 1], status[id], points=1, line=7) for id in only or parts]
        if only is None:
            done = set(status.values()) == {"passed"}
            results.append(
                Result(
                    "together", "together", "passed" if done and "helper" in text else "wrong" if done else "waiting"
                )
            )
        calls.append(only)
        for result in results:
            on_result(result)
        return results

    monkeypatch.setattr(watch, "grade", grade)
    monkeypatch.setattr(runner, "grade", grade)
    return calls


def test_a_save_is_answered_with_what_it_changed(lesson, graded, capsys):
    watched = Watched(lesson, Worker)

    def save(text: str) -> str:
        lesson.module.write_text(text)
        watched.look()
        return capsys.readouterr().out

    watched.begin()
    assert capsys.readouterr().out.count("to do") == 2 and graded == [None]
    right = answered(TODO, "9.1", "return x + x")
    told = save(answered(TODO, "9.1", "return x - x"))
    assert "9.1 one: to do -> wrong" in told and "make hint-9.1" in told and "Next" not in told
    told = save(right)
    assert "9.1 one: wrong -> passed" in told and "1 of 2 exercises" in told and "Next: 9.2 two" in told
    assert graded == [None, ["9.1"], ["9.1"]] and told.count("\n") == 3, "a blank line and two"
    assert "No exercise has changed" in save(right + "# a note\n")
    assert len(graded) == 3
    with pytest.raises(CourseError, match="Python cannot read this line"):
        save("def one(:\n")
    assert "No exercise has changed" in save(right + "# a note\n"), "it can be read again"
    wrong = answered(right, "9.2", "return 0 - x")
    assert "9.2 two: to do -> wrong" in save(wrong)
    assert graded[-1] == ["9.2"]
    assert "9.1 one: still passed" in save(wrong.replace("x + x", "2 * x"))
    assert graded[-1] == ["9.1", "9.2"], "what is wrong may be right by now"
    done = save(wrong.replace("0 - x", "x + x"))
    assert "9.2 two: wrong -> passed" in done and "2 of 2 exercises" in done
    assert graded[-2:] == [["9.1", "9.2"], None], "what is told in the end is the verdict on the whole file"
    assert all(result.status == "passed" for result in results.kept(lesson, lesson.module))
    told = save(right)
    assert "9.2 two: passed -> to do" in told and watched.results["together"].status == "waiting"


def test_a_file_that_is_saved_while_it_is_graded_has_no_known_grade(lesson, monkeypatch):
    """The grade is of the state before, or of that after, or of a bit of both."""
    passed = [Result("9.1", "one", "passed")]
    monkeypatch.setattr(runner, "grade", lambda lesson, file: passed)
    assert runner.grade_and_keep(lesson, lesson.module) == results.kept(lesson, lesson.module) == passed
    lesson.module.write_text(TODO + "# saved\n")
    monkeypatch.setattr(runner, "grade", lambda lesson, file: file.write_text(TODO + "# saved again\n") and passed)
    assert runner.grade_and_keep(lesson, lesson.module) == passed and results.kept(lesson, lesson.module) is None


def test_what_is_known_is_not_graded_again(lesson, graded, capsys):
    results.keep(lesson, lesson.module, watch.grade(lesson, lesson.module))
    graded.clear()
    Watched(lesson, Worker).begin()
    assert graded == [] and capsys.readouterr().out.count("to do") == 2


@pytest.mark.slow
def test_a_spare_worker_does_what_another_would(lesson):
    lesson.module.write_text(answered(answered(TODO, "9.1", "return x + x"), "9.2", "import os; os._exit(3)"))
    spare = [first := Worker()]
    start = partial(take, spare)
    results = watch.grade(lesson, lesson.module, start=start)
    assert first.process.poll() is not None and not spare
    assert [result.status for result in results] == ["passed", "wrong", "waiting"]
    again = watch.grade(lesson, lesson.module, only=["9.1"], start=start)
    assert [result.status for result in again] == ["passed"], "used up, it makes way for a new one"
    idle = Worker()
    idle.close()
    assert idle.process.poll() is not None
    again = watch.grade(lesson, lesson.module, only=["9.1"], start=partial(take, [idle]))
    assert [result.status for result in again] == ["passed"], "so does one that has ended"
