"""The frame: the environment that installs itself, the tests of the tests. Nothing here touches the network."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import matplotlib
import nbformat
import pytest

from common import setup
from common.authoring import checks, clean, notebooks
from common.authoring.remaining import longest_first
from common.bench import plots, results
from common.course import ROOT, Lesson
from common.machine import interleaved_medians
from common.tests.typed import typed

# --- The environment --------------------------------------------------------------------------------------------------


class Machine:
    """A repository in a temporary folder, whose installers only note that they were called."""

    def __init__(self, root: Path, monkeypatch):
        self.root, self.calls, self.entered = root, [], []
        (root / "pyproject.toml").write_text('[project]\ndependencies = ["torch==2.13.0"]\n\n[tool.pytest]\n')
        monkeypatch.setattr(setup, "ROOT", root)
        monkeypatch.setattr(setup, "run", self.run)
        monkeypatch.setattr(setup, "beside", self.beside)
        monkeypatch.setattr(setup, "enter", self.entered.append)
        monkeypatch.setattr(setup, "version_of", lambda python: setup.this_version() if python.exists() else "")
        for variable in ("TORCH", "COURSE_PYTHON", "COURSE_ENTERED"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(setup, "has_gpu", lambda: True)
        self.fail_at: set[str] = set()

    def run(self, command, failure):
        words = {"venv": "venv", "uv": "uv", "--no-index": "disk"}
        step = next((step for word, step in words.items() if word in command), "pip")
        self.calls.append((step, command))
        if step in self.fail_at:
            raise setup.SetupError(failure)
        if step == "venv":
            shutil.rmtree(setup.venv(), ignore_errors=True)
            setup.venv_python().parent.mkdir(parents=True)
            setup.venv_python().touch()

    @contextlib.contextmanager
    def beside(self, command):
        before = len(self.calls)
        yield
        assert len(self.calls) > before and "install" in command

    def ensure(self, extra: str = "") -> list[str]:
        """What had to be done."""
        self.calls.clear()
        setup.ensure(extra, ["run"])
        return [step for step, _ in self.calls]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    return Machine(tmp_path, monkeypatch)


def test_the_second_time_nothing_is_installed(machine):
    assert machine.ensure() == ["venv", "pip"]
    assert machine.ensure() == []
    assert machine.entered == [["run"], ["run"]]  # and both times .venv's Python goes on


def test_an_extra_is_added_once_and_kept(machine):
    machine.ensure()
    assert machine.ensure("dev") == ["pip"]
    assert machine.ensure("dev") == machine.ensure() == []
    (machine.root / "pyproject.toml").write_text('[project]\ndependencies = ["torch==2.14.0"]\n')
    assert machine.ensure() == ["pip"]
    assert machine.calls[0][1][-1].endswith("[dev]")  # what was there is brought up to date with the rest


@pytest.mark.parametrize("stamp", ["", "{", "[]", "null", "{}", '{"extras": 3}', '{"extras": ["dev"]}', "\0\xff"])
def test_a_broken_stamp_means_install_again(machine, stamp):
    machine.ensure()
    setup.stamp_file().write_text(stamp, encoding="latin-1")
    assert machine.ensure() == ["pip"]
    assert machine.ensure() == []


def test_an_interrupted_installation_leaves_no_stamp(machine):
    machine.fail_at = {"pip"}
    with pytest.raises(setup.SetupError, match="pip could not install"):
        machine.ensure()
    assert not setup.stamp_file().exists() and not machine.entered
    machine.fail_at = set()
    assert machine.ensure() == ["pip"]  # the environment itself was made
    machine.fail_at = {"pip"}
    with pytest.raises(setup.SetupError):
        machine.ensure("dev")
    assert not setup.stamp_file().exists()  # what is half changed is not up to date


def test_requirements_change_with_the_packages_and_the_place_and_not_with_the_linter(machine, monkeypatch):
    before, file = setup.requirements(), machine.root / "pyproject.toml"
    file.write_text(file.read_text() + "addopts = []\n")
    assert setup.requirements() == before
    file.write_text(file.read_text().replace("2.13.0", "2.14.0"))
    assert setup.requirements() != before
    copy = machine.root / "copy"
    copy.mkdir()
    shutil.copy(file, copy)
    before = setup.requirements()
    monkeypatch.setattr(setup, "ROOT", copy)  # a copied folder's environment still points to the original
    assert setup.requirements() != before


@pytest.mark.parametrize(
    ("gpu", "disk", "index", "steps"),
    [
        (True, True, True, ["venv", "pip"]),
        (False, True, True, ["venv", "disk", "pip"]),
        (False, False, True, ["venv", "disk", "pip", "uv", "pip"]),
        (False, False, False, ["venv", "disk", "pip", "uv", "pip"]),
    ],
)
def test_without_a_gpu_torch_comes_without_cuda(gpu, disk, index, steps, machine, monkeypatch, capsys):
    """From this disk where pip finds it there, else from where uv knows it, else what the package index has."""
    monkeypatch.setattr(setup, "has_gpu", lambda: gpu)
    machine.fail_at = {*(["disk"] if not disk else []), *(["uv"] if not index else [])}
    assert machine.ensure() == steps
    commands = dict(machine.calls)
    if "disk" in steps:
        assert {"--no-index", "--no-deps", "torch==2.13.0"} <= set(commands["disk"])
    if "uv" in steps:
        assert {"--torch-backend=cpu", "--no-deps", "torch==2.13.0"} <= set(commands["uv"])
    out = capsys.readouterr().out
    assert ("cannot be reached" in out) == (not index) and "Try again" not in out
    assert machine.ensure() == []
    assert setup.read_stamp()["torch"] == ("cuda" if gpu else "cpu")


def test_TORCH_decides_otherwise(machine, monkeypatch):
    assert machine.ensure() == ["venv", "pip"]
    monkeypatch.setenv("TORCH", "cpu")
    assert machine.ensure() == ["venv", "disk", "pip"]  # CUDA's packages go with the old environment
    assert machine.ensure() == []
    monkeypatch.delenv("TORCH")
    assert machine.ensure("dev") == ["disk", "pip"]  # as it was asked for before
    monkeypatch.setenv("TORCH", "cuda")
    assert machine.ensure() == ["venv", "pip"]
    monkeypatch.setenv("TORCH", "gpu")
    with pytest.raises(setup.SetupError, match="TORCH is 'gpu'; it must be cpu or cuda"):
        machine.ensure()
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setenv("TORCH", "cpu")
    assert machine.ensure() == []  # elsewhere there is only one build


def test_a_gpu_is_found_by_its_driver(monkeypatch):
    monkeypatch.setattr(setup.Path, "exists", lambda path: False)
    for said, found in ((b"GPU 0: NVIDIA H100 (UUID: ...)", True), (b"No devices found", False)):
        monkeypatch.setattr(subprocess, "run", lambda *_, said=said, **__: subprocess.CompletedProcess([], 0, said))
        assert setup.has_gpu() is found
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: open("/there is no nvidia-smi"))
    assert setup.has_gpu() is False
    monkeypatch.setattr(setup.Path, "exists", lambda path: str(path) == "/proc/driver/nvidia/version")
    assert setup.has_gpu() is True


def test_an_environment_of_one_s_own(machine, monkeypatch):
    monkeypatch.setenv("COURSE_PYTHON", "here")
    assert machine.ensure("dev") == [] and machine.entered == []
    assert not setup.venv().exists()


def test_errors_say_what_to_do(machine, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "ensurepip.py").write_text("raise ImportError")
    with pytest.raises(setup.SetupError, match=r"ensurepip.*apt install python3-venv"):
        setup.check_modules(sys.executable)
    for version in ((3, 10, 1), (3, 15, 0), (4, 0, 0)):
        monkeypatch.setattr(sys, "version_info", version)
        monkeypatch.setattr(shutil, "which", lambda name: None)
        with pytest.raises(setup.SetupError, match=r"This is Python \d\.\d+; the course needs 3.11 to 3.14.*PYTHON="):
            setup.suitable_python()
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable if name == "python3.12" else None)
    assert setup.suitable_python() == sys.executable


def test_a_failed_installer_is_quoted_and_explained(monkeypatch):
    offline = "print('step one'); print('Failed to establish a new connection: name resolution'); exit(1)"
    with pytest.raises(setup.SetupError) as caught:
        setup.run([sys.executable, "-c", offline], "pip could not install the packages")
    text = str(caught.value)
    assert text.startswith("pip could not install the packages:") and "name resolution" in text
    assert "Are you offline?" in text
    with pytest.raises(setup.SetupError) as caught:
        setup.run([sys.executable, "-c", "print('a wheel is broken'); exit(3)"], "pip failed")
    assert "offline" not in str(caught.value) and "a wheel is broken" in str(caught.value)
    told = "print('ERROR: the cause'); print('note: This is not a problem with pip.'); exit(1)"
    with pytest.raises(setup.SetupError) as caught:
        setup.run([sys.executable, "-c", told], "pip failed")
    assert "ERROR: the cause" in str(caught.value) and "note:" not in str(caught.value)
    crash = "print('ERROR: Exception:\\nTraceback (most recent call last):\\nValueError: the cause'); exit(2)"
    with pytest.raises(setup.SetupError, match="ValueError: the cause"):
        setup.run([sys.executable, "-c", crash], "pip failed")
    many = "for n in range(100): print('line', n)\nexit(1)"
    with pytest.raises(setup.SetupError) as caught:
        setup.run([sys.executable, "-c", many], "pip failed")
    assert "line 99" in str(caught.value) and "line 90\n" not in str(caught.value)


def test_what_is_installed_beside_torch_is_waited_for_and_ended_with_it(tmp_path):
    names = {re.match(r"[\w-]+", each)[0] for each in setup.lighter_packages()}
    assert {"numpy", "click", "pytest-xdist"} <= names and not names & {"torch", "transformers", "fastapi"}
    with setup.beside([sys.executable, "-c", f"open({str(tmp_path / 'done')!r}, 'w')"]):
        pass
    assert (tmp_path / "done").exists()
    with pytest.raises(KeyboardInterrupt), setup.beside([sys.executable, "-c", "import time; time.sleep(3600)"]):
        raise KeyboardInterrupt


def test_an_environment_that_does_not_start_is_not_tried_for_ever(monkeypatch):
    monkeypatch.setenv("COURSE_ENTERED", "1")
    with pytest.raises(setup.SetupError, match="Remove that folder"):
        setup.enter(["run"])


def test_what_decides_outputs_is_pinned():
    text = (ROOT / "pyproject.toml").read_text()
    for package in "torch numpy matplotlib ipykernel nbval transformers tokenizers sentencepiece".split():
        assert len(re.findall(rf'"{package}==[\d.]+"', text)) == 1, package
    assert "python_version" not in text  # one version of a package for every Python


# --- The tests of the tests: what `make test-all` leaves out ----------------------------------------------------------


@pytest.mark.slow
def test_what_has_passed_is_not_repeated_unless_something_changed(tmp_path):
    """In a small repository of its own: one fast test, one slow, one that skips itself."""
    for name in ("__init__.py", "course", "authoring/__init__.py", "authoring/remaining.py"):
        source, copy = ROOT / "common" / name, tmp_path / "common" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)
    tests = tmp_path / "test_it.py"
    tests.write_text(
        "import os, pytest\n\ndef test_fast(): assert not os.environ.get('BROKEN')\n\n@pytest.mark.slow\n"
        "def test_slow(): pass\n\ndef test_real():\n    if not os.environ.get('REAL'): pytest.skip('no model')\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\npythonpath = .\n")

    plain = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # nbval and its like take seconds to import

    def run(*arguments: str, **environment: str) -> str:
        command = [sys.executable, "-m", "pytest", "-p", "common.authoring.remaining", "-p", "no:cacheprovider", "-v"]
        result = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env={**plain, **environment}, capture_output=True, text=True
        )
        return " ".join(sorted(re.findall(r"::test_(\w+) PASSED", result.stdout)))

    assert run("--record", "-m", "not slow") == "fast"
    for name in (".venv/x.py", ".hypothesis/x"):  # the second is written when its package is first imported
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert run("--remaining", REAL="1") == "real slow"
    tests.write_text(tests.read_text() + "\n")
    assert run("--remaining", REAL="1") == "fast real slow"
    run("--record", "-m", "not slow", BROKEN="1")  # a run that fails takes the record of the one before away
    assert not (tmp_path / ".course" / "tested.json").exists()


def test_each_worker_begins_with_long_tests():
    def item(*seconds):
        return Mock(**{"iter_markers.return_value": [pytest.mark.slow(*seconds), pytest.mark.slow]})

    short, (a, b, c) = [item() for _ in range(6)], (item(20), item(90), item(60))
    found = longest_first([*short[:4], a, short[4], b, c, short[5]], 2)
    assert found == [b, a, *short[:2], c, *short[2:]]
    assert longest_first([*short, a, b, c], 1) == [b, c, a, *short]
    assert longest_first([a, b], 4) == [b, a]


def test_the_course_is_tested_whatever_the_environment_says(monkeypatch):
    seen = {}
    monkeypatch.setattr(checks, "call", lambda *command, **environment: seen.update(environment) or 0)
    monkeypatch.setenv("MINE", "0-2")
    monkeypatch.setenv("COURSE_MODULES", "intro=/nowhere")
    assert typed("test") == 0
    assert seen["MINE"] == seen["COURSE_MODULES"] == seen["SOLUTION"] == ""
    assert typed("test", "surplus") == 2


# --- Notebooks, figures, measurements ---------------------------------------------------------------------------------


def test_a_saved_notebook_does_not_say_who_ran_it_when_or_how_fast():
    cell = nbformat.v4.new_code_cell("print(1)", metadata={"execution": {"iopub.busy": "2026"}, "tags": ["kept"]})
    metadata = {
        "kernelspec": {"name": "mine", "display_name": "x"},
        "language_info": {"name": "python", "version": "3.11.7"},
        "v": 1,
    }
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("x"), cell], metadata=metadata)
    notebooks.normalise(notebook)
    nbformat.validate(notebook)
    text = nbformat.writes(notebook)
    assert "2026" not in text and "3.11" not in text and "mine" not in text and "kept" in text
    again = nbformat.reads(text, as_version=4)
    notebooks.normalise(again)
    assert nbformat.writes(again) == text


def test_cells_that_were_never_run_are_found(tmp_path):
    cells = [nbformat.v4.new_markdown_cell("x"), *(nbformat.v4.new_code_cell(source) for source in ("1", "2", " "))]
    cells[1].execution_count = 1
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "x.ipynb")
    assert notebooks.never_run(tmp_path / "x.ipynb") == [3]


@pytest.mark.slow
def test_a_notebook_runs_in_its_folder_finds_the_course_and_is_not_saved_with_an_error(tmp_path):
    class Elsewhere(Lesson):
        folder = tmp_path

    path = Elsewhere(0, "intro", "", 0).notebook
    source = "import os, time, common.course, solutions\nprint(os.getcwd(), hash('a'), os.environ['OMP_NUM_THREADS'])\n"
    source += "time.sleep(0.5)\nprint('later')"  # another piece of the same stream
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
    notebooks.execute(path)
    saved = nbformat.read(path, as_version=4)
    [text] = [output.text for output in saved.cells[0].outputs]
    assert text.split()[0] == str(tmp_path) and text.split()[2] == "2" and saved.cells[0].execution_count == 1
    saved.cells[0].source = "print('before')\n1 / 0"
    nbformat.write(saved, path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"):
        notebooks.execute(path)
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == [path.name]


MACHINE = {
    "machine": {"cpu": "a CPU", "cores": 2, "threads": 2},
    "versions": {"torch": "2.13.0"},
    "date": "2026-01-01",
    "command": "python -m common bench",
}
ROWS = [{"context": n, "recompute": n * 1e-3, "transformers, cache": 0.05} for n in (16, 64, 256)]
MADE_UP = {
    "machine": {**MACHINE, "read_gb_per_s": 20.0, "gemm_gflop_per_s": 100.0},
    "recompute-smollm2-135m": {**MACHINE, "rows": ROWS},
}


@pytest.mark.slow
def test_figures_are_the_same_bytes_for_the_same_data_and_others_for_other_data(monkeypatch):
    monkeypatch.setattr(results, "read", MADE_UP.__getitem__)
    for path in ("lesson-0-intro/figures/roofline.svg", "lesson-2-llama-pytorch/figures/recompute.svg"):
        first = plots.svg(plots.FIGURES[path])
        with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": "another"}):  # whatever the user has set
            assert plots.svg(plots.FIGURES[path]) == first
        assert b"<dc:date>" not in first and first.startswith(b"<?xml")
    faster = {**MADE_UP, "machine": {**MADE_UP["machine"], "read_gb_per_s": 30.0}}
    monkeypatch.setattr(results, "read", faster.__getitem__)
    changed = plots.svg(plots.FIGURES["lesson-0-intro/figures/roofline.svg"])
    monkeypatch.setattr(results, "read", MADE_UP.__getitem__)
    assert changed != plots.svg(plots.FIGURES["lesson-0-intro/figures/roofline.svg"])


def test_a_figure_without_its_measurement_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(results, "read", lambda name: json.loads((tmp_path / f"{name}.json").read_text()))
    assert typed("figures", "roofline", "--out", str(tmp_path)) == 1
    assert "make bench" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_quick_measurement_is_never_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COURSE_MODULES", "")
    assert typed("bench", "machine", "--quick", "--out", str(tmp_path)) == 0
    assert not list(tmp_path.iterdir()) and "not kept" in capsys.readouterr().out
    results.save(tmp_path, "x", "the command", {"value": 1.5})
    kept = results.read("x", tmp_path)
    assert kept["value"] == 1.5 and kept["command"] == "the command" and kept["machine"]["threads"] >= 1
    assert set(kept) >= {"machine", "versions", "date", "command"}


def test_what_is_compared_is_measured_in_turn():
    calls = []
    ways = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    assert set(interleaved_medians(ways, 2)) == {"a", "b"}
    assert calls == ["a", "b"] * 3  # one round to warm up


def test_clean_keeps_what_is_dear(tmp_path, monkeypatch):
    for name in (
        ".venv/x",
        ".course/x",
        "common/models/x",
        "common/__pycache__/x",
        ".pytest_cache/x",
        "solutions/a.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(clean, "ROOT", tmp_path)
    monkeypatch.setattr(clean, "LESSONS", ())
    assert clean.main([]) == 0
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("x")}
    assert left == {".venv/x", ".course/x", "common/models/x"}
