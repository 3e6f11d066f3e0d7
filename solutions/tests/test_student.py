"""The course as its users meet it: a copy of it, worked in by a student, through the commands that they type."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.course import GAINS, LESSONS, MODULES, ROOT, modules_of, skeleton
from common.course.exercises import exercises_of
from common.tests.zygote import typed_in

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the course in which no exercise has been touched."""
    base = tmp_path_factory.mktemp("student") / "course"
    shutil.copytree(
        ROOT, base, ignore=shutil.ignore_patterns(".git", ".venv", ".course", "__pycache__", ".pytest_cache", "*.ipynb")
    )
    for lesson in MODULES:
        (base / lesson.module.relative_to(ROOT)).write_text(skeleton.cut_lesson(lesson))
    return base


def finish(copy: Path, *numbers: int, **edits: tuple[str, str]) -> None:
    """Let the student's modules of these lessons be the reference's, but for an edit by slug."""
    for lesson in MODULES:
        if lesson.number in numbers:
            text = lesson.solution.read_text()
            if lesson.slug in edits:
                assert text.count(edits[lesson.slug][0]) == 1
                text = text.replace(*edits[lesson.slug])
            (copy / lesson.module.relative_to(ROOT)).write_text(text)


@pytest.fixture
def student(copy, tmp_path) -> Path:
    """A fresh copy for one test."""
    return Path(shutil.copytree(copy, tmp_path / "course"))


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_untouched_skeleton_scores_nothing_and_says_what_to_do(copy, lesson):
    result = typed_in(copy, "test-lesson", str(lesson.number))
    assert result.returncode == 1, result.stdout
    assert "Traceback" not in result.stdout
    required = [module for module in modules_of(lesson.number) if not module.is_optional]
    exercises = [exercise for module in required for exercise in exercises_of(module)]
    assert result.stdout.count("to do") == len(exercises)
    for exercise in exercises:
        assert re.search(rf"{re.escape(exercise.id)} .*\.py:\d+ +make hint-{re.escape(exercise.id)}\b", result.stdout)
    assert f"0 of {len(exercises)} exercises, 0 of " in result.stdout


@pytest.fixture(scope="module")
def finished(copy, tmp_path_factory) -> Path:
    """A copy in which every exercise has the reference's answer."""
    finished = Path(shutil.copytree(copy, tmp_path_factory.mktemp("finished") / "course"))
    finish(finished, *(lesson.number for lesson in LESSONS))
    return finished


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_finished_lesson_passes(finished, lesson):
    result = typed_in(finished, "test-lesson", str(lesson.number))
    assert result.returncode == 0, result.stdout
    assert f"Lesson {lesson.number} is complete." in result.stdout


@pytest.mark.parametrize("options", [{}, {"TP": "2", "QUANT": "int8", "KV": "int8", "SPEC": "tales-draft"}], ids=str)
def test_a_student_who_has_finished_can_chat(finished, options):
    result = typed_in(finished, "chat", stdin="Once upon a time\n/quit\n", MODEL="tales", MINE="0-8", **options)
    assert result.returncode == 0, result.stdout
    assert "Your lessons 0, 1, 2, 3, 4, 5, 6, 7 and 8." in result.stdout


def test_what_runs_is_the_students_file(student):
    """A grader that secretly ran the reference would not see this; nor would a later lesson built on it."""
    finish(student, 0, 1, 2, llm_basics=("torch.rsqrt(mean_square + eps)", "torch.zeros_like(mean_square)"))
    lesson_1 = typed_in(student, "test-lesson", "1")
    assert lesson_1.returncode == 1
    assert re.search(r"wrong +1\.4 ", lesson_1.stdout) and not re.search(r"wrong +1\.3 ", lesson_1.stdout)
    assert typed_in(student, "test-lesson", "2").returncode == 0
    under_mine = typed_in(student, "test-lesson", "2", MINE="0-1")
    assert under_mine.returncode == 1 and "It runs with your lessons 0 and 1." in under_mine.stdout
    assert re.search(r"wrong +2\.\d+ ", under_mine.stdout)


