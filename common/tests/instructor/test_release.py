"""A copy of the course for a class: what it must not have in it, and how a student fares in it."""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.course import LESSONS, MODULES, ROOT, WITHHELD, CourseError, Lesson, skeleton, withheld
from common.course.exercises import exercises_of, find_exercises, walk_functions
from common.course.modules import Waits, below, listed, slugs, still_to_do_below
from common.grading.compare import close
from common.grading.results import Result, next_step
from common.grading.runner import fail, grade, pointer
from common.grading.subject import Subject
from common.instructor import release
from common.tests.sample_lesson import SampleLesson, Scripted, write_lesson
from common.tests.typed import typed
from common.tests.zygote import typed_in

# --- what stands in a solution's place ------------------------------------------------------------------------------


@pytest.mark.parametrize("lesson", MODULES, ids=lambda lesson: lesson.slug)
def test_an_emptied_solution_keeps_its_exercises_and_gives_the_same_skeleton(lesson, tmp_path, monkeypatch):
    cut = skeleton.cut_lesson(lesson)
    exercises = [(each.id, each.function) for each in exercises_of(lesson)]
    sample = SampleLesson(lesson.number, lesson.name, lesson.title, 1, base=tmp_path)
    sample.solution.write_text(skeleton.emptied(cut))
    assert sample.is_withheld and not lesson.is_withheld
    assert skeleton.cut_lesson(sample) == cut
    assert [(each.id, each.function) for each in exercises_of(sample)] == exercises


def test_below_are_the_lessons_that_are_imported_at_the_top():
    standing_on = {lesson.slug: [each.slug for each in below(lesson)] for lesson in MODULES}
    assert standing_on["intro"] == []  # it looks ahead within a function only
    assert standing_on["kv_cache"] == ["llm_basics", "mixture_of_experts", "llama_pytorch"]
    # It imports lessons 6 and 7 only if an option asks for them.
    assert not {"parallelism", "quantization"} & set(standing_on["engine"])
    assert slugs(ast.parse("from solutions import kv_cache, batching").body[0]) == {"kv_cache", "batching"}


def test_no_check_needs_a_reference_that_may_be_withheld():
    for lesson in MODULES:
        assert not re.search(r"^\s*(from|import) reference\b", lesson.checks.read_text(), re.MULTILINE), lesson.checks


def test_nothing_is_withheld_in_the_course_itself():
    assert withheld() == {}
    assert [still_to_do_below(lesson) for lesson in MODULES] == [[]] * len(MODULES)


def test_sentences():
    assert listed(["3.4"]) == "3.4"
    assert listed(["1.1", "1.2", "1.3", "1.4"]) == "1.1, 1.2, 1.3 and 1.4"
    assert listed(["1.1", "1.2", "1.3", "1.4", "1.5"]) == "1.1, 1.2, 1.3 and 2 more"
    assert str(Waits("Lesson 5", ["3.4", "3.6"])) == ("Lesson 5 builds on your lesson 3: 3.4 and 3.6 are still to do.")
    assert str(Waits("This", ["1.14", "3.6", "3.8"])).startswith("This builds on your lessons 1 and 3: 1.14, ")


def test_where_a_copy_may_go(tmp_path, capsys):
    release.check_out(tmp_path, force=False)
    release.check_out(tmp_path / "new", force=False)
    (tmp_path / "something").write_text("")
    with pytest.raises(CourseError, match="not empty. With FORCE=1"):
        release.check_out(tmp_path, force=False)
    release.check_out(tmp_path, force=True)
    for within in (ROOT, ROOT / "class"):
        with pytest.raises(CourseError, match="lies in the course itself"):
            release.check_out(within, force=True)
    assert typed("release", "--lessons", "0-3") == 2
    assert typed("release", "--out", str(tmp_path / "something")) == 2
    assert typed("release", "--lessons", "3-0", "--out", str(tmp_path / "new")) == 2
    assert capsys.readouterr().err.splitlines() == [
        "release needs OUT: where the copy goes, such as ../class.",
        f"--out: Directory '{tmp_path / 'something'}' is a file.",
        "LESSONS=3-0: '3-0' is neither a lesson's number nor a range of them, such as 0-2.",
    ]


# --- grading without a reference ------------------------------------------------------------------------------------


