"""The command line: `make`, the table of commands, and what every command's options have in common."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from unittest import mock

import click
import pytest

from common import commands, options
from common.__main__ import main, run
from common.config import EngineConfig
from common.course import ROOT, CourseError
from common.tests import zygote

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


# --- The Makefile and the table of commands ---------------------------------------------------------------------------


@pytest.fixture
def echo(tmp_path):
    """The Makefile beside a `common` that prints, as JSON, what reaches it; returns what `make ...` printed."""
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").touch()
    (tmp_path / "common" / "__main__.py").write_text(
        "import json, os, sys\nprint(json.dumps({'argv': sys.argv[1:], **os.environ}))\n"
    )
    shutil.copy(ROOT / "Makefile", tmp_path)

    def call(*arguments: str, **environment: str) -> dict:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
        command = ["make", "-s", f"PYTHON={sys.executable}", *arguments]
        result = subprocess.run(
            command, cwd=tmp_path, env={**clean, **environment}, capture_output=True, text=True, check=True
        )
        return json.loads(result.stdout)

    return call


HOSTILE = """it's "so" $5 $(shell touch pwned) ${HOME} $$ `touch pwned` ; touch pwned & | > # \\ % * ~ é 🙂"""


@needs_make
def test_any_prompt_survives_make(echo, tmp_path):
    for text in (HOSTILE, "--flag", "a=b", " spaces  inside ", "$"):
        assert echo("run", f"PROMPT={text}")["PROMPT"].strip() == text.strip()
        assert echo("run", PROMPT=text)["PROMPT"] == text  # PROMPT=... make run
    assert not (tmp_path / "pwned").exists()


@needs_make
def test_a_target_reaches_its_command_as_it_was_typed_and_so_do_the_variables_names(echo):
    assert echo("test-1.4")["argv"] == ["test-1.4"]
    assert echo("nonsense")["argv"] == ["nonsense"]  # which knows what was meant
    assert set(echo("run", "TP=2", "QUNAT=int8")["COURSE_VARIABLES"].split()) == {"TP", "QUNAT"}
    assert echo("run", TP="2")["COURSE_VARIABLES"].split() == []


