"""`make check` on READMEs: each promise that can be broken is broken here once, and must be noticed."""

from __future__ import annotations

import dataclasses
import json
import os
import re

import pytest

from common.authoring.readmes import checks as readme_checks
from common.authoring.readmes import commands as readme_commands
from common.authoring.readmes import figures as readme_figures
from common.authoring.readmes.checks import blocks, check_command, check_commands, prose
from common.authoring.readmes.figures import check_figures
from common.course import ROOT, skeleton
from common.course.catalogue import apply, load_answers
from common.course.exercises import exercises_of
from common.tests import zygote


def told(text: str) -> list[str]:
    """The complaints about the commands and links of a text that lies where README.md does."""
    path = readme_checks.ROOT / "README.md"
    return list(check_commands(path, text, set()))


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
    assert len(told("1.  In a list:\n\n    ```bash\n    make \\\n      rum\n    ```")) == 1
    assert len(told("Type `make rum`, or `make run`, or `make test-N.M`, or `make reset-lesson-N`.")) == 1
    assert told("```python\nmake rum\n```\n") == []
    assert told("````text\n```bash\nmake rum\n```\n````") == []  # a block that shows a block


def test_the_lines_of_a_block_fit_a_page():
    assert "README.md:2: this line has 121 characters" in told(f"```bash\n{'x' * 121}\n```")[0]
    assert len(told(f"```\n{'x' * 121}\n```")) == 1
    assert told(f"```bash\n{'x' * 120}\n```") == told(f"```mermaid\n{'x' * 121}\n```") == []


def test_marks_need_a_reason_and_excuse_no_wrong_name():
    assert told("<!-- not run: it takes an hour -->\n\n```bash\nmake run\n```") == []
    assert len(told("<!-- not run: it takes an hour -->\n```bash\nmake rum\n```")) == 1
    assert "without a reason" in told("<!-- not run: -->\n```bash\nmake run\n```")[0]
    assert [block.not_run for block in blocks("<!-- not run: a -->\n```sh\n```\n```sh\n```")] == ["a", None]


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


def test_what_stands_between_a_notebook_s_cells_is_read(tmp_path):
    cells = [
        {"cell_type": "code", "source": ["`make rum`"]},
        {"cell_type": "markdown", "source": ["see\n", "`make rum`"]},
    ]
    (tmp_path / "a.ipynb").write_text(json.dumps({"cells": cells}))
    assert list(readme_checks.between_cells(tmp_path / "a.ipynb")) == [(2, "see\n`make rum`")]


# --- Numbers ----------------------------------------------------------------------------------------------------------

LADDER = {
    "date": "2026-01-01",
    "loads": [
        {
            "name": "one stream",
            "num_requests": 1,
            "ways": {
                "INT8": {"tokens_per_second": 22.528, "bytes": 135439104, "rounds": [25.9, 19.1]},
                "float32": {"tokens_per_second": 16.057, "step": 0.05983, "bytes": 538060032, "right": 0.9138},
            },
        },
        {"name": "eight streams", "num_requests": 8, "ways": {"INT8": {"tokens_per_second": 40.13}}},
    ],
    "step_seconds": {"33": 0.122},
    "draft_step_ms": 0.773,
}


@pytest.fixture
def said(tmp_path, monkeypatch):
    """Gives the complaints about the numbers of a text, beside a measurement and a notebook's outputs."""
    output = {"output_type": "stream", "text": ["rules     3   0    11 of 24\n", "the model 6   4    13 of 24, 2%\n"]}
    (tmp_path / "ladder.json").write_text(json.dumps(LADDER))
    (tmp_path / "own.ipynb").write_text(json.dumps({"cells": [{"cell_type": "code", "outputs": [output]}]}))
    monkeypatch.setattr(readme_figures, "MEASUREMENTS", tmp_path)
    return lambda text: list(check_figures(tmp_path / "README.md", prose(text)))


TABLE = """<!-- measured: ladder; = [INT8/tokens_per_second] / [one stream/float32/tokens_per_second] -->
| tokens/s | 1 | times | MB |
| --- | --- | --- | --- |
| INT8, as of 99 | 22.5 | 1.4 | 135 |
| float32 | 16.1 | | 538 |
"""


