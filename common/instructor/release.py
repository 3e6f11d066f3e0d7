"""`make release`: a copy of the course for a class, in which the solutions of some lessons are withheld.

    make release LESSONS=0-3 OUT=../class

In the copy, solutions/<slug>.py of such a lesson contains only its skeleton, and its first line tells this to
`Lesson.is_withheld`. Its catalogue of answers is left out, and so are the course's own tests, which quote answers, the
instructor's guide and the history. The student's module then replaces `solutions.<slug>` (common.course.modules), and
the exercises are graded in the student's whole module (common.grading.subject). A lesson that builds on an unfinished
one waits for it (`still_to_do_below`).

All files that git tracks are copied, in their present state. This keeps no secrets, since the course is public.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import click

from common.course import LESSONS, MODULES, ROOT, CourseError, Lesson, modules_of, parse_mine, shown, skeleton
from common.course.exercises import exercises_of
from common.course.modules import named
from common.options import folder, force, option

GUIDE = "common/instructor/README.md#withholding-solutions"
NOTE = """
> **This copy came without the solutions of {lessons}.** Do these one after the other, since each builds on your own. In
> such a lesson each exercise is checked in your whole file: it waits for those it calls that are still to do. Where the
> text says that what you have not written is taken from the reference, it means the other lessons; and there is no
> `make test` here, which tests the course and not you.
"""
"""The text below the title of the copy's README."""
INSTRUCTORS = re.compile(r"(?<=^## For instructors\n).*?(?=^## )", re.MULTILINE | re.DOTALL)
"""The section that is left out of it."""


def release(lessons: list[Lesson], out: Path) -> int:
    """Write the copy of the course into `out`. Returns its size in bytes.

    Existing files of the course are overwritten, and files that a copy must not have are removed. Other files in `out`
    are left alone. Raises CourseError if git cannot list the course's files.
    """
    modules = [module for each in lessons for module in modules_of(each.number)]
    skeletons = {each: skeleton.cut_lesson(each) for each in MODULES}
    contents = {each.module: text for each, text in skeletons.items()}
    contents |= {each.solution: skeleton.emptied(skeletons[each]) for each in modules}
    record = {each.slug: skeleton.digest(text) for each, text in skeletons.items()}
    contents[skeleton.RECORD] = json.dumps(record, indent=2, sort_keys=True) + "\n"
    title, text = (ROOT / "README.md").read_text(encoding="utf-8").split("\n", 1)
    text = INSTRUCTORS.sub("\nTheir guide is in the course's own repository.\n\n", text)
    contents[ROOT / "README.md"] = f"{title}\n{NOTE.format(lessons=named(lessons))}{text}"
    size = 0
    for file in tracked_files():
        copy = out / file.relative_to(ROOT)
        if is_left_out(file, [each.answers for each in modules]):
            copy.unlink(missing_ok=True)
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file in contents:
            copy.write_text(contents[file], encoding="utf-8")
        else:
            shutil.copy(file, copy)
        size += copy.stat().st_size
    return size


def tracked_files() -> list[Path]:
    """The course's files: those that git tracks and that exist. Raises CourseError if git cannot list them."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        raise CourseError(
            "Which files are the course's, git must say: release from a clone of its repository, with git installed."
        ) from None
    continuous_integration = (".ci/", ".github/")  # of the course; a class has its own
    return [ROOT / name for name in names if (ROOT / name).is_file() and not name.startswith(continuous_integration)]


def is_left_out(file: Path, catalogues: list[Path]) -> bool:
    """Whether a copy must not have this file: the withheld catalogues, the instructor's guide, the course's own tests
    and the list of surviving mutants, because the last two quote answers.
    """
    name = file.relative_to(ROOT).as_posix()
    return file in catalogues or name.startswith(
        (
            "common/instructor/README.md",
            "common/instructor/grade.yml",
            "common/tests/",
            "common/bench/measurements/mutants.json",
            "solutions/tests/test_",
        )
    )


def check_out(out: Path, force: bool) -> None:
    """Raise CourseError if the copy cannot be written to `out`."""
    if out == ROOT or ROOT in out.parents:
        raise CourseError("OUT lies in the course itself: name a folder beside it, such as OUT=../class.")
    if out.exists() and any(out.iterdir()) and not force:
        raise CourseError(
            f"{shown(out)} is there and not empty. With FORCE=1 the course's files in it are written over, a student's "
            "work among them; what else is there, .git too, stays."
        )


@click.command()
@option("--lessons", "LESSONS", default="", metavar="0-3", help="whose solutions are withheld; default: all")
@option("--out", "OUT", type=folder, required=True, metavar="FOLDER", help="where the copy goes, such as ../class")
@force("also into a folder that is not empty")
def release_course(lessons: str, out: Path, force: bool) -> None:
    """Make a copy of the course for a class, without the solutions of some lessons, or of all."""
    copy = out.expanduser().resolve()
    withheld = parse_mine(lessons, "LESSONS") or list(LESSONS)
    check_out(copy, force)
    size = release(withheld, copy)
    answers = sum(len(exercises_of(module)) for each in withheld for module in modules_of(each.number))
    print(
        f"{out}: the course, {size / 1e6:.1f} MB, with every exercise to do.\n"
        f"Withheld: the {answers} answers of {named(withheld)}, and all that the "
        "catalogue of answers says of them.\n"
        "Left out as well: the instructor's guide, the course's own tests, and its history.\n\n"
        f"Next: look around in it, make it a repository, and push that to your class:\n"
        f"    cd {out} && make progress\n"
        "    git init && git add . && git commit -m 'The course'\n\n"
        "This keeps nothing secret that is public elsewhere, and the course is. What it is good for, and how a\n"
        f"withheld lesson is graded: {GUIDE}"
    )
