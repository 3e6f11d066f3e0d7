"""How the code is built: which room stands on which, how long a module may be, how much of a lesson is the student's.

The floors of common/ are import-linter's, in pyproject.toml; what that cannot say is here. An import within a function
counts like any other.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from common.course import LESSONS, ROOT, modules_of

grimp = pytest.importorskip("grimp", reason="import-linter is not installed (python -m common setup dev)")

# Meant are 500, 9,000, 700, 4,200, 2,700 and 15. What stands here holds today, and may only be tightened.
LIMITS = {
    "lines of a module of common/": 500,
    "lines of common/": 22_577,
    "lines of a module of solutions/": 700,
    "lines of solutions/": 5_734,
    "lines of code of solutions/": 3_193,
    "percent of a lesson's code that students write": 15,
}


def is_test(module: str) -> bool:
    return "tests" in module.split(".")


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """Of each module, the modules of ours that it imports."""
    graph = grimp.build_graph("common", "solutions", cache_dir=None)
    return {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}


@pytest.fixture(scope="module")
def contract() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"][0]


def test_no_arrow_leads_upwards(monkeypatch, capsys):
    from importlinter.cli import lint_imports

    monkeypatch.chdir(ROOT)
    assert lint_imports(config_filename="pyproject.toml", no_cache=True) == 0, capsys.readouterr().out


def test_every_room_has_a_floor(imports, contract):
    rooms = {".".join(module.split(".")[:2]) for module in imports if module.startswith("common.")}
    placed = {room.strip() for floor in contract["layers"] for room in re.split(r"[|:]", floor)}
    assert rooms - placed == {"common.tests"} and placed - rooms == {"solutions"}


def test_no_circle(imports):
    """graphlib names the circle, if there is one."""
    graph = {module: found - {module} for module, found in imports.items() if not is_test(module)}
    TopologicalSorter(graph).prepare()


def test_nothing_but_a_test_imports_a_test(imports):
    found = {(module, each) for module in imports if not is_test(module) for each in imports[module] if is_test(each)}
    assert not found


# --- sizes ------------------------------------------------------------------------------------------------------------


def lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def code_lines(source: str) -> set[int]:
    """The numbers of the lines that hold code: no blank one, no comment, no docstring."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.string.strip() and token.type != tokenize.COMMENT:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.difference_update(range(node.lineno, node.end_lineno + 1))
    return found


def student_lines(source: str) -> set[int]:
    """Of these, the answers: what follows the comment that opens an exercise, to the end of its function."""
    text, found = source.splitlines(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            opening = [i for i in range(node.lineno, node.end_lineno + 1) if re.match(r"\s*# Exercise \d", text[i - 1])]
            found |= {i for start in opening for i in range(start + 1, node.end_lineno + 1)}
    return found & code_lines(source)


def names_used_early(source: str) -> list[str]:
    """Names of the module that stand in it above their definition, in whatever function."""
    body = ast.parse(source).body
    defined: dict[str, int] = {}
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [node]
        for target in targets:
            if name := getattr(target, "name", None) or getattr(target, "id", None):
                defined.setdefault(name, node.lineno)
    names = ((each, node.end_lineno) for node in body for each in ast.walk(node) if isinstance(each, ast.Name))
    used = {(name.id, line) for name, line in names if isinstance(name.ctx, ast.Load)}
    return sorted({name for name, line in used if defined.get(name, 0) > line})


def test_how_code_is_measured():
    source = '"""Doc."""\n\nA = [1,\n     2]  # two\n\n\ndef f():\n    """What it does."""\n    # Exercise 1.1: do.\n'
    source += "    return g() + B\n\n\ndef g():\n    return A\n\n\nB = 3\n"
    assert code_lines(source) == {3, 4, 7, 10, 13, 14, 17}
    assert student_lines(source) == {10}
    assert names_used_early(source) == ["B", "g"]


def test_no_module_is_too_long():
    modules = [file for file in (ROOT / "common").rglob("*.py") if not {"tests", "training"}.intersection(file.parts)]
    long = {
        file.relative_to(ROOT).as_posix() for file in modules if lines(file) > LIMITS["lines of a module of common/"]
    }
    assert not long
    assert sum(map(lines, modules)) <= LIMITS["lines of common/"]


def test_the_solutions_stay_small():
    sources = {file: file.read_text(encoding="utf-8") for file in (ROOT / "solutions").glob("*.py")}
    assert max(map(lines, sources)) <= LIMITS["lines of a module of solutions/"]
    assert sum(map(lines, sources)) <= LIMITS["lines of solutions/"]
    assert sum(len(code_lines(source)) for source in sources.values()) <= LIMITS["lines of code of solutions/"]


@pytest.mark.parametrize("lesson", LESSONS[3:], ids=lambda lesson: lesson.name)
def test_a_lesson_is_the_student_s(lesson):
    sources = [each.solution.read_text(encoding="utf-8") for each in modules_of(lesson.number)]
    own, all_of_it = (sum(len(count(source)) for source in sources) for count in (student_lines, code_lines))
    assert 100 * own >= LIMITS["percent of a lesson's code that students write"] * all_of_it


def test_names_are_defined_before_they_are_used():
    early = {
        file.stem: names_used_early(file.read_text(encoding="utf-8")) for file in (ROOT / "solutions").glob("*.py")
    }
    assert {slug: names for slug, names in early.items() if names} == {}
