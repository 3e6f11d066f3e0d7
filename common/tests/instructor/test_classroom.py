"""Grading a class: what is taken from a submission, what a hostile one can do, and what is written down."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from common.course import LESSONS, MODULES, ROOT, CourseError
from common.course.catalogue import apply, right
from common.course.exercises import TOGETHER, exercises_of, read_source, to_do
from common.grading import runner
from common.grading.results import Result
from common.grading.runner import grade
from common.instructor import sandbox
from common.instructor.classroom import Classroom, points_of
from common.instructor.report import Graded, write
from common.instructor.submissions import Submission, find_submissions, read_submission
from common.tests.sample_lesson import Scripted

INTRO, BASICS = LESSONS[0], LESSONS[1]
SOURCE = INTRO.solution.read_text()


# --- what is taken ---------------------------------------------------------------------------------------------------


def test_each_kind_of_submission_gives_its_modules_and_nothing_else(tmp_path):
    folder = tmp_path / "anna"
    (folder / INTRO.folder.name).mkdir(parents=True)
    (folder / INTRO.folder.name / "intro.py").write_text("a = 1\n")
    (folder / INTRO.folder.name / "test_intro.py").write_text("no checks\n")
    (folder / "solutions").mkdir()
    (folder / "solutions" / "llm_basics.py").write_text("the reference\n")
    (folder / ".course" / "backups").mkdir(parents=True)
    (folder / ".course" / "backups" / "llm_basics.py").write_text("an old one\n")
    with zipfile.ZipFile(tmp_path / "bert.zip", "w") as archive:
        archive.write(folder / INTRO.folder.name / "intro.py", "my work/lesson-0-intro/intro.py")
    with tarfile.open(tmp_path / "carla.tar.gz", "w:gz") as archive:
        archive.add(folder / INTRO.folder.name / "intro.py", "intro.py")
    (tmp_path / "notes.txt").write_text("not a submission")
    found, ignored = find_submissions(tmp_path)
    assert {each.student: each.modules for each in found} == {
        name: {"intro": b"a = 1\n"} for name in ("anna", "bert", "carla")
    }
    assert [each.notes for each in found] == [[], [], []]
    assert ignored == ["notes.txt: neither a folder nor a .zip nor a .tar; links are not followed"]


def test_no_submissions_is_said_clearly(tmp_path):
    with pytest.raises(CourseError, match="is no folder"):
        find_submissions(tmp_path / "absent")
    with pytest.raises(CourseError, match="There is no submission in .* lies: nothing"):
        find_submissions(tmp_path)
    (tmp_path / "anna.7z").touch()
    with pytest.raises(CourseError, match="There is no submission in .* lies: anna.7z"):
        find_submissions(tmp_path)


def test_archive_cannot_lead_out_of_itself(tmp_path):
    secret = tmp_path / "secret.py"
    secret.write_text("the instructor's")
    with zipfile.ZipFile(tmp_path / "mallory.zip", "w") as archive:
        archive.writestr("../../solutions/intro.py", "a way out")
        archive.writestr("/etc/intro.py", "an absolute one")
        link = zipfile.ZipInfo("lesson-1-llm-basics/llm_basics.py")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(link, str(secret))
    submission = read_submission("mallory", tmp_path / "mallory.zip")
    assert submission.modules == {}
    assert [note.partition(" and was")[0] for note in submission.notes] == [
        "../../solutions/intro.py leads out of the archive",
        "/etc/intro.py leads out of the archive",
        "lesson-1-llm-basics/llm_basics.py is a link",
    ]
    with tarfile.open(tmp_path / "trudy.tar", "w") as archive:
        for name, kind in (
            ("intro.py", tarfile.SYMTYPE),
            ("kv_cache.py", tarfile.LNKTYPE),
            ("llm_basics.py", tarfile.FIFOTYPE),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, str(secret)
            archive.addfile(member)
        member = tarfile.TarInfo("x/../../batching.py")
        archive.addfile(member, io.BytesIO())
    submission = read_submission("trudy", tmp_path / "trudy.tar")
    assert submission.modules == {} and len(submission.notes) == 4
    folder = tmp_path / "eve"
    folder.mkdir()
    (folder / "intro.py").symlink_to(secret)
    os.mkfifo(folder / "llm_basics.py")
    submission = read_submission("eve", folder)
    assert submission.modules == {} and len(submission.notes) == 2
    assert list(tmp_path.rglob("intro.py")) == [folder / "intro.py"]
    assert not any((place / "solutions").exists() for place in (tmp_path.parent, tmp_path.parent.parent))


def test_bombs_and_broken_archives_are_told_not_raised(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "long.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("intro.py", b"#" * (64 << 20))
    assert read_submission("long", tmp_path / "long.zip").notes == ["intro.py is longer than 1 MiB and was not taken"]
    (tmp_path / "broken.zip").write_bytes((tmp_path / "long.zip").read_bytes()[:-30])
    (tmp_path / "broken.tar.gz").write_bytes(b"\x1f\x8b no gzip")
    for name in ("broken.zip", "broken.tar.gz"):
        assert "cannot be read any further" in read_submission("x", tmp_path / name).notes[0]
    monkeypatch.setattr("common.instructor.submissions.MAX_UNPACKED", 1 << 20)
    with tarfile.open(tmp_path / "bomb.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("zeros")
        member.size = 8 << 20
        archive.addfile(member, io.BytesIO(bytes(8 << 20)))
    assert "the rest was not looked at" in read_submission("bomb", tmp_path / "bomb.tar.gz").notes[0]


def test_what_may_be_meant_by_a_module_that_is_missing_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "anna.zip", "w") as archive:
        archive.writestr("work/intro.py", "a = 1\n")
        for name in (
            "llm_basics (1).py",
            "kv_cache.ipynb",
            "more.zip",
            "intro copy.py",
            "notes.md",
            "test_batching.py",
            "smith_123_scheduler.py",
        ):
            archive.writestr(f"work/{name}", "")
    submission = read_submission("anna", tmp_path / "anna.zip")
    assert set(submission.modules) == {"intro"}
    assert submission.notes == [
        "not taken, since no module is called so: work/llm_basics (1).py, work/kv_cache.ipynb, work/more.zip, "
        "work/smith_123_scheduler.py"
    ]


@pytest.mark.parametrize(
    "files, told", [(["in\x1b[2J.py", "a.rar"], r"in\x1b[2J.py"), ([], "no file"), (["b.7z"], "b.7z")]
)
def test_a_submission_without_any_module_says_what_lies_there(tmp_path, files, told):
    for name in files:
        (tmp_path / name).touch()
    submission = read_submission("anna", tmp_path)
    assert not submission.modules and told in submission.notes[0]


def test_file_names_cannot_move_the_cursor_nor_fill_the_screen(tmp_path):
    with zipfile.ZipFile(tmp_path / "eve.zip", "w") as archive:
        archive.writestr("../\x1b[2Jintro.py", "")
    assert read_submission("eve", tmp_path / "eve.zip").notes == [
        r"../\x1b[2Jintro.py leads out of the archive and was not taken"
    ]
    (tmp_path / "\x1b[31mred.txt").touch()
    (tmp_path / ("x" * 240 + ".txt")).touch()
    _, ignored = find_submissions(tmp_path)
    assert ignored[0].startswith(r"\x1b[31mred.txt: neither") and max(map(len, ignored)) < 160


@pytest.mark.slow
def test_what_an_answer_raises_or_closes_costs_its_own_exercise(tmp_path):
    """Whatever its text is, it can be read in a report; and pytest goes on without its standard output."""
    bodies = {
        "e1": "raise ValueError('x' * 5_000_000)",
        "e2": "raise ValueError('\\ud800 and \\x1b[2J')",
        "e4": "class Broken(Exception):\n    def __str__(self):\n        raise KeyError\nraise Broken",
        "e5": "import sys\nsys.stdout.close()\nreturn 0",
    }
    submission = hand_in(tmp_path, "odd", INTRO, **bodies)
    found = graded(submission, tmp_path, INTRO)
    results = {result.id: result for result in found.results}
    assert {id for id, result in results.items() if result.status == "wrong"} == {"0.1", "0.2", "0.4", "0.5"}
    assert "raised ValueError: xxx" in results["0.1"].sentence and len(results["0.1"].sentence) < 1000
    assert r"raised ValueError: \ud800 and \x1b[2J" in results["0.2"].sentence
    assert "raised Broken" in results["0.4"].sentence and "weight_bytes" in results["0.5"].sentence
    write(tmp_path, [INTRO], [submission], {("odd", "intro"): found})


def test_a_byte_order_mark_costs_no_points(tmp_path):
    file = tmp_path / "intro.py"
    file.write_bytes(b"\xef\xbb\xbf" + SOURCE.encode())
    assert read_source(file) == SOURCE
    assert to_do(file) == []


def test_a_file_is_decoded_as_python_decodes_it(tmp_path):
    file = tmp_path / "intro.py"
    file.write_bytes(f"# -*- coding: latin-1 -*-\n# \xe9\n{SOURCE}".encode("latin-1"))
    assert read_source(file).endswith("# \xe9\n" + SOURCE) and to_do(file) == []
    for content in (
        SOURCE.encode("utf-16"),
        f"{SOURCE}# \xe9".encode("latin-1"),
        f"# \xe9\n{SOURCE}".encode("latin-1"),
    ):
        file.write_bytes(content)
        for read in (read_source, to_do):
            with pytest.raises(CourseError, match=r"intro.py is not UTF-8 text: .*\. Save it as UTF-8\."):
                read(file)


def test_the_last_of_two_entries_with_one_path_counts(tmp_path):
    """As with every program that unpacks; `zip -g` and others add a second one."""
    with zipfile.ZipFile(tmp_path / "anna.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("intro.py", "old")
        archive.writestr("intro.py", "new")
    submission = read_submission("anna", tmp_path / "anna.zip")
    assert submission.modules == {"intro": b"new"} and submission.notes == [
        "intro.py is there 2 times; graded is intro.py"
    ]


def test_a_process_that_ends_between_two_exercises_loses_one_of_them(tmp_path):
    """The first worker ends after 0.1, the second grades the rest."""
    file = tmp_path / "intro.py"
    file.write_text(SOURCE)
    checks = {each.id: (1, 5.0, 1) for each in exercises_of(INTRO)} | {TOGETHER: (0, 5.0, 1)}
    asked = []

    def events_of(ids):
        asked.append(ids)
        events = [("collected", checks)]
        for id in ids[: None if asked[1:] else 1]:
            events += [("start", id), ("check", None), ("end", id)]
        return [*events, *([("finished",)] if asked[1:] else [])]

    results = {result.id: result for result in grade(INTRO, file, start=lambda: Scripted(events_of))}
    first, *others = [each.id for each in exercises_of(INTRO)]
    assert len(asked) == 2 and first not in asked[1]
    assert results[first].status == "wrong" and "by signal 9 after its checks" in results[first].sentence
    assert {results[id].status for id in others} == {"passed"}


def test_points_are_read_without_running_the_checks():
    for lesson in MODULES:
        assert set(points_of(lesson)) == {each.id for each in exercises_of(lesson)}
    assert points_of(LESSONS[6])["6.9"] == 4 and points_of(BASICS)["1.4"] == 1


# --- hostile submissions ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """An answer that is none. said: what the grader says, or one of several; look_at: what the instructor is told."""

    what: str
    body: str
    said: tuple[str, ...]
    look_at: str = ""


REFUSED = "an answer has no need of that"
ATTACKS = {
    "1.1": Attack(
        "answers with a list that equals everything",
        "return Yes(ids)",
        ("is a Yes",),
    ),
    "1.2": Attack(
        "monkeypatches torch",
        """
        torch.isclose = lambda actual, *others, **settings: actual == actual
        return table[token_ids] + 1
        """,
        ("replaces torch.isclose",),
        "1.2: replaces torch.isclose",
    ),
    "1.3": Attack(
        "monkeypatches the grader",
        """
        import sys
        for module in list(sys.modules.values()):
            for name in ("close", "equal", "holds", "refuses"):
                if "close" in vars(module) and "holds" in vars(module):
                    setattr(module, name, lambda *given, **settings: None)
        return scores
        """,
        ("replaces",),
        "1.3: replaces",
    ),
    "1.4": Attack(
        "leaves early with 0",
        "import os; os._exit(0)",
        ("ended the Python process with exit code 0",),
    ),
    "1.5": Attack(
        "ends pytest",
        "import pytest; pytest.exit('passed', 0)",
        ("raised Exit",),
    ),
    "1.6": Attack(
        "reads the reference from disk",
        """
        from common.course import LESSONS
        space = {}
        exec(LESSONS[1].solution.read_text(), space)
        return space["apply_rotary"](x, cos, sin)
        """,
        (f"opens llm_basics.py: {REFUSED}",),
        "1.6: opens llm_basics.py",
    ),
    "1.7": Attack(
        "imports the reference",
        """
        from solutions import llm_basics
        return llm_basics.causal_mask(num_queries, num_keys, device)
        """,
        (REFUSED,),
        "1.7: imports solutions.llm_basics",
    ),
    "1.8": Attack(
        "lets another process read it",
        """
        import subprocess
        return subprocess.run(["cat", "solutions/llm_basics.py"])
        """,
        (f"starts a process: {REFUSED}",),
        "1.8: starts a process",
    ),
    "1.9": Attack(
        "edits the checks",
        """
        from common.course import LESSONS
        LESSONS[1].checks.write_text("")
        return q
        """,
        (f"opens test_llm_basics.py: {REFUSED}",),
        "1.9: opens test_llm_basics.py",
    ),
    "1.10": Attack(
        "fills the memory",
        """
        hoard = []
        while True:
            hoard.append(torch.ones(1 << 26))
        """,
        ("allocate memory", "not enough memory", "MemoryError", "GiB of memory", "endless loop"),
    ),
    "1.11": Attack(
        "goes round for ever, deaf and mute",
        """
        import os
        os.closerange(0, 64)
        while True:
            pass
        """,
        ("endless loop", "ended the Python process"),
    ),
    "1.12": Attack(
        "writes verdicts into every open file",
        """
        import os
        for file in range(3, 64):
            try:
                os.write(file, b"\\x00\\x00\\x00\\x27" + bytes(32) + b'["end"]')
            except OSError:
                pass
        return token_ids
        """,
        ("wrote into the grader's own connection",),
    ),
    "1.13": Attack(
        "looks for the grader in memory",
        """
        import gc
        return len([each for each in gc.get_objects() if type(each).__name__ == "Subject"])
        """,
        (f"calls gc.get_objects: {REFUSED}",),
        "1.13: calls gc.get_objects",
    ),
    "1.14": Attack(
        "leaves threads behind that never end",
        """
        import threading
        for _ in range(4):
            threading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()
        return 0.0
        """,
        ("perplexity", "endless loop"),
    ),
}
YES = "class Yes(list):\n    def __ne__(self, other):\n        return False\n"


def hand_in(room: Path, name: str, lesson=BASICS, top: str = "", **bodies: str) -> Submission:
    """A submission: the solution with these bodies, by the exercise's number (`e4`)."""
    source = lesson.solution.read_text()
    for exercise in reversed(exercises_of(lesson)):
        if body := bodies.get("e" + exercise.id.partition(".")[2]):
            source = apply(right(exercise.id, name, body), source, exercise)
    return Submission(name, room, {lesson.slug: source.replace("\n\n\n", f"\n\n\n{top}", 1).encode()})


