"""`make update`: installs a new version of the course, with the student's answers in it.

    make update                    from the repository that this clone follows
    make update FROM=course.zip    from a downloaded version: a zip, a tar or a folder

The new version is read into memory. `carry` puts the student's answers into the new skeletons, and `git merge-file`
merges other files that the student has edited; a download does not tell which these are, and replaces them. Only then
are files changed: the student's are copied to .course/backups first, and if one cannot be written, all are restored.

It imports only the standard library, so that it works in whatever state the course's packages are.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import time
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from common.course import MODULES, ROOT, CourseError
from common.course.exercises import unfinished
from common.course.skeleton import BACKUPS, cut_lesson, digest
from common.student.carry import Carried, carry, merge

RENUMBERED = "common/course/renumbered.json"
"""Every renumbering of the exercises so far: the new id of each exercise, by its old one."""
NUMBERED = ROOT / ".course" / "renumbered"
"""This file exists once a version that reads RENUMBERED has carried the student's answers over."""
SKELETONS = "common/skeletons.json"
NOT_OURS = {".git", ".venv", ".course", "__pycache__", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints"}

Files = Mapping[str, bytes]  # contents by path


@dataclass
class Version:
    """A new version of the course, and the old one that the student has worked on."""

    name: str
    files: Files
    old: Files
    answered: Files  # the version whose exercises the student's modules answer: the old one, or one before it
    commit: str = ""  # the new version's, where this copy is a clone
    mine: Path = ROOT  # where the student's modules are


def update(source: str) -> None:
    """Install the new version: from the download `source`, or by git if it is empty. Raises CourseError."""
    version = downloaded(Path(source).expanduser()) if source else fetched()
    if version is None:
        return
    old, new = skeletons(version.answered), skeletons(version.files)
    own = {path: text_of(path, (version.mine / path).read_bytes()) for path in old if (version.mine / path).is_file()}
    own = {path: text for path, text in own.items() if text != old[path]}
    renumbered = ids_now(version, old, new)
    carried = carry(old, own, new, renumbered)
    contents, remarks = merge_others(version, {*old, *new})
    contents |= {path: None for path in old} | {path: version.files[path] for path in new}
    contents |= {path: with_line_ends(each.text, read(path)) for path, each in carried.items()}
    contents = {path: content for path, content in contents.items() if content != read(path)}
    if not contents and not version.commit:
        print(f"Nothing new: {version.name} is what you have.")
        return
    backup = back_up([*own, *(path for path in contents if not version.commit or read(path) != version.old.get(path))])
    install(contents, version.commit)
    NUMBERED.parent.mkdir(exist_ok=True)
    NUMBERED.touch()
    report(version.name, new, carried, remarks, renumbered)
    if backup:
        others = "" if version.commit else " A download replaces all else: your edits of any other file are only there."
        print(f"What you had before is kept in {backup.relative_to(ROOT).as_posix()}.{others}")
    print("make progress shows where you are.")


def skeletons(files: Files) -> dict[str, str]:
    """The lessons' modules in a version, by path: each has the name of a file in solutions/."""
    names = {path: re.fullmatch(r"lesson-[^/]+/([a-z]\w*\.py)", path) for path in files}
    modules = [path for path, match in names.items() if match and f"solutions/{match[1]}" in files]
    return {path: text_of(path, files[path]) for path in modules}


def text_of(path: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise CourseError(f"{path} is not UTF-8 text. Nothing was changed. Save it as UTF-8 first.") from None


def with_line_ends(text: str, present: bytes | None) -> bytes:
    return text.replace("\n", "\r\n" if present and b"\r\n" in present else "\n").encode()


def ids_now(version: Version, old: Mapping[str, str], new: Mapping[str, str]) -> dict[str, str]:
    """The new id of each exercise of the old version that still exists."""
    before, steps = (json.loads(files.get(RENUMBERED) or "[]") for files in (version.answered, version.files))
    ids = {id: id for text in old.values() for id in unfinished(text)}
    for step in steps[len(before) :]:
        ids = {old: step[id] for old, id in ids.items() if id in step}
    present = {id for text in new.values() for id in unfinished(text)}
    return {old: id for old, id in ids.items() if id in present}


def merge_others(version: Version, modules: set[str]) -> tuple[dict[str, bytes | None], list[str]]:
    """Merge all files but the modules. Returns the new contents, None for no file, and a sentence for each file in
    which the course's lines have replaced the student's.
    """
    contents: dict[str, bytes | None] = {}
    remarks = []
    for path in {*version.old, *version.files} - modules:
        base, mine, theirs = version.old.get(path), read(path), version.files.get(path)
        if mine == base:
            contents[path] = theirs
        elif mine is not None and theirs not in (None, mine, base):
            try:
                merged, num_conflicts = merge(*(each.decode() for each in (mine, base or b"", theirs)))
                contents[path] = merged.encode()
            except UnicodeDecodeError:
                contents[path], num_conflicts = theirs, 1
            if num_conflicts:
                remarks.append(f"{path}: where both you and the course have edited it, the course's is in.")
    return contents, sorted(remarks)


# --- Files ------------------------------------------------------------------------------------------------------------


def read(path: str) -> bytes | None:
    file = ROOT / path
    return file.read_bytes() if file.is_file() else None


def write(path: str, content: bytes | None) -> None:
    """Write a file completely or not at all; None removes it."""
    file = ROOT / path
    if content is None:
        return file.unlink(missing_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_bytes(content)
    if content.startswith(b"#!"):
        part.chmod(0o755)
    if file.exists():
        shutil.copymode(file, part)
    os.replace(part, file)


def back_up(paths: list[str]) -> Path | None:
    """Copy those of these files that exist. Returns the folder of the copies, or None if there are none."""
    folder = BACKUPS / time.strftime("update-%Y%m%d-%H%M%S")
    present = [path for path in paths if read(path) is not None]
    for path in present:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, folder / path)
    return folder if present else None


def install(contents: Mapping[str, bytes | None], commit: str) -> None:
    """Change the files, then move the branch to the new version. If either fails, all files are restored."""
    before = {path: read(path) for path in contents}
    try:
        for path, content in contents.items():
            write(path, content)
        if commit:
            move_branch(commit, list(contents))
    except BaseException:
        for path, content in before.items():
            write(path, content)
        print("The update failed; your files are as they were before it.", file=sys.stderr)
        raise


def in_folder(root: Path) -> dict[str, bytes]:
    found = {}
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - NOT_OURS
        files = [path for name in names if not (path := Path(folder, name)).is_symlink()]
        found |= {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
    return found


def in_tar(archive: tarfile.TarFile) -> dict[str, bytes]:
    return {each.name: archive.extractfile(each).read() for each in archive if each.isfile()}


# --- A new version by git ---------------------------------------------------------------------------------------------


def git(*arguments: str) -> str:
    """Run git and return its output without spaces around it. Raises CourseError if it fails."""
    command = ["git", "-C", str(ROOT), *arguments]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="surrogateescape")
    if result.returncode:
        raise CourseError(f"git {arguments[0]}: {(result.stderr or result.stdout).strip()}")
    return result.stdout.strip()


def in_commit(commit: str) -> dict[str, bytes]:
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", commit]
    output = subprocess.run(command, capture_output=True, check=True).stdout
    return in_tar(tarfile.open(fileobj=io.BytesIO(output)))


def fetched() -> Version | None:
    """Fetch the branch that this clone follows. Prints a line and returns None if there is nothing new in it.

    Raises CourseError if this is no clone, a merge is in progress, or git cannot fetch the branch.
    """
    elsewhere = "download the new version and say where it is: make update FROM=course.zip"
    try:
        is_clone = Path(git("rev-parse", "--show-toplevel")).resolve() == ROOT
        remotes = git("remote").split()
    except (CourseError, FileNotFoundError):
        is_clone = False
    if not is_clone or not remotes:
        raise CourseError(
            "This folder does not know where it came from: it is no clone of the course, or git is not installed. "
            f"Install git and {elsewhere}"
        )
    state = ROOT / git("rev-parse", "--git-dir")
    if any((state / each).exists() for each in ("MERGE_HEAD", "rebase-merge", "rebase-apply", "CHERRY_PICK_HEAD")):
        raise CourseError("A merge or a rebase is under way in this clone. End it or abort it; then make update again.")
    remote, branch = followed(remotes)
    name = f"{remote} ({git('remote', 'get-url', remote)})"
    print(f"Fetching from {name} ...", flush=True)
    try:
        git("fetch", "--quiet", remote, branch)
    except CourseError as error:
        raise CourseError(
            f"{error}\nThe new version could not be fetched, and nothing was changed. Or {elsewhere}"
        ) from None
    target = git("rev-parse", "FETCH_HEAD")
    try:
        base = git("merge-base", "HEAD", target)
    except CourseError:
        raise CourseError(
            f"Your history and that of {name} have nothing in common; nothing was changed. Instead, {elsewhere}"
        ) from None
    if backup := needs_new_numbers():
        print(f"The exercises have other numbers now. Your answers are taken from {backup.relative_to(ROOT)}.")
    elif base == target:
        print(f"Nothing new: {name} is what you have.")
        return None
    old = in_commit(base)
    answered = in_commit(version_before_numbers()) if backup else old
    return Version(name, in_commit(target), old, answered, target, backup or ROOT)


def needs_new_numbers() -> Path | None:
    """The backup of an update that installed renumbered exercises with a version that did not read RENUMBERED."""
    backups = sorted(BACKUPS.glob("update-*"))
    is_told = not (ROOT / RENUMBERED).exists() or NUMBERED.exists()
    return backups[-1] if backups and not is_told else None


def version_before_numbers() -> str:
    """The course's commit before the update that installed renumbered exercises without carrying answers over."""
    try:
        base = git("merge-base", "ORIG_HEAD", "FETCH_HEAD")
        if not git("ls-tree", base, RENUMBERED):
            return base
    except CourseError:
        pass  # git has forgotten where that update came from
    return git("log", "-1", "--format=%H", "--diff-filter=A", "--", RENUMBERED) + "^"


def followed(remotes: list[str]) -> tuple[str, str]:
    """The remote and the branch to fetch: `upstream`, if there is one, as in a fork; else those of this branch."""
    if "upstream" in remotes:
        return "upstream", "HEAD"
    try:
        branch = git("symbolic-ref", "--short", "HEAD")
        remote, merged = (git("config", f"branch.{branch}.{key}") for key in ("remote", "merge"))
        if remote in remotes:
            return remote, merged
    except CourseError:
        pass  # the branch follows none
    return ("origin" if "origin" in remotes else remotes[0]), "HEAD"


def move_branch(commit: str, paths: list[str]) -> None:
    """Move the student's branch to the new version, or to a merge with it if the student has commits of their own."""
    if git("merge-base", "HEAD", commit) == git("rev-parse", "HEAD"):
        git("reset", "--quiet", commit)
        return
    git("add", "--update")
    git("add", "--force", "--", *(path for path in paths if read(path) is not None))
    message = "Merge the new version of the course"
    git("reset", "--quiet", "--soft", git("commit-tree", "-p", "HEAD", "-p", commit, "-m", message, git("write-tree")))


# --- A new version as a download --------------------------------------------------------------------------------------


def in_archive(archive: Path) -> dict[str, bytes]:
    """The files of the course in an archive; {} if it does not hold the course."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            found = {each.filename: opened.read(each) for each in opened.infolist() if not each.is_dir()}
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as opened:
            found = in_tar(opened)
    else:
        raise tarfile.ReadError("it is neither a zip nor a tar, or not all of it was downloaded")
    tops = [path.removesuffix(SKELETONS) for path in found if re.fullmatch(f"([^/]+/)?{SKELETONS}", path)]
    own = {path.removeprefix(tops[0]): found[path] for path in found if path.startswith(tops[0])} if tops else {}
    return {path: own[path] for path in own if not NOT_OURS.intersection(path.split("/"))}


def downloaded(source: Path) -> Version:
    """The version in an archive or a folder. Raises CourseError if it is not an untouched copy of the course."""
    if not source.exists():
        raise CourseError(f"FROM={source}: there is no such file or folder.")
    folders = [each for each in (source, *source.glob("*/")) if (each / SKELETONS).is_file()]
    if folders and folders[0].resolve() == ROOT:
        raise CourseError(f"{source} is this very copy of the course. FROM is for a new version of it.")
    try:
        files = in_folder(folders[0]) if folders else {} if source.is_dir() else in_archive(source)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise CourseError(f"{source} cannot be unpacked: {error}. Nothing was changed.") from None
    if not files:
        raise CourseError(f"{source} does not hold the course: there is no {SKELETONS} in it.")
    for path in files:
        if not (ROOT / path).resolve().is_relative_to(ROOT):
            raise CourseError(f"{source} cannot be unpacked: {path} would lie elsewhere. Nothing was changed.")
    record = json.loads(files[SKELETONS])
    for path, text in skeletons(files).items():
        if digest(text) != record[Path(path).stem]:
            raise CourseError(f"In {source.name} somebody has worked: {Path(path).name}. FROM needs an untouched copy.")
    modules = [module for module in MODULES if module.solution.exists()]
    solutions = [module.solution.relative_to(ROOT).as_posix() for module in modules]
    old = {path: content for path in [*files, *solutions] if (content := read(path)) is not None}
    old |= {module.module.relative_to(ROOT).as_posix(): cut_lesson(module).encode() for module in modules}
    return Version(source.name, files, old, old)


# --- The command ------------------------------------------------------------------------------------------------------


def report(
    name: str, new: Mapping[str, str], carried: Mapping[str, Carried], remarks: list[str], renumbered: Mapping[str, str]
) -> None:
    print(f"The new version is in, from {name}.")
    for path, module in carried.items():
        count = len(module.answers)
        if count or module.remarks:
            print(f"\n{path}: {count} answer{'s' if count != 1 else ''} put into the new version.")
            for remark in module.remarks:
                print(textwrap.indent(remark, "    "))
    print(*(f"\n{remark}" for remark in remarks), sep="", end="\n" if remarks else "")
    if any(old != id for old, id in renumbered.items()):
        print("\nThe exercises have other numbers now, in the order of the file; your answers are where they belong.")
    present = [id for text in new.values() for id in unfinished(text)]
    if added := [id for id in present if id not in renumbered.values()]:
        print(f"\nNew exercises: {', '.join(added)}.")


def main(argv: list[str]) -> int:
    """`python -m common update [DOWNLOAD]`; `make` passes the download, a zip, a tar or a folder, as FROM."""
    try:
        for name in {*os.environ.get("COURSE_VARIABLES", "").split()} - {"FROM", "TORCH", "COURSE_PYTHON"}:
            raise CourseError(f"make update takes no variable {name}; it takes FROM.")
        update(argv[0] if argv else os.environ.get("FROM", ""))
    except CourseError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
