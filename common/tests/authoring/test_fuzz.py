"""`make fuzz`: it sees errors, hangs, crashes and memory, and a sample of its variants is clear."""

from __future__ import annotations

import os
import random
import time

import pytest
from click.testing import CliRunner

from common.authoring.fuzz import changes, files
from common.authoring.fuzz.command import CRASHES, HANGS, Report, fuzz, fuzz_command
from common.authoring.fuzz.variants import LOADED, REFUSED, UNCLEAR, outcome, try_variant, use
from common.checkpoints import CheckpointError


@pytest.mark.parametrize("kind", files.KINDS)
def test_what_is_not_changed_loads(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("KERNELS", "plain")
    folder = tmp_path / "made"
    folder.mkdir()
    use(files.make(kind, folder))


@pytest.mark.slow
def test_a_sample_is_clear():
    """`make fuzz SECONDS=600` tries thousands."""
    report = fuzz(seed=1, seconds=600, most=60, longest=60)
    assert report.failures == []
    assert report.total == 60 and report.counts[LOADED] > 5 and report.counts[REFUSED] > 20
    assert report.megabytes < 2048


def test_a_variant_follows_from_its_number(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path))
    monkeypatch.setenv("KERNELS", "plain")
    assert try_variant(6, 7) == try_variant(6, 7)
    assert len({try_variant(6, number)["change"] for number in range(8)}) > 6


def planted(seed: int, number: int) -> dict:
    """Runs in the other process."""
    ways = {1: lambda: time.sleep(3600), 2: lambda: os._exit(7), 3: lambda: 1 / 0, 4: lambda: bytearray(3 << 30)}
    return outcome(ways.get(number, lambda: None), "/nowhere")


@pytest.mark.slow
def test_it_sees_hangs_crashes_errors_and_memory():
    for longest in (1, 10, 60):  # on a busy machine even what does nothing may take a second
        report = fuzz(0, 600, 6, target="common.tests.authoring.test_fuzz:planted", longest=longest)
        if report.counts[HANGS] < 2:
            break
    told = {failure["number"]: (failure["outcome"], failure["says"]) for failure in report.failures}
    assert told[1] == (HANGS, f"took more than {longest} s")
    assert told[2] == (CRASHES, "exit status 7")
    assert told[3][0] == UNCLEAR and told[3][1].startswith("ZeroDivisionError at test_fuzz.py")
    assert told[4][0] == UNCLEAR and told[4][1].startswith("MemoryError")
    assert report.counts[LOADED] == report.total - 4 == 2
    assert f"1 x hangs: took more than {longest} s" in report.lines()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (CheckpointError("/place/config.json: eps is 5"), REFUSED),
        (CheckpointError("config.json: eps is 5"), REFUSED),
        (CheckpointError("something is wrong"), UNCLEAR),
        (ValueError("/place/config.json: eps is 5"), UNCLEAR),
        (TypeError("unhashable"), UNCLEAR),
        (BaseException("as Rust panics"), UNCLEAR),
    ],
)
def test_what_is_clear(error, expected):
    def fails():
        raise error

    assert outcome(fails, "/place")["outcome"] == expected


def test_every_kind_of_change_happens(tmp_path):
    done = []
    for number in range(120):
        kind = files.KINDS[number % len(files.KINDS)]
        folder = tmp_path / str(number)
        folder.mkdir()
        files.make(kind, folder)
        done.append(changes.change(kind, folder, random.Random(number)))
    for words in (
        "removed",
        "renamed",
        "cut",
        "bytes",
        "at byte",
        "replaced by",
        "config.json",
        "tokenizer.model",
        "merges",
    ):
        assert any(words in each for each in done), words


def test_the_command_tells_how_to_do_it_again(monkeypatch):
    report = Report()
    report.add({"outcome": LOADED, "number": 0, "seconds": 0.5, "megabytes": 100})
    monkeypatch.setattr("common.authoring.fuzz.command.fuzz", lambda *arguments: report)
    result = CliRunner().invoke(fuzz_command, ["--seed", "3"], standalone_mode=False)
    assert result.return_value == 0 and "fuzz --seed 3 --variants 1" in result.output
    report.add({"outcome": UNCLEAR, "says": "KeyError at x.py:1", "number": 9, "kind": "gguf", "change": "bytes"})
    result = CliRunner().invoke(fuzz_command, ["--seed", "3"], standalone_mode=False)
    assert result.return_value == 1 and "fuzz --seed 3 --only 9" in result.output
    assert "9: gguf: bytes" in result.output
