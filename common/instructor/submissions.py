"""Finds the submissions of a class, and reads the lessons' modules in them.

A submission is a folder (a clone of a repository, say), a .zip or a .tar (.gz, .bz2, .xz), named after the student. No
archive is unpacked: only the modules are read, up to a limit of bytes. A note names what was not taken, and the reason.
"""

from __future__ import annotations

import itertools
import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from common.course import MODULES, CourseError, Lesson, shown
from common.grading.wire import readable

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_MODULE = 1 << 20
"""The largest number of bytes of a module; the longest solution has a twentieth of them."""
MAX_ENTRIES = 100_000
MAX_NAMED = 20
"""The largest number of files that a note names."""
SLUGS = {lesson.slug for lesson in MODULES}
NAMES = {lesson.module.name for lesson in MODULES}
MAX_UNPACKED = 2 << 30
"""The number of bytes of a .tar that are searched; unlike a .zip, it has no list of its files."""
NOT_HANDED_IN = {"solutions", ".course", ".git", ".venv", "venv", "node_modules", "site-packages"}
NOT_HANDED_IN |= {"__pycache__", "__MACOSX"}
"""Folders whose files are not the student's modules, even if they have the name of one."""


@dataclass
class Submission:
    """The submission of one student: the text of each module, by its slug."""

    student: str
    place: Path
    modules: dict[str, bytes] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what was not taken, and why


@dataclass(frozen=True)
class Entry:
    """A file in a submission. read: returns at most the given number of its bytes."""

    path: PurePosixPath
    read: Callable[[int], bytes]


def find_submissions(folder: Path) -> tuple[list[Submission], list[str]]:
    """Return all submissions in a folder, in the order of their names, and a line for each entry that is none.

    Raises CourseError if there is no such folder, or no submission in it.
    """
    if not folder.is_dir():
        raise CourseError(
            f"SUBMISSIONS={shown(folder)} is no folder; it holds one folder, .zip or .tar for each student."
        )
    found: dict[str, Submission] = {}
    ignored = []
    for place in sorted(folder.iterdir()):
        if place.name.startswith((".", "__MACOSX")):
            continue
        student, name = student_name(place), plain(place.name, 80)
        if student is None:
            ignored.append(f"{name}: neither a folder nor a .zip nor a .tar; links are not followed")
        elif student in found:
            ignored.append(f"{name}: {plain(found[student].place.name, 80)} is this student's submission already")
        else:
            found[student] = read_submission(student, place)
    if not found:
        there = plain(", ".join(place.name for place in folder.iterdir()), 400) or "nothing"
        raise CourseError(f"There is no submission in {shown(folder)}: no folder, .zip or .tar. In it lies: {there}.")
    return list(found.values()), ignored


def student_name(place: Path) -> str | None:
    """The student's name, which is also used as a folder's name; None if this is no submission."""
    suffix = next((each for each in ARCHIVES if place.name.lower().endswith(each)), "")
    if place.is_symlink() or not (place.is_dir() or (suffix and place.is_file())):
        return None
    name = place.name if place.is_dir() else place.name[: -len(suffix)]
    return re.sub(r"[^\w.@+ -]", "_", name).strip(". ") or "_"


def read_submission(student: str, place: Path) -> Submission:
    """Read the modules in a folder or an archive. Raises no error for its contents.

    If a module is missing, a note names the files that may contain it.
    """
    submission = Submission(student, place)
    read = entries_of_folder if place.is_dir() else entries_of_zip if zipfile.is_zipfile(place) else entries_of_tar
    try:
        entries = list(itertools.islice(read(place, submission.notes), MAX_ENTRIES + 1))
        if len(entries) > MAX_ENTRIES:
            submission.notes.append(f"more than {MAX_ENTRIES:,} files: the rest was not looked at")
        entries = [each for each in entries[:MAX_ENTRIES] if not NOT_HANDED_IN.intersection(each.path.parts[:-1])]
        for lesson in MODULES:
            if named := [each for each in entries if each.path.name == lesson.module.name]:
                take(submission, lesson, named)
        others = [each.path for each in entries if each.path.name not in NAMES]
        meant = [
            path
            for path in others
            for slug in [module_meant(path.name)]
            if (slug not in submission.modules if slug else path.name.lower().endswith(ARCHIVES))
        ]
        is_none_there = len(others) == len(entries)
        if left := meant or (others if is_none_there else []):
            names = ", ".join(map(str, left[:MAX_NAMED]))
            submission.notes.append(f"not taken, since no module is called so: {names}")
        elif is_none_there and not submission.notes:
            submission.notes.append("no file lies in it that could be a module")
    except (OSError, zipfile.BadZipFile, tarfile.TarError, EOFError, RuntimeError, ValueError) as error:
        submission.notes.append(f"cannot be read any further: {type(error).__name__}: {error}")
    submission.notes = [plain(note, 400) for note in submission.notes]
    return submission


