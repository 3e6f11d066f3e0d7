"""The grader, tried with answers that are right, wrong, unfinished and hostile."""

from __future__ import annotations

import inspect
import re
import time
import traceback
from pathlib import Path

import pytest
import torch

from common.course import CourseError
from common.course.catalogue import apply, right, wrong
from common.course.exercises import exercises_of
from common.course.skeleton import cut_lesson
from common.grading import compare, isolate, runner
from common.grading.arguments import state
from common.grading.results import Result
from common.grading.runner import grade
from common.grading.subject import Subject
from common.tests.sample_lesson import SampleLesson, write_lesson


def graded(lesson: SampleLesson, bodies: dict[str, str], top: str = "") -> dict[str, Result]:
    """Grade the solution with the answers of these functions replaced. Returns results by function name."""
    source = lesson.solution.read_text()
    for name, body in bodies.items():
        source = re.sub(
            rf'(def {name}\(x\):\n    """Twice x."""\n).*?\n    return 2 \* x\n',
            rf"\1    {body}\n",
            source,
            flags=re.DOTALL,
        )
        assert body in source
    file = lesson.base / "student.py"
    file.write_text(source.replace("import torch\n", "import torch\n" + top, 1))
    return {result.name: result for result in grade(lesson, file)}


def statuses(results: dict[str, Result]) -> dict[str, str]:
    return {name: result.status for name, result in results.items()}


# --- what the student is told ---------------------------------------------------------------------------------------


def test_untouched_skeleton_is_to_do_and_imports(tmp_path):
    lesson = write_lesson(tmp_path, ["one", "two"])
    lesson.module.write_text(cut_lesson(lesson))
    seen: list[Result] = []
    results = grade(lesson, lesson.module, on_result=seen.append)
    assert [result.status for result in results] == ["to do", "to do", "waiting"]
    assert seen == results
    assert [result.points for result in results] == [1, 2, 0]
    lines = lesson.module.read_text().splitlines()
    assert [lines[result.line - 1].strip() for result in results[:2]] == [
        "# TODO 9.1: double it.",
        "# TODO 9.2: double it.",
    ]
    isolate.whole("sample", lesson.module.read_text(), lesson.module)


def test_solution_passes(tmp_path):
    lesson = write_lesson(tmp_path, ["one", "two"])
    assert {result.status for result in grade(lesson, lesson.solution)} == {"passed"}


def test_each_kind_of_mistake_gets_its_sentence(tmp_path):
    bodies = {
        "nothing": "2 * x",
        "shaped": "return (2 * x)[None]",
        "typed": "return (2 * x).double()",
        "strange": "return 2 * x + float('nan')",
        "valued": "return 2 * x + torch.tensor(x.tolist() == [1, 2]) * torch.arange(len(x))",
        "listed": "return (2 * x).tolist()",
        "raising": "return x[7]",
        "leaving": "return undefined",
        "right": "return x + x",
    }
    results = graded(write_lesson(tmp_path, list(bodies)), bodies)
    sentences = {
        "nothing": "nothing([1, 2]) is None: is a `return` missing?",
        "shaped": "shaped([1, 2]) has shape (1, 2), expected (2,).",
        "typed": "typed([1, 2]) has dtype float64, expected float32.",
        "strange": "strange([1, 2]) is NaN at [0] (2 of 2 values), expected 2.",
        "valued": "valued([1, 2]): first difference at [1]: 5, expected 4. 1 of 2 values differ, the largest error "
        "is 1.",
        "listed": "listed([1, 2]) is a list ([2.0, 4.0]), expected a tensor.",
    }
    assert {name: results[name].sentence for name in sentences} == sentences
    assert re.match(r"raised IndexError: .* at .*student.py:\d+: `return x\[7\]`", results["raising"].sentence)
    assert "raised NameError: name 'undefined' is not defined at" in results["leaving"].sentence
    assert {name for name, result in results.items() if result.status == "passed"} == {"right"}
    assert results["together"].status == "waiting"


def test_an_attribute_that_is_none_may_lack_an_assignment():
    """A call's None lacks a `return`; what is none of a call may be an attribute that was never set."""
    with pytest.raises(
        compare.CheckFailed, match="^status of a request is None: is a `return` or an assignment missing"
    ):
        compare.equal(None, 1, "status of a request")


