"""A Sphinx extension for `make book`, for the course's own files:

- hints.md: each hint is folded, the second inside the first and the third inside the second
- solutions/*.py: pages with a section for each heading of the file
- mermaid diagrams, drawn by the reader's browser, and formulas, drawn here: both without the network
- the navigation, which the READMEs do not contain, since GitHub shows them too

Notebooks are shown with their saved outputs; nothing is run.
"""

from __future__ import annotations

import gzip
import html
import posixpath
import re
from pathlib import Path
from xml.etree import ElementTree

import ziamath
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.parsers import Parser
from sphinx.util.docutils import SphinxDirective

from common.authoring.book.command import FILES, MERMAID
from common.course import LESSONS, MODULES, ROOT

# --- The texts --------------------------------------------------------------------------------------------------------


def fold_hints(text: str) -> str:
    """Return hints.md with folded hints, so that each is seen only after the one before it. The page is left out of the
    search, which would show them.
    """
    head, *exercises = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    folded = ["---\nnosearch: true\n---\n", head]
    for exercise in exercises:
        title, *hints = re.split(r"^### (\d+)\n", exercise, flags=re.MULTILINE)
        folded.append(title)
        for number, hint in zip(hints[::2], hints[1::2]):
            folded.append(f'<details class="hint"><summary>Hint {number}</summary>\n\n{hint}')
        folded.append("</details>\n" * (len(hints) // 2) + "\n")
    return "".join(folded)


def pages() -> list[str]:
    """The files that become pages, by their paths from the root."""
    files = [ROOT / "README.md", *guides(), *(each.solution for each in MODULES)]
    for each in LESSONS:
        files += [each.readme, *each.second_pages, each.notebook, each.hints]
    return [file.relative_to(ROOT).as_posix() for file in files]


def guides() -> list[Path]:
    """The texts that belong to no lesson."""
    return [ROOT / "AGENTS.md", ROOT / "common" / "README.md", *sorted(ROOT.glob("common/*/*.md"))]


def point_to_files(text: str, folder: str) -> str:
    """Mark links to Python files that are no pages as links to files. Sphinx ignores the suffix, and would take the
    skeleton kv_cache.py for the notebook kv_cache.ipynb beside it.
    """

    def marked(link: re.Match) -> str:
        is_page = posixpath.normpath(posixpath.join(folder, link[1])) in pages()
        return link[0] if is_page else f"](path:{link[1]})"

    return re.sub(r"\]\(([^):\s]+\.py)\)", marked, text)


def toctree(*lines: str) -> str:
    """A hidden table of contents. lines: its options and its pages."""
    return "\n".join(["\n\n```{toctree}", ":hidden:", *lines, "```\n"])


def navigation(docname: str) -> str:
    """The tables of contents that are appended to a page."""
    if docname == "README":
        lessons = [f"{each.folder.name}/README" for each in LESSONS]
        sources = [f"{each.slug}.py <solutions/{each.slug}>" for each in MODULES]
        others = [file.relative_to(ROOT).with_suffix("").as_posix() for file in guides()]
        parts = {"The lessons": lessons, "The reference": sources, "Besides": others}
        return "".join(toctree(f":caption: {caption}", *below) for caption, below in parts.items())
    for each in LESSONS:
        if docname == f"{each.folder.name}/README":
            more = ["Second page <more>"] if each.second_pages else []
            return toctree(*more, f"Notebook <{each.notebook.stem}>", "Hints <hints>")
    return ""


def prepare(app: Sphinx, docname: str, source: list[str]) -> None:
    """Change the text that Sphinx has read from a file."""
    if docname.endswith("/hints"):
        source[0] = fold_hints(source[0])
    if docname.endswith("README"):
        source[0] = point_to_files(source[0], posixpath.dirname(docname))
    source[0] += navigation(docname)


def label(app: Sphinx, doctree: nodes.document) -> None:
    """Add "(notebook)" to a notebook's title, which is its lesson's, and a text to its plots, for readers who
    cannot see them.
    """
    if app.env.doc2path(app.env.docname).suffix == ".ipynb":
        next(doctree.findall(nodes.title)).append(nodes.Text(" (notebook)"))
        for plot in doctree.findall(nodes.image):
            plot["alt"] = "a plot, drawn by the code above"


# --- Source code ------------------------------------------------------------------------------------------------------


def split_source(text: str) -> list[tuple[str, str]]:
    """The parts of a module: the heading of each, from a comment of dashes ("" before the first), and its text."""
    parts = re.split(r"^# --- (.+?) -{10,}\n", text, flags=re.MULTILINE)
    return [(title, body.strip("\n") + "\n") for title, body in zip(["", *parts[1::2]], parts[::2])]


class PythonParser(Parser):
    """A Python file as a page."""

    supported = ("python",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        page = self.section(document.settings.env.docname + ".py", document)
        for title, text in split_source(inputstring):
            part = self.section(title, page) if title else page
            part += nodes.literal_block(text, text, language="python", classes=["source"])

    def section(self, title: str, above: nodes.Element) -> nodes.section:
        """A new section at the end of another, or of the document."""
        section = nodes.section("", nodes.title(title, title), names=[nodes.fully_normalize_name(title)])
        above += section
        section.document.note_implicit_target(section, section)
        return section


# --- Diagrams and mathematics -----------------------------------------------------------------------------------------


class diagram(nodes.General, nodes.Element):
    """A mermaid diagram, as text."""


class Mermaid(SphinxDirective):
    has_content = True

    def run(self) -> list[nodes.Node]:
        return [diagram(text="\n".join(self.content))]


def visit_diagram(translator, node: diagram) -> None:
    translator.body.append(f'<pre class="mermaid">{html.escape(node["text"])}</pre>\n')
    raise nodes.SkipNode


def unpack_mermaid(app: Sphinx) -> None:
    """Write npm's @mermaid-js/tiny 11.17.2, which is in the repository because no Python package contains it."""
    static = Path(app.outdir) / "_static"
    static.mkdir(parents=True, exist_ok=True)
    (static / MERMAID).write_bytes(gzip.decompress((FILES / f"{MERMAID}.gz").read_bytes()))


def load_mermaid(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None) -> None:
    """Load mermaid's 2.5 MB only in pages with diagrams."""
    if doctree and next(doctree.findall(diagram), None):
        app.add_js_file(MERMAID, loading_method="defer")
        app.add_js_file("diagrams.js", loading_method="defer")


def draw(tex: str, inline: bool) -> str:
    """A formula as SVG in the size and colour of the text around it. Raises ExtensionError if it cannot be typeset."""
    size = 16
    try:
        formula = ziamath.Latex(tex, size=size, color="currentColor", inline=inline)
    except Exception as error:  # it has no error of its own for bad TeX
        raise ExtensionError(f"This cannot be typeset: {tex}") from error
    if "\\" in formula.mathmlstr():
        raise ExtensionError(f"This has a command that is not known: {tex}")
    svg = formula.svgxml()
    for side in ("width", "height"):
        svg.set(side, f"{float(svg.get(side)) / size:.3f}em")
    svg.set("style", f"vertical-align: {(formula.getyofst() - formula.margin) / size:.3f}em")
    svg.set("role", "img")
    svg.set("aria-label", tex)
    return ElementTree.tostring(svg, encoding="unicode")


def visit_math(translator, node: nodes.math) -> None:
    translator.body.append(f'<span class="math">{draw(node.astext(), inline=True)}</span>')
    raise nodes.SkipNode


def visit_math_block(translator, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="math">{draw(node.astext(), inline=False)}</div>\n')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Register everything; Sphinx calls this."""
    ziamath.config.svg2 = False  # without ids, which formulas of one page would share
    app.add_source_suffix(".py", "python")
    app.add_source_parser(PythonParser)
    app.add_directive("mermaid", Mermaid)
    app.add_node(diagram, html=(visit_diagram, None))
    app.add_html_math_renderer("svg", (visit_math, None), (visit_math_block, None))
    app.connect("source-read", prepare)
    app.connect("doctree-read", label, priority=400)  # before Sphinx takes note of the titles
    app.connect("builder-inited", unpack_mermaid)
    app.connect("html-page-context", load_mermaid)
