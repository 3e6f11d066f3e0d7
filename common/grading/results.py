"""What became of each exercise; and the results that are kept, so that nothing is graded twice in the same state."""

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
    """What became of one exercise. `line` is where its TODO stands, or its function."""

    id: str
    name: str
    status: str = "to do"  # "passed", "wrong", "to do", "waiting" (for others: the together check for all of them)
    points: int = 0
    sentence: str = ""
    mistake: str | None = None
    traceback: str = ""
    line: int = 0
    certain: bool = True  # False where the machine's speed decided: such a result is not kept
    through: list[str] = field(default_factory=list)  # the exercises that a wrong one may be wrong because of
    notes: list[str] = field(default_factory=list)  # what an instructor should look at

    def __str__(self) -> str:
        return self.name if self.id == TOGETHER else f"{self.id} {self.name}"


def look_first(result: Result, results: dict[str, Result]) -> list[str]:
    """Of the exercises that ran in a wrong one's checks those that are wrong themselves, and not in turn because of
    another of them. One in whose checks it ran itself does not count: each would point to the other.
    """
    ran = [results[id] for id in result.through if id in results]
    wrong = [each.id for each in ran if each.status == "wrong" and result.id not in each.through]
    return [id for id in wrong if not set(wrong).intersection(results[id].through)] or wrong


def next_step(results: list[Result]) -> Result | None:
    """What to do next: the first that has not passed, but rather one that waits for no other; None if all have."""
    left = [each for each in results if each.status != "passed"]
    by_id = {each.id: each for each in results}
    ready = [each for each in left if each.status != "waiting" and not look_first(each, by_id)]
    return next(iter([*ready, *left]), None)


def fingerprint(lesson: Lesson, file: Path) -> str:
    """Everything that a grade depends on: the module, what it may import, its checks, the grader, the versions."""
    files = [file, lesson.checks, lesson.answers, *sorted((ROOT / "common").rglob("*.py"))]
    files += sorted((ROOT / "solutions").glob("*.py")) + sorted(substitutes().values())
    digest = hashlib.sha256(f"{platform.python_version()} {version('torch')}".encode())
    for each in files:
        content = each.read_bytes() if each.exists() else b""
        digest.update(f"{shown(each)} {len(content)} ".encode() + content)
    return digest.hexdigest()


def keep(lesson: Lesson, file: Path, results: list[Result]) -> None:
    """Remember the results for exactly this state of things, unless the machine's speed had a part in them."""
    if all(result.certain for result in results):
        GRADES.mkdir(parents=True, exist_ok=True)
        text = json.dumps([asdict(result) for result in results])
        (GRADES / f"{lesson.slug}-{fingerprint(lesson, file)}.json").write_text(text)


def kept(lesson: Lesson, file: Path) -> list[Result] | None:
    path = GRADES / f"{lesson.slug}-{fingerprint(lesson, file)}.json"
    return [Result(**each) for each in json.loads(path.read_text())] if path.exists() else None
