"""Whose code runs: `MINE`, here and in the processes that are started from here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from common import course
from common.course import MODULES, ROOT, CourseError

REPORT = """
import json, multiprocessing, sys
from common import course

def files():
    import torch
    import solutions.llm_basics as one, solutions.llama_pytorch as two, reference.llama_pytorch as kept
    normed = [each.RMSNorm(4, 0.0)(torch.ones(4)).sum().item() for each in (two, kept)]
    return [one.__file__, two.__file__, kept.__file__, kept.rms_norm.__module__, two.rms_norm.__module__, *normed]

def child(connection):
    connection.send(files())

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,))
    process.start()
    theirs.close()
    print(json.dumps(ours.recv()))
"""


def run(script: str, tmp_path, **environment) -> subprocess.CompletedProcess:
    file = tmp_path / "script.py"
    file.write_text(script)
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, str(file)], env=variables, capture_output=True, text=True)


def test_finder_obeys_the_environment_in_a_process_of_a_process(tmp_path):
    """What runs under MINE is the student's code, not the reference: sabotage in it reaches the later modules. The
    first process is the subject of the tests below.
    """
    mine = tmp_path / "mine.py"
    source = (ROOT / "solutions" / "llm_basics.py").read_text()
    mine.write_text(source.replace("torch.rsqrt(mean_square + eps)", "torch.zeros_like(mean_square)"))
    result = run(REPORT, tmp_path, COURSE_MODULES=f"llm_basics={mine}")
    reference = str(ROOT / "solutions" / "llama_pytorch.py")
    assert json.loads(result.stdout) == [
        str(mine),
        reference,
        reference,
        "reference.llm_basics",
        "solutions.llm_basics",
        0,
        4,
    ]


def test_unfinished_module_is_refused_at_import(tmp_path):
    mine = tmp_path / "mine.py"
    mine.write_text('def f():\n    raise NotImplementedError("TODO 1.4")\n')
    result = run("import solutions.llm_basics", tmp_path, COURSE_MODULES=f"llm_basics={mine}")
    assert "mine.py cannot be used yet: 1.4 still to do" in result.stderr


def test_a_module_that_was_saved_twice_within_a_second_runs_as_it_is(tmp_path):
    mine = tmp_path / "mine.py"
    for x in ("1", "2"):
        mine.write_text(f"x = {x}\n")
        os.utime(mine, (1, 1))
        result = run(
            "import solutions.intro\nprint(solutions.intro.x)",
            tmp_path,
            COURSE_MODULES=f"intro={mine}",
            PYTHONDONTWRITEBYTECODE="",
        )
        assert result.stdout.strip() == x, result.stderr


def test_a_notebook_chooses_modules_before_they_are_imported(tmp_path, monkeypatch):
    mine = tmp_path / "mine.py"
    mine.write_text((ROOT / "solutions" / "intro.py").read_text())
    choose = (
        "import os\nfrom common import course\nfrom common.course import modules\n"
        f"modules.activate = lambda mine: os.environ.update(COURSE_MODULES='intro={mine}')\n"
        "course.choose_modules({!r})\nimport solutions.intro as one\nprint(one.__file__)\n"
    )
    first, second = run(choose.format("0"), tmp_path, COURSE_MODULES="").stdout.splitlines()
    assert first == "Yours: lesson 0. All others run the reference." and second == str(mine)
    first, second = run(choose.format(""), tmp_path, COURSE_MODULES="").stdout.splitlines()
    assert first == "All lessons run the reference." and second != str(mine)
    late = choose.format("") + "course.choose_modules('0')"
    assert "intro.py already: restart it" in run(late, tmp_path, COURSE_MODULES="").stderr


def test_activate_names_what_is_unfinished(tmp_path, monkeypatch):
    monkeypatch.delenv(course.MODULES_VARIABLE, raising=False)
    monkeypatch.setattr("common.course.lessons.ROOT", tmp_path)
    folder = tmp_path / "lesson-1-llm-basics"
    folder.mkdir()
    with pytest.raises(CourseError, match=r"llm_basics.py does not exist"):
        course.activate("1")
    (folder / "llm_basics.py").write_text('def f():\n    raise NotImplementedError("TODO 1.4")\n')
    with pytest.raises(CourseError, match=r"1.4 still to do"):
        course.activate("1")
    (folder / "llm_basics.py").write_text("def f(:\n")
    with pytest.raises(CourseError, match=r"llm_basics.py:1: Python cannot read this line"):
        course.activate("1")
    (folder / "llm_basics.py").write_text("x = 1\0\n")  # Python 3.11.3 and older raise a ValueError
    with pytest.raises(CourseError, match=r"llm_basics.py: Python cannot read it: .*null bytes"):
        course.activate("1")
    (folder / "llm_basics.py").write_text("def f():\n    return 1\n")
    assert course.MODULES_VARIABLE not in os.environ
    monkeypatch.setenv(course.MODULES_VARIABLE, "")
    course.activate("1")
    assert course.substitutes() == {"llm_basics": folder / "llm_basics.py"}
    assert course.files_used().startswith("Your lesson 1, the reference's lessons 0, 2")
    course.activate("")
    assert course.substitutes() == {}


@pytest.mark.parametrize(
    ("mine", "numbers"), [("", []), ("1", [1]), ("0-2", [0, 1, 2]), ("2,0", [0, 2]), (" 0-1 , 1 ", [0, 1])]
)
def test_parse_mine(mine, numbers):
    assert [lesson.number for lesson in course.parse_mine(mine)] == numbers


@pytest.mark.parametrize("mine", ["x", "2-0", "0-", "-1", "1;2", "99", "0-99", "²"])
def test_parse_mine_refuses(mine):
    with pytest.raises(CourseError, match=r"MINE=|There is no lesson"):
        course.parse_mine(mine)


def test_one_rule_names_everything():
    for lesson in MODULES:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", lesson.name)
        assert lesson.folder.is_dir() and lesson.solution.is_file()
        assert lesson.module.name == lesson.solution.name == f"{lesson.slug}.py"


def test_the_front_of_the_course_needs_only_the_standard_library():
    """`python -m common` must answer before anything is installed."""
    script = "import sys, common.course.skeleton; print(sorted({'torch', 'rich', 'pytest'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