@pytest.mark.parametrize(
    "text",
    [
        "SmolLM2 makes 22.5 tokens/s, 23 tokens a second or 22.53 tokens/s, from 135.4 MB.",
        "A step takes 60 ms (59.8 ms, 0.06 s), and 91 % (or 91.4 per cent) of the guesses are right.",
        "with 17 requests; `99.9 ms`, $99.9$ ms, ![99.9 ms](x), [it](#99.9), 2021, smollm2-135m, 2.13.0 s",
        "```\n99.9 ms\n```",
    ],
)
def test_numbers_that_are_measured(said, text):
    assert said(f"<!-- measured: ladder -->\n{text}") == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("22.6 tokens/s", "22.6 tokens/s is not in what"),
        ("one line\nof 61 ms, say", ":3: 61 ms is not"),
        ("60 s", "60 s is not"),
        ("135 MiB", "135 MiB is not"),
        ("25.9 tokens/s", "25.9 tokens/s is not"),  # of one round, and no median
        ("1,122 ms", "1,122 ms is not"),
    ],
)
def test_numbers_that_are_not(said, text, problem):
    assert [problem in complaint for complaint in said(f"<!-- measured: ladder -->\n{text}")] == [True]


def test_a_path_narrows_and_a_formula_adds(said):
    assert said("<!-- measured: ladder/one stream/INT8 -->\n22.5 tokens/s") == []
    assert len(said("<!-- measured: ladder/one stream/INT8 -->\n40.1 tokens/s, and 16.1 tokens/s")) == 2
    assert said("<!-- measured: ladder/num_requests=8; ladder/float32 -->\n40.1 tokens/s and 16.1 tokens/s") == []
    ratio = "= [one stream/INT8/tokens_per_second] / [float32/tokens_per_second]"
    assert said(f"<!-- measured: ladder; {ratio}; {ratio} - 1 -->\n1.4 times as fast, 40 % more") == []
    assert len(said(f"<!-- measured: ladder; {ratio} -->\n2.5 times as fast")) == 1


def test_tables(said):
    assert said(TABLE) == []
    for wrong in (("22.5", "22.6"), ("1.4", "1.5"), ("538", "537")):
        assert len(said(TABLE.replace(*wrong))) == 1
    notebook = "<!-- measured: own.ipynb -->\n| | no | yes | of 24 |\n| --- | --- | --- | --- |\n| it | {} |\n"
    assert said(notebook.format("6 | 4 | 13")) == []
    assert "5 is not" in said(notebook.format("6 | 5 | 13"))[0]
    assert said("<!-- measured: own.ipynb -->\n2 % of it") == []


def test_a_comment_holds_up_to_the_next_one_or_a_heading(said):
    text = "<!-- measured: ladder -->\n60 ms\n\n- 60 ms\n\n```\n# no heading\n```\n99 ms"
    assert [complaint.split(": ")[1] for complaint in said(text)] == ["99 ms is not in what the comment above names."]
    assert len(said("<!-- measured: ladder -->\n60 ms\n## Next\n60 ms")) == 1
    assert said("<!-- not measured: arithmetic -->\n99 ms\n<!-- measured: ladder -->\n60 ms") == []
    assert len(said("<!-- measured: ladder -->\n60 ms\n<!-- not measured: sums -->\n99 ms\n# Next\n99 ms")) == 1


@pytest.mark.parametrize(
    "claim",
    ["99 ms", "9.9 tokens/s", "30 tokens a second", "12 GB/s", "1.5 TFLOP/s", "7 %", "half, or 7 per cent", "2 seconds"]
    + ["3.4 times as fast", "2 times faster", "16 microseconds"],
)
def test_what_looks_measured_must_say_where(said, claim):
    assert len(said(f"It takes {claim}.")) == len(said(f"| a |\n| --- |\n| {claim} |")) == 1
    assert said(f"It takes `{claim}`.") == said(f"<!-- not measured: arithmetic -->\nIt takes {claim}.") == []


