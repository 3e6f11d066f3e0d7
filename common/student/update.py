"""`make update`: a new version of the course, with the student's answers in it.

    make update                    from where this clone came from, by git
    make update FROM=course.zip    from a downloaded version: a zip, a tar or a folder

What may fail comes first: the new version is fetched or unpacked, `carry` puts the student's modules into
its skeletons, a merge is tried out. Then what the student has is copied to .course/backups, a journal notes what
is about to change, and it changes. If that fails or is stopped, everything is put back; if it is cut off, as by a power
failure, the next `make update` puts it back.

Standard library only, so that it works in whatever state the course's packages are.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from common.course import MODULES, ROOT, CourseError, unfinished
from common.course.skeleton import BACKUPS, cut_lesson, digest
from common.student.carry import Carried, Misfit, carry

WORK = ROOT / ".course" / "update"
"""Where a new version is unpacked and a merge is tried out."""
JOURNAL = WORK / "journal.json"
BEGUN_ON = ROOT / ".course" / "begun_on"
"""Of modules that could not be carried: the skeletons, older than the course, that they were begun on."""
NOT_OURS = {".git", ".venv", ".course", "__pycache__", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints"}
LARGEST = 2**30
"""Bytes that an archive may unpack to. The course has a hundredth of that."""


def update(source: str) -> None:
    put_back()
    shutil.rmtree(WORK, ignore_errors=True)
    version = Download(Path(source).expanduser()) if source else Clone()
    waited = {path: file.read_text(encoding="utf-8") for path in version.old if (file := BEGUN_ON / path).exists()}
    old = {**version.old, **waited}
    own = {path for path in old if is_own(read(path), old[path]) or is_own(read(path), version.committed.get(path))}
    modules = renew(own, old, version.new, read)
    if not version.is_newer and not any(module.carried and module.former in waited for module in modules):
        print(f"Nothing new: {version.name} is what you have.")
        return
    committed = {path for path, content in version.committed.items() if is_own(content, version.old[path])}
    version.prepare(renew(committed, old, version.new, version.committed.get))

    contents = {path: content for path, content in version.others(own).items() if content != read(path)}
    contents.update({module.path: module.content for module in modules})
    backup = back_up(sorted(path for path in {*own, *contents} if read(path) is not None))
    if backup.exists():
        print(f"Your work as it is now is kept in {backup.relative_to(ROOT).as_posix()}.")
    note_in_journal(version.head, sorted({*own, *contents}), backup)
    try:
        version.install()
        for path, content in contents.items():
            write(path, content)
    except BaseException:
        put_back()
        raise
    JOURNAL.unlink()
    for module in modules:
        note_what_waits(module, old[module.former])
    report(version, old, modules)


# ---------------------------------------------------------------------------------------------------------------
# The student's modules
# ---------------------------------------------------------------------------------------------------------------


@dataclass
class Module:
    """A lesson's module that the student has worked in. Paths are relative to the course, with slashes."""

    path: str  # in the new version
    former: str
    content: bytes  # what the file is to hold
    carried: Carried | None = None  # None where it is left as it is,
    why: str = ""  # for this reason


def renew(own: set[str], old: dict, new: dict, read: Callable[[str], bytes]) -> list[Module]:
    """Those of the student's modules `own` that the new version has as well. old, new: the skeletons, by path."""
    modules = []
    for path, skeleton in new.items():
        former = former_path(path, skeleton, old, new)
        if former not in own:
            continue
        module = Module(path, former, read(former))
        try:
            module.carried = carry(old[former], text_of(module.content), skeleton)
            line_end = "\r\n" if b"\r\n" in module.content else "\n"
            module.content = module.carried.text.replace("\n", line_end).encode()
        except UnicodeDecodeError:
            module.why = ": it is not UTF-8 text."
        except Misfit as misfit:
            module.why = str(misfit)
        except Exception as error:  # a mistake of ours: the student's file is safe where it is
            module.why = f": it could not be put into the new version ({type(error).__name__}: {error})."
        modules.append(module)
    return modules


def former_path(path: str, skeleton: str, old: dict, new: dict) -> str | None:
    """Where a module of the new version was in the old one: at the same path or, renamed, with the same exercises."""
    if path in old:
        return path
    ids = set(unfinished(skeleton))
    shared = {each: len(ids & set(unfinished(text))) for each, text in old.items() if each not in new}
    likeliest = max(shared, key=shared.get, default=None)
    return likeliest if likeliest and shared[likeliest] else None


