"""`make update` as a student has it: a real clone of a small course, real archives, and many ways to end badly."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from common.course import ROOT, CourseError, skeleton, unfinished
from common.student import update

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

    def interrupted(self, how: str) -> subprocess.CompletedProcess:
        """An update in which `update.write` first does this."""
        lines = [
            "import os, common.student.update as update",
            "def write(path, content, write=update.write, calls=[]):",
        ]
        lines += ["    calls.append(path)", f"    {how}", "    write(path, content)", "update.write = write"]
        return run(sys.executable, "-c", "\n".join([*lines, "raise SystemExit(update.main([]))"]), cwd=self.root)

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


# ---------------------------------------------------------------------------------------------------------------
# By git
# ---------------------------------------------------------------------------------------------------------------


@needs_git
def test_answers_that_were_never_committed_are_in_the_new_version(course, mine):
    before = mine[MODULE]
    course.deliver(solution(1, "one", "", "three", words="New words."))
    course["README.md"] = "The course, anew.\n"
    course.commit("Better words")
    result = mine.update()
    assert result.returncode == 0, result.stderr
    assert has_answer(mine[MODULE], 'New words."""\n    # TODO 1.1') and unfinished(mine[MODULE]) == ["1.3"]
    assert mine["README.md"] == "The course, anew.\n" and mine["lesson-1-llm-basics/notes.txt"] == "What I learnt."
    assert git(mine.root, "rev-parse", "HEAD") == git(course.root, "rev-parse", "HEAD")
    assert git(mine.root, "status", "--porcelain", "--untracked=no") == f"M {MODULE}"
    [backup] = mine.backups()
    assert (backup / MODULE).read_text() == before and not (backup / SECOND).exists()
    for told in ("1 commit; the last: ", "Better words", str(backup.relative_to(mine.root)), "New exercises: 1.3."):
        assert told in result.stdout
    assert f"{MODULE}: 1 answer put into the new version." in result.stdout
    state = mine.state()
    again = mine.update()
    assert again.returncode == 0 and "Nothing new" in again.stdout
    assert mine.state() == state and mine.backups() == [backup]


@pytest.mark.slow
@needs_git
def test_answers_that_were_committed_are_merged_without_a_conflict(course, mine):
    mine.commit("My answer")
    mine.answer("1.2", "return 2  # later")
    for words in ("New words.", "Newer words."):
        course.deliver(solution(1, "one", "two", words=words))
        course.commit(words)
        own = git(mine.root, "rev-parse", "HEAD")
        result = mine.update()
        assert result.returncode == 0, result.stderr
        assert "merged with your own commits" in result.stdout and "2 answers" in result.stdout
        parents = git(mine.root, "log", "-1", "--format=%P").split()
        assert parents == [own, git(course.root, "rev-parse", "HEAD")]
        committed = git(mine.root, "show", f"HEAD:{MODULE}")
        assert committed.count(words) == 2 and "# mine" in committed and "# later" not in committed
        assert mine[MODULE].count(words) == 2 and "# mine" in mine[MODULE] and "# later" in mine[MODULE]
    assert git(mine.root, "worktree", "list").count("\n") == 0 and not (mine.root / ".course" / "update").exists()
    assert "Nothing new" in mine.update().stdout


@needs_git
def test_a_lesson_that_is_started_again_does_not_come_back_from_the_commits(course, mine):
    mine.commit("My answer")
    mine[MODULE] = course[MODULE]
    course.deliver(solution(1, "one", "two", words="New words."))
    course.commit()
    assert mine.update().returncode == 0
    assert mine[MODULE] == course[MODULE] and "# mine" in git(mine.root, "show", f"HEAD:{MODULE}")


@needs_git
def test_who_has_written_nothing_yet_has_the_new_version_and_no_backup(course, mine):
    git(mine.root, "checkout", "--quiet", "--", MODULE)
    course.deliver(solution(1, "one", "two", words="New words."))
    course.commit()
    result = mine.update()
    assert result.returncode == 0 and mine[MODULE] == course[MODULE]
    assert not mine.backups() and "kept in" not in result.stdout


