"""`make figures`: the plots of the READMEs, each drawn from a measurement in common/measurements or from arithmetic.

One style for all: white ground, so that a figure reads the same on a light and on a dark page; colours that a
colour-blind reader can tell apart (Okabe and Ito's palette); lines named where they end, not in a legend. The same
data gives the same bytes, so a figure that changed is a figure whose data changed.

To add one: write a function that returns a Figure, under `@figure("lesson-3-kv-cache/figures/name.svg")`.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure

from common import bench
from common.course import ROOT, CourseError, shown

BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#5F6368",
)
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
"""Where a figure lies in the repository -> the function that draws it."""


def figure(path: str) -> Callable[[Callable[[], Figure]], Callable[[], Figure]]:
    """Register a function that draws the figure at this path."""

    def register(draw: Callable[[], Figure]) -> Callable[[], Figure]:
        if path in FIGURES:
            raise ValueError(f"{path} is drawn by {FIGURES[path].__name__} already.")
        FIGURES[path] = draw
        return draw

    return register


def new_figure(**settings) -> tuple[Figure, matplotlib.axes.Axes]:
    """A figure with one set of axes. It belongs to nobody's `pyplot` state, so there is none to clean up."""
    fig = Figure(layout="constrained", **settings)
    return fig, fig.subplots()


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
    fig.supxlabel(text, fontsize=7, color=GREY, x=0.01, ha="left")


# ---------------------------------------------------------------------------------------------------------------
# Lesson 0: the roofline
# ---------------------------------------------------------------------------------------------------------------


@figure("lesson-0-intro/figures/roofline.svg")
def roofline() -> Figure:
    """The two ceilings of the measured machine, and where SmolLM2 in float32 stands under them.

    Each weight is read once a step (4 bytes) and serves every token of it (2 operations): a step of B tokens has
    B / 2 operations a byte, if the cache of keys and values is left out, which these short contexts allow.
    """
    machine = bench.read("machine")
    bandwidth, peak = machine["read_gb_per_s"], machine["gemm_gflop_per_s"]
    intensities = [2**exponent for exponent in range(-3, 10)]
    ridge = peak / bandwidth
    line = sorted([*intensities, ridge])
    fig, axes = new_figure()
    axes.plot(line, [min(peak, bandwidth * x) for x in line], color=BLUE)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.set_ylim(bandwidth / 16, peak * 3)
    axes.set_xlim(line[0], line[-1])
    axes.set_xlabel("arithmetic intensity: operations for each byte read")
    axes.set_ylabel("GFLOP/s")
    axes.set_title("Decoding one stream is bound by memory, prefill by arithmetic")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.set_xticks(intensities[::2])
    label_end(axes, line[0], bandwidth * line[0] * 7, f"memory: {bandwidth:.0f} GB/s", BLUE)
    label_end(axes, line[-1], peak, f"arithmetic: {peak:.0f} GFLOP/s", BLUE, dx=-4, dy=12)
    axes.axvline(ridge, color=GREY, linewidth=1, linestyle=":")
    label_end(axes, ridge, bandwidth / 11, f"they meet at {ridge:.1f}", GREY)
    points = (
        ("decode, 1 stream", 1, VERMILION, 8, -4),
        ("decode, 8 streams", 8, ORANGE, 8, -10),
        ("decode, 64 streams", 64, GREEN, 0, -14),
        ("prefill, 512 tokens", 512, PURPLE, -1, -28),
    )
    for name, tokens, color, dx, dy in points:
        intensity = tokens / 2
        ceiling = min(peak, bandwidth * intensity)
        axes.plot([intensity], [ceiling], "o", color=color)
        label_end(axes, intensity, ceiling, name, color, dx=dx, dy=dy)
    source_line(fig, machine)
    return fig


