"""The workflows for GitHub: that they are well-formed, ask for no more than they need, and run commands that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.authoring.readmes.checks import check_command
from common.course import LESSONS, ROOT

yaml = pytest.importorskip("yaml")  # PyYAML comes with what `make test-all` and `make book` need

WORKFLOWS = [*sorted((ROOT / ".github" / "workflows").glob("*.yml")), ROOT / "common" / "instructor" / "grade.yml"]
each_workflow = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)


def read(path: Path) -> dict:
    return yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)  # BaseLoader: `on` and 3.14 stay what they are


def steps(path: Path) -> Iterator[tuple[dict, dict]]:
    """Each step with its job."""
    for job in read(path)["jobs"].values():
        for step in job["steps"]:
            yield job, step


def lines(job: dict, step: dict) -> Iterator[str]:
    """The lines that a step runs, for every value of the job's matrix."""
    text = step.get("run", "")
    for name in set(re.findall(r"\$\{\{ matrix\.(\w+) \}\}", text)):
        values = job["strategy"]["matrix"][name]
        text = "\n".join(text.replace(f"${{{{ matrix.{name} }}}}", value) for value in values)
    yield from text.splitlines()


def test_there_are_workflows():
    assert [path.name for path in WORKFLOWS] == ["book.yml", "ci.yml", "grade.yml"]


@each_workflow
def test_what_a_workflow_may_do_and_how_long(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    for name, job in workflow["jobs"].items():
        assert int(job["timeout-minutes"]) <= 60, name
        assert "permissions" not in job or path.name == "book.yml", "only the site's publication needs more"


@each_workflow
def test_actions_are_github_s_own_and_of_one_major_version(path):
    uses = [step["uses"] for _, step in steps(path) if "uses" in step]
    assert uses and all(re.fullmatch(r"actions/[a-z-]+@v\d+", each) for each in uses)


@each_workflow
def test_every_command_exists(path):
    commands = [line.split(" 2>&1")[0] for job, step in steps(path) for line in lines(job, step) if "make" in line]
    assert commands
    assert {line: check_command(line) for line in commands if check_command(line)} == {}


def test_every_python_and_system_is_tested_and_everything_once():
    jobs = read(ROOT / ".github" / "workflows" / "ci.yml")["jobs"]
    oldest, below = re.search(
        r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (ROOT / "pyproject.toml").read_text()
    ).groups()
    assert jobs["test"]["strategy"]["matrix"]["python"] == [f"3.{minor}" for minor in range(int(oldest), int(below))]
    assert {name.split("-")[0] for name in jobs["test"]["strategy"]["matrix"]["system"]} == {"ubuntu", "macos"}
    wanted = re.findall(r"^make .*$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert [step["run"] for step in jobs["all"]["steps"] if step.get("run", "").startswith("make")] == wanted


def test_students_have_every_lesson_graded():
    job = read(ROOT / "common" / "instructor" / "grade.yml")["jobs"]["lesson"]
    assert job["strategy"]["matrix"]["lesson"] == [str(lesson.number) for lesson in LESSONS]
