"""Carries a student's module from the skeleton that it was begun on into a newer one. Texts in, a text out.

A module is seen as pieces: each statement of the module or of a class, with the comments above it. What becomes of a
piece is decided by three versions of it, the old skeleton's, the student's and the new skeleton's. An exercise is known
by its id, so that its function may have another name by now; any other piece is known by its name.

- An answer goes into the new skeleton, under the arguments, the docstring and the TODO that stand there.
- What the student added, helpers, imports, constants, methods, follows what it followed before.
- Given code is the new skeleton's; where that is still the old one's, it is what the student made of it.

Whatever does not fit is named in `Carried.remarks`.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import takewhile

from common.course import unfinished
from common.course.exercises import walk_functions
from common.grading.isolate import names_bound

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
IMPORT = (ast.Import, ast.ImportFrom)


class Misfit(Exception):
    """The module cannot be carried. The text says why, and is to follow the file's name."""


@dataclass
class Carried:
    """A module in its new form."""

    text: str = ""
    answers: list[str] = field(default_factory=list)  # the ids of the finished ones that were put in
    new: list[str] = field(default_factory=list)  # the ids of the exercises that the old version did not have
    reworded: list[str] = field(default_factory=list)  # the ids of those answers under which the text has changed
    remarks: list[str] = field(default_factory=list)


def carry(old: str, mine: str, new: str) -> Carried:
    """The student's module, which was begun on the skeleton `old`, in the skeleton `new`. Raises Misfit."""
    was, now = Version(old), Version(new)
    renamed = renamed_classes(was, now)
    try:
        compile(mine, "a student's file", "exec")  # finds more than ast.parse does
        theirs = Version(mine, was.functions, renamed)
    except SyntaxError as error:
        raise Misfit(f":{error.lineno}: Python cannot read this line: {error.msg}.") from None
    except ValueError as error:
        raise Misfit(f": Python cannot read it: {error}.") from None
    return Carrier(Version(old, was.functions, renamed), theirs, now).carry()


# ---------------------------------------------------------------------------------------------------------------
# A module in pieces
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A statement, with a string behind it that describes it, or several statements that share a line."""

    key: str  # an exercise's id, or the names that it gives a meaning to
    nodes: list[ast.stmt]
    above: str  # comments and blank lines
    text: str  # whole lines; of a class that has members, those above the members
    members: list[Piece]
    is_last: bool = True  # of those with the same name: it is the one that counts

    @property
    def body(self) -> str:
        return self.text + "".join(member.above + member.body for member in self.members)

    @property
    def names(self) -> set[str]:
        return set().union(*map(names_bound, self.nodes))

    @property
    def is_import(self) -> bool:
        return all(isinstance(node, IMPORT) for node in self.nodes)


class Version:
    """One version of a module."""

    def __init__(self, source: str, functions: dict[str, str] | None = None, renamed: dict[str, str] | None = None):
        """functions: the qualified name of each exercise's function, by id; left out, it is what the TODOs say.
        renamed: by which name a class is to be known, where that is not its own.
        """
        tree = ast.parse(source)
        if functions is None:
            functions = {id: name for name, node in walk_functions(tree) for id in to_do(node)}
        self.functions = functions
        self.ids = {name: id for id, name in functions.items()}
        self.renamed = renamed or {}
        self.lines = [line + "\n" for line in source.rstrip("\n").split("\n")]
        self.pieces, end = self.split(tree.body, 0, "")
        self.tail = "".join(self.lines[end:])
        self.exercises = {piece.key: piece for _, piece in walk(self.pieces) if piece.key in functions}

    def split(self, body: list[ast.stmt], begin: int, scope: str) -> tuple[list[Piece], int]:
        """The pieces of a module or class whose first line is `begin`, and where the last ends. Lines count from 0."""
        pieces: list[Piece] = []
        for nodes in groups(body):
            start, end, members = first_line(nodes[0]), nodes[-1].end_lineno, []
            inner = first_line(nodes[0].body[0]) if isinstance(nodes[0], ast.ClassDef) else start
            text = self.lines[start : inner if inner > start else end]
            if inner > start:
                members, end = self.split(nodes[0].body, inner, f"{scope}{nodes[0].name}.")
            key = " ".join(self.key(node, scope) for node in nodes if not is_text(node)) or "docstring"
            pieces.append(Piece(key, nodes, "".join(self.lines[begin:start]), "".join(text), members))
            begin = end
        later = [[other.key for other in pieces[i + 1 :]].count(piece.key) for i, piece in enumerate(pieces)]
        return [replace(p, key=f"{p.key}, {n} later", is_last=False) if n else p for p, n in zip(pieces, later)], begin

    def key(self, node: ast.stmt, scope: str) -> str:
        if isinstance(node, FUNCTION):
            return self.ids.get(scope + node.name, node.name)
        if isinstance(node, ast.ClassDef):
            return self.renamed.get(node.name, node.name)
        if isinstance(node, ast.ImportFrom):
            return f"from {'.' * node.level}{node.module or ''}"
        return ", ".join(sorted(names_bound(node))) or ast.unparse(node)


def groups(body: list[ast.stmt]) -> list[list[ast.stmt]]:
    """Statements that cannot be parted: on one line, or a string with what it describes."""
    found: list[list[ast.stmt]] = []
    for node in body:
        if found and (is_text(node) or first_line(node) < found[-1][-1].end_lineno):
            found[-1].append(node)
        else:
            found.append([node])
    return found


def first_line(node: ast.stmt) -> int:
    """Of a statement with its decorators; lines count from 0."""
    return min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]) - 1


def is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def walk(pieces: list[Piece], scope: str = "") -> Iterator[tuple[str, Piece]]:
    """Every piece by its path: `softmax`, `Attention`, `Attention.scale`."""
    for piece in pieces:
        yield scope + piece.key, piece
        yield from walk(piece.members, f"{scope}{piece.key}.")


def renamed_classes(was: Version, now: Version) -> dict[str, str]:
    """The new names of the old version's classes whose exercises are in another class by now."""
    scopes = {
        id: (name.rpartition(".")[0], now.functions.get(id, "").rpartition(".")[0])
        for id, name in was.functions.items()
    }
    return {old: new for old, new in scopes.values() if old and new}


