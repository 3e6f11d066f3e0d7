"""What becomes of a student's module when its skeleton changes."""

from __future__ import annotations

import ast
import re

import pytest

from common.course import MODULES, skeleton, unfinished
from common.course.exercises import walk_functions
from common.student.carry import Misfit, carry

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


def test_where_nothing_changed_the_file_stays_as_it_is_to_the_letter():
    carried = carry(OLD, MINE, OLD)
    assert carried.text == MINE and carried.answers == ["9.1", "9.2"]
    assert carried.remarks == carried.reworded == []
    assert carry(OLD, OLD, OLD).text == OLD


def test_what_was_not_touched_becomes_the_new_skeleton():
    new = changed(OLD, ("add it to itself", "add"), ("LIMIT = 3", "LIMIT = 4"), ("Two of them", "Both"))
    assert carry(OLD, OLD, new).text == new
    assert carry(OLD, new, new).text == new, "somebody has brought it in by hand"


def test_text_that_changes_around_an_answer_is_the_new_one_and_the_answer_stays():
    new = changed(
        OLD,
        ("Twice x.", "Two times x."),
        ("add it to itself.", "add x\n    # to itself."),
        ("add the second to\n        # `first`.", "add the second."),
        ("return x + math.pi", "return x + math.tau"),
        ('"""Two of them."""', '"""Both of them."""'),
    )
    carried = carry(OLD, MINE, new)
    assert carried.answers == ["9.1", "9.2"] and carried.reworded == ["9.1", "9.2"] and carried.remarks == []
    assert function(carried.text, "double") == (
        'def double(x):\n    """Two times x."""\n    # TODO 9.1: add x\n    # to itself.\n'
        "    # with the helper\n    return twice(x)"
    )
    assert function(carried.text, "Pair.total").endswith(
        "# TODO 9.2: add the second.\n        return first + self.other()"
    )
    for own in ("import itertools as it\n", "STEPS = 2  # mine\n", "# why not x << 1?\ndef double", "print(double(2))"):
        assert carried.text.count(own) == 1
    assert "from collections.abc import Sequence, Mapping\n" in carried.text
    assert "math.tau" in carried.text and '"""Both of them."""' in carried.text
    assert unfinished(carried.text) == ["9.3"]


def test_of_an_import_that_the_course_has_changed_the_student_s_own_names_are_added():
    new = changed(
        OLD, ("abc import Sequence", "abc import Callable"), ("import math\n", "import itertools as it\nimport os\n")
    )
    text = carry(OLD, MINE, new).text
    assert text.count("from collections.abc import Callable\nfrom collections.abc import Mapping\n") == 1
    assert text.count("import itertools as it\n") == 1 and "import math" not in text and "Sequence" not in text


def test_a_function_of_another_name_or_in_a_class_of_another_name_is_known_by_its_id():
    new = changed(OLD, ("def double(", "def times_two("), ("class Pair:", "class Couple:"))
    carried = carry(OLD, MINE, new)
    assert "return twice(x)" in function(carried.text, "times_two")
    assert "self.other()" in function(carried.text, "Couple.total") and function(carried.text, "Couple.other")
    assert "class Pair" not in carried.text and "def double" not in carried.text
    assert carried.remarks == ["9.1 is called times_two now, and was double: change that where your own code calls it."]


def test_a_function_that_moves_into_a_class_is_indented():
    mine = changed(
        MINE,
        ("    # with the helper\n    return twice(x)", '    text = """a\nb"""\n    if text:\n        return twice(x)'),
    )
    new = changed(
        OLD,
        (DOUBLE + "\n\n\n", ""),
    )
    new += (
        '\n\nclass Ops:\n    @staticmethod\n    def double(x):\n        """Twice x."""\n'
        '        # TODO 9.1: add.\n        raise NotImplementedError("TODO 9.1")\n'
    )  # fmt: skip
    carried = carry(OLD, mine, new)
    assert sorted(carried.answers) == ["9.1", "9.2"] and "@staticmethod" in carried.remarks[0]
    assert '        text = """a\nb"""\n        if text:\n            return twice(x)\n' in carried.text


def test_other_arguments_are_taken_over_and_told():
    carried = carry(OLD, MINE, changed(OLD, ("def double(x):", "def double(x, times=2):")))
    assert function(carried.text, "double").startswith('def double(x, times=2):\n    """Twice x."""\n')
    assert "return twice(x)" in carried.text and carried.answers == ["9.1", "9.2"]
    assert [line.split(": ")[-1].strip() for line in carried.remarks[0].splitlines()[1:]] == ["(x)", "(x, times=2)"]


def test_what_the_student_made_of_a_declaration_stays_while_the_course_leaves_it():
    mine = changed(MINE, ("def double(x):", "def double(x: int = 1):"))
    carried = carry(OLD, mine, changed(OLD, ("Twice x.", "Two times x.")))
    assert function(carried.text, "double").startswith('def double(x: int = 1):\n    """Two times x."""')


def test_an_exercise_that_is_gone_is_named_and_one_that_is_new_is_to_do():
    start, end = OLD.index("def double"), OLD.index("class Pair")
    new = (
        OLD[:start]
        + OLD[end:]
        + '\n\ndef more():\n    """More."""\n    # TODO 9.4: do.\n    raise NotImplementedError("TODO 9.4")\n'
    )
    carried = carry(OLD, MINE, new)
    assert "9.1 double is gone" in carried.remarks[0] and "backup" in carried.remarks[0]
    assert carried.answers == ["9.2"] and set(unfinished(carried.text)) == {"9.3", "9.4"}
    assert carry(OLD, OLD, new).remarks == [], "nobody's answer was lost"