@figure("lesson-0-intro/figures/ceilings.svg")
def ceilings() -> Figure:
    """What batching can give Llama 2 7B on an H100, by arithmetic, for three lengths of context."""
    from solutions import intro

    shape = intro.LLAMA_2_7B
    model_bytes = intro.weight_bytes(intro.flops_per_token(shape, 0) // 2, 16)
    batches = [2**exponent for exponent in range(12)]
    fig, axes = new_figure()
    for context, color in ((1, BLUE), (1024, ORANGE), (4096, VERMILION)):
        cache_bytes = intro.kv_cache_bytes(
            shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim, context, bytes_per_number=2
        )
        limits = intro.H100.bandwidth, intro.H100.peak_flops
        token_flops = intro.flops_per_token(shape, context)
        speeds = [intro.decode_ceiling(token_flops, model_bytes, cache_bytes, batch, *limits) for batch in batches]
        axes.plot(batches, speeds, color=color)
        name = "no context" if context == 1 else f"{context} tokens of context"
        label_end(axes, batches[-1], speeds[-1], name, color)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.set_xticks(batches[::2], [str(batch) for batch in batches[::2]])
    axes.minorticks_off()
    axes.set_xlim(1, batches[-1] * 24)
    axes.set_xlabel("requests in the batch")
    axes.set_ylabel("tokens/s of all requests together, at most")
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    axes.set_title("Batching is nearly free, until the caches are what is read")
    fig.supxlabel(
        "By arithmetic: Llama 2 7B, 16 bits, one H100 SXM (3.35 TB/s, 989 TFLOP/s), if its memory were large enough",
        fontsize=7,
        color=GREY,
        x=0.01,
        ha="left",
    )
    return fig


# ---------------------------------------------------------------------------------------------------------------
# Lesson 2: seconds per token without a memory
# ---------------------------------------------------------------------------------------------------------------


def recompute_figure(measurement: dict, title: str) -> Figure:
    """Seconds for the next token against the tokens before it, for each way that was measured."""
    ways = {
        "recompute": ("ours: all again", VERMILION),
        "transformers, no cache": ("transformers, no cache", ORANGE),
        "transformers, cache": ("transformers, with its cache", BLUE),
    }
    rows = measurement["rows"]
    contexts = [row["context"] for row in rows]
    fig, axes = new_figure()
    lines = [(name, color, [1e3 * row[way] for row in rows]) for way, (name, color) in ways.items() if way in rows[0]]
    top = max(max(values) for _, _, values in lines)
    ends: list[float] = []
    for name, color, values in sorted(lines, key=lambda line: line[2][-1]):
        axes.plot(contexts, values, "o-", color=color)
        # Labels of lines that end side by side are pushed apart by a line of text.
        height = max(values[-1], ends[-1] + top / 15) if ends else values[-1]
        ends.append(height)
        axes.annotate(name, (contexts[-1], height), (8, 0), textcoords="offset points", color=color, va="center")
    axes.set_xlim(0, contexts[-1] * 1.45)
    axes.set_xticks([x for x in contexts if x >= contexts[-1] / 8])
    axes.set_ylim(0, top * 1.12)
    axes.set_xlabel("tokens before it")
    axes.set_ylabel("milliseconds for one more token")
    axes.set_title(title)
    source_line(fig, measurement)
    return fig


@figure("lesson-2-llama-pytorch/figures/recompute.svg")
def recompute() -> Figure:
    return recompute_figure(bench.read("recompute-smollm2-135m"), "SmolLM2: a token costs more, the more came before")


# ---------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------


def svg(draw: Callable[[], Figure]) -> bytes:
    """The figure as SVG: the same bytes for the same data."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "backend": "Agg"}):
        draw().savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return b"".join(line.rstrip() + b"\n" for line in buffer.getvalue().splitlines())


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m common figures", description=__doc__.partition("\n")[0])
    parser.add_argument("part", nargs="?", default="", help="draw only those with this in their path")
    parser.add_argument("--out", type=Path, default=ROOT, help="draw below this folder, and not in the lessons")
    settings = parser.parse_args(argv)
    chosen = {path: draw for path, draw in FIGURES.items() if settings.part in path}
    if not chosen:
        raise SystemExit(f"No figure has {settings.part!r} in its path; there are {', '.join(FIGURES)}.")
    failed = False
    for path, draw in chosen.items():
        target = settings.out / path
        try:
            content = svg(draw)
        except (FileNotFoundError, CourseError) as error:
            print(f"{path}: cannot be drawn: {error}. `make bench` measures.")
            failed = True
            continue
        changed = not target.exists() or target.read_bytes() != content
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        print(f"{shown(target)}: {'drawn' if changed else 'unchanged'}")
    return int(failed)
