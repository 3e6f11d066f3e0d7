"""`make book`: what is done to the texts, and the site that comes out, looked at page by page."""

from __future__ import annotations

import json
import re
from copy import copy
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from common.authoring.readmes.checks import blocks
from common.course import LESSONS, MODULES, ROOT, modules_of
from common.course.exercises import read_hints

pytest.importorskip("sphinx", reason="the extra `book` is not installed; `make book` installs it")

from bs4 import BeautifulSoup
from sphinx.errors import ExtensionError
from sphinx.search.en import SearchEnglish

from common.authoring.book import command
from common.authoring.book import extension as book
from common.tests.typed import typed

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:myst_parser", "ignore::PendingDeprecationWarning")
HINTS = "# Title\n\n## 1.1 f\n\n### 1\n\nAsk.\n\n### 2\n\nKnow.\n\n## 1.2 g\n\n### 1\n\nOnly `this`.\n"


# --- The texts --------------------------------------------------------------------------------------------------------


def test_each_hint_is_folded_into_the_one_before_it():
    folded = book.fold_hints(HINTS)
    assert folded.startswith("---\nnosearch: true\n---\n# Title\n")
    assert re.sub(r"\s+", " ", folded.partition("# Title")[2]).strip() == (
        '## 1.1 f <details class="hint"><summary>Hint 1</summary> Ask. '
        '<details class="hint"><summary>Hint 2</summary> Know. </details> </details> '
        '## 1.2 g <details class="hint"><summary>Hint 1</summary> Only `this`. </details>'
    )


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_no_hint_of_a_lesson_is_in_plain_sight(lesson):
    depth, seen = 0, {1: [], 2: [], 3: []}
    for line in book.fold_hints(lesson.hints.read_text(encoding="utf-8")).splitlines():
        depth += line.count("<details") - line.count("</details>")
        if depth and line.strip() and not line.startswith("<"):
            seen[depth].append(line)
    assert depth == 0
    for level, lines in seen.items():
        expected = [
            line for hints in read_hints(lesson).values() for line in hints[level - 1].splitlines() if line.strip()
        ]
        assert lines == expected


def test_a_link_to_a_file_that_is_no_page_leads_to_the_file():
    text = "[the skeleton](kv_cache.py), [the reference](../solutions/kv_cache.py), [lesson 4](../lesson-4/README.md)"
    assert book.point_to_files(text, "lesson-3-kv-cache") == text.replace("(kv_cache.py)", "(path:kv_cache.py)")


def test_a_module_is_split_at_its_headings():
    first, second = (f"# --- {title} " + "-" * 100 + "\n" for title in ("First", "Second"))
    text = f'"""What it is."""\n\nimport os\n\n{first}\n\ndef f():\n    return 1\n\n\n{second}\nx = 1\n'
    assert book.split_source(text) == [
        ("", '"""What it is."""\n\nimport os\n'),
        ("First", "def f():\n    return 1\n"),
        ("Second", "x = 1\n"),
    ]


def test_a_formula_has_the_text_s_colour_and_its_own_source_as_words():
    svg = BeautifulSoup(book.draw(r"\frac{1}{2} < x", inline=False), "html.parser").svg
    assert svg["aria-label"] == r"\frac{1}{2} < x" and svg["width"].endswith("em")
    assert {path["fill"] for path in svg.find_all(fill=True)} == {"currentColor"}


@pytest.mark.parametrize("tex", [r"\frac{1", r"x + \nosuchcommand"])
def test_a_formula_that_cannot_be_read_is_named(tex):
    with pytest.raises(ExtensionError, match=re.escape(tex)):
        book.draw(tex, inline=True)


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.txt").write_text("years")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(command, "build", lambda site: pytest.fail("it would have been overwritten"))
    assert typed("book") == 2
    assert "name a new folder" in capsys.readouterr().err


# --- The site ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The whole book, built once."""
    folder = tmp_path_factory.mktemp("book") / "site"
    assert command.build(folder) == 0
    return folder


@cache
def soup(page: Path) -> BeautifulSoup:
    return BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")


@cache
def ids(page: Path) -> set[str]:
    return {element["id"] for element in soup(page).find_all(id=True)}


def article(site: Path, source: Path) -> BeautifulSoup:
    """What the page of a file in the repository says, without what stands around it."""
    return soup(site / source.relative_to(ROOT).with_suffix(".html")).article


def texts() -> list[Path]:
    return [ROOT / name for name in book.pages() if name.endswith("README.md")]


@pytest.mark.slow
def test_every_file_has_its_page_and_the_first_is_found(site):
    for name in book.pages():
        assert article(site, ROOT / name).h1, name
    assert (site / "index.html").read_bytes() == (site / "README.html").read_bytes()
    linked = {link.get("href", "") for link in soup(site / "index.html").find(class_="sidebar-tree").find_all("a")}
    assert {f"{each.folder.name}/README.html" for each in LESSONS} <= linked
    assert {
        f"{each.folder.name}/{page}" for each in LESSONS for page in (f"{each.notebook.stem}.html", "hints.html")
    } <= linked
    assert {f"solutions/{each.slug}.html" for each in MODULES} <= linked


@pytest.mark.slow
def test_every_link_and_anchor_leads_somewhere(site):
    broken = []
    for page in site.rglob("*.html"):
        for element in soup(page).find_all(lambda element: element.has_attr("href") or element.has_attr("src")):
            target = urlsplit(element.get("href") or element.get("src"))
            if target.scheme or target.netloc:
                continue
            file = (page.parent / unquote(target.path)).resolve() if target.path else page
            anchor = unquote(target.fragment)
            if not file.is_file() or (anchor and file.suffix == ".html" and anchor not in ids(file)):
                broken.append((page.relative_to(site).as_posix(), target.geturl()))
    assert not broken


