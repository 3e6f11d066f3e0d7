"""The cut from solution to skeleton: what it keeps, what it takes away, and what it refuses."""

from __future__ import annotations

import ast
import os
import re
import runpy
import sys
import textwrap

import pytest

from common.course import MODULES, CourseError, skeleton, unfinished
from common.course.catalogue import planted_answers
from common.course.exercises import exercises_of, find_exercises, walk_functions
from common.course.skeleton import cut
from common.grading.runner import grade
from common.workers import call

SOLUTION = '''\
"""A lesson."""

import math  # given


class A:
    def __init__(self):
        self.x = 1  # given

    def f(self, y):
        """Adds.

        # Exercise 9.9: this stands in a string.
        """
        z = y + 1  # a given head
        # Exercise 9.2: add, and
        # mind the sign.

        # the answer's own comment

        def inner():
            return z

        return inner() + self.x
        # the secret behind the answer

    def g(self):
        return "# Exercise 9.8: in a string too"


def last():
    """Ends the file."""
    # Exercise 9.1: end it.
    return math.pi
'''


def test_cut_keeps_what_is_given_and_takes_the_answer():
    text = cut(SOLUTION, "solution.py", 9)
    assert text == (
        SOLUTION[: SOLUTION.index("        # Exercise 9.2")]
        + "        # TODO 9.2: add, and\n        # mind the sign.\n"
        + '        raise NotImplementedError("TODO 9.2")\n\n'
        + SOLUTION[SOLUTION.index("    def g") : SOLUTION.index("    # Exercise 9.1")]
        + '    # TODO 9.1: end it.\n    raise NotImplementedError("TODO 9.1")\n'
    )
    assert sorted(unfinished(text)) == ["9.1", "9.2"]
    assert [(each.id, each.function) for each in find_exercises(SOLUTION, "s")] == [("9.2", "A.f"), ("9.1", "last")]


def function(body: str, name: str = "f") -> str:
    return f'def {name}():\n    """Does."""\n' + textwrap.indent(textwrap.dedent(body), "    ")


@pytest.mark.parametrize(
    ("source", "line", "why"),
    [
        (function("# Exercise 9.1 double it\nreturn 1\n"), 3, "opens with '# Exercise N.M: what to do'"),
        (function("# exercise 9.1: double it\nreturn 1\n"), 3, "opens with"),
        (function("# Exercise 9.1:\nreturn 1\n"), 3, "opens with"),
        (function("# Exercise 8.1: double it\nreturn 1\n"), 3, "stands in lesson 9"),
        ("# Exercise 9.1: nowhere\nx = 1\n", 1, "stands in no function"),
        (function("if True:\n    # Exercise 9.1: deep\n    return 1\n"), 4, "top indentation"),
        (function("x = [\n# Exercise 9.1: amid\n1]\nreturn x\n"), 4, "top indentation"),
        (function("def g():\n    # Exercise 9.1: nested\n    return 1\nreturn g\n"), 4, "function within a function"),
        (function("# Exercise 9.1: a\nx = 1\n# Exercise 9.2: b\nreturn x\n"), 5, "has exercise 9.1 already"),
        (
            function("# Exercise 9.1: a\nreturn 1\n") + function("# Exercise 9.1: b\nreturn 1\n", "g"),
            7,
            "there already",
        ),
        ("def f():\n    # Exercise 9.1: undocumented\n    return 1\n", 1, "no docstring"),
        (function("x = 1\n# Exercise 9.1: nothing\n"), 4, "no function|no answer"),
        (function("# Exercise 9.1: long\n" + "x = 1\n" * 26), 3, "has 26 lines; 25 are allowed"),
    ],
)
def test_violations_are_refused_with_file_and_line(source, line, why):
    with pytest.raises(CourseError, match=why) as raised:
        cut(source, "solutions/nine.py", 9)
    assert str(raised.value).startswith(f"solutions/nine.py:{line}: ")