# ---------------------------------------------------------------------------------------------------------------
# Three versions become one
# ---------------------------------------------------------------------------------------------------------------


class Carrier:
    def __init__(self, was: Version, mine: Version, now: Version):
        self.was, self.mine, self.now = was, mine, now
        self.carried = Carried()
        before = dict(walk(was.pieces))
        own = [piece for path, piece in walk(mine.pieces) if path not in before or piece.text != before[path].text]
        self.used = set().union(*map(names_used, own))
        """What the student's own code makes use of: if the course has dropped that, it is kept."""

    def carry(self) -> Carried:
        text = self.merge(self.was.pieces, self.mine.pieces, self.now.pieces)
        self.carried.text = text + comments(self.was.tail, self.mine.tail, self.now.tail)
        for id, old in self.was.exercises.items():
            mine = self.mine.exercises.get(id)
            if id not in self.now.exercises and mine and mine.text != old.text:
                self.remark(f"{id} {self.was.functions[id]} is gone from this lesson. Your answer is in the backup.")
        self.check()
        return self.carried

    def remark(self, sentence: str) -> None:
        self.carried.remarks.append(sentence)

    def check(self) -> None:
        """Each exercise that is done in the student's file is done in the new one, and no other."""
        done = {id for id, piece in self.mine.exercises.items() if id not in to_do(piece.nodes[0])}
        try:
            compile(self.carried.text, "the new file", "exec")
            found = Version(self.carried.text, self.now.functions).exercises
        except SyntaxError:
            found = {}
        is_done = {id: id not in to_do(piece.nodes[0]) for id, piece in found.items()}
        if is_done != {id: id in done for id in self.now.functions}:
            raise Misfit(": your code and the new version do not go together by themselves.")

    def merge(self, old: list[Piece], mine: list[Piece], new: list[Piece], scope: str = "") -> str:
        """A module's pieces, or a class's."""
        olds, mines, news = ({piece.key: piece for piece in pieces} for pieces in (old, mine, new))
        given = set().union(*(piece.names for piece in old))
        taken = set().union(*(piece.names for piece in new))
        names = (scope, given, taken)
        texts = {key: self.choose(olds.get(key), mines.get(key), piece, *names) for key, piece in news.items()}
        order, place = list(texts), 0
        for piece in mine:
            if piece.key in news:
                place = order.index(piece.key) + 1
            elif text := self.addition(olds.get(piece.key), piece, *names):
                texts[piece.key] = text
                order.insert(place, piece.key)
                place += 1
        return "".join(texts[key] for key in order)

    def choose(
        self, old: Piece | None, mine: Piece | None, new: Piece, scope: str, given: set[str], taken: set[str]
    ) -> str:
        """What becomes of a piece of the new skeleton."""
        if new.key in self.now.functions:
            return self.exercise(new)
        above = new.above if old is None or mine is None else comments(old.above, mine.above, new.above)
        if new.is_import and (old is None or new.text != old.text):
            return above + new.text + (imports(mine, given - self.used, taken) if mine else "")
        if new.members:
            members = [each.members if each else [] for each in (old, mine)]
            head = self.given(scope + new.key, old, mine, new, "text")
            return above + head + self.merge(*members, new.members, f"{scope}{new.key}.")
        return above + self.given(scope + new.key, old, mine, new, "body")

    def given(self, key: str, old: Piece | None, mine: Piece | None, new: Piece, part: str) -> str:
        """Given code, or the part of it that is so called. If both have changed it, it is the course's."""
        theirs, ours = getattr(mine, part, None), getattr(new, part)
        if mine is None or theirs == ours:
            return ours
        if old is not None and getattr(old, part) == ours:
            return theirs
        if old is None:
            self.remark(f"{key}: the course has something of that name now. Yours is in the backup.")
        elif theirs != getattr(old, part):
            self.remark(f"{key}: you have changed it, and so has the course. Yours is in the backup.")
        return ours

    def addition(self, old: Piece | None, mine: Piece, scope: str, given: set[str], taken: set[str]) -> str:
        """What becomes of a piece that the new skeleton has not: as text to put in, empty if nothing does."""
        if mine.key in self.was.functions:
            return ""  # it stands elsewhere by now, or is gone
        if mine.is_import:
            return imports(mine, given - self.used, taken)
        if old is None or mine.names & self.used:
            if not mine.is_last or not mine.names & taken:
                return mine.above + mine.body
            self.remark(f"{scope}{mine.key}: the course has something of that name now. Yours is in the backup.")
        elif mine.body != old.body:
            self.remark(
                f"{scope}{mine.key}: you have changed it, and the course has it no more. Yours is in the backup."
            )
        return ""

    def exercise(self, new: Piece) -> str:
        """An exercise's function: the student's answer under what is given now."""
        id, name = new.key, self.now.functions[new.key]
        old, mine = self.was.exercises.get(id), self.mine.exercises.get(id)
        if old is None:
            self.carried.new.append(id)
            return new.above + new.text
        former = self.was.functions[id]
        if mine is None:
            self.remark(f"{id} {name} is to do: your file has no function {former}.")
            return new.above + new.text
        above = comments(old.above, mine.above, new.above)
        if mine.text in (old.text, new.text):
            return above + new.text
        if id not in to_do(mine.nodes[0]):
            self.carried.answers.append(id)
        if name.rpartition(".")[2] != former.rpartition(".")[2]:
            self.remark(f"{id} is called {name} now, and was {former}: change that where your own code calls it.")
        before, after = declaration(old.nodes[0]), declaration(new.nodes[0])
        if before != after:
            what = f"{id} {name} is declared differently now. What you wrote is in it: see whether it still fits."
            self.remark(f"{what}\n    before: {before}\n    now:    {after}")
        if new.text == old.text:
            return above + mine.text
        if before == after and Head(old).rest != Head(new).rest:
            self.carried.reworded.append(id)
        return above + with_answer(old, mine, new)