@pytest.mark.slow
def test_nothing_is_loaded_from_the_network(site):
    for page in site.rglob("*.html"):
        for element in soup(page).find_all(
            ["script", "link", "img", "iframe", "source", "object", "use", "video", "form"]
        ):
            for attribute in ("src", "href", "srcset", "data", "action"):
                assert not re.match(r"\s*(\w+:)?//", element.get(attribute, "")), element
    for file in [*site.rglob("*.css"), *site.rglob("*.svg")]:
        assert not re.search(r"@import|url\(\s*[\"']?(https?:)?//", file.read_text(encoding="utf-8")), file
    for file in site.rglob("*.js"):
        loads = r"(?:import|importScripts|fetch)\s*\(?\s*[\"'`](?:https?:)?//|https?://[^\s\"'`]+\.m?js\b|cdn|unpkg"
        assert not re.search(loads, file.read_text(encoding="utf-8")), file


@pytest.mark.slow
def test_the_search_knows_every_lesson_and_no_hint(site):
    index = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)", (site / "searchindex.js").read_text())[1])
    pages = index["docnames"]
    found: dict[str, set[str]] = {}
    for term, numbers in [*index["terms"].items(), *index["titleterms"].items()]:
        for number in [numbers] if isinstance(numbers, int) else numbers:
            found.setdefault(pages[number], set()).add(term)
    stem = SearchEnglish({}).stem
    for lesson in LESSONS:
        text = lesson.readme.read_text(encoding="utf-8")
        in_lesson: set[str] = set()
        for module in modules_of(lesson.number):
            names = re.findall(r"^(?:def|class) (\w+)", module.solution.read_text(encoding="utf-8"), re.MULTILINE)
            words = {stem(name.lower()) for name in names if f"`{name}`" in text}
            assert words <= found[f"solutions/{module.slug}"]
            in_lesson |= words
        assert in_lesson
        assert in_lesson <= found[f"{lesson.folder.name}/README"]
        assert in_lesson & found[f"{lesson.folder.name}/{lesson.notebook.stem}"]
    assert not any(page.endswith("hints") for page in found)


@pytest.mark.slow
@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.name)
def test_a_notebook_is_shown_as_it_was_saved(site, lesson):
    page = article(site, lesson.notebook)
    cells = nbformat.read(lesson.notebook, as_version=4).cells
    sources = [cell.source.strip() for cell in cells if cell.cell_type == "code" and cell.source.strip()]
    assert [element.get_text().strip() for element in page.select(".cell_input pre")] == sources
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    plots = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(page.select(".cell_output img")) == len(plots) > 0
    shown = "".join(element.get_text() for element in page.select(".cell_output"))
    for output in outputs:
        if output.output_type == "stream":
            assert output.text.strip() in shown


@pytest.mark.slow
@pytest.mark.parametrize("source", texts(), ids=lambda path: path.parent.name)
def test_a_readme_is_rendered_as_github_does(site, source):
    page, text = article(site, source), source.read_text(encoding="utf-8")
    fenced = {"mermaid": [], "code": []}
    for block in blocks(text):
        fenced["mermaid" if block.language == "mermaid" else "code"].append(" ".join(block.lines).split())
    assert [element.get_text().split() for element in page.select("pre.mermaid")] == fenced["mermaid"]
    shown = [element.get_text().split() for element in page.select(".highlight pre")]
    assert [words for words in fenced["code"] if words not in shown] == []
    scripts = soup(site / source.relative_to(ROOT).with_suffix(".html")).find_all("script", src=True)
    assert bool(fenced["mermaid"]) == any("mermaid.tiny.js" in script["src"] for script in scripts)
    assert len(page.select("div.math")) == text.count("$$") // 2
    assert len(page.select("details > summary")) == text.count("<details")
    assert len(page.find_all("table")) == len(re.findall(r"^\|?[ :|-]*-{3}[ :|-]*$", text, re.MULTILINE))
    words = copy(page)
    for code in words.find_all(["code", "pre"]):
        code.extract()
    assert not re.search(r"not run:|<!--|</?details|\]\(|\*\*|```|\$\$|^#+ ", words.get_text(), re.MULTILINE)


@pytest.mark.slow
def test_a_page_of_source_has_every_line(site):
    for module in MODULES:
        page, source = article(site, module.solution), module.solution.read_text(encoding="utf-8")
        lines = [line for line in source.splitlines() if line.strip() and not line.startswith("# ---")]
        shown = "".join(pre.get_text() for pre in page.find_all("pre")).splitlines()
        assert lines == [line for line in shown if line.strip()]


@pytest.mark.slow
def test_a_link_that_leads_nowhere_stops_the_build(tmp_path, capfd, monkeypatch):
    """The rest of the course need not be built for that: one page is enough."""
    (tmp_path / "README.md").write_text("# A\n\n[b](#b) [c](c.md) [d](#d)\n\n## b\n")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    monkeypatch.setattr(book, "ROOT", tmp_path)
    monkeypatch.setattr(book, "LESSONS", ())
    monkeypatch.setattr(book, "MODULES", ())
    assert command.build(tmp_path / "work" / "site") == 1
    complaints = capfd.readouterr().err
    assert "README.md:3" in complaints and "'c.md'" in complaints and "'d'" in complaints and "'b'" not in complaints
