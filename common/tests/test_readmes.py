"""`make check` on READMEs: each promise that can be broken is broken here once, and must be noticed."""

from __future__ import annotations

import pytest

from common import readme_checks
from common.readme_checks import anchors, blocks, check_command, check_commands, check_links


def told(text: str) -> list[str]:
    """The complaints about a text that lies where README.md does."""
    path = readme_checks.ROOT / "README.md"
    return [*check_commands(path, text, set()), *check_links(path, text)]


@pytest.mark.parametrize(
    "line",
    [
        "make",
        "make run",
        "make test-lesson-1",
        "make test-1.4 VERBOSE=1 PDB=1",
        "make hint-1.4 LEVEL=3   # a comment",
        "make run PROMPT='what is \"it\"; rm -rf $HOME' MODEL=tales",
        "COURSE_PYTHON=here make test",
        "python -m common test-lesson 1 --solution",
        "python3 -m common test-1.4",
        ".venv/bin/python -m common bench machine --quick",
        "git status",
        "makefile_reader --wrong",
    ],
)
def test_right_commands(line):
    assert check_command(line) is None


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("make rum", "no target 'rum'"),
        ("make test-lesson-17", "no lesson 17"),
        ("make test-1.99", "no exercise 1.99"),
        ("make hint-1", "number of an exercise"),
        ("make run PROMT=hello", "no variable PROMT"),
        ("make test lint-all", "no target 'lint-all'"),
        ("python -m common bnech", "no target 'bnech'"),
        ("python3 -m common test-lesson", "number of a lesson"),
        ("make run PROMPT='it", "a shell cannot read"),
    ],
)
def test_wrong_commands(line, problem):
    assert problem in check_command(line)


def test_commands_are_found_in_every_kind_of_block():
    assert "README.md:2: " in told("```bash\nmake rum\n```")[0]
    assert len(told("~~~sh\nmake rum\n~~~")) == 1
    assert len(told("```console\n$ make rum\nmake is mentioned by the output, which is not a command\n```")) == 1
    assert len(told("    ```bash\n    make \\\n      rum\n    ```")) == 1
    assert len(told("Type `make rum`, or `make run`, or `make test-N.M`, or `make reset-lesson-N`.")) == 1
    assert told("```python\nmake rum\n```\n") == []
    assert told("````text\n```bash\nmake rum\n```\n````") == []  # a block that shows a block


def test_marked_blocks_are_left_alone_and_need_a_reason():
    assert told("<!-- not run: it takes an hour -->\n\n```bash\nmake rum\n```") == []
    assert len(told("<!-- not run: it takes an hour -->\nBut this one:\n```bash\nmake rum\n```")) == 1
    assert "without a reason" in told("<!-- not run: -->\n```bash\nmake run\n```")[0]
    assert [block.not_run for block in blocks("<!-- not run: a -->\n```sh\n```\n```sh\n```")] == ["a", None]


def test_links():
    assert told("[a](LICENSE) [b](common/) [c](https://example.org/x#y) [d](mailto:a@example.org)") == []
    assert told("[a](#here) [b](README.md)\n# Here") == []
    assert told("`[a](nowhere.md)` and\n```\n[b](nowhere.md)\n```") == []
    for broken in (
        "[a](nowhere.md)",
        "![a](common/nowhere.svg)",
        '<img src="nowhere.svg" alt="x">',
        "[a][b]\n\n[b]: nowhere.md",
        '[a](nowhere.md "title")',
    ):
        assert "leads nowhere" in told(broken)[0], broken
    assert "out of the repository" in told("[a](../)")[0]
    assert "no heading #there" in told("# Here\n[a](#there)")[0]


def test_anchors_are_spelled_as_on_github():
    text = "# The KV cache: why?\n## `rms_norm` & co\n## Twice\n## Twice\n```\n# no heading\n```\n<a id='own'></a>"
    assert anchors(text) == {"the-kv-cache-why", "rms_norm--co", "twice", "twice-1", "own"}


def test_an_exercise_that_nobody_mentions_and_hints_that_are_missing(tmp_path, monkeypatch):
    each = readme_checks.lesson(1)
    ids = [exercise.id for exercise in readme_checks.exercises_of(each)]
    assert "1.1" in ids and "1.14" in ids
    three = "### 1\na\n### 2\nb\n### 3\nc\n"

    class Elsewhere(type(each)):
        folder = tmp_path
        solution = each.solution

    copy = Elsewhere(each.number, each.name, each.title, each.hours)

    def complain(readme: list[str], hints: dict[str, str]) -> list[str]:
        copy.readme.write_text("\n".join(f"### {id} name" for id in readme))
        copy.hints.write_text("\n".join(f"## {id} name\n{text}" for id, text in hints.items()))
        return list(readme_checks.check_lesson(copy))

    hints = dict.fromkeys(ids, three)
    assert complain(ids, hints) == []
    assert (
        "nothing is said of exercise 1.1." in complain([id for id in ids if id != "1.1"], hints)[0]
    )  # 1.14 is not 1.1
    assert "1.2 has 2 hints" in complain(ids, {**hints, "1.2": "### 1\na\n### 2\nb\n"})[0]
    assert "1.2 has 2 hints" in complain(ids, {**hints, "1.2": "### 1\na\n### 2\n\n### 3\nc\n"})[0]
    assert "1.99, which is no exercise" in complain(ids, {**hints, "1.99": three})[0]
    del hints["1.3"]
    assert "1.3 has 0 hints" in complain(ids, hints)[0]