@pytest.mark.parametrize(
    "actual, sentence",
    [
        (2.5, "the loss is 2.5, expected 2."),
        (float("nan"), "the loss is NaN, expected 2."),
        (3, "the loss is 3, expected 2."),
    ],
)
def test_a_tensor_that_is_a_single_number_has_no_index(actual, sentence):
    with pytest.raises(compare.CheckFailed) as failed:
        compare.close(torch.tensor(actual), torch.tensor(type(actual)(2)), "the loss")
    assert failed.value.sentence == sentence


def test_a_sentence_has_the_verb_of_its_subject_and_no_comma_before_a_colon():
    told = {
        "the number of blocks": "the number of blocks is [1], expected [].",
        "the ids of the blocks, where one is free,": "the ids of the blocks, where one is free, are [1], expected [].",
        "the status of the requests": "the status of the requests is [1], expected [].",
    }
    for what, sentence in told.items():
        with pytest.raises(compare.CheckFailed) as failed:
            compare.equal([1], [], what)
        assert failed.value.sentence == sentence
    with pytest.raises(compare.CheckFailed) as failed:
        compare.equal([1], [2], "the ids, where one is free,")
    assert failed.value.sentence == "the ids, where one is free: first difference at [0]: 1, expected 2."


class Near(float):
    def __sub__(self, other):
        return 0.0


class Yes:
    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False


@pytest.mark.parametrize("judge", [compare.close, compare.equal])
def test_objects_that_call_themselves_equal_are_none(judge):
    with pytest.raises(compare.CheckFailed, match="is a Near"):
        judge(Near(3), 4.0, "f(x)")
    with pytest.raises(compare.CheckFailed, match=r"another class in it \(Yes\), expected \[1, \(2, 3\)\]"):
        compare.equal([1, (2, Yes())], [1, (2, 3)], "f(x)")
    compare.equal([torch.tensor(1), (2.0, True)], [1, (2, 1)], "f(x)")


def test_known_mistake_is_named_only_when_one_explains_the_value(tmp_path):
    lesson = write_lesson(tmp_path, ["one", "two"])
    lesson.answers.write_text(
        "from common.course.catalogue import right, wrong\n"
        "ANSWERS = [wrong('9.1', 'tripled', '2 * x', '3 * x'), wrong('9.1', 'squared', '2 * x', 'x * x + x - x'),\n"
        "           wrong('9.2', 'tripled', '2 * x', '3 * x'), wrong('9.2', 'also tripled', '2 * x', 'x + 2 * x')]\n"
    )
    results = graded(lesson, {"one": "return x * 3", "two": "return x * 3"})
    assert results["one"].mistake == "tripled"
    assert results["two"].mistake is None


def test_a_mistake_is_named_only_where_it_agrees_in_every_check(tmp_path):
    """Tripled and `3 * x + 1` agree on no check; an answer that is like one here and like another there is neither."""
    lesson = write_lesson(tmp_path, ["one", "two"])
    lesson.answers.write_text(
        "from common.course.catalogue import wrong\n"
        "ANSWERS = [wrong('9.1', 'tripled', '2 * x', '3 * x'), wrong('9.2', 'divided', '2 * x', '2 * x * (x / x)')]\n"
    )
    results = graded(lesson, {"one": "return 3 * x if x.any() else x + 1", "two": "return 2 * x / (x - x) * 0 + 2 * x"})
    assert results["one"].status == "wrong" and results["one"].mistake is None, "the second check says otherwise"
    assert results["two"].status == "wrong" and results["two"].mistake is None, "NaN tells nothing"


def test_an_answer_that_changes_its_arguments_is_wrong(tmp_path):
    lesson = write_lesson(tmp_path, ["one", "two"])
    lesson.answers.write_text(
        "from common.course.catalogue import wrong\nANSWERS = [wrong('9.1', 'in place', '2 * x', 'x.mul_(2)')]\n"
    )
    results = graded(lesson, {"one": "return x.mul_(2)", "two": "return 2 * x"})
    assert results["one"].sentence == "`one` changed its argument `x`, which belongs to the caller: work on a copy."
    assert results["one"].mistake == "in place"
    assert results["two"].status == "passed"


