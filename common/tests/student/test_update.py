"""`make update` as a student has it: a real clone of a small course, real archives, and many ways to end badly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from common.course import ROOT, CourseError, skeleton, unfinished
from common.student import carry, update

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git here")
GIT = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@b.c",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@b.c",
}
MODULE = "lesson-1-llm-basics/llm_basics.py"
SECOND = "lesson-2-llama-pytorch/llama_pytorch.py"


def solution(number: int, *names: str, words: str = "Does it.") -> str:
    """A lesson whose exercises are functions with these names, each with an answer of one line."""
    functions = (
        f'\n\ndef {name}(x):\n    """{words}"""\n    # Exercise {number}.{i}: do.\n    return x + {i}\n'
        for i, name in enumerate(names, 1)
        if name
    )
    return '"""A lesson."""\n\nimport math\n' + "".join(functions)


def run(*command: object, cwd: Path) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_") and name != "FROM"}
    return subprocess.run(list(map(str, command)), cwd=cwd, env={**kept, **GIT}, capture_output=True, text=True)


def git(folder: Path, *arguments: object) -> str:
    result = run("git", *arguments, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


class Course:
    """A copy of the course with two small lessons: what is taught is left out, the frame is the real one."""

    def __init__(self, root: Path):
        self.root = root
        for folder in ("common", "common/course", "common/grading", "common/student"):
            (root / folder).mkdir(parents=True)
            for file in (ROOT / folder).glob("*.py"):
                shutil.copy(file, root / folder)
        self["README.md"] = "The course.\n"
        self[".gitignore"] = ".course/\n__pycache__/\n"
        self.deliver(solution(1, "one", "two"))
        self.deliver(solution(2, "far"), SECOND)

    def __getitem__(self, path: str) -> str:
        return (self.root / path).read_text()

    def __setitem__(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def deliver(self, text: str, path: str = MODULE) -> None:
        """Let this be a lesson's solution, and its skeleton be what is cut from it."""
        file, record = Path(path), self.root / "common" / "skeletons.json"
        self[f"solutions/{file.name}"] = text
        self[path] = skeleton.cut(text, file.name)
        known = json.loads(record.read_text()) if record.exists() else {}
        record.write_text(json.dumps({**known, file.stem: skeleton.digest(self[path])}))

    def commit(self, message: str = "A change") -> None:
        git(self.root, "add", "--all")
        git(self.root, "commit", "--quiet", "-m", message)

    def answer(self, id: str, line: str, path: str = MODULE) -> None:
        text = self[path]
        assert text.count(f'raise NotImplementedError("TODO {id}")') == 1
        self[path] = text.replace(f'raise NotImplementedError("TODO {id}")', line)

    def update(self, *options: object) -> subprocess.CompletedProcess:
        return run(sys.executable, "-m", "common", "update", *options, cwd=self.root)

    def failing(self) -> subprocess.CompletedProcess:
        """An update that fails at the second file that it writes."""
        lines = [
            "import common.student.update as update",
            "def write(path, content, write=update.write, calls=[]):",
            "    calls.append(path)",
            "    if len(calls) == 2: raise OSError('disk full')",
            "    write(path, content)",
            "update.write = write",
            "update.main([])",
        ]
        return run(sys.executable, "-c", "\n".join(lines), cwd=self.root)

    def state(self) -> dict[str, bytes]:
        """Every file but git's own and the backups."""
        files = [file for file in self.root.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
        own = [file for file in files if not {".git", ".course"}.intersection(file.relative_to(self.root).parts)]
        return {str(file.relative_to(self.root)): file.read_bytes() for file in own}

    def backups(self) -> list[Path]:
        return sorted((self.root / ".course" / "backups").glob("update-*"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The course's repository and a clone, made once and copied for each test."""
    base = tmp_path_factory.mktemp("courses")
    course = Course(base / "course")
    git(course.root, "init", "--quiet", "--initial-branch=main")
    course.commit("The course")
    git(base, "clone", "--quiet", "course", "mine")
    return base


@pytest.fixture
def course(made, tmp_path) -> Course:
    """What the student's clone follows."""
    return self_made(shutil.copytree(made / "course", tmp_path / "course"))


@pytest.fixture
def mine(made, course, tmp_path) -> Course:
    """The student's clone, with an answer and a helper in lesson 1, and a note beside it."""
    student = self_made(shutil.copytree(made / "mine", tmp_path / "mine"))
    git(student.root, "remote", "set-url", "origin", course.root)
    student.answer("1.1", "return helped(x)  # mine")
    student[MODULE] += "\n\ndef helped(x):\n    return x + 1\n"
    student["lesson-1-llm-basics/notes.txt"] = "What I learnt."
    return student


def self_made(root: Path) -> Course:
    made = Course.__new__(Course)
    made.root = Path(root)
    return made


def has_answer(text: str, words: str) -> bool:
    """The new version's words, with the student's answer and helper."""
    return all(text.count(each) == 1 for each in (words, "return helped(x)  # mine", "def helped(x):"))


# --- By git -----------------------------------------------------------------------------------------------------------


@needs_git
def test_answers_that_were_never_committed_are_in_the_new_version(course, mine):
    before = mine[MODULE]
    mine["README.md"] = "The course.\nMy note.\n"
    course.deliver(solution(1, "one", "", "three", words="New words."))
    course["common/new.py"] = "# new\n"
    course.commit("Better words")
    result = mine.update()
    assert result.returncode == 0, result.stderr
    assert has_answer(mine[MODULE], 'New words."""\n    # TODO 1.1') and unfinished(mine[MODULE]) == ["1.3"]
    assert mine["README.md"] == "The course.\nMy note.\n" and mine["common/new.py"] == "# new\n"
    assert mine["lesson-1-llm-basics/notes.txt"] == "What I learnt."
    assert git(mine.root, "rev-parse", "HEAD") == git(course.root, "rev-parse", "HEAD")
    assert git(mine.root, "status", "--porcelain", "--untracked=no").split() == ["M", "README.md", "M", MODULE]
    [backup] = mine.backups()
    assert (backup / MODULE).read_text() == before and not (backup / SECOND).exists()
    for told in (str(backup.relative_to(mine.root)), "New exercises: 1.3.", f"{MODULE}: 1 answer put into"):
        assert told in result.stdout
    state = mine.state()
    again = mine.update()
    assert again.returncode == 0 and "Nothing new" in again.stdout
    assert mine.state() == state and mine.backups() == [backup]


@needs_git
def test_answers_that_were_committed_are_merged(course, mine):
    mine.commit("My answer")
    own = git(mine.root, "rev-parse", "HEAD")
    course.deliver(solution(1, "one", "two", words="New words."))
    course.commit()
    result = mine.update()
    assert result.returncode == 0, result.stderr
    assert git(mine.root, "log", "-1", "--format=%P").split() == [own, git(course.root, "rev-parse", "HEAD")]
    assert has_answer(git(mine.root, "show", f"HEAD:{MODULE}"), 'New words."""\n    # TODO 1.1')
    assert git(mine.root, "status", "--porcelain") == "" and "Nothing new" in mine.update().stdout


@needs_git
def test_a_fork_follows_what_it_was_forked_from(course, mine, tmp_path):
    git(tmp_path, "clone", "--quiet", "--bare", mine.root, "fork")
    git(mine.root, "remote", "set-url", "origin", tmp_path / "fork")
    git(mine.root, "switch", "--quiet", "-c", "answers")
    assert "Nothing new: origin" in mine.update().stdout
    git(mine.root, "remote", "add", "upstream", course.root)
    course.deliver(solution(1, "one", "two", words="New words."))
    course.commit()
    assert mine.update().returncode == 0 and has_answer(mine[MODULE], 'New words."""\n    # TODO 1.1')
    assert git(mine.root, "branch", "--show-current") == "answers"


@needs_git
def test_a_lesson_that_moves_takes_its_answers_along(course, mine):
    git(course.root, "mv", "lesson-1-llm-basics", "lesson-1-basics")
    course.commit()
    result = mine.update()
    assert result.returncode == 0, result.stderr
    assert "# mine" in mine["lesson-1-basics/llm_basics.py"] and not (mine.root / MODULE).exists()
    assert "# mine" in (mine.backups()[0] / MODULE).read_text()


@needs_git
def test_line_ends_stay_as_the_student_has_them(course, mine):
    (mine.root / MODULE).write_bytes(mine[MODULE].replace("\n", "\r\n").encode())
    course.deliver(solution(1, "one", "two", words="New words."))
    course.commit()
    assert mine.update().returncode == 0
    content = (mine.root / MODULE).read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n") and b"# mine\r\n" in content and b"New words." in content


@needs_git
def test_what_both_have_edited_elsewhere_is_the_course_s_and_yours_is_kept(course, mine):
    mine["README.md"] = "My course.\n"
    mine["common/more.py"] = "# mine\n"  # not known to git
    course["README.md"], course["common/more.py"] = "The course, anew.\n", "# the course's\n"
    course["findings/new.sh"] = "#!/bin/sh\n"
    (course.root / "findings/new.sh").chmod(0o755)
    course.commit()
    result = mine.update()
    assert result.returncode == 0 and mine["README.md"] == course["README.md"], result.stderr
    assert "findings" not in git(mine.root, "status", "--porcelain")
    for path, text in {"README.md": "My course.\n", "common/more.py": "# mine\n"}.items():
        assert f"{path}: where both you and the course" in result.stdout
        assert mine[path] == course[path] and (mine.backups()[0] / path).read_text() == text


# --- Other numbers ----------------------------------------------------------------------------------------------------


def renumber(course: Course) -> None:
    """Two exercises exchange their numbers, a third is gone."""
    course.deliver(solution(1, "two", "one", words="New words."))
    course[update.RENUMBERED] = json.dumps([{"1.1": "1.2", "1.2": "1.1", "2.1": "2.1"}])
    course.commit("Renumbered")


@needs_git
def test_answers_follow_their_exercises_to_other_numbers(course, mine):
    renumber(course)
    result = mine.update()
    assert result.returncode == 0, result.stderr
    assert "return helped(x)  # mine" in mine[MODULE].partition("def one")[2] and unfinished(mine[MODULE]) == ["1.1"]
    assert "other numbers now" in result.stdout
    state = mine.state()
    assert "Nothing new" in mine.update().stdout and mine.state() == state, "once is enough"


@needs_git
def test_an_update_by_a_version_that_knew_of_no_numbers_is_mended_by_the_next(course, mine):
    """It has put the answers where the numbers were. Its backup and git know what there was before."""
    backup = mine.root / ".course" / "backups" / "update-20261128-080000" / MODULE
    backup.parent.mkdir(parents=True)
    backup.write_text(mine[MODULE])
    renumber(course)
    git(mine.root, "checkout", "--quiet", "--", MODULE)
    git(mine.root, "pull", "--quiet", "--ff-only")
    mine.answer("1.1", "return helped(x)  # mine")
    assert "# mine" in mine[MODULE].partition("def one")[0], "in the wrong place"
    result = mine.update()
    assert result.returncode == 0, result.stderr
    assert "# mine" in mine[MODULE].partition("def one")[2] and unfinished(mine[MODULE]) == ["1.1"]
    assert "Nothing new" in mine.update().stdout


# --- What ends badly --------------------------------------------------------------------------------------------------


def no_network(course, mine):
    git(mine.root, "remote", "set-url", "origin", "/nowhere/at/all")
    return "could not be fetched, and nothing was changed", "FROM="


def no_remote(course, mine):
    git(mine.root, "remote", "remove", "origin")
    return "does not know where it came from", "FROM="


def no_clone(course, mine):
    shutil.rmtree(mine.root / ".git")
    return "does not know where it came from", "FROM="


def merge_under_way(course, mine):
    mine["README.md"] = "My notes.\n"
    mine.commit()
    run("git", "pull", "--no-rebase", cwd=mine.root)
    return ("A merge or a rebase is under way",)


def history_made_anew(course, mine):
    shutil.rmtree(course.root / ".git")
    git(course.root, "init", "--quiet", "--initial-branch=main")
    course.commit()
    return "have nothing in common", "FROM="


def file_that_python_cannot_read(course, mine):
    mine[MODULE] += "def unfinished(:\n"
    return f"{MODULE}:{mine[MODULE].count(chr(10))}: Python cannot read this", "make reset-lesson-N"


BAD_ENDS = [no_network, no_remote, no_clone, merge_under_way, history_made_anew, file_that_python_cannot_read]


@needs_git
@pytest.mark.parametrize("circumstance", BAD_ENDS, ids=lambda each: each.__name__)
def test_what_cannot_be_updated_stays_as_it_was_and_is_told_what_to_do(course, mine, circumstance):
    course.deliver(solution(1, "one", "two", words="New words."))
    course["README.md"] = "The course, anew.\n"
    course.commit()
    told = circumstance(course, mine)
    before, head = mine.state(), run("git", "rev-parse", "HEAD", cwd=mine.root).stdout
    result = mine.update()
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert all(each in result.stderr for each in told), result.stderr
    assert mine.state() == before and not mine.backups()
    assert run("git", "rev-parse", "HEAD", cwd=mine.root).stdout == head


@needs_git
@pytest.mark.parametrize("is_committed", [False, True])
def test_an_update_that_fails_is_put_back_and_can_be_made_again(course, mine, is_committed):
    if is_committed:
        mine.commit()
    course.deliver(solution(1, "one", "two", words="New words."))
    course["README.md"] = "The course, anew.\n"
    course.commit()
    before, status = mine.state(), git(mine.root, "status", "--porcelain")
    result = mine.failing()
    assert result.returncode == 1 and "your files are as they were" in result.stderr
    assert mine.state() == before and git(mine.root, "status", "--porcelain") == status
    assert mine.update().returncode == 0 and has_answer(mine[MODULE], 'New words."""\n    # TODO 1.1')


# --- From a download --------------------------------------------------------------------------------------------------


@pytest.fixture
def download(course, mine) -> Course:
    """The new version; and the student's copy is no clone."""
    shutil.rmtree(mine.root / ".git", ignore_errors=True)
    root = mine.root.parent / "new" / "course-main"
    new = self_made(shutil.copytree(course.root, root, ignore=shutil.ignore_patterns(".git")))
    new.deliver(solution(1, "one", "two", words="New words."))
    new["README.md"] = "The course, anew.\n"
    return new


@needs_git
@pytest.mark.parametrize("kind", ["folder", "zip", "gztar"])
def test_a_downloaded_version_is_brought_in(download, mine, kind, tmp_path):
    mine["README.md"] = "The course.\nMy own line.\n"
    before, source = mine[MODULE], download.root
    download[".venv/bin/python"] = "evil"
    if kind != "folder":
        source = shutil.make_archive(str(tmp_path / "download"), kind, tmp_path / "new", "course-main")
    result = mine.update(source)
    assert result.returncode == 0, result.stderr
    assert has_answer(mine[MODULE], 'New words."""\n    # TODO 1.1')
    assert mine["README.md"] == "The course, anew.\n" and not (mine.root / ".venv").exists()
    assert mine["lesson-1-llm-basics/notes.txt"] == "What I learnt." and mine[SECOND] == download[SECOND]
    assert (mine.backups()[0] / MODULE).read_text() == before
    assert (mine.backups()[0] / "README.md").read_text() == "The course.\nMy own line.\n"
    assert "your edits of any other file are only there" in result.stdout
    state = mine.state()
    assert "Nothing new" in mine.update(source).stdout and mine.state() == state


@needs_git
def test_what_is_no_new_version_of_the_course_is_refused(download, mine, tmp_path):
    before = mine.state()
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "page.zip").write_text("<html>Sign in first</html>")
    (tmp_path / "empty").mkdir()
    whole = Path(shutil.make_archive(str(tmp_path / "whole"), "gztar", tmp_path / "new")).read_bytes()
    (tmp_path / "half.tar.gz").write_bytes(whole[: len(whole) // 2])
    with tarfile.open(tmp_path / "outside.tar.gz", "w:gz") as archive:
        archive.add(download.root, "course-main")
        archive.add(tmp_path / "broken.zip", "course-main/../outside.txt")
    download.answer("1.1", "return 'theirs'")
    for name, told in {
        "missing.zip": "no such file",
        "broken.zip": "is neither a zip nor a tar, or not all of it was downloaded. Nothing was changed.\n",
        "page.zip": "page.zip cannot be unpacked: it is neither a zip nor a tar",
        "half.tar.gz": "cannot be unpacked",
        "outside.tar.gz": "outside.txt would lie elsewhere",
        "empty": "does not hold the course",
        "mine": "this very copy",
        "new": "somebody has worked: llm_basics.py",
    }.items():
        result = mine.update(tmp_path / name)
        assert result.returncode == 2 and told in result.stderr, (name, result.stderr)
        assert mine.state() == before and not mine.backups()


def test_a_variable_that_it_does_not_take_is_refused(mine, monkeypatch):
    monkeypatch.setenv("COURSE_VARIABLES", "FORM TORCH")
    result = mine.update()
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "make update takes no variable FORM; it takes FROM.\n"


def test_without_git_it_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(CourseError, match="needs git"):
        carry.merge("a", "b", "c")