def is_own(content: bytes | None, skeleton: str | bytes | None) -> bool:
    """Whether a file is there and differs from what the course delivered, where that is known."""
    if content is None or skeleton is None:
        return False
    expected = skeleton.encode() if isinstance(skeleton, str) else skeleton
    return content.replace(b"\r\n", b"\n") != expected.replace(b"\r\n", b"\n")


def text_of(content: bytes) -> str:
    return content.decode().replace("\r\n", "\n")


def module_paths(names: list[str]) -> list[str]:
    """The lessons' modules among a version's files: each has the name of a file in solutions/."""
    found = [re.fullmatch(r"lesson-[^/]+/([a-z]\w*\.py)", name) for name in names]
    return [match[0] for match in found if match and f"solutions/{match[1]}" in set(names)]


def note_what_waits(module: Module, begun_on: str) -> None:
    """Keep the skeleton of a module that was left as it is: the next update needs it. Forget it otherwise."""
    for path in {module.path, module.former}:
        (BEGUN_ON / path).unlink(missing_ok=True)
    if module.carried is None:
        (BEGUN_ON / module.path).parent.mkdir(parents=True, exist_ok=True)
        (BEGUN_ON / module.path).write_text(begun_on, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# Files, and how they are put back
# ---------------------------------------------------------------------------------------------------------------


def read(path: str) -> bytes | None:
    file = ROOT / path
    return file.read_bytes() if file.is_file() else None


def write(path: str, content: bytes) -> None:
    """Whole or not at all."""
    file = ROOT / path
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_bytes(content)
    if file.exists():
        shutil.copymode(file, part)
    os.replace(part, file)


def back_up(paths: list[str]) -> Path:
    """Copy these files. Returns the folder that they are copied to."""
    stamp, n = time.strftime("update-%Y%m%d-%H%M%S"), 0
    while (folder := BACKUPS / (f"{stamp}-{n}" if n else stamp)).exists():
        n += 1
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path)
    return folder


def note_in_journal(head: str | None, paths: list[str], backup: Path) -> None:
    """head: the commit to go back to. paths: the files that are about to change; those in `backup` were there."""
    WORK.mkdir(parents=True, exist_ok=True)
    part = JOURNAL.with_suffix(".part")
    part.write_text(json.dumps({"head": head, "paths": paths, "backup": str(backup.relative_to(ROOT))}))
    os.replace(part, JOURNAL)


def put_back() -> None:
    """Undo what an update has begun and not ended, if there is such a thing."""
    if not JOURNAL.exists():
        return
    journal = json.loads(JOURNAL.read_text())
    backup = ROOT / journal["backup"]
    try:
        if journal["head"] and git("rev-parse", "HEAD").strip() != journal["head"]:
            discard_edits(journal["paths"])
            git("reset", "--quiet", "--keep", journal["head"])
        for path in journal["paths"]:
            if (backup / path).exists():
                write(path, (backup / path).read_bytes())
            elif journal["head"] is None:
                (ROOT / path).unlink(missing_ok=True)
    except (CourseError, OSError) as error:
        raise CourseError(
            f"{error}\nAn update stopped halfway, and what it had changed could not be put back. All of your work is "
            f"in {journal['backup']}. Once what is said above is mended, make update tries again."
        ) from None
    JOURNAL.unlink()
    print("The update did not come to its end; your files are as they were before it.")


# ---------------------------------------------------------------------------------------------------------------
# A new version by git
# ---------------------------------------------------------------------------------------------------------------


def try_git(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="surrogateescape")


def git(*arguments: str, folder: Path = ROOT) -> str:
    """What git prints. Raises CourseError if it fails."""
    result = try_git(*arguments, folder=folder)
    if result.returncode:
        raise CourseError(f"git {arguments[0]}: {(result.stderr or result.stdout).strip()}")
    return result.stdout


def names(*arguments: str, folder: Path = ROOT) -> list[str]:
    """The files that git lists."""
    return [name for name in git(*arguments, folder=folder).split("\0") if name]