def to_do(node: ast.AST) -> list[str]:
    """The ids of the exercises whose `raise NotImplementedError` is in it."""
    raises = [each for each in ast.walk(node) if isinstance(each, ast.Raise)]
    return [id for each in raises for id in unfinished(ast.unparse(each))]


def names_used(piece: Piece) -> set[str]:
    """The names, and the names behind a dot, that a piece mentions; of a class that has members, not theirs."""
    nodes = [*piece.nodes[0].bases, *piece.nodes[0].decorator_list] if piece.members else piece.nodes
    inside = [each for node in nodes for each in ast.walk(node)]
    return {each.id for each in inside if isinstance(each, ast.Name)} | {
        each.attr for each in inside if isinstance(each, ast.Attribute)
    }


def imports(piece: Piece, unwanted: set[str], taken: set[str]) -> str:
    """The import of those names that are neither unwanted nor there already."""
    statements = []
    for node in piece.nodes:
        bound = [(alias, (alias.asname or alias.name).partition(".")[0]) for alias in node.names]
        if wanted := [alias for alias, name in bound if name not in unwanted | taken]:
            statements.append(replace_names(node, wanted))
    if [len(each.names) for each in statements] == [len(node.names) for node in piece.nodes]:
        return piece.above + piece.text
    return "".join(ast.unparse(each) + "\n" for each in statements)


