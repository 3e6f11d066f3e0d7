"""The result of an exercise; and stored results, so that nothing is graded twice in the same state."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from common.course import ROOT, Lesson, shown, substitutes
from common.course.exercises import TOGETHER

GRADES = ROOT / ".course" / "grades"


@dataclass
class Result:
    """The result of one exercise. line: of its TODO or, without one, of its function."""

    id: str
    name: str
    status: str = "to do"  # "passed", "wrong", "to do", or "waiting" for other exercises
    points: int = 0
    sentence: str = ""
    mistake: str | None = None
    traceback: str = ""
    line: int = 0
    certain: bool = True  # False if the machine's speed may be the reason: such a result is not stored
    through: list[str] = field(default_factory=list)  # the exercises that ran in its checks and may be the cause
    notes: list[str] = field(default_factory=list)  # what an instructor should look at

    def __str__(self) -> str:
        return self.name if self.id == TOGETHER else f"{self.id} {self.name}"


def look_first(result: Result, results: dict[str, Result]) -> list[str]:
    """The ids of the exercises to mend before this wrong one: those that ran in its checks and are wrong themselves.

    Of these, one that may in turn be wrong because of another is left out. An exercise in whose checks this one ran is
    left out, too: the two would point to each other.
    """
    ran = [results[id] for id in result.through if id in results]
    wrong = [each.id for each in ran if each.status == "wrong" and result.id not in each.through]
    return [id for id in wrong if not set(wrong).intersection(results[id].through)] or wrong


def next_step(results: list[Result]) -> Result | None:
    """The exercise to do next: the first that has not passed, preferably one that needs no other; None if all have."""
    left = [each for each in results if each.status != "passed"]
    by_id = {each.id: each for each in results}
    ready = [each for each in left if each.status != "waiting" and not look_first(each, by_id)]
    return next(iter([*ready, *left]), None)


def fingerprint(lesson: Lesson, file: Path) -> str:
    """A hash of all that a grade depends on: the module, what it may import, its checks, the grader, the versions."""
    files = [file, lesson.checks, lesson.answers, *sorted((ROOT / "common").rglob("*.py"))]
    files += sorted((ROOT / "solutions").glob("*.py")) + sorted(substitutes().values())
    digest = hashlib.sha256(f"{platform.python_version()} {version('torch')}".encode())
    for each in files:
        content = each.read_bytes() if each.exists() else b""
        digest.update(f"{shown(each)} {len(content)} ".encode() + content)
    return digest.hexdigest()


def keep(lesson: Lesson, file: Path, results: list[Result]) -> None:
    """Store the results under the fingerprint, unless one of them is not certain."""
    if all(result.certain for result in results):
        GRADES.mkdir(parents=True, exist_ok=True)
        text = json.dumps([asdict(result) for result in results])
        (GRADES / f"{lesson.slug}-{fingerprint(lesson, file)}.json").write_text(text)


def kept(lesson: Lesson, file: Path) -> list[Result] | None:
    """The stored results for the present fingerprint, or None."""
    path = GRADES / f"{lesson.slug}-{fingerprint(lesson, file)}.json"
    return [Result(**each) for each in json.loads(path.read_text())] if path.exists() else None