@pytest.mark.slow
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
def test_a_lesson_that_moves_takes_its_answers_along_and_one_that_is_gone_is_kept(course, mine):
    mine.answer("2.1", "return 21", SECOND)
    git(course.root, "mv", "lesson-1-llm-basics", "lesson-1-basics")
    git(course.root, "rm", "--quiet", SECOND)
    course.commit()
    result = mine.update()
    assert result.returncode == 0, result.stderr
    assert "# mine" in mine["lesson-1-basics/llm_basics.py"] and not (mine.root / MODULE).exists()
    assert f"{SECOND} is gone" in result.stdout and "return 21" in (mine.backups()[0] / SECOND).read_text()
    assert mine["lesson-1-llm-basics/notes.txt"] == "What I learnt."


@pytest.mark.slow
@needs_git
@pytest.mark.parametrize("is_committed", [False, True])
def test_a_file_that_python_cannot_read_is_left_and_carried_once_it_is_mended(course, mine, is_committed):
    mine[MODULE] += "\ndef unfinished(:\n"
    mine.answer("2.1", "return 21", SECOND)
    if is_committed:
        mine.commit()
    before = mine[MODULE]
    course.deliver(solution(1, "one", "two", words="New words."))
    course.deliver(solution(2, "far", words="New words."), SECOND)
    course.commit()
    result = mine.update()
    assert result.returncode == 0, result.stderr
    line = before.splitlines().index("def unfinished(:") + 1
    assert f"{MODULE}:{line}: Python cannot read this line" in result.stdout
    assert mine[MODULE] == before and mine[SECOND].count("New words.") == 1 and "return 21" in mine[SECOND]
    assert mine.update().stdout.count("Nothing new") == 1, "it is no better than before"
    assert "make reset-lesson-1:" in result.stdout
    mine[MODULE] = before.replace("\ndef unfinished(:\n", "")
    result = mine.update()
    assert result.returncode == 0 and has_answer(mine[MODULE], 'New words."""\n    # TODO 1.1'), result.stderr
    assert "Nothing new" in mine.update().stdout


@needs_git
def test_line_ends_stay_as_the_student_has_them(course, mine):
    (mine.root / MODULE).write_bytes(mine[MODULE].replace("\n", "\r\n").encode())
    course.deliver(solution(1, "one", "two", words="New words."))
    course.commit()
    assert mine.update().returncode == 0
    content = (mine.root / MODULE).read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n") and b"# mine\r\n" in content and b"New words." in content


# ---------------------------------------------------------------------------------------------------------------
# What ends badly
# ---------------------------------------------------------------------------------------------------------------


def no_network(course, mine):
    git(mine.root, "remote", "set-url", "origin", "/nowhere/at/all")
    return "could not be fetched, and nothing was changed", "FROM="


def no_remote(course, mine):
    git(mine.root, "remote", "remove", "origin")
    return "git remote add origin", "FROM="


def no_clone(course, mine):
    shutil.rmtree(mine.root / ".git")
    return "no clone of the course", "FROM="


def nested_in_another_repository(course, mine):
    shutil.rmtree(mine.root / ".git")
    git(mine.root.parent, "init", "--quiet")
    return "no clone of the course", "FROM="


def merge_under_way(course, mine):
    mine["README.md"] = "My notes.\n"
    mine.commit()
    run("git", "pull", "--no-rebase", cwd=mine.root)
    return "A merge or a rebase is under way", "git merge --abort"


def local_edit_elsewhere(course, mine):
    mine["README.md"] = "My notes.\n"
    return "    README.md", "git checkout -- FILE"


def staged_edit_elsewhere(course, mine):
    mine["README.md"] = "My notes.\n"
    git(mine.root, "add", "README.md")
    return "    README.md", "git checkout -- FILE"


def file_in_the_way(course, mine):
    mine["common/more.py"] = "# mine\n"
    return "    common/more.py", "move them away"