def test_given_code_that_both_have_changed_is_the_course_s_and_is_named():
    mine = changed(MINE, ("LIMIT = 3", "LIMIT = 30"), ("self.a, self.b = a, b", "self.a, self.b = b, a"))
    assert "LIMIT = 30" in carry(OLD, mine, changed(OLD, ("Twice x.", "Two."))).text, "the course has not touched it"
    new = changed(OLD, ("LIMIT = 3", "LIMIT = 4"), ("self.a, self.b = a, b", "self.a, self.b = a + 0, b"))
    carried = carry(OLD, mine, new)
    assert "LIMIT = 4" in carried.text and "a + 0" in carried.text
    assert [remark.partition(":")[0] for remark in carried.remarks] == ["LIMIT", "Pair.__init__"]


def test_a_name_that_both_have_added_is_the_course_s_and_is_named():
    carried = carry(OLD, MINE, OLD.replace("\n\ndef double", "\n\ndef twice(x, y):\n    return y\n\n\ndef double"))
    assert carried.text.count("def twice") == 1 and "return y" in carried.text
    assert carried.remarks == ["twice: the course has something of that name now. Yours is in the backup."]


def test_given_code_that_is_gone_stays_where_an_answer_uses_it():
    new = changed(OLD, ("import math\n", ""), ("def helper(x):\n    return x + math.pi\n\n\n", ""))
    assert "math" not in carry(OLD, MINE, new).text
    mine = changed(MINE, ("return twice(x)", "return math.prod([2, helper(x)])"))
    carried = carry(OLD, mine, new)
    assert "import math\n" in carried.text and "def helper" in carried.text and carried.remarks == []


def test_half_an_answer_and_notes_stay():
    new = changed(OLD, ("end it.", "end it well."))
    carried = carry(OLD, MINE, new)
    assert '    # TODO 9.3: end it well.\n    half = """text\n  within"""\n' in carried.text
    assert "9.3" in unfinished(carried.text) and "9.3" not in carried.answers


@pytest.mark.parametrize(
    "body",
    [
        "def double(x): return 2 * x",
        'def double(x):\n  """Twice x."""\n  if x:\n    return 2 * x\n  return x',
        'def double(x):\n\t"""Twice x."""\n\treturn 2 * x',
        "def double(\n    x,\n):\n    return 2 * x",
        'def double(x):\n    """My own words."""\n    return 2 * x',
    ],
)
def test_an_answer_in_any_layout(body):
    carried = carry(OLD, changed(OLD, (DOUBLE, body)), changed(OLD, ("Twice x.", "Two times x.")))
    scope: dict = {}
    exec(carried.text, scope)
    assert scope["double"](3) == 6 and "Two times x." in scope["double"].__doc__


def test_of_two_functions_with_one_name_the_last_is_the_answer_and_the_first_stays():
    mine = MINE.replace("# why not x << 1?\n", "def double(x):\n    return x + x + 0  # first try\n\n\n")
    carried = carry(OLD, mine, changed(OLD, ("Twice x.", "Two times x.")))
    assert carried.text.index("# first try") < carried.text.index("return twice(x)")
    assert "return twice(x)" in function(carried.text, "double")


def test_a_function_that_the_student_renamed_is_kept_and_its_exercise_is_to_do():
    carried = carry(OLD, MINE.replace("double", "doubled"), changed(OLD, ("Twice x.", "Two times x.")))
    assert "def doubled(x)" in carried.text and "9.1" in unfinished(carried.text)
    assert "9.1 double is to do: your file has no function double." in carried.remarks


@pytest.mark.parametrize(
    ("mine", "why"),
    [
        ("def double(:\n", ":1: Python cannot read this line"),
        (MINE.replace("return twice(x)", "<<<<<<< mine"), r":\d+: Python cannot read this line"),
        ("\0", "Python cannot read"),
        ("return 1\n", ":1: Python cannot read this line: 'return' outside function"),
        (MINE + "class Pair: pass\n", ": your code and the new version do not go together"),
    ],
)
def test_what_cannot_be_carried_is_refused(mine, why):
    with pytest.raises(Misfit, match=why):
        carry(OLD, mine, changed(OLD, ("Twice x.", "Two times x."), ("Their sum.", "The sum.")))


@pytest.mark.parametrize("lesson", MODULES, ids=lambda lesson: lesson.slug)
def test_every_answer_of_the_course_survives_other_words_around_it(lesson):
    if lesson.is_withheld:
        pytest.skip("no answers here")
    old, mine = skeleton.cut_lesson(lesson), lesson.solution.read_text(encoding="utf-8")
    assert carry(old, mine, old).text == mine
    carried = carry(old, mine, re.sub(r"# TODO (\d+\.\d+): ", r"# TODO \1: anew: ", old))
    assert ast.dump(ast.parse(carried.text)) == ast.dump(ast.parse(mine))
    assert sorted(carried.answers) == sorted(carried.reworded) == sorted(unfinished(old)) and not carried.remarks