def test_arguments_that_the_reference_changes_may_be_changed(tmp_path):
    lesson = write_lesson(tmp_path, ["one", "two"])
    source = lesson.solution.read_text()
    lesson.solution.write_text(
        source.replace("9.1: double it.\n", "9.1: double it.\n    x, _ = x.clone(), x.zero_()\n")
    )
    results = graded(lesson, {"one": "return x.mul_(2)", "two": "return 2 * x"})
    assert {result.status for result in (results["one"], results["two"])} == {"passed"}


@pytest.mark.parametrize(
    ("value", "change"),
    [
        ([1, [torch.ones(2)]], lambda value: value[1][0].add_(1)),
        ({"a": {3}}, lambda value: value["a"].add(4)),
        (([1], "x"), lambda value: value[0].append(2)),
        (torch.tensor([1.0, float("nan")]), lambda value: value.mul_(2)),
        (torch.zeros(4, 4, dtype=torch.bfloat16)[:1, 1], lambda value: value.add_(1)),
        (torch.tensor([1 + 2j]).conj(), lambda value: value.imag.add_(1)),
        ([float("nan"), object(), torch.ones(2, device="meta")], lambda value: value.__setitem__(1, object())),
    ],
)
def test_the_state_of_a_value_is_equal_until_the_value_changes(value, change):
    before = state(value)
    assert state(value) == before
    change(value)
    assert state(value) != before


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def one(x:\n    return x\n", "student.py:1: Python cannot read this line"),
        ("x = 'abc\n", "student.py:1: Python cannot read this line"),
        (b"\xff\xfe", "is not UTF-8 text"),
        ("x = 1\0", "student.py"),
        (None, "student.py does not exist"),
    ],
)
def test_unreadable_file_is_one_sentence(tmp_path, text, says):
    lesson = write_lesson(tmp_path, ["one"])
    file = tmp_path / "student.py"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CourseError, match=re.escape(says)):
        grade(lesson, file)


def test_missing_function_is_named(tmp_path):
    lesson = write_lesson(tmp_path, ["one", "two"])
    file = tmp_path / "student.py"
    file.write_text(lesson.solution.read_text().replace("def one(", "def eins("))
    results = {result.name: result for result in grade(lesson, file)}
    assert results["one"].sentence.endswith("has no function `one` any more: was it renamed?")
    assert results["two"].status == "passed"


def test_a_function_that_a_later_line_takes_away_is_named_and_input_is_not_awaited(tmp_path):
    lesson = write_lesson(tmp_path, ["one", "two"])
    file = tmp_path / "student.py"
    source = lesson.solution.read_text()
    for line in ("del one", "one = 5"):
        file.write_text(f"{source}\n{line}\n")
        results = {result.name: result for result in grade(lesson, file)}
        assert "student.py has run, `one` is no function any more" in results["together"].sentence
    results = graded(lesson, {"one": "return input('x = ')"})
    assert "it asks for input, and while a check runs nothing is typed" in results["one"].sentence


# --- hostile and broken ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_code_that_hangs_dies_or_cheats_fails_alone(tmp_path):
    bodies = {
        "looping": "exec('while True: pass')",
        "exiting": "import os; os._exit(0)",
        "leaving": "import sys; sys.exit(0)",
        "crashing": "import os; os.kill(os.getpid(), 11)",
        "skipping": "import pytest; pytest.skip('done')",
        "ending": "import pytest; pytest.exit('done', 0)",
        "interrupting": "raise KeyboardInterrupt",
        "eager": "return type('Equal', (), {'__eq__': lambda *a: True, 'shape': x.shape, 'dtype': x.dtype})()",
        "innocent": "return x + x",
    }
    results = graded(write_lesson(tmp_path, list(bodies)), bodies)
    found = statuses(results)
    assert found == {**dict.fromkeys(bodies, "wrong"), "innocent": "passed", "together": "waiting"}
    assert (
        results["looping"].sentence == "did not end within 1.5 s: an endless loop? If the machine is busy, try again."
    )
    assert not results["looping"].certain
    assert "ended the Python process with exit code 0" in results["exiting"].sentence
    assert "SystemExit (a call of exit)" in results["leaving"].sentence
    assert "by signal 11" in results["crashing"].sentence


