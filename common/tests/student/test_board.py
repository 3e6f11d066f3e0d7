"""What a student sees of how far they are: the board, the end of a lesson, and the comparison with the reference."""

from __future__ import annotations

import pytest
from rich.console import Console
from rich.text import Text

from common.course import GAINS, LESSONS, CourseError, Lesson, modules_of
from common.course.exercises import TOGETHER, exercises_of
from common.grading.results import Result
from common.student import board, difference
from common.student.board import Standing
from common.tests.sample_lesson import write_lesson


def standing(lesson: Lesson, passed: int, wrong: int = 0) -> Standing:
    """The first so many exercises have passed, so many after them are wrong, the rest is to do."""
    required = [module for module in modules_of(lesson.number) if not module.is_optional]
    exercises = [each for module in required for each in exercises_of(module)]
    statuses = ["passed"] * passed + ["wrong"] * wrong + ["to do"] * len(exercises)
    results = [Result(each.id, each.function, status, points=2) for each, status in zip(exercises, statuses)]
    together = "passed" if passed >= len(exercises) else "waiting"
    return Standing(lesson, [*results, Result(TOGETHER, TOGETHER, together)])


def drawn(standings: list[Standing]) -> list[str]:
    console = Console(width=80, record=True, file=open("/dev/null", "w"), highlight=False)
    console.print(board.draw(standings))
    return [line.rstrip() for line in console.export_text().splitlines()]


def test_the_board_fits_80_columns_and_says_how_each_lesson_stands():
    standings = [standing(lesson, 99 if lesson.number < 2 else 0) for lesson in LESSONS]
    standings[2] = standing(LESSONS[2], 4, wrong=1)
    lines = drawn(standings)
    assert max(map(len, lines)) <= 80 and len(lines) <= 24
    number = len(standings[0].exercises)
    assert lines[1].split() == ["0", "Introduction", "█" * number, f"{number}/{number}", f"{2 * number}/{2 * number}"]
    assert lines[2].strip() == GAINS[0]
    assert "████x░" in lines[5] and " 4/17" in lines[5]
    fifth = standings[2].exercises[4]
    assert lines[6].strip() == f"next: {fifth}" and GAINS[2] not in "\n".join(lines)
    assert lines[-1].strip() == f"Next: {fifth}   make test-{fifth.id}   make hint-{fifth.id}"
    total = [each for every in standings for each in every.exercises]
    passed = 4 + len(standings[0].exercises) + len(standings[1].exercises)
    assert lines[-2].endswith(f"{passed} of {len(total)} exercises, {2 * passed} of {2 * len(total)} points")
    assert 0 < lines[-2].count("█") < board.WIDTH


def test_the_board_at_the_beginning_and_at_the_end():
    assert drawn([standing(lesson, 0) for lesson in LESSONS])[-1].strip() == "Next: lesson-0-intro/README.md"
    lines = drawn([standing(lesson, 99) for lesson in LESSONS])
    assert "The engine is yours" in lines[-1] and lines[-2].count("█") == board.WIDTH
    assert max(map(len, lines)) <= 80


def test_the_board_goes_on_with_what_is_begun_and_says_what_cannot_be_graded():
    standings = [standing(lesson, 0) for lesson in LESSONS]
    standings[0] = Standing(LESSONS[0], note=Text("intro.py:3: Python cannot read this line"))
    standings[5] = standing(LESSONS[5], 1)
    lines = drawn(standings)
    assert "intro.py:3: Python cannot read this line" in lines[2]
    assert lines[-1].strip().startswith(f"Next: {standings[5].exercises[1]}")
    whole = standing(LESSONS[5], 99)
    whole.results[-1].status = "wrong"
    assert not whole.is_complete and "make test-lesson-5" in board.next_line([whole])


def test_every_lesson_says_what_it_made_possible():
    assert set(GAINS) == {lesson.number for lesson in LESSONS}
    assert all(len(gain) <= 76 and gain.endswith(".") for gain in GAINS.values())


# --- make diff-lesson-N -----------------------------------------------------------------------------------------------


@pytest.fixture
def compared(tmp_path, monkeypatch, capsys):
    """Compares a lesson of three, of which the first two have passed; returns what is shown in so many columns."""
    lesson = write_lesson(tmp_path, ["one", "two", "three"])
    lesson.module.write_text(
        '"""A sample."""\n\n\ndef one(x):\n    """Twice x."""\n    # TODO 9.1: double it.\n    # by adding\n'
        '    return x + x\n\n\ndef two(x):\n    """My words."""\n    return 2 * x\n\n\n'
        "def three(x):\n    return 3 * x\n"
    )
    results = [Result("9.1", "one", "passed"), Result("9.2", "two", "passed"), Result("9.3", "three", "wrong")]
    monkeypatch.setattr(difference, "kept", lambda lesson, file: results)

    def compare(width: int, force: bool = False) -> str:
        monkeypatch.setattr(difference.console, "width", width)
        difference.difference([(lesson, exercises_of(lesson))], force)
        return capsys.readouterr().out

    compare.lesson = lesson
    return compare


def test_answers_that_have_passed_stand_beside_the_reference_s(compared):
    wide, narrow = compared(120), compared(60)
    assert [line for line in wide.splitlines() if "return x + x" in line and line.index("return x + x") < 60]
    [line] = [line for line in wide.splitlines() if "# by adding" in line]
    assert "return 2 * x" in line, "side by side"
    assert narrow.index("return x + x") < narrow.index("return 2 * x"), "one above the other"
    assert not [line for line in narrow.splitlines() if "return x + x" in line and "return 2 * x" in line]
    for shown in (wide, narrow):
        assert "Twice x" not in shown and "double it" not in shown and "TODO" not in shown, "only what they made of it"
        assert "the same as the reference's" in shown
        assert "3 * x" not in shown and "9.3 has not passed yet" in shown and "FORCE=1" in shown


def test_with_force_what_has_not_passed_is_shown_as_well(compared, monkeypatch):
    monkeypatch.setattr(difference, "kept", lambda lesson, file: pytest.fail("nothing needs to be graded"))
    assert "return 3 * x" in compared(120, force=True) and "FORCE" not in compared(120, force=True)


def test_a_file_that_cannot_be_read_is_named(compared):
    compared.lesson.module.write_text("def one(:\n")
    with pytest.raises(CourseError, match=r"sample\.py:1: Python cannot read this line"):
        compared(80, force=True)


def test_a_function_that_is_gone_is_named(compared):
    compared.lesson.module.write_text("x = 1\n")
    assert compared(80, force=True).count("has no function") == 3