def discard_edits(paths: list[str]) -> None:
    """Let those of these files that HEAD has be as they are there."""
    committed = set(names("ls-tree", "-r", "-z", "--name-only", "HEAD"))
    if edited := committed.intersection(names("diff", "-z", "--name-only", "--no-renames", "HEAD", "--", *paths)):
        git("checkout", "--quiet", "HEAD", "--", *sorted(edited))


class Clone:
    """The new version is the branch that this clone follows.

    Where the student has committed nothing, the clone is moved on to it. Otherwise the two histories are merged, and
    of the lesson modules, about which git could only report conflicts, the merge takes what `renew` makes.
    """

    def __init__(self):
        self.check_clone()
        remote, branch = self.followed()
        self.name = f"{remote} ({git('remote', 'get-url', remote).strip()})"
        print(f"Fetching from {self.name} ...", flush=True)
        fetched = try_git("fetch", "--quiet", remote, branch)
        if fetched.returncode:
            raise CourseError(
                f"{fetched.stderr.strip()}\nThe new version could not be fetched, and nothing was changed. If that is "
                "not to be mended, download it and say where it is: make update FROM=course.zip"
            )
        self.head = git("rev-parse", "HEAD").strip()
        self.target = git("rev-parse", "FETCH_HEAD").strip()
        self.is_newer = try_git("merge-base", "--is-ancestor", self.target, "HEAD").returncode != 0
        self.commit = self.target if self.is_newer else self.head
        base = try_git("merge-base", "HEAD", self.target).stdout.strip()
        if not base:
            raise CourseError(
                f"Your history and that of {self.name} have nothing in common, so git cannot bring it in; nothing was "
                "changed. Download the new version and say where it is: make update FROM=course.zip"
            )
        self.old, self.new = self.modules(base), self.modules(self.target)
        committed = set(names("ls-tree", "-r", "-z", "--name-only", "HEAD"))
        self.committed = {
            path: git("show", f"HEAD:{path}").encode(errors="surrogateescape") for path in self.old if path in committed
        }

    def check_clone(self) -> None:
        top = try_git("rev-parse", "--show-toplevel") if shutil.which("git") else None
        if top is None or top.returncode or Path(top.stdout.strip()).resolve() != ROOT:
            raise CourseError(
                "This folder is no clone of the course"
                + (", or git is not installed" if top is None else "")
                + ". Download the new version and say where it is: make update FROM=course.zip"
            )
        folder = ROOT / git("rev-parse", "--git-dir").strip()
        if any((folder / each).exists() for each in ("MERGE_HEAD", "rebase-merge", "rebase-apply", "CHERRY_PICK_HEAD")):
            raise CourseError(
                "A merge or a rebase is under way in this clone, perhaps one that git pull has begun. End it, or take "
                "it back with git merge --abort or git rebase --abort; then make update again."
            )

    def followed(self) -> tuple[str, str]:
        """The remote and what to fetch from it: of a fork, by custom, `upstream`; else what this branch follows."""
        remotes = git("remote").split()
        if not remotes:
            raise CourseError(
                "This clone does not know where it came from. Tell it, by git remote add origin ADDRESS, or download "
                "the new version and say where it is: make update FROM=course.zip"
            )
        if "upstream" in remotes:
            return "upstream", "HEAD"
        branch = try_git("symbolic-ref", "--short", "HEAD").stdout.strip()
        remote = try_git("config", f"branch.{branch}.remote").stdout.strip()
        if remote in remotes and (merge := try_git("config", f"branch.{branch}.merge").stdout.strip()):
            return remote, merge
        return ("origin" if "origin" in remotes else remotes[0]), "HEAD"

    def modules(self, commit: str) -> dict[str, str]:
        paths = module_paths(names("ls-tree", "-r", "-z", "--name-only", commit))
        return {path: git("show", f"{commit}:{path}") for path in paths}

    def others(self, own: set[str]) -> dict[str, bytes]:
        return {}  # git brings them

    def prepare(self, committed: list[Module]) -> None:
        """Settle which commit to go to, and refuse what `install` would fail at."""
        if self.is_newer and try_git("merge-base", "--is-ancestor", "HEAD", self.target).returncode:
            self.commit = self.merged(committed)
        changed = set(names("diff", "-z", "--name-only", "--no-renames", "HEAD", self.commit)) - {*self.old, *self.new}
        edited = changed.intersection(names("diff", "-z", "--name-only", "--no-renames", "HEAD"))
        in_the_way = {name for name in changed | set(self.new) - set(self.old) if (ROOT / name).exists()}
        in_the_way -= set(names("ls-tree", "-r", "-z", "--name-only", "HEAD"))
        if edited or in_the_way:
            listed = "".join(f"\n    {name}" for name in sorted(edited | in_the_way))
            raise CourseError(
                f"Nothing was changed, since the new version has these files too, and yours would be lost:{listed}\n"
                "What you want to keep of them, save under other names. Then "
                + ("git checkout -- FILE gives one up; " if edited else "move them away; ")
                + "after that, make update again."
            )

    def merged(self, committed: list[Module]) -> str:
        """Merge in a folder of its own. Returns the commit."""
        folder = WORK / "merge"
        git("worktree", "prune")
        git("worktree", "add", "--quiet", "--detach", str(folder), "HEAD")
        try:
            merge = try_git("merge", "--quiet", "--no-commit", "--no-ff", self.target, folder=folder)
            for module in committed:
                (folder / module.path).parent.mkdir(parents=True, exist_ok=True)
                (folder / module.path).write_bytes(module.content)
                git("add", "--force", "--", module.path, folder=folder)
            if gone := set(self.old) - set(self.new):
                git("rm", "--quiet", "--force", "--ignore-unmatch", "--", *sorted(gone), folder=folder)
            if conflicts := names("diff", "-z", "--name-only", "--diff-filter=U", folder=folder):
                listed = "".join(f"\n    {name}" for name in sorted(set(conflicts)))
                raise CourseError(
                    "Nothing was changed, since your commits and the course's have both changed these files, and git "
                    f"cannot put them together:{listed}\nTake the course's, git checkout {self.target[:12]} -- FILE, "
                    "and commit that; or merge them as you like. Then make update again."
                )
            if try_git("rev-parse", "--verify", "--quiet", "MERGE_HEAD", folder=folder).returncode:
                raise CourseError(f"git could not merge, and nothing was changed: {merge.stderr.strip()}")
            message = "Merge the new version of the course"
            git("commit", "--quiet", "--no-verify", "--no-gpg-sign", "-m", message, folder=folder)
            return git("rev-parse", "HEAD", folder=folder).strip()
        finally:
            try_git("worktree", "remove", "--force", str(folder))

    def install(self) -> None:
        discard_edits([*self.old, *self.new])
        git("merge", "--quiet", "--ff-only", self.commit)

    def told(self) -> str:
        count = git("rev-list", "--count", f"{self.head}..{self.target}").strip()
        last = git("log", "-1", "--format=%cs, %s", self.target).strip()
        merged = ", merged with your own commits" if self.commit != self.target else ""
        return f"The new version is in: {count} commit{'s' if count != '1' else ''}{merged}; the last: {last}"


