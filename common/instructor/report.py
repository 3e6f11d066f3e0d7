"""Writes the reports of a grading: pages, tables for a spreadsheet, and Gradescope's results.json.

A student's text (names, messages, tracebacks) is untrusted: the templates escape it, and no cell of a table is a
formula.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from common.course import Lesson
from common.course.exercises import TOGETHER, exercises_of
from common.grading.results import Result
from common.instructor.submissions import Submission

TEMPLATES = Path(__file__).parent / "templates"
MOST_NOTES = 20
"""The largest number of a submission's notes that is shown."""


def earned(result: Result) -> int:
    return result.points if result.status == "passed" else 0


@dataclass
class Graded:
    """The result of one module of one submission."""

    student: str
    lesson: Lesson
    results: list[Result]
    problem: str = ""  # why it could not be graded at all
    review: list[str] = field(default_factory=list)  # what an instructor should look at

    @property
    def points(self) -> int:
        return sum(map(earned, self.results))


def write(
    out: Path, lessons: list[Lesson], submissions: list[Submission], known: dict[tuple[str, str], Graded]
) -> None:
    """Write all reports into `out`. known: the results so far, by student and module."""
    out.mkdir(parents=True, exist_ok=True)
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    rows = [row(submission, lessons, known) for submission in submissions]
    for each in rows:
        folder = out / "students" / each["student"]
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "index.html", pages.get_template("student.html").render(**each))
        write_text(folder / "results.json", json.dumps(gradescope(each["graded"]), indent=1))
        for slug, content in each["modules"].items():
            (folder / f"{slug}.py").write_bytes(content)
    overview = pages.get_template("class.html").render(rows=rows, columns=columns(lessons, known), lessons=lessons)
    write_text(out / "index.html", overview)
    grades = [
        {"student": each["student"], "points": each["points"], "of": each["worth"]}
        | {lesson.slug: getattr(each["by_slug"].get(lesson.slug), "points", "") for lesson in lessons}
        | {"not graded yet": each["left"] or "", "look at": "; ".join(each["review"])}
        for each in rows
    ]
    exercises = [
        {
            "student": each["student"],
            "exercise": result.id,
            "name": result.name,
            "result": graded.problem or result.status,
            "points": earned(result),
            "of": result.points,
            "diagnosis": result.sentence,
            "known mistake": result.mistake or "",
        }
        for each in rows
        for graded in each["graded"]
        for result in graded.results
        if result.id != TOGETHER
    ]
    write_table(out / "grades.csv", grades)
    write_table(out / "exercises.csv", exercises)


def row(submission: Submission, lessons: list[Lesson], known: dict[tuple[str, str], Graded]) -> dict:
    """The values of the templates for one student."""
    found = (known.get((submission.student, lesson.slug)) for lesson in lessons)
    graded = [each for each in found if each]
    review = [f"{each.lesson.slug} {note}" for each in graded for note in each.review] + submission.notes
    more = [f"and {len(review) - MOST_NOTES} more"] if len(review) > MOST_NOTES else []
    return {
        "student": submission.student,
        "modules": submission.modules,
        "graded": graded,
        "by_slug": {each.lesson.slug: each for each in graded},
        "by_id": {result.id: result for each in graded for result in each.results},
        "points": sum(each.points for each in graded),
        "worth": sum(result.points for each in graded for result in each.results),
        "left": sum(each.slug in submission.modules or not each.is_optional for each in lessons) - len(graded),
        "review": review[:MOST_NOTES] + more,
    }


def columns(lessons: list[Lesson], known: dict[tuple[str, str], Graded]) -> list[tuple[str, str, int]]:
    """The columns of the class's table: (the exercise's id, its name, how many passed)."""
    slugs = {slug for _, slug in known}
    passed = Counter(each.id for graded in known.values() for each in graded.results if each.status == "passed")
    exercises = [each for lesson in lessons if lesson.slug in slugs for each in exercises_of(lesson)]
    return [(each.id, each.function, passed[each.id]) for each in exercises]


def gradescope(graded: list[Graded]) -> dict:
    """Gradescope's results.json: https://gradescope-autograders.readthedocs.io/en/latest/specs/"""
    tests = []
    for each in graded:
        for result in each.results:
            text = each.problem or ". ".join(
                filter(None, [result.sentence, result.mistake and f"Known as: {result.mistake}"])
            )
            tests.append(
                {
                    "number": result.id,
                    "name": f"{result.id} {result.name}",
                    "score": earned(result),
                    "max_score": result.points,
                    "status": "passed" if result.status == "passed" else "failed",
                    "output": text or result.status,
                    "output_format": "text",
                }
            )
    return {
        "score": sum(test["score"] for test in tests),
        "output_format": "text",
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "tests": [test for test in tests if test["max_score"]],
    }


def write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_table(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows({name: cell(value) for name, value in each.items()} for each in rows)


def cell(value: object) -> object:
    """Quote a text that a spreadsheet would take for a formula, because of its first character."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
