"""What becomes of a student's module when its skeleton changes."""

from __future__ import annotations

import ast
import json
import re
import subprocess

import pytest

from common.course import LESSONS, MODULES, ROOT, CourseError, modules_of, skeleton, unfinished
from common.course.exercises import find_exercises, walk_functions
from common.student.carry import Carried, carry
from common.student.update import RENUMBERED

OLD = '''\
"""A lesson."""

from __future__ import annotations

import math
from collections.abc import Sequence

LIMIT = 3
"""How far it goes."""


def helper(x):
    return x + math.pi


def double(x):
    """Twice x."""
    # TODO 9.1: add it to itself.
    raise NotImplementedError("TODO 9.1")


class Pair:
    """Two of them."""

    def __init__(self, a, b):
        self.a, self.b = a, b

    def total(self):
        """Their sum."""
        first = self.a
        # TODO 9.2: add the second to
        # `first`.
        raise NotImplementedError("TODO 9.2")

    def swap(self):
        """Exchange them."""
        self.a, self.b = self.b, self.a


def last():
    """The end."""
    # TODO 9.3: end it.
    raise NotImplementedError("TODO 9.3")
'''

DOUBLE = OLD[OLD.index("def double") : OLD.index("\n\n\nclass Pair")]

MINE = '''\
"""A lesson."""

from __future__ import annotations

import math
import itertools as it
from collections.abc import Sequence, Mapping

LIMIT = 3
"""How far it goes."""

STEPS = 2  # mine


def helper(x):
    return x + math.pi


def twice(x):
    # a helper of my own
    return STEPS * x


# why not x << 1?
def double(x):
    """Twice x."""
    # with the helper
    return twice(x)


class Pair:
    """Two of them."""

    def __init__(self, a, b):
        self.a, self.b = a, b

    def total(self):
        """Their sum."""
        first = self.a
        # TODO 9.2: add the second to
        # `first`.
        return first + self.other()

    def other(self):
        return self.b

    def swap(self):
        """Exchange them."""
        self.a, self.b = self.b, self.a


def last():
    """The end."""
    half = """text
  within"""
    # TODO 9.3: end it.
    raise NotImplementedError("TODO 9.3")


print(double(2))  # try it
'''


def changed(text: str, *edits: tuple[str, str]) -> str:
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def function(text: str, name: str) -> str:
    nodes = dict(walk_functions(ast.parse(text)))
    return ast.get_source_segment(text, nodes[name])


def carried(new: str, mine: str = MINE, old: str = OLD, renumbered: dict[str, str] | None = None) -> Carried:
    ids = {id: id for id in unfinished(old)}
    present = set(unfinished(new))
    known = ids if renumbered is None else renumbered
    return carry({"m.py": old}, {"m.py": mine}, {"m.py": new}, {a: b for a, b in known.items() if b in present})["m.py"]


def test_where_nothing_changed_the_file_stays_as_it_is():
    result = carried(OLD)
    assert result.answers == ["9.1", "9.2"] and not result.remarks
    for own in ("import itertools as it\n", "STEPS = 2  # mine\n", "# why not x << 1?\ndef double", "print(double(2))"):
        assert result.text.count(own) == 1
    assert ast.dump(ast.parse(result.text)) == ast.dump(ast.parse(MINE))


def test_text_that_changes_around_an_answer_is_the_new_one_and_the_answer_stays():
    new = changed(
        OLD,
        ("Twice x.", "Two times x."),
        ("add it to itself.", "add x\n    # to itself."),
        ("add the second to\n        # `first`.", "add the second."),
        ("return x + math.pi", "return x + math.tau"),
        ('"""Two of them."""', '"""Both of them."""'),
    )
    result = carried(new)
    assert result.answers == ["9.1", "9.2"] and unfinished(result.text) == ["9.3"]
    assert function(result.text, "double") == (
        'def double(x):\n    """Two times x."""\n    # TODO 9.1: add x\n    # to itself.\n'
        "    # with the helper\n    return twice(x)"
    )
    assert function(result.text, "Pair.total").endswith(
        "# TODO 9.2: add the second.\n        return first + self.other()"
    )
    assert "math.tau" in result.text and '"""Both of them."""' in result.text and "def twice(x)" in result.text


