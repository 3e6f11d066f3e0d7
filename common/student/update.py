"""`make update`: installs a new version of the course, with the student's answers in it.

    make update                    from the repository that this clone follows
    make update FROM=course.zip    from a downloaded version: a zip, a tar or a folder

The new version is fetched or unpacked beside this one. `carry` puts the student's answers into the new skeletons, and
`git merge-file` merges other files that the student has edited. Only then are files changed: the student's are copied
to .course/backups first, and if a file cannot be written, all are restored.

It imports only the standard library, so that it works in whatever state the course's packages are.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.course import MODULES, ROOT, CourseError
from common.course.exercises import unfinished
from common.course.skeleton import BACKUPS, cut_lesson, digest
from common.student.carry import Carried, carry, merge

RENUMBERED = "common/course/renumbered.json"
"""Every renumbering of the exercises so far: the new id of each exercise, by its old one."""
NUMBERED = ROOT / ".course" / "renumbered"
"""This file exists once a version that reads RENUMBERED has carried the student's answers over."""
NOT_OURS = {".git", ".venv", ".course", "__pycache__", ".pytest_cache", ".ruff_cache", ".ipynb_checkpoints"}


@dataclass
class Version:
    """A new version of the course in a folder of its own, and the files of the old one."""

    name: str
    folder: Path
    skeletons: dict[str, str]  # of the old version's modules, by path
    edited: dict[str, bytes | None] = field(default_factory=dict)  # other files that the student edited, as they were
    gone: list[str] = field(default_factory=list)  # files that the new version no longer has
    commit: str = ""  # the new version's, where this copy is a clone
    mine: Path = ROOT  # where the student's modules are


def update(source: str) -> None:
    """Install the new version: from the download `source`, or by git if it is empty. Raises CourseError."""
    with tempfile.TemporaryDirectory(prefix="course-") as folder:
        version = downloaded(Path(source).expanduser(), Path(folder)) if source else fetched(Path(folder))
        if version is None:
            return
        files = {path.relative_to(version.folder).as_posix(): path for path in files_below(version.folder)}
        new = {path: files[path].read_text(encoding="utf-8") for path in module_paths(list(files))}
        own = {path: text for path, text in texts(version).items() if text != version.skeletons[path]}
        renumbered = ids_now(version, new)
        carried = carry(version.skeletons, own, new, renumbered)
        contents = {path: file.read_bytes() for path, file in files.items()}
        contents |= {path: with_line_ends(each.text, read(path)) for path, each in carried.items()}
        remarks = merge_others(version, contents)
        contents |= {path: None for path in version.gone if read(path) is not None}
        contents = {path: content for path, content in contents.items() if content != read(path)}
        if not contents and not version.commit:
            print(f"Nothing new: {version.name} is what you have.")
            return
        backup = back_up([*own, *(path for path in contents if path in version.edited)])
        install(contents, version.commit)
        NUMBERED.parent.mkdir(exist_ok=True)
        NUMBERED.touch()
        report(version.name, new, carried, remarks, renumbered)
        if backup:
            print(f"What you had before is kept in {backup.relative_to(ROOT).as_posix()}.")
        print("make progress shows where you are.")


def ids_now(version: Version, new: Mapping[str, str]) -> dict[str, str]:
    """The new id of each exercise of the old version that still exists."""
    known = len(json.loads(read(RENUMBERED) or "[]")) if version.mine == ROOT else 0
    file = version.folder / RENUMBERED
    steps = json.loads(file.read_text(encoding="utf-8"))[known:] if file.exists() else []
    ids = {id: id for text in version.skeletons.values() for id in unfinished(text)}
    for step in steps:
        ids = {old: step[id] for old, id in ids.items() if id in step}
    present = {id for text in new.values() for id in unfinished(text)}
    return {old: id for old, id in ids.items() if id in present}


def needs_new_numbers() -> Path | None:
    """The backup of an update that installed renumbered exercises with a version that did not read RENUMBERED."""
    backups = sorted(BACKUPS.glob("update-*"))
    is_told = not (ROOT / RENUMBERED).exists() or NUMBERED.exists()
    return backups[-1] if backups and not is_told else None


