"""Cuts solutions/<slug>.py into the skeleton that the student fills in.

The comment that opens an exercise, and the comment lines that follow it directly, become the TODO; the answer becomes
`raise NotImplementedError("TODO 1.4")`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

from common.course import ROOT, WITHHELD, CourseError, Lesson, shown
from common.course.catalogue import Answer, edited_body, planted_answers
from common.course.exercises import find_exercises

RECORD = ROOT / "common" / "skeletons.json"
"""The SHA-256 of each skeleton as it was last generated: a file with another one has been edited."""
FIND_THE_BUG = "  # take this line out, then find the one mistake below and mend it"
NOTICE = WITHHELD + "# ruff: noqa\n"
"""The beginning of a withheld solution. ruff would complain about unused imports, as in a skeleton."""
BACKUPS = ROOT / ".course" / "backups"


def cut(source: str, file: str, number: int | None = None, planted: Mapping[str, Answer] = MappingProxyType({})) -> str:
    """The skeleton of a solution, as text.

    file, number: as for `find_exercises`. planted: the answers to show, by the ids of exercises in which the student
    must find a bug. Raises CourseError.
    """
    lines = source.splitlines()
    for exercise in reversed(find_exercises(source, file, number)):
        opening = lines[exercise.comment_line - 1].replace("# Exercise", "# TODO", 1)
        stub = " " * exercise.indent + f'raise NotImplementedError("TODO {exercise.id}")'
        todo = lines[exercise.comment_line : exercise.first_answer_line - 1]
        body = [stub]
        if exercise.id in planted:
            body = [stub + FIND_THE_BUG, *edited_body(planted[exercise.id], source, exercise).splitlines()]
        lines[exercise.comment_line - 1 : exercise.last_line] = [opening, *todo, *body]
    return "\n".join(lines) + "\n"


def cut_lesson(lesson: Lesson) -> str:
    """The lesson's skeleton, cut from its solution and its planted mistakes as they are now."""
    if lesson.is_withheld:
        return reopened(lesson.solution.read_text(encoding="utf-8").removeprefix(NOTICE), "Exercise", "TODO")
    source = lesson.solution.read_text(encoding="utf-8")
    return cut(source, shown(lesson.solution), lesson.number, planted_answers(lesson))


def emptied(skeleton: str) -> str:
    """The text that takes the place of a withheld solution: its skeleton, in which exercises can still be found."""
    return NOTICE + reopened(skeleton, "TODO", "Exercise")


def reopened(source: str, old: str, new: str) -> str:
    """The source with the word that opens an exercise, Exercise or TODO, replaced by the other."""
    return re.sub(rf"^( +# ){old}( \d+\.\d+: )", rf"\1{new}\2", source, flags=re.MULTILINE)


# --- Files ------------------------------------------------------------------------------------------------------------


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def generate(lesson: Lesson) -> str:
    """Write the lesson's skeleton. Returns "written" or "unchanged". Raises CourseError if the file was edited."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    skeleton = cut_lesson(lesson)
    present = lesson.module.read_text(encoding="utf-8") if lesson.module.exists() else None
    if present not in (None, skeleton) and digest(present) != record.get(lesson.slug):
        raise CourseError(
            f"{shown(lesson.module)} was edited since it was generated, and is left as it is. If the edit is meant "
            f"for the course, make it in {shown(lesson.solution)}; `make reset-lesson-{lesson.number}` backs the file "
            "up and starts it afresh."
        )
    lesson.module.write_text(skeleton, encoding="utf-8")
    RECORD.write_text(json.dumps({**record, lesson.slug: digest(skeleton)}, indent=2, sort_keys=True) + "\n")
    return "unchanged" if present == skeleton else "written"


def reset(lesson: Lesson) -> Path | None:
    """Replace a lesson's file by its skeleton. Returns the old file's backup, or None if it was a skeleton already."""
    skeleton = cut_lesson(lesson)
    backup = None
    if lesson.module.exists() and lesson.module.read_text(encoding="utf-8") != skeleton:
        BACKUPS.mkdir(parents=True, exist_ok=True)
        backup = BACKUPS / f"{lesson.slug}-{datetime.now():%Y%m%d-%H%M%S-%f}.py"
        backup.write_bytes(lesson.module.read_bytes())
    lesson.module.write_text(skeleton, encoding="utf-8")
    return backup


def difference(lesson: Lesson) -> str:
    """The difference between the committed skeleton and the one cut from the solution now; "" if there is none."""
    present = lesson.module.read_text(encoding="utf-8") if lesson.module.exists() else ""
    return "".join(
        difflib.unified_diff(
            present.splitlines(keepends=True),
            cut_lesson(lesson).splitlines(keepends=True),
            shown(lesson.module),
            f"cut from {shown(lesson.solution)}",
        )
    )