def in_whole_file(tmp_path: Path, **bodies: str) -> Subject:
    """A withheld lesson's subject; 9.1 is `one` and so on, and what is not given is still to do."""
    lesson = write_lesson(tmp_path, ["one", "two", "three"])
    cut = skeleton.cut(lesson.solution.read_text(), "solution.py", 9)
    lesson.solution.write_text(skeleton.emptied(cut))  # before anyone asks whether it is withheld
    for number, name in enumerate(("one", "two", "three"), 1):
        if name in bodies:
            cut = cut.replace(f'raise NotImplementedError("TODO 9.{number}")', bodies[name])
    lesson.module.write_text(cut)
    return Subject(lesson, lesson.module)


def doubles(name: str):
    def check(code):
        close(getattr(code, name)(torch.ones(2)), torch.full((2,), 2.0), f"{name}([1, 1])")

    return check


def test_an_exercise_waits_for_one_that_is_to_do(tmp_path):
    subject = in_whole_file(tmp_path, two="return one(x)", three="return two(x) + 1")
    assert subject.judge("9.2", doubles("two")).waits_for == "9.1"
    assert subject.judge("9.3", doubles("three")).waits_for == "9.1", "however deep it lies"


def test_what_ran_in_a_wrong_one_is_told(tmp_path):
    subject = in_whole_file(tmp_path, one="return 3 * x", two="return one(x)", three="return 2 * x")
    assert subject.judge("9.1", doubles("one")).through == ()
    failure = subject.judge("9.2", doubles("two"))
    assert (failure.through, failure.waits_for) == (("9.1",), None)
    assert failure.sentence.startswith("two([1, 1]): first difference at [0]: 3, expected 2.")
    assert subject.judge("9.3", doubles("three")) is None
    assert sys.getprofile() is None


def test_a_function_that_was_renamed_is_named(tmp_path):
    subject = in_whole_file(tmp_path, one="return 2 * x")
    subject.source = subject.source.replace("def one(", "def eins(")
    assert "has no function `one` any more: was it renamed?" in subject.judge("9.1", doubles("one")).sentence


def test_a_wrong_one_points_to_where_it_begins():
    one = Result("9.1", "one", "wrong")
    two = Result("9.2", "two", "wrong", through=["9.1"])
    three = Result("9.3", "three", "wrong", through=["9.1", "9.2", "9.4"])
    four = Result("9.4", "four", "passed")
    results = {each.id: each for each in (three, two, one, four)}
    assert "and 9.1 is wrong too: look there first." in pointer(LESSONS[0], three, results)
    assert pointer(LESSONS[0], one, results) == ""
    assert next_step([*results.values()]) is one
    alone = pointer(LESSONS[3], three, {"9.3": three})
    assert alone.endswith("9.1, 9.2 and 9.4 included: make test-lesson-3 says which are right.")
    one.through = ["9.2"]  # now each runs in the other's checks, and neither is to blame
    assert pointer(LESSONS[0], one, results) == pointer(LESSONS[0], two, results) == ""


def test_of_several_checks_a_failure_of_its_own_counts_more_than_waiting():
    result = Result("9.2", "two")
    fail(result, "raised NotImplementedError", waits_for="9.1")
    assert (result.status, result.sentence) == ("waiting", "waits for 9.1")
    fail(result, "is 3, expected 2", through=["9.3"])
    assert (result.status, result.sentence, result.through) == ("wrong", "is 3, expected 2", ["9.3"])
    fail(result, "raised NotImplementedError", waits_for="9.1")
    assert result.status == "wrong"
    assert next_step([Result("9.1", "one", "waiting"), Result("9.2", "two")]).id == "9.2"
    assert next_step([Result("9.1", "one", "passed")]) is None


def test_a_wrong_one_is_told_after_what_it_may_be_wrong_because_of(tmp_path):
    subject = in_whole_file(tmp_path, one="return two(x)", two="return 3 * x", three="return 2 * x")
    ids, wrong = ["9.1", "9.2", "9.3"], {"sentence": "is 3, expected 2."}
    failures = {"9.1": {**wrong, "through": ["9.2"]}, "9.2": wrong}
    events: list[tuple] = [("collected", {id: (1, 9.0, 1) for id in [*ids, "together"]})]
    for id in ids:
        events += [("start", id), ("check", failures.get(id)), ("end", id)]
    events += [("start", "together"), ("end", "together"), ("finished",)]
    told = []
    results = grade(
        subject.lesson,
        subject.file,
        on_result=lambda result: told.append((len(told), result.id, result.sentence)),
        start=lambda: Scripted(lambda ids: events),
    )
    assert [each[1] for each in told] == [*ids, "together"]
    assert told[0][2] == "is 3, expected 2.\nThis ran in your whole file, and 9.2 is wrong too: look there first."
    assert told[1][2] == "is 3, expected 2."
    assert [each.status for each in results] == ["wrong", "wrong", "passed", "waiting"]