def replace_names(node: ast.Import | ast.ImportFrom, names: list[ast.alias]) -> ast.stmt:
    return ast.ImportFrom(node.module, names, node.level) if isinstance(node, ast.ImportFrom) else ast.Import(names)


def comments(old: str, mine: str, new: str) -> str:
    """What stands above a piece, or below the last: the new version's, and what the student has written there."""
    if new == old:
        return mine
    known = {line.strip() for line in (old + new).splitlines()}
    return new + "".join(line for line in mine.splitlines(keepends=True) if line.strip() not in known)


# ---------------------------------------------------------------------------------------------------------------
# An answer and what is given above it
# ---------------------------------------------------------------------------------------------------------------


class Head:
    """Of a skeleton's exercise, all that stands above its `raise NotImplementedError`."""

    def __init__(self, piece: Piece):
        lines, node = piece.text.splitlines(keepends=True), piece.nodes[0]
        first = first_line(node)
        self.given = list(takewhile(lambda statement: not to_do(statement), node.body))
        stub = node.body[len(self.given)]
        self.indent = stub.col_offset
        self.declaration = "".join(lines[: declaration_length(piece.text)])
        self.rest = "".join(lines[declaration_length(piece.text) : stub.lineno - 1 - first])
        self.todo = {line.strip() for line in lines[self.given[-1].end_lineno - first : stub.lineno - 1 - first]}


def with_answer(old: Piece, mine: Piece, new: Piece) -> str:
    """The new skeleton's function with the student's answer in it."""
    before, after, node = Head(old), Head(new), mine.nodes[0]
    lines, first, length = mine.text.splitlines(keepends=True), first_line(node), declaration_length(mine.text)
    if first_line(node.body[0]) - first < length:  # all on one line
        text = ast.unparse(node) + "\n"
        return with_answer(old, replace(mine, text=text, nodes=ast.parse(text).body), new)
    begin = length
    for statement, given in zip(node.body, before.given if is_text(node.body[0]) else before.given[1:]):
        if ast.dump(statement) != ast.dump(given) and not (is_text(statement) and is_text(given)):
            break
        begin = statement.end_lineno - first
    while begin < len(lines) and lines[begin].strip() in {"", *before.todo}:
        begin += 1
    declaration = "".join(lines[:length]) if before.declaration == after.declaration else after.declaration
    return declaration + after.rest + indented(node, lines, begin, after.indent)


def declaration(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """What stands around a function's name."""
    before = "".join(f"@{ast.unparse(each)} " for each in node.decorator_list)
    before += "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    return f"{before}({ast.unparse(node.args)})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def declaration_length(text: str) -> int:
    """How many lines of a function's text come before its body: up to the colon that stands in no bracket."""
    depth, is_past_def = 0, False
    for token in tokenize.generate_tokens(io.StringIO(text.lstrip()).readline):
        is_past_def |= token.string == "def"
        depth += (token.string in "([{") - (token.string in ")]}") if token.type == tokenize.OP else 0
        if is_past_def and depth == 0 and token.string == ":":
            return token.start[0]
    raise AssertionError(text)


def indented(node: ast.AST, lines: list[str], begin: int, indent: int) -> str:
    """The function's lines from `begin` on, moved so that its body stands at `indent`; text in strings stays."""
    former = node.body[-1].col_offset
    if former == indent:
        return "".join(lines[begin:])
    strings = [each for each in ast.walk(node) if isinstance(each, (ast.Constant, ast.JoinedStr))]
    inside = {number for each in strings for number in range(each.lineno, each.end_lineno)}
    moved = []
    for number, line in enumerate(lines[begin:], first_line(node) + begin):
        code = line[former:] if line[:former].isspace() else line.lstrip(" \t")
        moved.append(line if number in inside or not line.strip() else " " * indent + code)
    return "".join(moved)
