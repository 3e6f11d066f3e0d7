"""Makes the page: one HTML file with its scripts and the trace, which needs no server and no network."""

from __future__ import annotations

import base64
import gzip
from pathlib import Path

from common.course import CourseError

FOLDER = Path(__file__).parent / "page"
FILES = ("style.css", "trace.js", "views.js", "main.js")


def prepare(out: Path) -> None:
    """Make the folder of the page `out`. Raises CourseError unless its name ends with .html."""
    if out.suffix != ".html":
        raise CourseError(f"OUT is {out}; the page's name must end with .html.")
    out.parent.mkdir(parents=True, exist_ok=True)


def make_page(trace: Path, other: Path | None = None) -> str:
    """The page that replays a trace. other: a trace to compare it with."""
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    for name in FILES:
        page = page.replace(f"/* {name} */", (FOLDER / name).read_text(encoding="utf-8"))
    for name, file in (("trace", trace), ("other", other)):
        packed = b"" if file is None else base64.b64encode(gzip.compress(file.read_bytes(), 9, mtime=0))
        page = page.replace(f"<!-- {name} -->", packed.decode())
    return page