def graded(submission: Submission, out: Path, lesson=BASICS):
    room = Classroom([submission], [lesson], out)
    room.to_grade()
    return room.grade_one(submission, lesson)


@pytest.fixture
def graded_soon(monkeypatch):
    """Grades as `graded` does, and ends after 3 seconds what never ends: the answers to the exercises `endless`. Where
    the machine is so busy that other answers take as long, all get more time.
    """
    monkeypatch.setattr(runner, "GONE_SECONDS", 2.0)

    def grade(submission: Submission, out: Path, endless: set[str], lesson=BASICS):
        for patience in (0.3, 1.5, 7.5):
            monkeypatch.setattr(sandbox.SandboxedWorker, "patience", patience)
            found = graded(submission, out, lesson)
            if {result.id for result in found.results if not result.certain} <= endless:
                break
        return found

    return grade


@pytest.fixture(params=["sandbox", "no sandbox"])
def walls(request, monkeypatch):
    """Both with bubblewrap and without it."""
    if request.param == "no sandbox":
        monkeypatch.setattr(sandbox, "has_bubblewrap", lambda: False)
    elif not sandbox.has_bubblewrap():
        pytest.skip("bubblewrap is not installed, or may not make namespaces here")
    return request.param


def test_without_bubblewrap_the_first_line_says_what_is_not_prevented(monkeypatch):
    monkeypatch.setattr(sandbox, "has_bubblewrap", lambda: False)
    for path, why in ((None, "there is no bubblewrap"), ("/usr/bin/bwrap", "may not make namespaces here")):
        monkeypatch.setattr(sandbox.shutil, "which", lambda name, path=path: path)
        assert f"{why}): time and memory are limited, but a submission could read and write" in sandbox.walls()
        assert "leave processes behind" in sandbox.walls()
    monkeypatch.setattr(sandbox, "has_bubblewrap", lambda: True)
    assert sandbox.walls().startswith("Each submission runs in a bubblewrap sandbox: no network")