def ignored_file_in_the_way(course, mine):
    mine["common/more.py"] = "# mine\n"
    mine[".git/info/exclude"] = "more.py\n"
    return "    common/more.py", "move them away"


def commits_that_conflict(course, mine):
    mine["README.md"] = "My notes.\n"
    mine.commit()
    return "    README.md", "cannot put them together"


def history_made_anew(course, mine):
    shutil.rmtree(course.root / ".git")
    git(course.root, "init", "--quiet", "--initial-branch=main")
    course.commit()
    return "have nothing in common", "FROM="


BAD_ENDS = [
    no_network,
    no_remote,
    no_clone,
    nested_in_another_repository,
    merge_under_way,
    local_edit_elsewhere,
    staged_edit_elsewhere,
    file_in_the_way,
    ignored_file_in_the_way,
    commits_that_conflict,
    history_made_anew,
]


@pytest.mark.slow
@needs_git
@pytest.mark.parametrize("circumstance", BAD_ENDS, ids=lambda each: each.__name__)
def test_what_cannot_be_updated_stays_as_it_was_and_is_told_what_to_do(course, mine, circumstance):
    course.deliver(solution(1, "one", "two", words="New words."))
    course["README.md"] = "The course, anew.\n"
    course["common/more.py"] = "# the course's\n"
    course.commit()
    told = circumstance(course, mine)
    has_git = (mine.root / ".git").exists()
    status = run("git", "status", "--porcelain", cwd=mine.root).stdout
    head = run("git", "rev-parse", "HEAD", cwd=mine.root).stdout
    before = mine.state()
    result = mine.update()
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert all(each in result.stderr for each in told), result.stderr
    assert mine.state() == before and not mine.backups()
    if has_git:
        assert run("git", "status", "--porcelain", cwd=mine.root).stdout == status
        assert run("git", "rev-parse", "HEAD", cwd=mine.root).stdout == head
        assert git(mine.root, "worktree", "list").count("\n") == 0


@pytest.mark.slow
@needs_git
def test_after_what_it_was_told_the_student_can_update(course, mine):
    course["README.md"] = "The course, anew.\n"
    course.deliver(solution(1, "one", "two", words="New words."))
    course.commit()
    commits_that_conflict(course, mine)
    target = re.search(r"git checkout (\w+) -- FILE", mine.update().stderr)[1]
    git(mine.root, "checkout", target, "--", "README.md")
    git(mine.root, "commit", "--quiet", "-m", "Theirs")
    assert mine.update().returncode == 0 and "# mine" in mine[MODULE]
    course["README.md"] = "The course, once more.\n"
    course.commit()
    local_edit_elsewhere(course, mine)
    assert mine.update().returncode == 2
    git(mine.root, "checkout", "--", "README.md")
    assert mine.update().returncode == 0 and "# mine" in mine[MODULE]


@pytest.mark.slow
@needs_git
@pytest.mark.parametrize("is_committed", [False, True])
@pytest.mark.parametrize("how", ["raise KeyboardInterrupt", "raise OSError('disk full')", "os._exit(9)"])
def test_an_update_that_is_cut_off_is_put_back_and_can_be_made_again(course, mine, how, is_committed):
    if is_committed:
        mine.commit()
    mine.answer("2.1", "return 21", SECOND)
    for path, number in ((MODULE, 1), (SECOND, 2)):
        course.deliver(solution(number, *(("one", "two") if number == 1 else ("far",)), words="New words."), path)
    course["README.md"] = "The course, anew.\n"
    course.commit()
    before, head = mine.state(), git(mine.root, "rev-parse", "HEAD")
    result = mine.interrupted(f"if len(calls) == 2: {how}")
    assert result.returncode not in (0, 2)
    if "_exit" in how:
        assert mine.state() != before, "it was cut off in the middle"
    else:
        assert mine.state() == before and git(mine.root, "rev-parse", "HEAD") == head
        assert "your files are as they were" in result.stdout
    result = mine.update()
    assert result.returncode == 0, result.stderr
    assert ("your files are as they were" in result.stdout) == ("_exit" in how)
    assert has_answer(mine[MODULE], 'New words."""\n    # TODO 1.1') and "return 21" in mine[SECOND]
    for backup in mine.backups():
        assert (backup / MODULE).read_bytes() == before[MODULE]