def test_unfinished_modules_are_refused_under_mine(student):
    finish(student, 0, 2)
    result = typed_in(student, "chat", stdin="/quit\n", MODEL="tales", MINE="0-2")
    assert result.returncode == 2
    assert "llm_basics.py cannot be used yet: 1.1, 1.2, " in result.stdout


def test_progress_is_graded_anew_when_something_changed(student):
    """The board follows the file, not what was once true of it; what was graded as it is now is not graded again."""
    finish(student, 1)
    board = typed_in(student, "progress").stdout
    assert re.search(r"LLM basics .*14/14", board) and GAINS[1] in board and GAINS[2] not in board
    grades = {path: path.stat().st_mtime_ns for path in student.glob(".course/grades/*")}
    assert any(path.name.startswith("llm_basics-") for path in grades)
    assert typed_in(student, "progress").stdout == board
    assert {path: path.stat().st_mtime_ns for path in student.glob(".course/grades/*")} == grades
    finish(student, 1, llm_basics=("torch.rsqrt(mean_square + eps)", "torch.zeros_like(mean_square)"))
    assert re.search(r"LLM basics .*13/14", typed_in(student, "progress").stdout)


def test_reset_backs_up_and_the_work_can_be_put_back(student):
    finish(student, 1)
    work = (student / "lesson-1-llm-basics" / "llm_basics.py").read_text()
    result = typed_in(student, "reset-lesson", "1")
    assert result.returncode == 0
    backup = student / re.search(r"kept in (\S+\.py)\.", result.stdout)[1]
    assert backup.read_text() == work
    assert typed_in(student, "test-lesson", "1").returncode == 1


def test_a_watched_lesson_is_graded_on_save_until_it_is_complete(student):
    """Seen from outside: a process, a file, and what is printed."""
    finish(student, 0, intro=("(num_parameters * bits + 7) // 8", "num_parameters * bits // 8"))
    file = student / modules_of(0)[0].module.relative_to(ROOT)
    command = [sys.executable, "-m", "common", "watch-lesson-0"]
    environment = {**os.environ, "COURSE_PYTHON": "here", "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
    watching = subprocess.Popen(command, cwd=student, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        read_until(watching, "wrong   0.5")
        read_until(watching, "graded whenever you save it")
        wrong = file.read_text()
        file.write_text(wrong + "def f(:\n")
        read_until(watching, "Python cannot read this line")
        (student / "new").write_text(wrong.replace("num_parameters * bits // 8", "(num_parameters * bits + 7) // 8"))
        os.replace(student / "new", file)  # as many editors save
        read_until(watching, "0.5 weight_bytes: wrong -> passed")
        read_until(watching, "Lesson 0 is complete.")
        watching.send_signal(signal.SIGINT)
        assert watching.wait(timeout=120) == 0
    finally:
        watching.kill()
        watching.stdout.close()


def read_until(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"it ended without saying {text!r}")


def test_what_passes_may_be_compared_with_the_reference(student):
    finish(student, 0, intro=("(num_parameters * bits + 7) // 8", "num_parameters * bits // 8"))
    shown = typed_in(student, "diff-lesson-0").stdout
    assert shown.count("the same as the reference's") == 8 and "0.5 has not passed yet" in shown
    assert "num_parameters * bits // 8" not in shown
    assert "(num_parameters * bits + 7) // 8" in typed_in(student, "diff-0.5", FORCE="1").stdout


def test_the_courses_own_tests_do_not_depend_on_the_students_work(student):
    for lesson in MODULES:
        (student / lesson.module.relative_to(ROOT)).write_text("def broken(:\n")
    tests = ["common/tests/course/test_skeleton.py", "common/tests/course/test_course.py"]
    options = ["-q", "-p", "no:cacheprovider", "--disable-plugin-autoload"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *tests], cwd=student, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