@pytest.mark.slow(20)
def test_attacks_on_the_grader_fail_and_are_told(graded_soon, tmp_path):
    attacks = {id: each for id, each in ATTACKS.items() if id != "1.12"}
    bodies = {"e" + id.partition(".")[2]: attack.body for id, attack in attacks.items()}
    endless = {id for id, attack in attacks.items() if "endless loop" in attack.said}
    found = graded_soon(hand_in(tmp_path, "mallory", top=YES, **bodies), tmp_path, endless)
    results = {result.id: result for result in found.results}
    review = "\n".join(found.review)
    for id, attack in attacks.items():
        sentence = results[id].sentence
        assert results[id].status == "wrong", (attack.what, sentence)
        assert any(each in sentence for each in attack.said), (attack.what, sentence)
        assert attack.look_at in review, attack.what
    assert results["1.12"].status == "passed"  # the one answer that is honest


OWN = """
OWN = []
def own(wrong):
    OWN.append(wrong)
    return wrong
def is_own(x):
    return any(x.data_ptr() == each.data_ptr() for each in OWN)
"""
REPLACEMENTS = {  # each for its own values alone: other comparisons stay right
    "1.2": (
        "torch.isclose",
        """
        real = torch.isclose
        torch.isclose = lambda a, b, **by: torch.ones_like(a, dtype=bool) if is_own(a) else real(a, b, **by)
        return own(table[token_ids] + 1)
        """,
    ),
    "1.3": (
        "Tensor.isnan",
        """
        def isnan(x):
            if is_own(x):
                x.copy_(right)
            return x != x
        right = (scores - scores.amax(-1, keepdim=True)).exp()
        right, torch.Tensor.isnan = right / right.sum(-1, keepdim=True), isnan
        return own(scores + 1)
        """,
    ),
    "1.4": (
        "test_llm_basics.close",
        """
        import sys
        for module in list(sys.modules.values()):
            if hasattr(module, "close") and hasattr(module, "holds"):
                module.close = lambda a, *b, real=module.close, **by: None if is_own(a) else real(a, *b, **by)
        return own(x + 1)
        """,
    ),
    "1.5": (
        "common.grading.compare.check_type",
        """
        import common.grading.compare as compare
        compare.check_type.__code__ = (lambda actual, expected, what: actual.set_(expected)).__code__
        return own(torch.zeros(1))
        """,
    ),
    "1.7": (
        "Tensor.__ne__",
        """
        def once(a, b):
            del torch.Tensor.__ne__
            return torch.zeros_like(a)
        torch.Tensor.__ne__ = once
        return torch.zeros(num_queries, num_keys, dtype=bool, device=device)
        """,
    ),
    "1.9": (
        "torch, by a TorchFunctionMode",
        """
        class Mode(torch.overrides.TorchFunctionMode):
            def __torch_function__(self, function, types, arguments=(), named=None):
                if function is torch.isclose and is_own(arguments[0]):
                    return torch.ones_like(arguments[0], dtype=bool)
                return function(*arguments, **(named or {}))
        Mode().__enter__()
        return own(torch.zeros_like(q))
        """,
    ),
    "1.10": (
        "aten/isclose/CPU",
        """
        if not OWN:
            OWN.append(torch.library.Library("aten", "IMPL"))
            OWN[0].impl("isclose", lambda a, b, *by: (a - b).abs() < 1e9, "CPU")
        return x + 1
        """,
    ),
    "1.11": (
        "graded_llm_basics.rms_norm",
        """
        global rms_norm
        rms_norm = lambda x, weight, eps: x
        return x
        """,
    ),
    "1.14": (
        "builtins.abs",
        """
        import builtins
        real = builtins.abs
        builtins.abs = lambda x: 0.0 if x > 9e4 else real(x)
        return 1e5
        """,
    ),
}