# ---------------------------------------------------------------------------------------------------------------
# A new version as a download
# ---------------------------------------------------------------------------------------------------------------


class Download:
    """The new version is a folder, or an archive of one. Files that it has not are left alone."""

    head = None
    committed: dict[str, bytes] = {}

    def __init__(self, source: Path):
        self.name = source.name
        if not source.exists():
            raise CourseError(f"FROM={source}: there is no such file or folder.")
        folder = source if source.is_dir() else unpacked(source)
        roots = [each for each in (folder, *folder.glob("*/")) if (each / "common/skeletons.json").is_file()]
        self.root = roots[0] if roots else None
        if self.root is None:
            raise CourseError(f"{source} does not hold the course: there is no common/skeletons.json in it.")
        if self.root.resolve() == ROOT:
            raise CourseError(f"{source} is this very copy of the course. FROM is for a new version of it.")
        self.files = list(files_below(self.root))
        self.new = {path: (self.root / path).read_text(encoding="utf-8") for path in module_paths(self.files)}
        self.check_skeletons()
        modules = [module for module in MODULES if module.solution.exists()]
        self.old = {module.module.relative_to(ROOT).as_posix(): cut_lesson(module) for module in modules}
        changed = [
            path for path in self.files if path not in self.new and (self.root / path).read_bytes() != read(path)
        ]
        self.num_changed = len(changed) + sum(text != self.old.get(path) for path, text in self.new.items())
        self.is_newer = self.num_changed > 0

    def check_skeletons(self) -> None:
        """A copy in which somebody has worked would pass on their answers as skeletons."""
        record = json.loads((self.root / "common/skeletons.json").read_text(encoding="utf-8"))
        edited = [path for path, text in self.new.items() if digest(text) != record.get(PurePosixPath(path).stem)]
        if edited:
            raise CourseError(f"In {self.name} somebody has worked: {', '.join(edited)}. FROM needs an untouched copy.")

    def others(self, own: set[str]) -> dict[str, bytes]:
        return {path: (self.root / path).read_bytes() for path in self.files if path not in own}

    def prepare(self, committed: list[Module]) -> None:
        pass

    def install(self) -> None:
        pass

    def told(self) -> str:
        return f"{self.name} is in: {self.num_changed} file{'s' if self.num_changed != 1 else ''} changed."