def test_thread_left_behind_does_not_hold_up_the_grader(tmp_path):
    body = "import threading, time; threading.Thread(target=time.sleep, args=(3600,)).start(); return 2 * x"
    start = time.monotonic()
    results = graded(write_lesson(tmp_path, ["one"]), {"one": body})
    assert statuses(results) == {"one": "passed", "together": "passed"}
    assert time.monotonic() - start < 600


def test_check_without_counterpart_is_the_courses_fault(tmp_path):
    lesson = write_lesson(tmp_path, ["one", "two"])
    lesson.checks.write_text(lesson.checks.read_text().replace('@exercise("9.2"', '@exercise("9.3"'))
    with pytest.raises(CourseError, match=r"has no check for 9.2 \(two\)"):
        grade(lesson, lesson.solution)


def test_broken_check_file_is_not_a_pass(tmp_path):
    lesson = write_lesson(tmp_path, ["one"])
    lesson.checks.write_text("import nothing_of_that_name\n" + lesson.checks.read_text())
    with pytest.raises(CourseError, match="nothing_of_that_name"):
        grade(lesson, lesson.solution)


# --- isolation -------------------------------------------------------------------------------------------------------


def test_one_mistake_fails_one_exercise(tmp_path):
    lesson = write_lesson(tmp_path, ["one", "two"])
    source = lesson.solution.read_text().replace("return 2 * x\n\n\ndef two", "return helper(x) + 1\n\n\ndef two")
    file = tmp_path / "student.py"
    file.write_text(source)
    assert statuses({r.name: r for r in grade(lesson, file)}) == {
        "one": "wrong",
        "two": "passed",
        "together": "waiting",
    }


def test_broken_given_code_does_not_fail_exercises_but_the_whole(tmp_path):
    lesson = write_lesson(tmp_path, ["one"])
    results = graded(lesson, {"one": "return helper(x)"}, top="DOUBLE = 2\n")
    assert statuses(results) == {"one": "passed", "together": "passed"}
    file = tmp_path / "student.py"
    file.write_text(
        lesson.solution.read_text().replace("def helper(x):\n    return 2 * x", "def helper(x):\n    return x")
    )
    assert statuses({r.name: r for r in grade(lesson, file)}) == {"one": "passed", "together": "wrong"}


def test_own_helpers_imports_and_methods_come_along(tmp_path):
    reference, student = tmp_path / "reference.py", tmp_path / "student.py"
    reference.write_text(
        "class A:\n    def f(self):\n        return 1\n\n    def g(self):\n        return self.f()\n\n\n"
        "def h():\n    return A().f()\n"
    )
    text = (
        "import math as m\nBASE = m.floor(2.5)\n\ndef plus(x, by=BASE):\n    return x + by\n\n"
        "class A:\n    STEP = 3\n\n    def own(self):\n        return plus(self.STEP)\n\n"
        "    def f(self):\n        return self.own()\n"
    )
    module = isolate.composite("made", reference, text, student, "A.f")
    assert module.A().f() == 5 and module.A().g() == 5 and module.h() == 5
    other = isolate.composite("other", reference, "def h():\n    return 7\n", student, "h")
    assert other.h() == 7 and other.A().g() == 1 and not hasattr(other, "plus"), "one answer stays in the reference"
    assert not hasattr(other.A, "own")


def test_second_chance_in_the_untouched_module(tmp_path):
    """A student who changed a private representation throughout is right, though not in isolation."""
    lesson = write_lesson(tmp_path, ["one"])
    file = tmp_path / "student.py"
    file.write_text(
        lesson.solution.read_text()
        .replace("def helper(x):\n    return 2 * x", "def helper(x):\n    return 4 * x")
        .replace("# Exercise 9.1: double it.\n    return 2 * x", "return helper(x) / 2")
    )
    results = {result.name: result for result in grade(lesson, file)}
    assert results["one"].status == "passed"