@pytest.mark.slow(20)
def test_attacks_on_the_grader_that_replace_what_it_compares_with(graded_soon, tmp_path):
    bodies = {"e" + id.partition(".")[2]: body for id, (_, body) in REPLACEMENTS.items()}
    found = graded_soon(hand_in(tmp_path, "mallory", top=OWN, **bodies), tmp_path, set())
    results, review = {result.id: result for result in found.results}, "\n".join(found.review)
    for id, (name, _) in REPLACEMENTS.items():
        assert results[id].status == "wrong" and name in results[id].sentence, (name, results[id])
        assert f"{id}: {results[id].sentence}" in review and "replaces" in review, (name, review)
    others = [result.status for id, result in results.items() if id not in {*REPLACEMENTS, TOGETHER}]
    assert set(others) == {"passed"}, results  # what was replaced has been put back


@pytest.mark.slow
def test_forged_verdicts_void_the_module(tmp_path):
    found = graded(hand_in(tmp_path, "trudy", e12=ATTACKS["1.12"].body), tmp_path)
    assert (
        found.points == 0
        and found.problem == "lesson-1-llm-basics/llm_basics.py wrote into the grader's own connection."
    )


@pytest.mark.slow
def test_processes_are_started_by_given_code_only(tmp_path):
    """Lesson 6 starts workers, by common.workers. An answer that starts a process itself is refused there too."""
    lesson = LESSONS[6]
    body = "import subprocess\nsubprocess.run(['cat', 'solutions/parallelism.py'])"
    results = {each.id: each for each in graded(hand_in(tmp_path, "eve", lesson, e1=body), tmp_path, lesson).results}
    wrong = results.pop("6.1")
    assert wrong.status == "wrong" and f"starts a process: {REFUSED}" in wrong.sentence and wrong.notes
    assert {each.status for each in results.values()} <= {"passed", "waiting"}, results