def test_the_assembly_waits_while_the_rest_of_its_lesson_is_graded(monkeypatch):
    monkeypatch.setattr("common.grading.runner.still_to_do_below", lambda lesson: ["6.1", "8.4"])
    seen: list[Result] = []
    results = grade(MODULES[-1], MODULES[-1].solution, on_result=seen.append)
    assert {(each.status, each.sentence) for each in results} == {("waiting", "waits for 6.1 and 8.4")}
    assert seen == results and len(results) == len(exercises_of(MODULES[-1]))
    with pytest.raises(Waits, match="Lesson 8 builds on your lessons 6 and 8: 6.1 and 8.4 are still to do."):
        grade(MODULES[-2], MODULES[-2].solution)


# --- a released copy ------------------------------------------------------------------------------------------------

GIVEN_AWAY = (0, 1, 2, 3)
MODULES_GIVEN_AWAY = [module for module in MODULES if module.number in GIVEN_AWAY]


def course(copy: Path, *words: str, **variables: str) -> tuple[int, str]:
    """Run `python -m common` there. Returns the exit status and what was said."""
    result = typed_in(copy, *words, **variables)
    return result.returncode, result.stdout


@pytest.fixture(scope="module")
def instructors(tmp_path_factory) -> Path:
    """The course as a repository of its own, in which somebody has worked and left a note."""
    base = tmp_path_factory.mktemp("release") / "course"
    caches = (".git", ".venv", ".course", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info")
    shutil.copytree(ROOT, base, ignore=shutil.ignore_patterns(*caches))
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=base, check=True)
    (base / "grades-of-last-year.txt").write_text("not for the class\n")
    (base / LESSONS[0].module.relative_to(ROOT)).write_text(LESSONS[0].solution.read_text())
    return base


@pytest.fixture(scope="module")
def released(instructors) -> Path:
    out = instructors.parent / "class"
    (out / "solutions" / "tests" / "answers").mkdir(parents=True)
    (out / "solutions" / "tests" / "answers" / "kv_cache.py").write_text("an earlier release had it\n")
    (out / ".git").mkdir()
    (out / "syllabus.md").write_text("the class's own\n")
    assert course(instructors, "release", LESSONS="0-3", OUT="../class")[0] == 2
    code, said = course(instructors, "release", LESSONS="0-3", OUT="../class", FORCE="1")
    assert code == 0, said
    answers = sum(len(exercises_of(each)) for each in MODULES_GIVEN_AWAY)
    assert f"the {answers} answers of lessons 0, 1, 2 and 3" in said
    assert re.search(r"the course, \d+\.\d MB", said) and "keeps nothing secret" in said
    return out


@pytest.fixture
def student(released, tmp_path) -> Path:
    return Path(shutil.copytree(released, tmp_path / "course"))


def write(copy: Path, lesson: Lesson, ids: list[str] | None = None, edit: tuple[str, str] = ("", "")) -> None:
    """Put the answers to these exercises, or to all, into the student's module; with an edit."""
    source = lesson.solution.read_text()
    lines = source.splitlines()
    for exercise in reversed(find_exercises(source, lesson.slug)):
        if ids is not None and exercise.id not in ids:
            stub = " " * exercise.indent + f'raise NotImplementedError("TODO {exercise.id}")'
            lines[exercise.first_answer_line - 1 : exercise.last_line] = [stub]
    text = "\n".join(lines) + "\n"
    assert not edit[0] or text.count(edit[0]) == 1
    (copy / lesson.module.relative_to(ROOT)).write_text(text.replace(*edit) if edit[0] else text)


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
slow = [pytest.mark.slow, needs_git]


def statements(body: list[ast.stmt]) -> list[str]:
    """The statements without their places, docstrings and other lone constants left out."""
    lone = (ast.Expr, ast.Constant)
    return [ast.dump(each) for each in body if not (isinstance(each, lone[0]) and isinstance(each.value, lone[1]))]


def answers_to(lessons: list[Lesson]) -> dict[str, list[str]]:
    """The statements of each exercise's answer."""
    found = {}
    for lesson in lessons:
        source = lesson.solution.read_text()
        functions = dict(walk_functions(ast.parse(source)))
        for each in find_exercises(source, lesson.slug):
            body = functions[each.function].body
            found[each.id] = statements([one for one in body if one.lineno >= each.first_answer_line])
    return found