def test_tracebacks_name_the_file_that_the_line_is_in(tmp_path):
    reference, student = tmp_path / "reference.py", tmp_path / "student.py"
    reference.write_text("def f(x):\n    return x\n\n\ndef g(x):\n    raise ValueError(x)\n")
    text = "\n\n\ndef f(x):\n    return g(x)\n"
    module = isolate.composite("made", reference, text, student, "f")
    assert (module.f.__code__.co_filename, module.f.__code__.co_firstlineno) == (str(student), 4)
    assert (module.g.__code__.co_filename, module.g.__code__.co_firstlineno) == (str(reference), 5)
    try:
        module.f(1)
    except ValueError as error:
        frames = traceback.extract_tb(error.__traceback__)
        assert [(Path(frame.filename).name, frame.lineno) for frame in frames[1:]] == [
            ("student.py", 5),
            ("reference.py", 6),
        ]


# --- the catalogue ---------------------------------------------------------------------------------------------------


def test_edit_must_fit_once(tmp_path):
    lesson = write_lesson(tmp_path, ["one", "two"])
    exercise = exercises_of(lesson)[0]
    source = lesson.solution.read_text()
    edited = apply(wrong("9.1", "tripled", "2 * x", "3 * x"), source, exercise)
    assert edited.count("3 * x") == 1 and edited.count("2 * x") == source.count("2 * x") - 1
    for old, count in (("5 * x", 0), (" ", 7)):
        with pytest.raises(CourseError, match=f"occurs {count} times in the reference's answer, and must occur once"):
            apply(wrong("9.1", "?", old, "y"), source, exercise)


def test_other_body_with_its_imports(tmp_path):
    lesson = write_lesson(tmp_path, ["one"])
    exercise = exercises_of(lesson)[0]
    source = apply(
        right(
            "9.1",
            "by numpy",
            "return torch.from_numpy(twice(x.numpy()))",
            top="import numpy as np\n\ndef twice(a):\n    return np.multiply(a, 2)",
        ),
        lesson.solution.read_text(),
        exercise,
    )
    subject = Subject(lesson, lesson.solution, source)
    assert subject.module("9.1").one(torch.ones(2)).tolist() == [2.0, 2.0]


# --- comparisons -----------------------------------------------------------------------------------------------------


def test_close_accepts_rounding_and_nothing_more():
    compare.close(torch.tensor([1.0 + 1e-6]), torch.tensor([1.0]), "x")
    compare.close(1.0, 1.0, "x")
    for actual, expected in [
        (torch.tensor([1.01]), torch.tensor([1.0])),
        (torch.tensor(1.0), torch.tensor([1.0])),
        (torch.tensor([1]), torch.tensor([1.0])),
        (torch.tensor([float("inf")]), torch.tensor([1.0])),
        (torch.tensor([True]), torch.tensor([False])),
        (float("nan"), 1.0),
        ("1.0", 1.0),
        (None, 1.0),
    ]:
        with pytest.raises(compare.CheckFailed):
            compare.close(actual, expected, "x")


def test_refuses_wants_the_error_and_its_words():
    def call():
        raise ValueError("top_p must be above 0")

    compare.refuses(ValueError, call, "top_p=0", mentions=["top_p"])
    with pytest.raises(compare.CheckFailed, match="should mention 'min_p'"):
        compare.refuses(ValueError, call, "x", mentions=["min_p"])
    with pytest.raises(compare.CheckFailed, match="should raise ValueError; it returned 1"):
        compare.refuses(ValueError, lambda: 1, "x")


def test_workers_leave_nothing_behind(tmp_path, monkeypatch):
    started, call = [], runner.call
    monkeypatch.setattr(runner, "call", lambda program: started.append(call(program)) or started[-1])
    lesson = write_lesson(tmp_path, ["one"])
    grade(lesson, lesson.solution)
    assert started and all(process.poll() is not None for process, _ in started)


def test_a_source_that_is_in_no_file_is_found_as_if_it_were(tmp_path):
    """Triton runs what `inspect` says that a kernel's source is: an edited answer's, not the file's."""
    lesson = write_lesson(tmp_path, ["one", "two"])
    source = lesson.solution.read_text()
    edited = Subject(lesson, lesson.solution, source.replace("return 2 * x", "y = x\n    return 3 * y"))
    for module in (edited.module("9.1"), edited.untouched()):
        assert "return 3 * y" in inspect.getsource(module.one)
    assert "return 2 * x" in inspect.getsource(edited.module("9.1").two)
    assert "return 2 * x" in inspect.getsource(Subject(lesson, lesson.solution).untouched().one)