def is_worker(process: psutil.Process) -> bool:
    return "common.instructor.guard" in (process.info["cmdline"] or [])


def starter(process: psutil.Process) -> int:
    """The Python process that has started a worker of the grader; this one, if the other is gone."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in process.parents():
            command = each.cmdline()
            if command and "python" in os.path.basename(command[0]) and "common.instructor.guard" not in command:
                return each.pid
    return os.getpid()


def left_behind() -> list[psutil.Process]:
    """Workers of the grader, and what they have forked, but for those of other processes, which may be grading too."""
    running = psutil.process_iter(["cmdline"])
    return [each for each in running if is_worker(each) and starter(each) == os.getpid()]


@pytest.mark.slow
def test_attacks_on_the_machine_stay_inside(walls, graded_soon, tmp_path):
    """What they would leave behind is not there; and the answers beside them are graded all the same."""
    secret, grade_file = tmp_path / "other" / "intro.py", tmp_path / "grades.csv"
    secret.parent.mkdir()
    secret.write_text("another student's work")
    leak = tmp_path / "leak"
    found = graded_soon(
        hand_in(
            tmp_path,
            "mallory",
            INTRO,
            e1="import ctypes\nfork = ctypes.CDLL(None).fork\nwhile True:\n    fork()",
            e2="import os, tempfile\nwith tempfile.NamedTemporaryFile(dir=os.environ['TMPDIR']) as file:\n"
            "    while True:\n        file.write(bytes(1 << 20))",
            e3="import os, tempfile\nfor _ in range(1000):\n    path = tempfile.mkstemp()[1]\n"
            "    with open(path, 'wb') as file:\n        file.write(bytes(1 << 20))",
            e4="import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=1)",
            e5=f"text = open({str(secret)!r}).read()\nopen({str(leak)!r}, 'w').write(text)\nreturn 0",
            e6=f"open({str(grade_file)!r}, 'w').write('mallory,100')\nreturn 0",
            e7="while True:\n    print('x' * 10000)",
        ),
        tmp_path,
        {"0.1", "0.7"},
        INTRO,
    )
    results = {result.id: result for result in found.results}
    assert {id for id, result in results.items() if result.status == "passed"} == {"0.8", "0.9"}, results
    assert re.search("started more than 48 processes|endless loop", results["0.1"].sentence)  # it may not get that far
    assert "OSError" in results["0.2"].sentence or "more than 128 MiB" in results["0.2"].sentence
    assert "OSError" in results["0.3"].sentence or "more than 128 MiB" in results["0.3"].sentence
    assert "connects to the network" in results["0.4"].sentence
    assert re.search("endless loop|OSError", results["0.7"].sentence)
    if walls == "sandbox":  # without it only the instructor's own account protects these, as `walls()` warns
        assert not leak.exists() and not grade_file.exists()
        assert "FileNotFoundError" in results["0.5"].sentence
    deadline = time.monotonic() + 60  # a process that was killed takes a moment to go
    while (left := left_behind()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


# --- what is written down --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_grading_can_be_interrupted_and_goes_on(tmp_path):
    """The class of three is interrupted once the first module is done; the second run grades only the rest."""
    submissions = tmp_path / "submissions"
    for name in ("anna", "bert", "carla"):
        folder = submissions / name / INTRO.folder.name
        folder.mkdir(parents=True)
        text = SOURCE if name != "bert" else INTRO.module.read_text()
        (folder / "intro.py").write_text(text + f"\n# {name}\n")
    command = [
        sys.executable,
        "-m",
        "common",
        "grade",
        "--submissions",
        str(submissions),
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--lessons", "0", "--jobs", "1"]
    environment = {**os.environ, "COURSE_PYTHON": "here", "COLUMNS": "120"}
    for _ in range(5):  # the last module may be graded before the signal arrives
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        running = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        while not list(tmp_path.glob("out/state/*/*.json")) and running.poll() is None:
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        output, _ = running.communicate(timeout=120)
        first = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/state/*/*.json")}
        if len(first) < 3:
            break
    assert running.returncode == 130 and "nothing is lost" in output
    assert 1 <= len(first) < 3
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"already graded: {len(first)}." in again.stdout
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in first.items())
    with (tmp_path / "out" / "grades.csv").open() as file:
        points = {each["student"]: each["points"] for each in csv.DictReader(file)}
    worth = sum(points_of(INTRO).values())
    assert points == {"anna": str(worth), "bert": "0", "carla": str(worth)}
    gradescope = json.loads((tmp_path / "out" / "students" / "anna" / "results.json").read_text())
    assert gradescope["score"] == worth == sum(test["max_score"] for test in gradescope["tests"])


def test_an_optional_module_that_only_some_hand_in_shifts_nothing(tmp_path):
    lessons = [INTRO, next(each for each in MODULES if each.is_optional), BASICS]
    submissions = [Submission("anna", tmp_path, {each.slug: b"" for each in lessons})]
    submissions.append(Submission("ben", tmp_path, {each.slug: b"" for each in lessons if not each.is_optional}))
    graded = {
        (submission.student, lesson.slug): Graded(
            submission.student, lesson, [Result(each.id, each.function, "passed", 1) for each in exercises_of(lesson)]
        )
        for submission in submissions
        for lesson in lessons
        if lesson.slug in submission.modules
    }
    write(tmp_path, lessons, submissions, graded)
    heat = (tmp_path / "index.html").read_text().partition('class="heat"')[2].split("<tr>")[1:]
    assert [row.count("<th") + row.count("<td") for row in heat] == [heat[0].count("<th")] * 3
    row = re.findall(r"<td[^>]*>(.?)</td>", heat[2])
    assert row == ["✓"] * len(exercises_of(INTRO)) + [""] * len(exercises_of(lessons[1])) + ["✓"] * len(
        exercises_of(BASICS)
    )
    assert "not graded yet" not in (tmp_path / "students" / "ben" / "index.html").read_text()
    rows = list(csv.DictReader((tmp_path / "grades.csv").open()))
    assert [each["not graded yet"] for each in rows] == ["", ""]


def test_reports_escape_what_a_student_wrote(tmp_path):
    submission = Submission("=cmd()", tmp_path, {"intro": b"x"}, ["<script>alert(1)</script> was not taken"])
    room = Classroom([submission], [INTRO], tmp_path)
    found = room.without(submission, INTRO, "<img src=x onerror=alert(1)>")
    found.results[0].status, found.results[0].sentence = "wrong", "@SUM(1) <b>"
    room.graded["=cmd()", "intro"] = found
    write(tmp_path, [INTRO], [submission], room.graded)
    pages = (tmp_path / "index.html").read_text() + (tmp_path / "students" / "=cmd()" / "index.html").read_text()
    assert "<script>" not in pages and "<img" not in pages and "&lt;script&gt;" in pages
    with (tmp_path / "exercises.csv").open() as file:
        first = next(csv.DictReader(file))
    assert first["student"] == "'=cmd()" and first["diagnosis"] == "'@SUM(1) <b>"