def test_what_does_not_look_measured_need_not(said):
    assert said("In lesson 5, 32 requests of 64 tokens have 538 MB of weights, 1,024 rows, 3 times, and 7.2.") == []


@pytest.mark.parametrize(
    ("comment", "problem"),
    [
        ("measured: ladr", "no measurement 'ladr'"),
        ("measured: ladder/two streams", "has no two streams"),
        ("measured: ladder; = [INT9/bytes]", "no entry [INT9/bytes]"),
        ("measured: ladder; = [INT8/rounds]", "no entry"),
        ("measured: ladder; = [INT8/bytes] / ", "no arithmetic"),
        ("measured: ladder; = __import__('os')", "no arithmetic"),
        ("not measured:", "without a reason"),
    ],
)
def test_a_comment_that_leads_nowhere(said, comment, problem):
    assert problem in said(f"# Title\n\n<!-- {comment} -->\n60 ms")[0]


def test_most_changes_of_a_number_in_the_readmes_would_be_noticed():
    """A comment may name so much that any number is somewhere in it. Here each number is changed in its last digit."""
    noticed = []
    for path in readme_commands.texts():
        for line, paragraph, values in readme_figures.sourced(path, prose(path.read_text())):
            for figure in readme_figures.to_check(paragraph, line) if isinstance(values, list) else ():
                digit = str((int(figure.number[-1]) + 1) % 10)
                noticed.append(not dataclasses.replace(figure, number=figure.number[:-1] + digit).is_in(values))
    assert len(noticed) > 200 and sum(noticed) > 0.8 * len(noticed)


# --- Commands that are run --------------------------------------------------------------------------------------------


COMMANDS = """
```bash
make progress   # how far
make run PROMPT='a # b'
```
<!-- not run: why -->
```sh
make test
```
<!-- not run: make watch-lesson-1, which does not end -->
```sh
make watch-lesson-1  # again and again
make help
```
```python
a = 1
print(a)
```
```bash
printf 1
```

<details><summary>What you see, and why</summary>

`1`: one.
</details>

```sh
printf 2
```
<details><summary>What you see</summary>

```
2
3
```
</details>
"""


def test_what_is_to_be_run(tmp_path):
    (tmp_path / "README.md").write_text(COMMANDS)
    found = list(readme_commands.commands_of(tmp_path / "README.md"))
    assert [(command.text, command.prints) for command in found] == [
        ("make progress   # how far", None),
        ("make run PROMPT='a # b'", None),
        ("make help", None),
        ("a = 1\nprint(a)", None),
        ("printf 1", "1"),
        ("printf 2", "2\n3"),
    ]
    assert [command.is_python for command in found] == [False, False, False, True, False, False]


def test_what_is_the_same_is_run_once():
    texts = [
        " ".join(readme_commands.words_of(each)) for found in readme_commands.all_commands().values() for each in found
    ]
    assert len(texts) == len(set(texts)) > 30
    assert texts.count("make test-") == texts.count("make hint-") == texts.count("make test-lesson-") == 1
    assert "make run TP=2 PP=2" in texts and not {"make run TP=2", "make run", "make run PROMPT="} & set(texts)


def test_what_a_command_can_do_wrong(tmp_path, monkeypatch):
    def wrong(text: str, prints: str | None = None) -> str | None:
        return readme_commands.run(readme_commands.Command(tmp_path / "a.md", 7, text, False, prints), tmp_path)

    assert wrong("echo $MODEL $COURSE_PYTHON", "tales here") is None
    assert wrong("cat", "Hello! /quit") is None
    assert "a.md:7: `echo so; exit 3` ended with exit status 3:\nso" in wrong("echo so; exit 3")
    assert "the text shows\n46 places" in wrong("echo 47 places", "46 places")
    for seconds in (1, 10, 60):  # on a busy machine a shell may need more than a second to say so
        monkeypatch.setattr(readme_commands, "SECONDS", seconds)
        said = wrong("echo so; sleep 3600 | sleep 3600")  # with all that it has started
        if said.endswith("so\n"):
            break
    assert f"takes more than {seconds} seconds:\nso" in said