@pytest.mark.skipif(not zygote.IS_SAFE, reason="nothing is forked here")
@pytest.mark.slow
def test_what_the_tests_fork_ends_as_a_python_of_its_own_would():
    """Or a command that fails would pass."""
    endings = {
        "-c pass": 0,
        "-c 'import sys; sys.exit(5)'": 5,
        "-c 1/0": 1,
        "-c 'import os; os.kill(os.getpid(), 9)'": 137,
        "-m common nothing": 2,
        "-m platform nothing": 0,  # which is not forked
    }
    for words, code in endings.items():
        command = ["sh", "-c", f"{shlex.join(zygote.python())} {words}"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == code, (words, result.stderr)
    told = zygote.typed_in(ROOT, "nothing")
    assert told.returncode == 2 and "There is no target 'nothing'" in told.stdout


def test_a_reader_who_leaves_early_is_no_error():
    """A pipe that nobody reads, as in `make help | head -0`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "common", "help"]
    result = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert result.stderr == ""


@needs_make
def test_make_alone_helps_and_a_file_of_a_target_s_name_does_not_hide_it(echo, tmp_path):
    assert echo()["argv"] == ["help"]
    for name in ("test", "run", "test-1.4"):
        (tmp_path / name).touch()
        assert echo(name)["argv"] == [name]


def test_help_names_every_command_once_and_fits_a_screen():
    lines = commands.help_text().splitlines()
    named = [line.split()[0] for line in lines if line.startswith("  ")]
    assert sorted(named) == sorted(commands.TARGETS) and len(named) == len(set(named))
    assert all(len(line) <= 110 for line in lines) and len(lines) <= 50


def test_every_command_has_a_line_of_help_and_an_extra_that_exists():
    """The two are easily exchanged, and only on a new machine would anybody notice."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for command in commands.BY_NAME.values():
        assert " " in command.help, command
        assert command.extra in ("", None, *extras), command


@pytest.mark.parametrize("command", commands.BY_NAME.values(), ids=lambda command: command.name)
def test_every_command_has_its_function_and_says_what_its_options_are_for(command):
    if command.extra is None:
        return
    function = options.find(command)
    assert function.help and isinstance(function, click.Command)
    assert bool(command.argument) == any(isinstance(each, click.Argument) and each.required for each in function.params)
    unexplained = [each.name for each in function.params if isinstance(each, click.Option) and not each.help]
    assert set(unexplained) <= {"temperature", "top_p"}


@pytest.mark.parametrize(
    ("typed", "command", "rest"),
    [
        ([], "help", []),
        (["--help"], "help", []),
        (["test-lesson", "2", "--solution"], "test-lesson", ["2", "--solution"]),
        (["test-lesson-2", "--solution"], "test-lesson", ["2", "--solution"]),
        (["test-1.14"], "test-exercise", ["1.14"]),
        (["hint-1.4"], "hint", ["1.4"]),
        (["diff-1.4"], "diff-exercise", ["1.4"]),
        (["diff-lesson-1", "--force"], "diff-lesson", ["1", "--force"]),
        (["watch-lesson-1"], "watch-lesson", ["1"]),
        (["test-exercise", "--help"], "test-exercise", ["--help"]),
        (["test"], "test", []),
        (["help-run"], "run", ["--help"]),
        (["help-test-1.4"], "test-exercise", ["1.4", "--help"]),
        (["help", "hint"], "hint", ["--help"]),
    ],
)
def test_both_spellings(typed, command, rest):
    parsed, arguments = commands.parse(typed)
    assert (parsed.name, arguments) == (command, rest)


def test_what_an_ai_assistant_is_told_exists():
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    assert re.findall("^mode: .*$", text, re.MULTILINE) == ["mode: tutor"]
    typed = re.findall(r"`(?:PDB=1 )?make ([\w.-]+)", text)
    assert len(typed) > 8 and all(commands.parse([each]) for each in typed)
    assert all((ROOT / file).exists() for file in re.findall(r"\]\(([\w/.]+)\)", text))


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("nonsense", "`make help` lists them"),
        ("rnu", "did you mean run?"),
        ("tset-1.4", "did you mean test-N.M"),
        ("test-lesson", "make test-lesson-2"),
        ("test-lesson-1.2", "make test-lesson-2"),
        ("hint-1", "make hint-1.4"),
        ("test-2", "make test-1.4"),
        ("test-x", "did you mean test"),
        ("reset-lesson-", "did you mean reset-lesson-N"),
    ],
)
def test_a_wrong_target_is_refused_in_a_line(typed, words, capsys):
    assert main([typed]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@click.command()
@options.lesson_number
@options.engine_options
@options.mine()
@options.option("--verbose", "VERBOSE", is_flag=True)
@options.option("--out", "OUT", required=True, help="where it goes")
def sample(lesson_number, **settings):
    SEEN.update(settings, lesson_number=lesson_number)


SEEN = {}
SAMPLE = commands.Command("sample-lesson", "N", "tests.test_commands:sample", "")


@pytest.fixture
def clean(monkeypatch):
    SEEN.clear()
    for variable in ("MODEL", "MINE", "TP", "PP", "QUANT", "GROUP", "KV", "OFFLOAD", "SPEC", "VERBOSE", "OUT"):
        monkeypatch.setenv(variable, "")
    monkeypatch.setenv("OUT", "there")


def test_an_option_and_its_variable_are_the_same(clean, monkeypatch):
    flags = "--tensor-parallel 2 --quantization int4 --group-size 32 --offload 300 --verbose --no-adaptive-speculation"
    assert options.call(SAMPLE, ["2", *flags.split()]) == 0
    typed = dict(SEEN)
    wanted = {"tensor_parallel": 2, "quantization": "int4", "group_size": 32, "offload": 300 * 10**6, "verbose": True}
    assert wanted.items() <= typed.items() and typed["out"] == "there" and typed["lesson_number"] == 2
    for name, value in {"TP": "2", "QUANT": "int4", "GROUP": "32", "OFFLOAD": "300", "VERBOSE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert options.call(SAMPLE, ["2", "--no-adaptive-speculation"]) == 0 and SEEN == typed
    assert options.call(SAMPLE, ["2", "--tensor-parallel", "3"]) == 0
    assert SEEN["tensor_parallel"] == 3  # what is typed goes before what make passes


def test_the_options_of_an_engine_are_its_config_s(clean):
    """Left alone, they make the config that is made without any."""
    assert options.call(SAMPLE, ["2"]) == 0
    assert EngineConfig(**{name: SEEN[name] for name in options.ENGINE_FIELDS}) == EngineConfig()


@pytest.mark.parametrize(
    ("arguments", "variables", "sentence"),
    [
        ("2 --tensor-parallel 0", "", "--tensor-parallel: it must be a whole number of at least 1"),
        ("2", "TP=two", "TP: it must be a whole number of at least 1"),
        ("2 --timeout never", "", "--timeout: it must be a number of at least 0.001"),
        ("2", "QUANT=int3", "QUANT: 'int3' is not one of 'int8', 'w8a8', 'int4', 'w4a8'."),
        ("2", "VERBOSE=perhaps", "VERBOSE: 'perhaps' is not a valid boolean"),
        ("two", "", "N: 'two' is not a valid integer."),
        ("2", "OUT=", "sample-lesson needs OUT: where it goes."),
        ("2 --mien 0-2", "", "sample-lesson: No such option '--mien'."),
        ("2 3", "", "sample-lesson: Got unexpected extra argument (3)"),
        ("2", "COURSE_VARIABLES=QUNAT", "make sample-lesson-N takes no variable QUNAT; did you mean QUANT?"),
        ("2", "COURSE_VARIABLES=LEVEL", "make sample-lesson-N takes no variable LEVEL; it takes MODEL, DTYPE, TP, PP,"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(arguments, variables, sentence, clean, monkeypatch, capsys):
    for each in variables.split():
        monkeypatch.setenv(*each.split("="))
    assert options.call(SAMPLE, arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(sentence) and error.count("\n") == 1 and not SEEN


@pytest.mark.parametrize(("raised", "status"), [(CourseError("mend it"), 2), (KeyboardInterrupt(), 130)])
def test_how_a_command_ends(raised, status, clean, monkeypatch, capsys):
    def fail(**_):
        raise raised

    monkeypatch.setattr(sample, "callback", fail)
    assert options.call(SAMPLE, ["2"]) == status
    assert capsys.readouterr().err.strip() in ("mend it", "Stopped.")
    monkeypatch.setattr(sample, "callback", lambda **_: 1)
    assert options.call(SAMPLE, ["2"]) == 1


def test_the_front_runs_on_an_old_and_bare_python():
    """No package, and no syntax newer than 3.8, so that a Python that is too old can be told so."""
    for name in ("__init__", "__main__", "commands", "setup"):
        ast.parse((ROOT / "common" / f"{name}.py").read_text(), feature_version=(3, 8))
    command = [sys.executable, "-S", "-m", "common", "help"]  # -S: no site-packages
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "test-lesson-N" in result.stdout, result.stderr


def test_threads_that_wait_sleep_soon(monkeypatch):
    """What OpenMP reads once stands in the environment before torch is imported; what the user says there stays."""
    seen = []
    monkeypatch.setattr("common.__main__.run_bare", lambda *given: seen.append(os.environ["GOMP_SPINCOUNT"]))
    bare = commands.Command("x", "", "x:y", "a command", extra=None)
    with mock.patch.dict(os.environ):
        os.environ.pop("GOMP_SPINCOUNT", None)
        run(bare, [])
        os.environ["GOMP_SPINCOUNT"] = "7"
        run(bare, [])
    assert 100 <= int(seen[0]) <= 1000 and seen[1] == "7"  # not between the parts of a layer, and not for a whole step