def texts(version: Version) -> dict[str, str]:
    """The student's modules, with the line ends of the skeletons. Raises CourseError if one is not UTF-8 text."""
    found = {}
    for path in version.skeletons:
        if (version.mine / path).is_file():
            content = (version.mine / path).read_bytes()
            try:
                found[path] = content.decode("utf-8-sig").replace("\r\n", "\n")
            except UnicodeDecodeError:
                raise CourseError(
                    f"{path} is not UTF-8 text. Nothing was changed. Save it as UTF-8, then update again."
                ) from None
    return found


def with_line_ends(text: str, present: bytes | None) -> bytes:
    return text.replace("\n", "\r\n" if present and b"\r\n" in present else "\n").encode()


def merge_others(version: Version, contents: dict[str, bytes | None]) -> list[str]:
    """Merge the files that the student has edited, except the lessons' modules, into the new version's `contents`.

    Returns a sentence for each file in which the course's lines have replaced the student's.
    """
    remarks = []
    for path, base in version.edited.items():
        mine, theirs = read(path), contents.get(path)
        if mine is None or theirs is None or theirs in (mine, base):
            contents.pop(path, None)  # the course has not changed it, or no longer has it: the student's stays
            continue
        try:
            merged, num_conflicts = merge(*(each.decode() for each in (mine, base or b"", theirs)))
            contents[path] = merged.encode()
        except UnicodeDecodeError:
            num_conflicts = 1
        if num_conflicts:
            remarks.append(f"{path}: where both you and the course have edited it, the course's is in.")
    return remarks


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


def files_below(root: Path) -> list[Path]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - NOT_OURS)
        found += [path for name in sorted(files) if not (path := Path(folder, name)).is_symlink()]
    return found


def module_paths(names: list[str]) -> list[str]:
    """The lessons' modules among a version's files: each has the name of a file in solutions/."""
    found = [re.fullmatch(r"lesson-[^/]+/([a-z]\w*\.py)", name) for name in names]
    return [match[0] for match in found if match and f"solutions/{match[1]}" in names]


# --- A new version by git ---------------------------------------------------------------------------------------------


def git(*arguments: str) -> str:
    """Run git and return its output. Raises CourseError if it fails."""
    result = subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, encoding="utf-8", errors="surrogateescape"
    )
    if result.returncode:
        raise CourseError(f"git {arguments[0]}: {(result.stderr or result.stdout).strip()}")
    return result.stdout


def names(*arguments: str) -> list[str]:
    """The files that git lists."""
    return [name for name in git(arguments[0], "-z", *arguments[1:]).split("\0") if name]


def fetched(folder: Path) -> Version | None:
    """Fetch the branch that this clone follows. Prints a line and returns None if there is nothing new in it.

    Raises CourseError if this is no clone, a merge is in progress, or git cannot fetch the branch.
    """
    elsewhere = "download the new version and say where it is: make update FROM=course.zip"
    try:
        is_clone = Path(git("rev-parse", "--show-toplevel").strip()).resolve() == ROOT
        remotes = git("remote").split()
    except (CourseError, FileNotFoundError):
        is_clone = False
    if not is_clone or not remotes:
        raise CourseError(
            "This folder does not know where it came from: it is no clone of the course, or git is not installed. "
            f"Install git and {elsewhere}"
        )
    state = ROOT / git("rev-parse", "--git-dir").strip()
    if any((state / each).exists() for each in ("MERGE_HEAD", "rebase-merge", "rebase-apply", "CHERRY_PICK_HEAD")):
        raise CourseError("A merge or a rebase is under way in this clone. End it or abort it; then make update again.")
    remote, branch = followed(remotes)
    name = f"{remote} ({git('remote', 'get-url', remote).strip()})"
    print(f"Fetching from {name} ...", flush=True)
    try:
        git("fetch", "--quiet", remote, branch)
    except CourseError as error:
        raise CourseError(
            f"{error}\nThe new version could not be fetched, and nothing was changed. Or {elsewhere}"
        ) from None
    target = git("rev-parse", "FETCH_HEAD").strip()
    try:
        base = git("merge-base", "HEAD", target).strip()
    except CourseError:
        raise CourseError(
            f"Your history and that of {name} have nothing in common; nothing was changed. Instead, {elsewhere}"
        ) from None
    backup = needs_new_numbers()
    if backup:
        print(f"The exercises have other numbers now. Your answers are taken from {backup.relative_to(ROOT)}.")
        base = version_before_numbers()
    elif base == target:
        print(f"Nothing new: {name} is what you have.")
        return None
    git("archive", f"--output={folder / 'new.tar'}", target)
    unpack(folder / "new.tar", folder / "new")
    before, after = (set(names("ls-tree", "-r", "--name-only", commit)) for commit in (base, target))
    modules = module_paths(list(before))
    skeletons = {path: git("show", f"{base}:{path}") for path in modules}
    changed = set() if backup else set(names("diff", "--name-only", "--no-renames", base)) & before
    added = {path for path in after - before if read(path) is not None}
    others = sorted((changed | added) - set(modules) - set(module_paths(list(after))))
    edited = {path: show(base, path) if path in before else None for path in others}
    gone = sorted(before - after - set(edited))
    return Version(name, folder / "new", skeletons, edited, gone, target, backup or ROOT)