def module_meant(name: str) -> str | None:
    """The slug of the module that is likely meant by a file of another name, such as `llm_basics (1).py`,
    `llm_basics.ipynb` or `smith_12345_llm_basics.py`; None if there is none.
    """
    stem, dot, suffix = name.lower().rpartition(".")
    stem = stem.replace("-", "_")
    found = [] if stem.startswith("test_") else [slug for slug in SLUGS if re.search(f"(?<![a-z]){slug}", stem)]
    return max(found, key=len) if found and dot + suffix in (".py", ".ipynb", ".txt") else None


def plain(text: str, width: int) -> str:
    """A text of at most `width` characters, with control characters written out, so that none moves the cursor."""
    shown = readable(text, kept="")
    return shown if len(shown) <= width else f"{shown[: width - 1]}…"


def take(submission: Submission, lesson: Lesson, candidates: list[Entry]) -> None:
    """Take the module from one of the files with its name: the one in the lesson's folder, or the least deep one."""
    candidates.reverse()  # of two entries with one path, the last one is what unpacking leaves
    candidates.sort(key=lambda entry: (entry.path.parent.name != lesson.folder.name, len(entry.path.parts), entry.path))
    entry = candidates[0]
    if len(candidates) > 1:
        submission.notes.append(f"{lesson.module.name} is there {len(candidates)} times; graded is {entry.path}")
    content = entry.read(MAX_MODULE + 1)
    if len(content) > MAX_MODULE:
        submission.notes.append(f"{entry.path} is longer than {MAX_MODULE >> 20} MiB and was not taken")
    else:
        submission.modules[lesson.slug] = content


def inside(name: str) -> PurePosixPath | None:
    """The path of an entry within its archive, or None if it leads out of it."""
    path = PurePosixPath(name.replace("\\", "/"))
    return None if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:", name) else path


def entries_of_folder(folder: Path, notes: list[str]) -> Iterator[Entry]:
    """The files of a folder. Links are not followed, because they may lead to any file of this machine."""
    for path, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - NOT_HANDED_IN)
        for name in sorted(files):
            file = Path(path, name)
            place = PurePosixPath(file.relative_to(folder).as_posix())
            if stat.S_ISREG(file.lstat().st_mode):
                yield Entry(place, lambda limit, file=file: read_start(file.open("rb"), limit))
            elif name in NAMES:
                notes.append(f"{place} is a link or no plain file, and was not taken")


def entries_of_zip(place: Path, notes: list[str]) -> Iterator[Entry]:
    archive = zipfile.ZipFile(place)
    for info in archive.infolist():
        path = inside(info.filename)
        if path is None:
            notes.append(f"{info.filename} leads out of the archive and was not taken")
        elif stat.S_ISLNK(info.external_attr >> 16):
            notes.append(f"{path} is a link and was not taken")
        elif not info.is_dir():
            yield Entry(path, lambda limit, info=info: read_start(archive.open(info), limit))


def entries_of_tar(place: Path, notes: list[str]) -> Iterator[Entry]:
    archive = tarfile.open(place)
    for member in archive:
        if member.offset_data + member.size > MAX_UNPACKED:
            notes.append(f"unpacks to more than {MAX_UNPACKED >> 30} GiB: the rest was not looked at")
            return
        path = inside(member.name)
        if path is None:
            notes.append(f"{member.name} leads out of the archive and was not taken")
        elif member.isfile():
            yield Entry(path, lambda limit, member=member: read_start(archive.extractfile(member), limit))
        elif not member.isdir():
            notes.append(f"{path} is a link or no plain file, and was not taken")


def read_start(file, limit: int) -> bytes:
    with file:
        return file.read(limit)