def files_below(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - NOT_OURS)
        for name in sorted(set(files) - NOT_OURS):
            if Path(folder, name).is_symlink():
                raise CourseError(f"{Path(folder, name)} is a link; the course has none.")
            yield Path(folder, name).relative_to(root).as_posix()


def unpacked(archive: Path) -> Path:
    """The folder that an archive was unpacked to. Refuses whatever would be written elsewhere, and links."""
    folder, left = WORK / "new", LARGEST
    try:
        for name, size, content in zip_members(archive) if zipfile.is_zipfile(archive) else tar_members(archive):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or re.search(r"[\\:\0]", name) or not path.parts:
                raise CourseError(f"{archive} has a file {name!r}, which does not belong there. Nothing was changed.")
            left -= size
            if left < 0:
                raise CourseError(f"{archive} unpacks to more than the course can be. Nothing was changed.")
            if not NOT_OURS.intersection(part.lower() for part in path.parts):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                with content, (folder / path).open("xb") as file:
                    shutil.copyfileobj(content, file)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise CourseError(f"{archive} cannot be unpacked: {error}. Nothing was changed.") from None
    return folder


def zip_members(archive: Path) -> Iterator[tuple[str, int, BinaryIO]]:
    with zipfile.ZipFile(archive) as opened:
        for member in opened.infolist():
            if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise CourseError(
                    f"{archive} has a link, {member.filename!r}; the course has none. Nothing was changed."
                )
            if not member.is_dir():
                yield member.filename, member.file_size, opened.open(member)


def tar_members(archive: Path) -> Iterator[tuple[str, int, BinaryIO]]:
    with tarfile.open(archive) as opened:
        for member in opened:
            if not member.isfile() and not member.isdir():
                raise CourseError(f"{archive} has a link, {member.name!r}; the course has none. Nothing was changed.")
            if member.isfile():
                yield member.name, member.size, opened.extractfile(member)


# ---------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------


def report(version: Clone | Download, old: dict[str, str], modules: list[Module]) -> None:
    print(version.told())
    for module in modules:
        if module.carried is None:
            lesson = re.match(r"lesson-\d+", module.path)[0]
            print(f"\n{module.path}{module.why}\n    The file is left as it was. Mend it, and make update again;")
            print(
                f"    or make reset-{lesson}: that gives the new skeleton, and keeps what you have in .course/backups."
            )
        elif version.new[module.path] != old[module.former]:
            answers = module.carried.answers
            print(f"\n{module.path}: {len(answers)} answer{'s' if len(answers) != 1 else ''} put into the new version.")
            for remark in module.carried.remarks:
                print(textwrap.indent(remark, "    "))
            if anew := module.carried.reworded:
                print(f"    Described differently now: {', '.join(anew)}. See whether yours still fits.")
    for path in sorted(set(old) - set(version.new) - {module.former for module in modules}):
        print(f"\n{path} is gone from the course; what you had in it is in the backup.")
    known = {id for text in old.values() for id in unfinished(text)}
    if new := [id for text in version.new.values() for id in unfinished(text) if id not in known]:
        print(f"\nNew exercises: {', '.join(new)}.")
    print("\nmake progress shows where you are.")


def stop(*_) -> None:
    raise KeyboardInterrupt


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m common update", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--from", dest="source", default=os.environ.get("FROM", ""), metavar="DOWNLOAD", help="a zip, a tar or a folder"
    )
    source = parser.parse_args(argv).source
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)
    try:
        update(source)
    except CourseError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. Your files are as they were.", file=sys.stderr)
        return 130
    finally:
        if not JOURNAL.exists():
            shutil.rmtree(WORK, ignore_errors=True)
    return 0
