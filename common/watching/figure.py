"""Plots of a trace, for the notebooks: steps from left to right, requests and blocks from top to bottom."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from common.watching.trace import KINDS, Replay, Trace, read_trace

# The colours of bench/style.py, which cannot be imported here: it turns off the display of a notebook's figures.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
COLORS = dict(zip(KINDS, (BLUE, ORANGE, GREEN, PURPLE)))
OWNERS = (BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY)
CACHED, SHARED = "#E8EAED", "#000000"


def draw_timeline(axes, trace: Trace, num_steps: int = 0, with_counts: bool = False) -> None:
    """Plot what each request computes in each step, coloured by kind, and a triangle where it is preempted.

    num_steps: the smallest width of the plot. with_counts: write the number of new tokens into each cell.
    """
    for x, step in enumerate(trace.steps):
        for entry in step.entries:
            axes.barh(entry.request, 1, left=x, color=COLORS[entry.kind])
            if with_counts and entry.num_kept:
                axes.text(x + 0.5, entry.request, entry.num_kept, ha="center", va="center")
        for victim, *_ in step.plan.get("preempt", ()):
            axes.plot(x + 0.5, victim, "v", color=VERMILION)
    used = {entry.kind for step in trace.steps for entry in step.entries}
    names = [request["id"] for request in trace.requests]
    axes.set(xlabel="step", yticks=range(len(names)), yticklabels=names, xlim=(0, max(num_steps, len(trace.steps))))
    axes.invert_yaxis()
    legend = [(f"■ {kind}", COLORS[kind]) for kind in KINDS if kind in used]
    if any("preempt" in step.plan for step in trace.steps):
        legend.append(("▼ preempted", VERMILION))
    for place, (text, color) in enumerate(legend):
        axes.text(0.26 * place, 1.03, text, color=color, transform=axes.transAxes)


def draw_pool(axes, trace: Trace) -> None:
    """Plot the holder of each block in each step. White is free, grey free and in the prefix cache, black is shared."""
    import numpy as np
    from matplotlib.colors import ListedColormap

    num_blocks, columns = trace.config["num_blocks"], []
    replay = Replay(num_blocks)
    for line in trace.lines:
        replay.apply(line)
        if "plan" in line:
            columns.append(np.full(num_blocks, np.nan))
            columns[-1][sorted(replay.cached)] = len(OWNERS)
            for k, table in sorted(replay.tables.items()):
                columns[-1][[block for block in table if block >= 0]] = k % len(OWNERS)
            columns[-1][np.array(replay.counts) > 1] = len(OWNERS) + 1
    settings = dict(cmap=ListedColormap([*OWNERS, CACHED, SHARED]), vmin=0, vmax=len(OWNERS) + 1)
    axes.imshow(np.stack(columns, 1), aspect="auto", interpolation="nearest", **settings)
    axes.set(xlabel="step", ylabel="block")
    for place, (text, color) in enumerate(
        (("one colour a request", BLUE), ("■ shared", SHARED), ("■ free, cached", "#9AA0A6"))
    ):
        axes.text(0.4 * place, 1.03, text, color=color, transform=axes.transAxes)


def draw_run(file: Path, size: tuple[float, float] = (10, 3)) -> Figure:
    """Plot the timeline and the pool of a run, side by side."""
    figure, trace = Figure(figsize=size, layout="constrained"), read_trace(file)
    left, right = figure.subplots(1, 2)
    draw_timeline(left, trace)
    draw_pool(right, trace)
    return figure


def draw_ranks(axes, trace: Trace, first: int, last: int) -> None:
    """Plot when each rank computed the steps from `first` to `last`, with their numbers, in two alternating colours."""
    times = {rank: [each for each in own if first <= each[0] <= last] for rank, own in trace.lines[-1]["ranks"].items()}
    begin = min(start for own in times.values() for _, start, _ in own)
    for y, own in enumerate(times.values()):
        for step, start, end in own:
            axes.barh(y, 1e3 * (end - start), left=1e3 * (start - begin), color=(BLUE, ORANGE)[step % 2])
            axes.text(5e2 * (start + end - 2 * begin), y, int(step), ha="center", va="center")
    axes.set(xlabel="milliseconds", yticks=range(len(times)), yticklabels=[f"rank {rank}" for rank in times])
    axes.invert_yaxis()