def test_what_a_merge_would_lose_of_the_student_s_own_is_put_at_the_end():
    """Everything around it has changed, so git keeps the course's lines."""
    lines = [
        line + "  # anew" if line and "TODO" not in line and '"""' not in line else line for line in OLD.split("\n")
    ]
    result = carried("\n".join(lines), MINE.partition("\n\n\nprint")[0] + "\n")
    assert result.answers == ["9.1", "9.2"] and "yours is in the backup" in result.remarks[0].lower()
    for own in ("import itertools as it\n", "STEPS = 2", "def twice(x):\n", "    def other(self):\n"):
        assert result.text.count(own) == 1, own
    scope: dict = {}
    exec(result.text, scope)
    assert scope["double"](3) == 6 and scope["Pair"](1, 2).total() == 3


def test_additions_survive_a_merge_that_python_cannot_read():
    """Git takes the course's opening bracket, and the student's closing one."""
    table = "TABLE = (\n" + "".join(f"    {number},\n" for number in range(9)) + ")\n"
    old, mine = (
        changed(text, ('"""How far it goes."""\n', f'"""How far it goes."""\n\n{table}')) for text in (OLD, MINE)
    )
    mine = changed(mine, ("TABLE = (", "TABLE = ["), ("    8,\n)", "    8,\n]"))
    result = carried(changed(old, ("TABLE = (", "TABLE = (  # anew")), mine, old)
    assert result.answers == ["9.1", "9.2"] and "the course's is in" in result.remarks[0]
    assert "TABLE = (  # anew" in result.text and "def twice(x):" in result.text


def test_answers_follow_their_ids_into_other_modules_and_other_numbers():
    first, second = OLD.index("def double"), OLD.index("class Pair")
    moved = changed(OLD[:first] + OLD[second:], ("TODO 9.2: ", "TODO 9.1: "), ('"TODO 9.2"', '"TODO 9.1"'))
    other = changed(
        OLD[:second], ("TODO 9.1: ", "TODO 9.2: "), ('"TODO 9.1"', '"TODO 9.2"'), ("def double", "def times_two")
    )
    found = carry(
        {"m.py": OLD}, {"m.py": MINE}, {"m.py": moved, "o.py": other}, {"9.1": "9.2", "9.2": "9.1", "9.3": "9.3"}
    )
    assert found["m.py"].answers == ["9.1"] and "self.other()" in function(found["m.py"].text, "Pair.total")
    assert found["o.py"].answers == ["9.2"] and "return twice(x)" in function(found["o.py"].text, "times_two")
    assert "def twice" in found["o.py"].text and "was: double(x)" in found["o.py"].remarks[-1]


def test_a_function_that_moves_into_a_class_is_indented():
    answer = '    text = "a"\n    if text:\n        return twice(x)'
    mine = changed(MINE, ("    # with the helper\n    return twice(x)", answer))
    new = changed(OLD, (DOUBLE + "\n\n\n", "")) + (
        '\n\nclass Ops:\n    @staticmethod\n    def double(x):\n        """Twice x."""\n'
        '        # TODO 9.1: add.\n        raise NotImplementedError("TODO 9.1")\n'
    )
    result = carried(new, mine)
    assert sorted(result.answers) == ["9.1", "9.2"]
    assert '        text = "a"\n        if text:\n            return twice(x)\n' in result.text


def test_other_arguments_are_taken_over_and_told():
    result = carried(changed(OLD, ("def double(x):", "def double(x, times=2):")))
    assert function(result.text, "double").startswith('def double(x, times=2):\n    """Twice x."""\n')
    assert [line.strip() for line in result.remarks[-1].splitlines()[1:]] == [
        "was: double(x)",
        "now: double(x, times=2)",
    ]


def test_an_exercise_that_is_gone_is_named_and_one_that_is_new_is_to_do():
    more = '\n\ndef more():\n    """More."""\n    # TODO 9.4: do.\n    raise NotImplementedError("TODO 9.4")\n'
    result = carried(changed(OLD, (DOUBLE + "\n\n\n", "")) + more)
    assert any("9.1 double is gone" in remark for remark in result.remarks)
    assert result.answers == ["9.2"] and set(unfinished(result.text)) == {"9.3", "9.4"}


def test_half_an_answer_and_notes_stay():
    result = carried(changed(OLD, ("end it.", "end it well.")))
    assert "    # TODO 9.3: end it well.\n    half = " in result.text
    assert "9.3" in unfinished(result.text) and "9.3" not in result.answers


