"""The check of the texts finds what it should, and only that."""

import json
import subprocess
import sys
import tomllib

import pytest

from common.authoring import prose
from common.course import ROOT

RULES = tomllib.loads(prose.RULES.read_text(encoding="utf-8"))


def complaints(monkeypatch, tmp_path, text: str, name: str = "text.md") -> list[str]:
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    file = tmp_path / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return prose.complaints(file, RULES)


@pytest.mark.parametrize(
    "text",
    [
        "The proposer makes five guesses.",
        "Nobody waits for an empty plan.",
        "Rank 0 decides who computes what; who waits is told.",
        "The token behind the newest one is dropped.",
        " ".join(["word"] * 36) + ".",
        "- a list\n- of things that fall to\n  the first rank: what falls to it",
        "| cell | the books balance |",
    ],
)
def test_what_prose_md_forbids_is_found_with_its_line(monkeypatch, tmp_path, text):
    found = complaints(monkeypatch, tmp_path, "# Title\n\n" + text + "\n")
    assert found and all(line.startswith("text.md:") for line in found)


@pytest.mark.parametrize(
    "text",
    [
        "Students who fill in the stubs run `guess()` and see the result.",
        "```python\nguess = nobody\n```",
        "See [the table](guess.md) and $guess + 1$.",
        "<!-- nobody reads this -->",
        " ".join(["word"] * 35) + ".",
        "One sentence, e.g. this one, ends here. " + " ".join(["word"] * 30) + ".",
    ],
)
def test_code_and_ordinary_sentences_pass(monkeypatch, tmp_path, text):
    assert complaints(monkeypatch, tmp_path, text) == []


def test_docstrings_and_comments_are_read_and_strings_are_not(monkeypatch, tmp_path):
    source = 'def f():\n    """Nobody is told.\n\n    Returns.\n    """\n    # so many tokens\n    return "nobody"\n'
    found = complaints(monkeypatch, tmp_path, source, "module.py")
    assert [line.split(":")[1] for line in found] == ["2", "4", "6"]


def test_the_text_of_a_notebook_is_read(monkeypatch, tmp_path):
    cells = [{"cell_type": "markdown", "source": ["somebody"]}, {"cell_type": "code", "source": ["# somebody"]}]
    assert len(complaints(monkeypatch, tmp_path, json.dumps({"cells": cells}), "n.ipynb")) == 1


def test_a_readme_has_a_budget(monkeypatch, tmp_path):
    text = "\n\n".join(["word word word."] * 1001)
    assert len(complaints(monkeypatch, tmp_path, text, "lesson-3-kv-cache/README.md")) == 1
    assert complaints(monkeypatch, tmp_path, text, "lesson-0-intro/README.md") == []


def test_spelling_is_checked_in_a_notebook_s_cells_but_not_in_their_outputs(tmp_path):
    pytest.importorskip("codespell_lib", reason="codespell is not installed (python -m common setup dev)")

    def found(cell: str, output: str) -> bool:
        outputs = [{"name": "stdout", "output_type": "stream", "text": [output]}]
        cells = [{"cell_type": "code", "metadata": {}, "outputs": outputs, "source": [cell]}]
        (tmp_path / "n.ipynb").write_text(json.dumps({"cells": cells}, indent=1), encoding="utf-8")
        command = [sys.executable, "-m", "codespell_lib", "--toml", ROOT / "pyproject.toml", tmp_path]
        return bool(subprocess.run(command, stdout=subprocess.DEVNULL).returncode)

    wrong = "teh"  # codespell:ignore
    assert found(wrong, "the") and not found("the", wrong)