def code_in(file: Path) -> Iterator[str]:
    """What may be Python in a file: all of it, or the cells of a notebook, fenced blocks and what backticks enclose."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        yield text
        return
    cells = json.loads(text)["cells"] if file.suffix == ".ipynb" else [{"cell_type": "markdown", "source": [text]}]
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            yield source
        else:
            yield from re.findall(r"^\s*```[^\n]*\n(.*?)^\s*```", source, re.MULTILINE | re.DOTALL)
            yield from re.findall(r"`([^`\n]+)`", source)


def bodies_in(code: str, depth: int = 0) -> Iterator[list[str]]:
    """The statements of every block in a piece of Python, and in the strings in it that are Python themselves."""
    try:
        tree = ast.parse(textwrap.dedent(code))
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            if isinstance(body := getattr(node, name, None), list):
                yield statements(body)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) > 8 and depth < 2:
            yield from bodies_in(node.value, depth + 1)


def leaks(files: list[Path], answers: dict[str, list[str]]) -> set[tuple[str, str]]:
    """(exercise, name of a file) where all statements of its answer stand in a row."""
    found, beginning = set(), {}
    for id, answer in answers.items():
        beginning.setdefault(answer[0], []).append((id, answer))
    for file in files:
        for code in code_in(file):
            for body in bodies_in(code):
                for i, each in enumerate(body):
                    for id, answer in beginning.get(each, ()):
                        if body[i : i + len(answer)] == answer:
                            found.add((id, file.name))
    return found


class TestCopy:
    pytestmark = slow

    def test_no_answer_is_in_it(self, released):
        files = [each for each in released.rglob("*") if each.suffix in (".py", ".ipynb", ".md")]
        assert len(files) > 80
        assert leaks(files, answers_to(MODULES_GIVEN_AWAY)) == set()

    def test_an_answer_would_be_found_wherever_it_stands(self, tmp_path):
        answers = answers_to(MODULES_GIVEN_AWAY)
        body = dict(walk_functions(ast.parse(LESSONS[1].solution.read_text())))["rms_norm"].body[1:]
        answer = textwrap.indent("size = 4\n# written differently\n" + ast.unparse(body), "    ") + "\n"
        for name, text in {
            "module.py": f"class A:\n    def f(x):\n        if x:\n{textwrap.indent(answer, ' ' * 8)}\n",
            "answers.py": f"ANSWERS = [right('1.4', 'another way', '''\n{answer}''')]\n",
            "text.md": f"Like this:\n\n```python\n{answer}```\n",
            "book.ipynb": json.dumps({"cells": [{"cell_type": "code", "source": [f"def f(x):\n{answer}"]}]}),
        }.items():
            (tmp_path / name).write_text(text)
            assert leaks([tmp_path / name], answers) == {("1.4", name)}
            (tmp_path / name).write_text(text.replace("return ", "return 1 + "))
            assert leaks([tmp_path / name], answers) == set()

    def test_what_is_in_it_and_what_is_not(self, instructors, released):
        for lesson in MODULES:
            here, there = (each / lesson.solution.relative_to(ROOT) for each in (instructors, released))
            catalogue = released / lesson.answers.relative_to(ROOT)
            if lesson.number in GIVEN_AWAY:
                assert there.read_text().startswith(WITHHELD) and not catalogue.exists()
            else:
                assert there.read_bytes() == here.read_bytes() and catalogue.exists()
            assert (released / lesson.module.relative_to(ROOT)).read_text() == skeleton.cut_lesson(lesson)
            for file in (lesson.checks, lesson.hints, lesson.readme, lesson.notebook):
                assert (released / file.relative_to(ROOT)).read_bytes() == file.read_bytes()
        title, said, *_ = [line for line in (released / "README.md").read_text().splitlines() if line]
        assert title.startswith("# ") and "without the solutions of lessons 0, 1, 2 and 3.**" in said
        assert not (released / "grades-of-last-year.txt").exists()
        for name in (
            ".ci",
            ".github",
            "common/instructor/README.md",
            "common/instructor/grade.yml",
            "common/tests",
            "common/bench/measurements/mutants.json",
        ):
            assert not (released / name).exists()
        assert [each.name for each in (released / "solutions" / "tests").glob("test_*")] == []
        assert (released / "syllabus.md").exists() and (released / ".git").is_dir()
        assert course(released, "skeletons", "--check") == (0, "")

    def test_without_git_nobody_knows_what_is_the_courses(self, released, tmp_path):
        environment = {"GIT_CEILING_DIRECTORIES": str(released.parent)}
        shutil.rmtree(released / ".git")
        code, said = course(released, "release", OUT=str(tmp_path / "class"), **environment)
        (released / ".git").mkdir()
        assert code == 2 and said.startswith("Which files are the course's, git must say")
        assert not (tmp_path / "class").exists()


class TestStudent:
    pytestmark = slow

    def test_before_anything_is_done(self, student):
        code, board = course(student, "progress")
        assert code == 0 and re.search(r"Introduction .* 0/9 ", board) and re.search(r"LLM basics .* 0/14 ", board)
        assert board.count("waits for your lesson") == 7 and "waits for your lesson 1\n" in board
        refused = {
            ("test-lesson", "3"): "Lesson 3 builds on your lessons 1 and 2: 1.1, 1.2, 1.3 and 28 more are still to do.",
            ("test-lesson", "0", "--solution"): "The solution of lesson 0 is withheld in this copy of the course.",
            ("prove-lesson", "3"): "The solution of lesson 3 is withheld in this copy of the course.",
            ("run",): "This builds on your lessons 1 and 2: 1.1, 1.2, 1.3 and 28 more are still to do.",
            ("test",): "came without the solutions of lessons 0, 1, 2 and 3",
        }
        for command, sentence in refused.items():
            code, said = course(student, *command)
            assert code and sentence in said and "Traceback" not in said, command

    def test_a_lesson_from_half_to_whole(self, student):
        """Lesson 1 stands on no other: partly filled, with a mistake, and right."""
        lesson = LESSONS[1]
        write(student, lesson, ["1.4", "1.8", "1.9", "1.10", "1.13"])
        code, said = course(student, "test-lesson", "1")
        assert code == 1 and "Its solution is withheld" in said
        assert re.findall(r"passed +(\S+)", said) == ["1.4", "1.10", "1.13"]
        assert re.findall(r"waiting +(\d\S+) .*waits for (\S+)", said) == [("1.8", "1.3"), ("1.9", "1.3")]
        assert "wrong" not in said and "Next: 1.1 merge_pair." in said

        write(student, lesson, edit=("torch.rsqrt(mean_square + eps)", "torch.rsqrt(mean_square - eps)"))
        code, said = course(student, "test-lesson", "1")
        assert code == 1 and re.findall(r"wrong +(\d\S+)", said)[0] == "1.4" and "Mend: 1.4 rms_norm." in said
        others = len(re.findall(r"wrong +\d", said)) - 1
        assert others and said.count("and 1.4 is wrong too: look there first.") == others

        write(student, lesson)
        code, said = course(student, "test-lesson", "1")
        assert code == 0 and "14 of 14 exercises" in said and "Lesson 1 is complete." in said
        code, said = course(student, "reset-lesson", "1")
        assert code == 0 and "kept in .course/backups/llm_basics-" in said
        assert (student / lesson.module.relative_to(ROOT)).read_text() == skeleton.cut_lesson(lesson)

    def test_later_lessons_stand_on_the_students_own(self, student):
        for lesson in LESSONS[1:3]:
            write(student, lesson)
        write(
            student,
            LESSONS[3],
            [each.id for each in exercises_of(LESSONS[3]) if each.id not in ("3.5", "3.10")],
        )
        write(student, LESSONS[4])
        waits = "builds on your lesson 3: 3.5 and 3.10 are still to do."
        for command, who in ((["test-lesson", "4"], "Lesson 4"), (["run"], "This")):
            code, said = course(student, *command, MINE="3", MODEL="tales", PROMPT="Once")
            assert code == 2 and f"{who} {waits}" in said and "Traceback" not in said
        kernel = [sys.executable, "-c", "import solutions.kv_cache"]  # as a notebook's would
        result = subprocess.run(kernel, cwd=student, capture_output=True, text=True)
        assert result.returncode == 1 and f"Waits: This {waits}" in result.stderr

        write(student, LESSONS[3])
        code, said = course(student, "test-exercise", "4.17")
        assert code == 0 and "It runs with your lessons 0, 1, 2 and 3." in " ".join(said.split()), said
        write(student, LESSONS[3], edit=("permute(1, 2, 0, 3)", "permute(1, 0, 2, 3)"))
        assert course(student, "test-exercise", "4.17")[0] == 1, "it is the student's lesson 3 that runs"
        write(student, LESSONS[3])
        code, said = course(student, "run", MODEL="tales", PROMPT="Once upon a time")
        assert code == 0 and "Your lessons 0, 1, 2 and 3, the reference's lessons 4" in " ".join(said.split()), said
        code, said = course(student, "run", MODEL="tales", PROMPT="Once upon a time", MINE="5")
        assert code == 2 and "scheduler.py cannot be used yet" in said