@pytest.mark.parametrize(
    "body",
    [
        "def double(x): return 2 * x",
        'def double(x):\n  """Twice x."""\n  if x:\n    return 2 * x\n  return x',
        "def double(\n    x,\n):\n    return 2 * x",
        'def double(x):\n    """My own words."""\n    return 2 * x',
    ],
)
def test_an_answer_in_any_layout(body):
    result = carried(changed(OLD, ("Twice x.", "Two times x.")), changed(OLD, (DOUBLE, body)))
    scope: dict = {}
    exec(result.text, scope)
    assert scope["double"](3) == 6 and "Two times x." in scope["double"].__doc__


def test_a_function_that_the_student_renamed_is_kept_and_its_exercise_is_to_do():
    result = carried(changed(OLD, ("Their sum.", "The sum.")), MINE.replace("double", "doubled"))
    assert "def doubled(x)" in result.text and "9.1" in unfinished(result.text)
    assert "9.1 is to do again: your file has no function for it." in result.remarks


@pytest.mark.parametrize("mine", ["def double(:\n", MINE.replace("return twice(x)", "<<<<<<< mine"), "\0"])
def test_what_python_cannot_read_is_refused(mine):
    with pytest.raises(CourseError, match=r"m\.py(:\d+)?: Python cannot read this.*Nothing was changed"):
        carried(OLD, mine)


@pytest.mark.parametrize("lesson", MODULES, ids=lambda lesson: lesson.slug)
def test_every_answer_of_the_course_survives_other_words_around_it(lesson):
    if lesson.is_withheld:
        pytest.skip("no answers here")
    old, mine = skeleton.cut_lesson(lesson), lesson.solution.read_text(encoding="utf-8")
    result = carried(re.sub(r"# TODO (\d+\.\d+): ", r"# TODO \1: anew: ", old), mine, old)
    assert ast.dump(ast.parse(result.text)) == ast.dump(ast.parse(mine))
    assert sorted(result.answers) == sorted(unfinished(old)) and not result.remarks


BEFORE = "99eeceece3b1813da4d5cb27b2c87af878c495f9"
"""A commit before the exercises were renumbered and lesson 5 became two modules."""


def at_that_time(path: str) -> str:
    command = ["git", "-C", str(ROOT), "show", f"{BEFORE}:{path}"]
    shown = subprocess.run(command, capture_output=True, encoding="utf-8")
    if shown.returncode:
        pytest.skip("this copy of the course does not know that commit")
    return shown.stdout


@pytest.mark.parametrize(
    "lesson",
    [lesson if lesson.number == 5 else pytest.param(lesson, marks=pytest.mark.slow) for lesson in LESSONS],
    ids=lambda lesson: lesson.slug,
)
def test_half_done_work_from_before_the_renumbering_is_where_it_belongs(lesson):
    """Every second exercise was answered, with a helper above the first."""
    name = "batching" if lesson.number == 5 else lesson.slug
    path = f"{lesson.folder.name}/{name}.py"
    old, answers = at_that_time(path), at_that_time(f"solutions/{name}.py").split("\n")
    helper = "def own_helper(x):\n    return x\n\n\n"
    mine, done = old.replace("def ", helper + "def ", 1), []
    for exercise in find_exercises("\n".join(answers), name)[::2]:
        body = "\n".join(answers[exercise.first_answer_line - 1 : exercise.last_line]) + "\n"
        begin = mine.index(f'raise NotImplementedError("TODO {exercise.id}")')
        begin = mine.rindex("\n", 0, begin) + 1
        ends = [place for place in (mine.find("\n\n", begin), len(mine)) if place >= 0]
        if "find the one mistake" not in mine[begin : ends[0]]:
            mine = mine[:begin] + body + mine[mine.index("\n", begin) + 1 :]
            done.append(exercise.id)
    new = {f"{each.folder.name}/{each.module.name}": skeleton.cut_lesson(each) for each in modules_of(lesson.number)}
    present = {id for text in new.values() for id in unfinished(text)}
    steps = json.loads((ROOT / RENUMBERED).read_text()) if (ROOT / RENUMBERED).exists() else []
    ids = {id: id for id in unfinished(old)}
    for step in steps:
        ids = {id: step[now] for id, now in ids.items() if now in step}
    found = carry({path: old}, {path: mine}, new, {id: now for id, now in ids.items() if now in present})
    assert {id for each in found.values() for id in each.answers} == {ids[id] for id in done if ids.get(id) in present}
    assert any("def own_helper" in each.text for each in found.values())
    for name, each in found.items():
        compile(each.text, name, "exec", dont_inherit=True)