def version_before_numbers() -> str:
    """The course's commit before the update that installed renumbered exercises without carrying answers over."""
    try:
        base = git("merge-base", "ORIG_HEAD", "FETCH_HEAD").strip()
        if not names("ls-tree", "--name-only", base, RENUMBERED):
            return base
    except CourseError:
        pass  # git has forgotten where that update came from
    added = git("log", "-1", "--format=%H", "--diff-filter=A", "--", RENUMBERED).strip()
    return git("rev-parse", f"{added}^").strip()


def show(commit: str, path: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), "show", f"{commit}:{path}"], capture_output=True, check=True).stdout


def followed(remotes: list[str]) -> tuple[str, str]:
    """The remote and the branch to fetch: `upstream`, if there is one, as in a fork; else those of this branch."""
    if "upstream" in remotes:
        return "upstream", "HEAD"
    try:
        branch = git("symbolic-ref", "--short", "HEAD").strip()
        remote, merged = (git("config", f"branch.{branch}.{key}").strip() for key in ("remote", "merge"))
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
    merged = git("commit-tree", "-p", "HEAD", "-p", commit, "-m", message, git("write-tree").strip())
    git("reset", "--quiet", "--soft", merged.strip())


# --- A new version as a download --------------------------------------------------------------------------------------


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive; of a tar only files and folders. Raises tarfile.ExtractError for a path outside the folder."""
    if not tarfile.is_tarfile(archive):
        return shutil.unpack_archive(archive, folder)
    with tarfile.open(archive) as tar:
        plain = [member for member in tar if member.isfile() or member.isdir()]
        for member in plain:
            if not (folder / member.name).resolve().is_relative_to(folder.resolve()):
                raise tarfile.ExtractError(f"{member.name} would lie elsewhere")
        tar.extraction_filter = getattr(tarfile, "data_filter", None)
        tar.extractall(folder, plain)


def downloaded(source: Path, folder: Path) -> Version:
    """The version in an archive or a folder. Raises CourseError if it is not an untouched copy of the course."""
    if not source.exists():
        raise CourseError(f"FROM={source}: there is no such file or folder.")
    if not source.is_dir():
        try:
            unpack(source, folder / "new")
        except (shutil.ReadError, zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, OSError) as error:
            raise CourseError(f"{source} cannot be unpacked: {error}. Nothing was changed.") from None
    found = folder / "new" if (folder / "new").exists() else source
    roots = [each for each in (found, *found.glob("*/")) if (each / "common/skeletons.json").is_file()]
    if not roots:
        raise CourseError(f"{source} does not hold the course: there is no common/skeletons.json in it.")
    if roots[0].resolve() == ROOT:
        raise CourseError(f"{source} is this very copy of the course. FROM is for a new version of it.")
    record = json.loads((roots[0] / "common/skeletons.json").read_text(encoding="utf-8"))
    for slug, expected in record.items():
        for module in roots[0].glob(f"lesson-*/{slug}.py"):
            if digest(module.read_text(encoding="utf-8")) != expected:
                raise CourseError(f"In {source.name} somebody has worked: {module.name}. FROM needs an untouched copy.")
    modules = [module for module in MODULES if module.solution.exists()]
    skeletons = {module.module.relative_to(ROOT).as_posix(): cut_lesson(module) for module in modules}
    return Version(source.name, roots[0], skeletons)


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
        update(argv[0] if argv else os.environ.get("FROM", ""))
    except CourseError as error:
        print(error, file=sys.stderr)
        return 2
    return 0