REAL = pytest.mark.skipif(
    os.environ.get("COURSE_REAL_MODEL") != "1", reason="set COURSE_REAL_MODEL=1 for the real model"
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    return readme_commands.finished_copy(tmp_path_factory.mktemp("readmes"), zygote.python())


@pytest.mark.slow
@REAL
@pytest.mark.parametrize("path", readme_commands.texts(), ids=lambda path: path.parent.name)
def test_what_a_readme_says_to_type_works(path, copy):
    complaints = [readme_commands.run(command, copy) for command in readme_commands.all_commands()[path]]
    assert not any(complaints), "\n\n".join(filter(None, complaints))


@pytest.mark.slow
@REAL
def test_lesson_2_shows_what_the_real_model_thinks():
    """Two lists of likely words, each with its probability, and how many tokens three filters keep."""
    import torch

    from solutions import llama_pytorch as lesson

    model, tokenizer = lesson.load("smollm2-135m", torch.float32, "cpu")
    text = readme_checks.lesson(2).readme.read_text(encoding="utf-8")
    block = next(block for block in blocks(text) if "Paris" in "\n".join(block.lines))
    prompts = re.findall(r'"([^"]+)"', block.lines[0])
    place = block.lines[0].index(f'"{prompts[1]}"')
    for prompt, column in zip(prompts, (slice(place), slice(place, None)), strict=True):
        logits = lesson.recompute(model, tokenizer.encode(prompt))
        probabilities = logits.softmax(-1)
        shown = re.findall(r"^ (\w+) +#* ?(\.\d+)", "\n".join(line[column] for line in block.lines[1:]), re.MULTILINE)
        assert len(shown) == 5
        for token, (word, value) in zip(logits.topk(5).indices, shown):
            assert (tokenizer.decode([int(token)]).strip(), f"{probabilities[token]:.{len(value) - 1}f}") == (
                word,
                f"0{value}",
            )
        filters = ((lesson.keep_top_k, 40), (lesson.keep_top_p, 0.9), (lesson.keep_min_p, 0.1))
        kept = [int((keep(logits, most) > -torch.inf).sum()) for keep, most in filters]
        [told] = re.findall(rf'^\| "{prompt}" \|(.*)\|$', text, re.MULTILINE)
        # The processor's roundings decide which token is the last of the 90 %.
        assert all(abs(int(number) - own) <= own // 500 for number, own in zip(told.split("|"), kept, strict=True))
    assert f"tail, {model.config.vocab_size - int(told.split('|')[1]):,} tokens," in " ".join(text.split())


@pytest.mark.slow
def test_the_front_page_quotes_the_grader(copy):
    """What it says to somebody who took the variance for the mean square and has not come further."""
    quoted = next(
        block for block in blocks((ROOT / "README.md").read_text()) if "wrong   1.4" in "\n".join(block.lines)
    )
    lesson = readme_checks.lesson(1)
    exercises = {exercise.id: exercise for exercise in exercises_of(lesson)}
    variance = next(
        answer for answer in load_answers(lesson) if answer.name in " ".join("\n".join(quoted.lines).split())
    )
    answered = apply(variance, lesson.solution.read_text(), exercises["1.4"]).splitlines()
    empty = skeleton.cut_lesson(lesson).splitlines()
    rest = next(number for number, line in enumerate(answered) if line.startswith("    # Exercise 1.5"))
    to_do = next(number for number, line in enumerate(empty) if line.startswith("    # TODO 1.5"))
    module = copy / lesson.module.relative_to(ROOT)
    finished = module.read_text()
    module.write_text("\n".join(answered[:rest] + empty[to_do:]) + "\n")
    command = readme_commands.Command(ROOT / "README.md", quoted.line, "COLUMNS=80 make test-lesson-1 || true", False)
    try:
        complaint = readme_commands.run(dataclasses.replace(command, prints="\n".join(quoted.lines)), copy)
    finally:
        module.write_text(finished)
    assert complaint is None, complaint
