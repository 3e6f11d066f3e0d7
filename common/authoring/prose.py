"""Check how the course is written: words to avoid, sentences that are too long, texts that are too long.

The rules are in `prose.toml`. They apply to Markdown, to the text of notebooks, and to docstrings and comments. Code is
left out: fenced blocks, inline code, links' addresses, mathematics.
"""

from __future__ import annotations

import ast
import fnmatch
import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from markdown_it import MarkdownIt

from common.authoring.readmes.checks import between_cells
from common.course import ROOT

RULES = Path(__file__).with_name("prose.toml")
READER = MarkdownIt().enable("table")
MATHEMATICS = re.compile(r"\$\$.*?\$\$|\$[^$\n]+\$", re.DOTALL)
HTML = re.compile(r"<!--.*?-->|<[^>]+>", re.DOTALL)
ABBREVIATIONS = re.compile(r"\b(e\.g|i\.e|et al|etc|vs|cf|Fig|eq|St|No)\.", re.IGNORECASE)


@dataclass(frozen=True)
class Passage:
    """A paragraph, list item, table cell, docstring paragraph or comment: its text on one line, and where it begins."""

    file: Path
    line: int
    text: str


def passages_of_markdown(file: Path, text: str, first_line: int = 1) -> Iterator[Passage]:
    line = 0
    for token in READER.parse(MATHEMATICS.sub(lambda match: "x" + "\n" * match[0].count("\n"), text)):
        line = token.map[0] if token.map else line
        if token.type == "inline":
            kinds = {"text": "{}", "code_inline": "x", "softbreak": " ", "hardbreak": " "}
            words = "".join(kinds[part.type].format(part.content) for part in token.children if part.type in kinds)
            yield Passage(file, first_line + line, words)
        elif token.type == "html_block":
            yield Passage(file, first_line + line, HTML.sub("", token.content))


def passages_of_python(file: Path) -> Iterator[Passage]:
    source = file.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            text = re.sub(rf"^ {{{node.col_offset}}}", "", node.value.value, flags=re.MULTILINE)
            text = re.sub(r"^ {4,}\S.*$", "", text, flags=re.MULTILINE)  # an indented block is code or a drawing
            yield from passages_of_markdown(file, text, node.lineno)
    block, start, last = [], 0, -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not re.match(r"#( ?-{5,}|!| noqa| type:| fmt:)", token.string):
            alone = not token.line[: token.start[1]].strip()
            if block and not (alone and token.start[0] == last + 1):
                yield from passages_of_markdown(file, " ".join(block), start)
                block = []
            start = start if block else token.start[0]
            block.append(token.string.lstrip("# ").strip())
            last = token.start[0] if alone else -1
    if block:
        yield from passages_of_markdown(file, " ".join(block), start)


def passages(file: Path) -> Iterator[Passage]:
    if file.suffix == ".ipynb":
        return chain.from_iterable(passages_of_markdown(file, text) for _, text in between_cells(file))
    if file.suffix == ".py":
        return passages_of_python(file)
    return passages_of_markdown(file, file.read_text(encoding="utf-8"))


def sentences(text: str) -> list[str]:
    """The sentences of a passage; a colon or a semicolon does not end one."""
    text = ABBREVIATIONS.sub(lambda match: match[0].replace(".", ""), text)
    return [each for each in re.split(r"(?<=[.!?])[)\"']*\s+", text) if each.strip()]


def count_words(text: str) -> int:
    return len(re.findall(r"[A-Za-z0-9][\w'’.,/-]*", text))


def complaints(file: Path, rules: dict) -> list[str]:
    """What is wrong with one file's text: a line for each finding, with its place and what to write instead.

    Of several budgets of words whose pattern fits, the first in the rules counts.
    """
    found, limit = [], rules["max_sentence_words"]
    name = file.relative_to(ROOT).as_posix()
    for passage in passages(file):
        place = f"{name}:{passage.line}"
        for rule in rules["replace"]:
            for match in re.finditer(rule["pattern"], passage.text, re.IGNORECASE):
                found.append(f"{place}: not “{match[0].strip(' .,:;(')}” but {rule['use']}.")
        for sentence in sentences(passage.text):
            if (length := count_words(sentence)) > limit:
                found.append(f"{place}: “{' '.join(sentence.split()[:6])} ...” has {length} words; at most {limit}.")
            if file.suffix == ".py" and re.fullmatch(r"Returns?\W*(\w+\W*)?", sentence):
                found.append(f"{place}: “{sentence}” does not say what is returned.")
    budgets = [most for pattern, most in rules["max_words"].items() if fnmatch.fnmatchcase(name, pattern)]
    if budgets and (words := sum(count_words(each.text) for each in passages(file))) > budgets[0]:
        found.append(f"{name}: {words} words; at most {budgets[0]}.")
    return found


def texts() -> list[Path]:
    """Every file whose text a reader meets, tests left out."""
    patterns = ("*.md", "lesson-*/*.md", "lesson-*/*.ipynb", "solutions/*.py", "common/**/*.md", "common/**/*.py")
    files = {file for pattern in patterns for file in ROOT.glob(pattern)}
    return sorted(file for file in files if not {"tests", "models", "training"} & set(file.parts))


def all_complaints() -> list[str]:
    rules = tomllib.loads(RULES.read_text(encoding="utf-8"))
    return [line for file in texts() for line in complaints(file, rules)]
