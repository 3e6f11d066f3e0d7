"""How every figure looks, and the register of all figures.

The background is white, so that a figure looks the same on a light and on a dark page. A colour-blind reader can tell
the colours apart (Okabe and Ito's palette). Lines are named where they end, not in a legend. The same data gives the
same bytes, so a figure changes only if its data does.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, GREY = "#CC79A7", "#56B4E9", "#5F6368"
STYLE = {
    "svg.hashsalt": "inference-course",
    "svg.fonttype": "path",  # looks alike wherever it is opened
    "font.family": "DejaVu Sans",  # the one font that matplotlib brings along
    "font.size": 10,
    "figure.figsize": (7.2, 4.2),
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#202124",
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.grid": True,
    "grid.color": "#E8EAED",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "lines.linewidth": 2,
    "lines.markersize": 6,
    "xtick.color": GREY,
    "ytick.color": GREY,
}
FIGURES: dict[str, Callable[[], Figure]] = {}
"""The functions that draw the figures, by the figure's path in the repository."""


def figure(path: str) -> Callable[[Callable[[], Figure]], Callable[[], Figure]]:
    """Register a function that draws the figure at this path."""

    def register(draw: Callable[[], Figure]) -> Callable[[], Figure]:
        FIGURES[path] = draw
        return draw

    return register


def new_figure(rows: int = 1, columns: int = 1, figsize: tuple[float, float] | None = None, **settings) -> tuple:
    """Return a figure and its axes, as `subplots` of matplotlib does: of several an array.

    It is not part of `pyplot`'s state, so it need not be closed.
    """
    fig = Figure(layout="constrained", figsize=figsize)
    return fig, fig.subplots(rows, columns, **settings)


def label_end(axes, x: float, y: float, text: str, color: str, dx: int = 6, dy: int = 0) -> None:
    """Name a line at its end, in its colour. dx, dy: in points, away from the end."""
    side = "left" if dx >= 0 else "right"
    axes.annotate(text, (x, y), (dx, dy), textcoords="offset points", color=color, va="center", ha=side)


def source_line(fig: Figure, measurement: dict) -> None:
    """Below the figure, small: the machine, the versions, the day and the command of a measurement."""
    machine, versions = measurement["machine"], measurement["versions"]
    text = (
        f"{machine['cpu']}, {machine['threads']} threads; torch {versions['torch']}; {measurement['date']}; "
        f"{measurement['command']}"
    )
    footnote(fig, text)


def footnote(fig: Figure, text: str) -> None:
    fig.supxlabel(text, fontsize=7, color=GREY, x=0.01, ha="left")


def name_rows(axes, names: Iterable[str]) -> None:
    """For horizontal bars: write a name beside each row, from the top down, and draw no lines along the rows."""
    names = list(names)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def svg(draw: Callable[[], Figure]) -> bytes:
    """The figure as SVG: the same bytes for the same data."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "backend": "Agg"}):
        draw().savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return b"".join(line.rstrip() + b"\n" for line in buffer.getvalue().splitlines())
