"""Calls a command, and describes the options that several commands take.

Every command is a click command. Most options may also be given as one of make's variables: `make run TP=2` is
`python -m common run --tensor-parallel 2`. The options of an engine are made from the fields of `EngineConfig`.
"""

from __future__ import annotations

import difflib
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import click
from click.core import ParameterSource

from common.checkpoints import CheckpointError
from common.commands import Command, target
from common.config import ENGINE_FIELDS, broken_rule
from common.course import CourseError

ENVIRONMENT = ("TORCH", "KERNELS", "COURSE_CACHE", "COURSE_PYTHON", "COURSE_REAL_MODEL", "OMP_NUM_THREADS", "COLUMNS")
"""Environment variables that are allowed with every command, though no option names them."""

# --- Calling a command ------------------------------------------------------------------------------------------------


def call(command: Command, arguments: list[str]) -> int:
    """Run a command and return its exit status. An error that the user can mend is one sentence, and status 2."""
    try:
        function = find(command)
        check_variables(command, function, os.environ.pop("COURSE_VARIABLES", "").split())
        program = f"python -m common {command.name}"
        appearance = {"show_default": True, "max_content_width": 110}
        return function.main(arguments, prog_name=program, standalone_mode=False, **appearance) or 0
    except click.Abort:
        print("\nStopped.", file=sys.stderr)
        return 130
    except click.ClickException as error:
        print(sentence(command, error), file=sys.stderr)
        return 2
    except (CourseError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2


def find(command: Command) -> click.Command:
    """The click command that an entry of the table of commands names."""
    return resolve_name(f"common.{command.function}")


def check_variables(command: Command, function: click.Command, given: list[str]) -> None:
    """Raise CourseError for a variable on make's command line that the command does not take: it may be misspelt."""
    known = [each.envvar for each in function.params if each.envvar]
    for name in given:
        if name not in known and name not in ENVIRONMENT:
            near = difflib.get_close_matches(name, known, n=1)
            takes = f"it takes {', '.join(known)}" if known else "it takes no variable"
            meant = f"did you mean {near[0]}?" if near else f"{takes}."
            raise CourseError(f"make {target(command)} takes no variable {name}; {meant}")


def sentence(command: Command, error: click.ClickException) -> str:
    """What is wrong with a command line, in a sentence that begins with the variable or the option."""
    if isinstance(error, click.MissingParameter):
        needed = error.param.envvar or name_of(error.param, error.ctx)
        return f"{command.name} needs {needed}: {error.param.help}."
    if isinstance(error, click.BadParameter) and error.param:
        return f"{name_of(error.param, error.ctx)}: {error.message}"
    return f"{command.name}: {error.format_message()}"


def name_of(parameter: click.Parameter, context: click.Context | None) -> str:
    """The name under which a parameter was given: its variable, its option, or a positional argument's metavar."""
    if context and context.get_parameter_source(parameter.name) is ParameterSource.ENVIRONMENT:
        return parameter.envvar
    return parameter.opts[0] if isinstance(parameter, click.Option) else parameter.make_metavar(context)


# --- Options ----------------------------------------------------------------------------------------------------------


class Value(click.ParamType):
    """The type of an option whose value must follow a rule.

    kind: makes the value from text. rule: takes the value; returns what it must be, or None if it is that.
    """

    def __init__(self, kind: Callable[[str], Any], rule: Callable[[Any], str | None], name: str):
        self.kind, self.rule, self.name = kind, rule, name

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        try:
            made = self.kind(value)
        except ValueError:
            made = value
        if rule := self.rule(made):
            self.fail(f"it must be {rule}; it is {value!r}.", parameter, context)
        return made


def number(minimum: int = 1, kind: type = int) -> Value:
    """The type of an option that is a number, whole unless kind is float, of at least `minimum`."""

    def rule(value: Any) -> str | None:
        is_right = isinstance(value, kind) and value >= minimum
        return None if is_right else f"a {'' if kind is float else 'whole '}number of at least {minimum}"

    return Value(kind, rule, "number")


def option(flag: str, variable: str | None = None, name: str | None = None, **settings: Any) -> Callable:
    """An option that may also be given as one of make's variables. name: the function's argument, if not the flag's."""
    names = (flag, name) if name else (flag,)
    return click.option(*names, envvar=variable, show_envvar=variable is not None, **settings)


def several(*options: Callable) -> Callable:
    """One decorator for several options, which --help lists in this order."""
    return lambda function: functools.reduce(lambda command, each: each(command), reversed(options), function)


def mine(what: str = "use your modules of these lessons, the reference's of the others") -> Callable:
    return option("--mine", "MINE", default="", show_default=False, metavar="0-2", help=what)


def force(what: str) -> Callable:
    return option("--force", "FORCE", is_flag=True, help=what)


folder = click.Path(path_type=Path, file_okay=False)
"""The type of an option that is a folder, which need not exist."""

lesson_number = click.argument("lesson_number", metavar="N", type=int)
exercise_id = click.argument("exercise_id", metavar="N.M")
threads = option("--threads", "THREADS", type=click.IntRange(1, 1024), help="CPU threads; default: torch's choice")
jobs = option("--jobs", "JOBS", type=number(), default=os.cpu_count() or 1, help="processes")


def engine_option(name: str, flag: str = "", **settings: Any) -> Callable:
    """The option for a field of `EngineConfig`. settings: click's, where they differ from what the field says."""
    field = ENGINE_FIELDS[name]
    flag, rules = flag or "--" + name.replace("_", "-"), field.metadata
    settings = {"default": field.default, "help": rules["help"], **settings}
    variable = rules["envvar"]
    if rules["choices"]:
        return option(flag, variable, name, type=click.Choice(rules["choices"]), **settings)
    if "bool" in field.type:
        return option(f"{flag}/--no-{flag[2:]}", variable, name, **settings)
    if rules["minimum"] is None:
        return option(flag, variable, name, **settings)
    kind = float if isinstance(field.default, float) else int
    if name == "offload":
        settings["help"] = settings["help"].replace("bytes", "MB")
        settings["callback"] = lambda context, parameter, value: value and value * 10**6
    return option(flag, variable, name, type=Value(kind, lambda value: broken_rule(field, value), "number"), **settings)


engine_options = several(*map(engine_option, ENGINE_FIELDS))
"""Every option of an engine. A command gets them as `**options`, which `EngineConfig` accepts."""