@pytest.mark.slow
@needs_git
def test_what_cannot_be_put_back_at_once_is_put_back_later(course, mine):
    course.deliver(solution(1, "one", "two", words="New words."))
    course.commit()
    before = mine[MODULE]
    assert mine.interrupted("os._exit(9)").returncode == 9
    assert mine[MODULE] != before
    lock = mine.root / ".git" / "index.lock"
    lock.touch()
    result = mine.update()
    assert result.returncode == 2 and "index.lock" in result.stderr and ".course/backups/update-" in result.stderr
    lock.unlink()
    assert mine.update().returncode == 0 and has_answer(mine[MODULE], 'New words."""\n    # TODO 1.1')


# ---------------------------------------------------------------------------------------------------------------
# From a download
# ---------------------------------------------------------------------------------------------------------------


def zipped(root: Path, file: Path) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for each in sorted(root.rglob("*")):
            archive.write(each, Path("course-main") / each.relative_to(root))
    return file


def tarred(root: Path, file: Path) -> Path:
    with tarfile.open(file, "w:gz") as archive:
        archive.add(root, "./course-main")
    return file


@pytest.fixture
def download(course, mine) -> Course:
    """The new version; and the student has no git."""
    shutil.rmtree(mine.root / ".git", ignore_errors=True)
    new = self_made(shutil.copytree(course.root, mine.root.parent / "new", ignore=shutil.ignore_patterns(".git")))
    new.deliver(solution(1, "one", "two", words="New words."))
    new["README.md"] = "The course, anew.\n"
    new["common/more.py"] = "# the course's\n"
    return new


@pytest.mark.slow
@needs_git
@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_a_downloaded_version_is_brought_in(download, mine, kind, tmp_path):
    before = mine[MODULE]
    source = {
        "folder": lambda: download.root,
        "zip": lambda: zipped(download.root, tmp_path / "new.zip"),
        "tar": lambda: tarred(download.root, tmp_path / "new.tar.gz"),
    }[kind]()
    result = mine.update("--from", source)
    assert result.returncode == 0, result.stderr
    assert has_answer(mine[MODULE], 'New words."""\n    # TODO 1.1')
    assert mine["README.md"] == "The course, anew.\n" and mine["common/more.py"] == "# the course's\n"
    assert mine["lesson-1-llm-basics/notes.txt"] == "What I learnt." and mine[SECOND] == download[SECOND]
    [backup] = mine.backups()
    assert (backup / MODULE).read_text() == before and (backup / "README.md").read_text() == "The course.\n"
    assert f"{source.name} is in: 5 files changed." in result.stdout
    state = mine.state()
    assert "Nothing new" in mine.update("--from", source).stdout and mine.state() == state


@pytest.mark.slow
@needs_git
def test_a_download_that_is_cut_off_is_put_back(download, mine):
    before = mine.state()
    lines = "import os, common.student.update as update\ndef write(path, content, write=update.write, calls=[]):\n"
    lines += "    calls.append(path)\n    if len(calls) == 3: {}\n    write(path, content)\nupdate.write = write\n"
    lines += f"raise SystemExit(update.main(['--from', {str(download.root)!r}]))"
    assert run(sys.executable, "-c", lines.format("raise OSError('disk full')"), cwd=mine.root).returncode == 1
    assert mine.state() == before
    assert run(sys.executable, "-c", lines.format("os._exit(9)"), cwd=mine.root).returncode == 9
    assert mine.state() != before
    result = mine.update("--from", "/nowhere")
    assert result.returncode == 2 and "no such file" in result.stderr and mine.state() == before
    assert mine.update("--from", download.root).returncode == 0 and "# mine" in mine[MODULE]


def member(name: str, **more) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in more.items():
        setattr(info, key, value)
    return info