def test_generate_never_overwrites_an_edit(tmp_path, monkeypatch):
    from common.tests.sample_lesson import write_lesson

    monkeypatch.setattr(skeleton, "RECORD", tmp_path / "skeletons.json")
    lesson = write_lesson(tmp_path, ["one"])
    assert skeleton.generate(lesson) == "written"
    assert skeleton.generate(lesson) == "unchanged"
    lesson.solution.write_text(lesson.solution.read_text().replace("double it.", "double it, gently."))
    assert "gently" in skeleton.difference(lesson)
    assert skeleton.generate(lesson) == "written"
    assert skeleton.difference(lesson) == ""
    mine = lesson.module.read_text().replace('raise NotImplementedError("TODO 9.1")', "return x + x")
    lesson.module.write_text(mine)
    with pytest.raises(CourseError, match="edited since it was generated"):
        skeleton.generate(lesson)
    assert lesson.module.read_text() == mine


def test_reset_keeps_every_earlier_state(tmp_path, monkeypatch):
    from common.tests.sample_lesson import write_lesson

    monkeypatch.setattr(skeleton, "BACKUPS", tmp_path / "backups")
    lesson = write_lesson(tmp_path, ["one"])
    assert skeleton.reset(lesson) is None
    assert skeleton.reset(lesson) is None
    backups = []
    for i in range(3):
        lesson.module.write_text(f"# state {i}\n")
        backups.append(skeleton.reset(lesson))
    assert [backup.read_text() for backup in backups] == ["# state 0\n", "# state 1\n", "# state 2\n"]
    assert unfinished(lesson.module.read_text()) == ["9.1"]


def import_file(connection, file: str) -> None:
    runpy.run_path(file)


@pytest.mark.parametrize("lesson", MODULES, ids=lambda lesson: lesson.slug)
def test_skeleton_of_each_lesson_imports_and_holds_no_answer(lesson, tmp_path):
    """Cut afresh from the solution: a student's own file may be in any state."""
    text = skeleton.cut_lesson(lesson)
    exercises = exercises_of(lesson)
    assert sorted(unfinished(text)) == sorted(exercise.id for exercise in exercises)
    file = tmp_path / f"{lesson.slug}.py"
    file.write_text(text)
    if lesson.is_importable:
        process, connection = call("common.tests.course.test_skeleton:import_file", str(file))
        connection.close()
        assert process.wait() == 0, "its import fails"
    functions = dict(walk_functions(ast.parse(text)))
    bugs = planted_answers(lesson)
    for exercise in exercises:
        body = [ast.unparse(statement) for statement in functions[exercise.function].body]
        assert body.count(f"raise NotImplementedError('TODO {exercise.id}')") == 1
        assert (body[-1] == f"raise NotImplementedError('TODO {exercise.id}')") == (exercise.id not in bugs)


def test_a_bug_to_be_found_stays_in_the_skeleton(tmp_path, monkeypatch):
    """With its line that says TODO gone it is the planted mistake, and mended it is the reference."""
    from common.tests.sample_lesson import write_lesson

    lesson = write_lesson(tmp_path, ["one", "two"])
    lesson.answers.write_text(
        "from common.course.catalogue import planted\n"
        "ANSWERS = [planted('9.2', 'three times', 'return 2 * x', 'return 3 * x')]\n"
    )
    text = skeleton.cut_lesson(lesson)
    assert unfinished(text) == ["9.1", "9.2"]
    assert text.count("return 2 * x") == 1 and "return 3 * x" in text, "the helper's stays, 9.1 is cut, 9.2 is faulty"
    lines = [line for line in text.splitlines() if 'TODO 9.2")' not in line]
    assert unfinished("\n".join(lines)) == ["9.1"]
    lesson.module.write_text("\n".join(lines))
    results = {result.id: result for result in grade(lesson, lesson.module)}
    assert results["9.2"].status == "wrong" and results["9.2"].mistake is None, "its name would give it away"
    lesson.module.write_text("\n".join(lines).replace("return 3 * x", "return 2 * x"))
    assert {result.id: result.status for result in grade(lesson, lesson.module)}["9.2"] == "passed"
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    skeleton.cut_lesson(lesson)
    saved = lesson.answers.stat().st_mtime
    lesson.answers.write_text(lesson.answers.read_text().replace("return 2", "return 5"))
    os.utime(lesson.answers, (saved, saved))  # as if saved within the same second, with the same length
    with pytest.raises(CourseError, match="occurs 0 times"):
        skeleton.cut_lesson(lesson)


def test_ids_are_not_reused():
    ids = [exercise.id for lesson in MODULES for exercise in exercises_of(lesson)]
    assert len(ids) == len(set(ids)) > 30
    assert all(re.fullmatch(r"\d+\.\d+", id) for id in ids)
