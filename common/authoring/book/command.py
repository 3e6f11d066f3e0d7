"""`make book`: builds the whole course as a web site in .course/book with Sphinx; see conf.py and extension.py."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import click

from common.course import ROOT, CourseError, shown
from common.options import folder, option

FILES = Path(__file__).resolve().parent
MERMAID = "mermaid.tiny.js"


def build(site: Path) -> int:
    """Build the book into a folder. Returns Sphinx's exit status; a warning is an error."""
    from sphinx.cmd.build import build_main  # only the extra `book` brings it; the command is listed without it

    options = ["-b", "html", "-W", "--keep-going", "-q", "-c", str(FILES), "-d", str(site.parent / "doctrees")]
    status = build_main([*options, str(ROOT), str(site)])
    if status == 0:
        shutil.copy(site / "README.html", site / "index.html")
    return status


@click.command()
@option("--out", "OUT", type=folder, metavar="FOLDER", help="where it goes; default: .course/book")
def book(out: Path | None) -> int:
    """Make the course into a web site that needs no network."""
    out = out or ROOT / ".course" / "book"
    earlier = (out / "_static" / MERMAID).exists()
    if out.exists() and not earlier and any(out.iterdir()):
        raise CourseError(f"OUT={out} is there already and is no book: name a new folder.")
    print("Building the book, about 15 seconds ...", flush=True)
    with tempfile.TemporaryDirectory() as work:
        site = Path(work) / "site"
        if status := build(site):
            print("The book was not built: what stands above must be mended first.", file=sys.stderr)
            return status
        if earlier:
            shutil.rmtree(out)
        shutil.copytree(site, out, dirs_exist_ok=True)
    print(f"Open {shown(out / 'index.html')} in a browser, or put the folder on a web server. It needs no network.")
    return 0