def link_in_zip() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("course/README.md")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info


@pytest.mark.parametrize(
    "evil",
    [
        "../outside.txt",
        "/tmp/outside.txt",
        "course/../../../outside.txt",
        "C:\\outside.txt",
        "course\\..\\..\\outside.txt",
        link_in_zip(),
        member("../outside.txt"),
        member("/tmp/outside.txt"),
        member("course/link", type=tarfile.SYMTYPE, linkname="/etc"),
        member("course/link", type=tarfile.LNKTYPE, linkname="../../outside.txt"),
        member("course/pipe", type=tarfile.FIFOTYPE),
    ],
    ids=lambda each: str(getattr(each, "name", getattr(each, "filename", each))),
)
def test_an_archive_that_reaches_out_is_refused(evil, tmp_path, monkeypatch):
    monkeypatch.setattr(update, "WORK", tmp_path / "a" / "work")
    if isinstance(evil, tarfile.TarInfo):
        with tarfile.open(tmp_path / "new", "w:gz") as archive:
            archive.addfile(member("course/good.txt"))
            archive.addfile(evil)
    else:
        with zipfile.ZipFile(tmp_path / "new", "w") as archive:
            archive.writestr("course/good.txt", "")
            archive.writestr(evil, "/etc/passwd")
    with pytest.raises(CourseError, match=r"Nothing was changed\.$"):
        update.unpacked(tmp_path / "new")
    assert {each.name for each in tmp_path.rglob("*") if not each.is_dir()} == {"new", "good.txt"}
    assert not Path("/tmp/outside.txt").exists()


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(update, "WORK", tmp_path / "work")
    with zipfile.ZipFile(tmp_path / "new.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(3):
            archive.writestr(f"{i}.txt", bytes(400))
    assert len(list(update.unpacked(tmp_path / "new.zip").iterdir())) == 3
    monkeypatch.setattr(update, "WORK", tmp_path / "again")
    monkeypatch.setattr(update, "LARGEST", 1000)
    with pytest.raises(CourseError, match="more than the course can be"):
        update.unpacked(tmp_path / "new.zip")
    assert len(list((tmp_path / "again" / "new").iterdir())) == 2


@pytest.mark.slow
@needs_git
def test_other_archives_that_are_no_course(download, mine, tmp_path):
    before = mine.state()
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "empty").mkdir()
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("other/README.md", "Another thing.")
    whole = zipped(download.root, tmp_path / "half.zip").read_bytes()
    (tmp_path / "half.zip").write_bytes(whole[: len(whole) // 2])
    half = tarred(download.root, tmp_path / "half.tar.gz").read_bytes()
    (tmp_path / "half.tar.gz").write_bytes(half[: len(half) // 2])
    for name, told in {
        "missing.zip": "no such file",
        "broken.zip": "cannot be unpacked",
        "half.zip": "cannot be unpacked",
        "half.tar.gz": "cannot be unpacked",
        "empty": "does not hold the course",
        "other.zip": "does not hold the course",
        "mine": "this very copy",
    }.items():
        result = mine.update("--from", tmp_path / name)
        assert result.returncode == 2 and told in result.stderr, (name, result.stderr)
        assert mine.state() == before and not mine.backups()


@needs_git
def test_an_archive_brings_no_git_and_no_environment(download, mine, tmp_path):
    for path in (".git/hooks/post-merge", ".venv/bin/python", ".course/grades/x.json", "common/.GIT/config"):
        download[path] = "evil"
    assert mine.update("--from", zipped(download.root, tmp_path / "new.zip")).returncode == 0
    assert not any((mine.root / name).exists() for name in (".git", ".venv", ".course/grades", "common/.GIT"))


@needs_git
def test_a_copy_in_which_somebody_has_worked_is_no_new_version(download, mine):
    download.answer("1.1", "return 'theirs'")
    before = mine.state()
    result = mine.update("--from", download.root)
    assert result.returncode == 2 and f"somebody has worked: {MODULE}" in result.stderr and mine.state() == before
