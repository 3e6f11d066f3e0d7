"""`make figures`: the plots of the READMEs, each drawn from a measurement (bench/measurements) or from arithmetic.

To add one: write a function that returns a Figure, under `@figure("lesson-3-kv-cache/figures/name.svg")`. Those of
lessons 0 to 4 are in `plots_model.py`.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import click
import matplotlib
import numpy
from matplotlib.figure import Figure

from common.bench import (
    plots_model,  # noqa: F401  (registers its figures)
    results,
)
from common.bench.style import (
    BLUE,
    FIGURES,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    figure,
    label_end,
    name_rows,
    new_figure,
    source_line,
    svg,
)
from common.config import EngineConfig
from common.course import ROOT, CourseError, shown

# --- Lesson 5: which requests compute in a step, and which blocks they hold -------------------------------------------


def simulate(prompts: list[int], outputs: list[int], **settings) -> tuple[list, list[dict[int, int]]]:
    """Return the plans of the reference's scheduler for requests of these lengths, and for each plan the holder of each
    block after it. No model is needed: every sampled token is 1.
    """
    from solutions.llama_pytorch import SamplingParams
    from solutions.paged_attention import KVCacheManager
    from solutions.scheduler import ModelRunnerOutput, Request, Scheduler

    manager = KVCacheManager(settings.pop("num_blocks"), settings.pop("block_size"), enable_prefix_caching=False)
    scheduler = Scheduler(manager, EngineConfig(num_host_blocks=0, **settings))
    for i, (prompt, output) in enumerate(zip(prompts, outputs)):
        scheduler.add(Request(str(i), [0] * prompt, SamplingParams(), output, arrival=i))
    plans, pools = [], []
    while scheduler.requests:
        plan = scheduler.schedule()
        pools.append({block: int(name) for name in manager.block_tables for block in manager.block_table(name)})
        sampled = {each.request_id: [1] for each in plan.scheduled if each.sample_index is not None}
        scheduler.update_from_output(plan, ModelRunnerOutput(plan.step_id, sampled))
        plans.append(plan)
    return plans, pools


@figure("lesson-5-batching/figures/schedule.svg")
def schedule() -> Figure:
    """Twelve requests over the steps: in static batches, which wait for their slowest, and with continuous batching."""
    from solutions.scheduler import static_batch

    prompts = [9, 4, 14, 6, 5, 11, 3, 7, 10, 4, 6, 8]
    outputs = [4, 15, 6, 9, 20, 3, 8, 5, 12, 7, 2, 10]
    fig, (left, right) = new_figure(1, 2, sharey=True, sharex=True, figsize=(9.6, 4.0))

    batches = static_batch(outputs, 4)
    last = 0
    for i, steps in enumerate(batches):
        batch = batches[i // 4 * 4 : i // 4 * 4 + 4]
        end = max(each.stop for each in batch)
        left.barh(i, 1, left=steps.start, color=ORANGE)
        left.barh(i, len(steps) - 1, left=steps.start + 1, color=BLUE)
        left.barh(i, end - steps.stop, left=steps.stop, color="#E8EAED", hatch="///", edgecolor="white")
        last = max(last, end)
    left.set_title(f"static batches of 4: {last} steps")

    settings = dict(max_num_seqs=4, max_num_batched_tokens=12, long_prefill_token_threshold=8)
    plans, _ = simulate(prompts, outputs, num_blocks=200, block_size=4, **settings)
    for step, plan in enumerate(plans):
        for each in plan.scheduled:
            is_prompt = each.start < prompts[int(each.request_id)]
            right.barh(int(each.request_id), 1, left=step, color=ORANGE if is_prompt else BLUE)
    right.set_title(f"continuous, four at a time, 12 tokens a step: {len(plans)} steps")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(axis="y", visible=False)
    left.set(ylabel="request", yticks=range(len(prompts)))
    left.invert_yaxis()
    for color, text, y in ((ORANGE, "computes its prompt", 0.92), (BLUE, "decodes", 0.85), ("#9AA0A6", "waits", 0.78)):
        left.text(0.62, y, "■ " + text, color=color, transform=left.transAxes, fontsize=9)
    return fig


@figure("lesson-5-batching/figures/pool.svg")
def pool_through_time() -> Figure:
    """The holder of each block, step by step, in a pool that is too small for all; preemptions are marked."""
    prompts, outputs = [10, 7, 13, 5, 9, 6], [16, 20, 9, 18, 12, 14]
    settings = dict(max_num_seqs=6, max_num_batched_tokens=16, long_prefill_token_threshold=8)
    plans, pools = simulate(prompts, outputs, num_blocks=20, block_size=4, **settings)
    picture = numpy.full((20, len(plans)), numpy.nan)
    for step, pool in enumerate(pools):
        for block, owner in pool.items():
            picture[block, step] = owner
    fig, axes = new_figure(figsize=(8.4, 3.8))
    colors = matplotlib.colors.ListedColormap([BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY])
    axes.imshow(picture, cmap=colors, vmin=0, vmax=5, aspect="auto", interpolation="nearest")
    for step, plan in enumerate(plans):
        for name in plan.preempted_ids:
            axes.plot(step, -1.1, "v", color=colors(int(name)), clip_on=False)
    axes.text(-0.4, -1.7, "▼ is preempted", color=GREY, fontsize=9)
    for request in range(6):
        axes.text(1.01, 0.95 - 0.11 * request, f"■ request {request}", color=colors(request), transform=axes.transAxes)
    axes.set(xlabel="step", ylabel="block", yticks=range(0, 20, 4))
    axes.grid(visible=False)
    return fig


# --- Lesson 6: which rank is idle -------------------------------------------------------------------------------------


@figure("lesson-6-parallelism/figures/timeline.svg")
def pipeline() -> Figure:
    """When two stages computed, measured: with one batch under way, and with two."""
    measurement = results.read("grids-smollm2-135m")
    fig, all_axes = new_figure(2, 1, sharex=True, figsize=(8.5, 3.6))
    for axes, way in zip(all_axes, ("two stages, one batch", "two stages, two batches")):
        stages = measurement["ways"][way]["timeline"]
        for row, stage in enumerate(stages):
            for step, _, began, ended in stage:
                color = (BLUE, ORANGE)[step % 2] if "two batches" in way else BLUE
                axes.barh(row, ended - began, left=began, height=0.7, color=color, edgecolor="white", linewidth=0.6)
        name_rows(axes, [f"stage {row}" for row in range(len(stages))])
        axes.set_title(way.removeprefix("two stages, ") + " under way")
    axes.set(xlabel="seconds", xlim=(0, 0.9 * max(stage[-1][3] for stage in stages)))
    source_line(fig, measurement)
    return fig


# --- Lesson 7: what fewer bits cost -----------------------------------------------------------------------------------


@figure("lesson-7-quantization/figures/quality.svg")
def quality() -> Figure:
    """Perplexity against bytes, for INT8, W8A8 and INT4 in groups, plain and with scales for activations."""
    measurement = results.read("quality-smollm2-135m")
    rows = measurement["rows"]
    exact = rows[0]["perplexity"]
    fig, (eight, four) = new_figure(1, 2, width_ratios=(1, 2.4), sharey=True, figsize=(10, 4.2))
    for axes in (eight, four):
        axes.axhline(exact, color=GREY, linewidth=1, linestyle=":")
        axes.set_xlabel("MB of weights")
    for row in rows:
        if row["kind"] in ("int8", "w8a8"):
            eight.plot([row["bytes"] / 1e6], [row["perplexity"]], "o", color=BLUE)
            dy = -10 if row["kind"] == "int8" else 10
            label_end(eight, row["bytes"] / 1e6, row["perplexity"], row["kind"].upper(), BLUE, dx=8, dy=dy)
    eight.set(xlim=(130, 142), ylabel="perplexity", title="eight bits")
    eight.text(130.3, exact + 0.15, f"float32, {rows[0]['bytes'] / 1e6:.0f} MB", color=GREY, fontsize=8)
    styles = {
        (False, False): ("asymmetric", ORANGE, "o-"),
        (True, False): ("symmetric", VERMILION, "s-"),
        (False, True): ("asymmetric, activation-aware", SKY, "o--"),
        (True, True): ("symmetric, activation-aware", GREEN, "s--"),
    }
    for (symmetric, aware), (name, color, style) in styles.items():
        asked = {"kind": "int4", "symmetric": symmetric, "activation_aware": aware}
        chosen = [row for row in rows if asked.items() <= row.items()]
        points = [(row["bytes"] / 1e6, row["perplexity"]) for row in chosen]
        four.plot(*zip(*points), style, color=color, label=name)
        for row in rows:
            if {**asked, "kind": "w4a8"}.items() <= row.items():
                four.plot([row["bytes"] / 1e6], [row["perplexity"]], "x", color=color)
        for row, point in zip(chosen, points):
            four.annotate(str(row["group_size"]), point, (4, 5), textcoords="offset points", fontsize=8)
    four.set_title("four bits, in groups of 32, 64 and 128 (x: activations in eight)")
    four.legend(frameon=False, fontsize=9)
    source_line(fig, measurement)
    return fig


@figure("lesson-7-quantization/figures/quality-and-speed.svg")
def quality_and_speed() -> Figure:
    """KL divergence against tokens a second, for every kind that the ladder has: one stream, and 32 requests."""
    measurement, ladder = results.read("quality-smollm2-135m"), results.read("ladder-smollm2-135m")
    ways = {"engine, kernels": {"kind": "float32"}, "bfloat16": {"kind": "bfloat16", "bits_of_sums": 32}}
    for kind in ("int8", "w8a8", "int4", "w4a8"):
        ways[kind.upper()] = {"kind": kind, "group_size": 64, "symmetric": False, "activation_aware": False}
    costs = {
        way: [row["kl"] for row in measurement["rows"] if asked.items() <= row.items()][-1]
        for way, asked in ways.items()
    }
    fig, all_axes = new_figure(1, 2, sharey=True, figsize=(10, 3.8))
    for axes, name in zip(all_axes, ("one stream", "32 mixed requests")):
        told = next(load["ways"] for load in ladder["loads"] if load["name"] == name)
        for way, kl in costs.items():
            speed, label = told[way]["tokens_per_second"], way.replace("engine, kernels", "float32")
            axes.plot([speed], [kl], "o", color=BLUE)
            axes.annotate(label, (speed, kl), (6, 4), textcoords="offset points", fontsize=9)
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set(
            ylim=(-2e-4, 1),
            xlim=(0, 1.2 * max(told[way]["tokens_per_second"] for way in costs)),
            xlabel="tokens/s",
            title=name,
        )
    fig.axes[0].set_ylabel("KL to float32, nats a token")
    source_line(fig, ladder)
    return fig


# --- Lesson 8: what draft tokens give ---------------------------------------------------------------------------------


@figure("lesson-8-speculative/figures/speculation.svg")
def speculation() -> Figure:
    """Tokens a second with speculation, as a ratio to those without, by kind of text and by number of streams."""
    chats, tales = results.read("speculation-smollm2-135m"), results.read("speculation-tales")
    fig, (left, right) = new_figure(1, 2, width_ratios=(1.35, 1), sharey=True, figsize=(10.4, 4.2))

    singles = [case for case in chats["cases"] if case["num_streams"] == 1]
    named = {"adaptive": ("as many draft tokens as pay", BLUE), "k=2": ("always 2", "#BDD7EE")}
    named |= {"k=4": ("always 4", SKY), "k=8": ("always 8", "#9AA0A6")}
    ways = [way for way in named if way in singles[0]["ways"]]
    width = 0.84 / len(ways)
    for i, way in enumerate(ways):
        places = [place + (i - (len(ways) - 1) / 2) * width for place in range(len(singles))]
        label, color = named[way]
        left.bar(places, [case["ways"][way]["ratio"] for case in singles], width * 0.92, color=color, label=label)
    shares = [right_share([case]).replace(" of", "\nof") for case in singles]
    left.set_xticks(range(len(singles)), [f"{case['name']}\n{share}" for case, share in zip(singles, shares)])
    left.tick_params(axis="x", length=0)
    left.set(ylabel="tokens/s, times those without draft tokens", title="SmolLM2, n-grams, one stream")

    lines = (
        (chats, lambda case: case["is_repetitive"], "n-grams, repeating", BLUE),
        (chats, lambda case: case["is_repetitive"] is False, "n-grams, not repeating", VERMILION),
        (tales, lambda case: case["temperature"] == 0, "draft model, greedy", GREEN),
        (tales, lambda case: case["temperature"] > 0, "draft model, drawn", ORANGE),
    )
    for measurement, belongs, name, color in lines:
        cases = [case for case in measurement["cases"] if belongs(case)]
        by_count: dict[int, list[float]] = {}
        for case in cases:
            by_count.setdefault(case["num_streams"], []).append(case["ways"]["adaptive"]["ratio"])
        ratios = [statistics.geometric_mean(by_count[count]) for count in sorted(by_count)]
        right.plot(range(len(ratios)), ratios, "o-", color=color, label=f"{name}, {right_share(cases)}")
        right.set_xticks(range(len(ratios)), sorted(by_count))
    right.set(xlabel="streams at once", title="as many draft tokens as pay")
    for axes in (left, right):
        axes.axhline(1, color="#202124", linewidth=1, linestyle=":")
        axes.set_ylim(0, 1.35 * max(case["ways"][way]["ratio"] for case in singles for way in ways))
        axes.grid(axis="x", visible=False)
        axes.legend(frameon=False, fontsize=9, loc="upper right")
    source_line(fig, chats)
    return fig


def right_share(cases: list[dict]) -> str:
    """The share of draft tokens that were accepted with adaptive speculation in all these cases, in words."""
    told = [case["ways"]["adaptive"] for case in cases]
    num_draft_tokens = sum(each["num_draft_tokens"] for each in told)
    if not num_draft_tokens:
        return "no draft tokens"
    num_right = sum(each["num_draft_tokens"] * (each["acceptance_rate"] or 0) for each in told)
    return f"{num_right / num_draft_tokens:.0%} right of {num_draft_tokens:,}"


# --- The ladder -------------------------------------------------------------------------------------------------------


RUNGS = {
    "recompute": ("lesson 2: recompute", VERMILION),
    "cache": ("lesson 3: KV cache", ORANGE),
    "paged": ("lesson 4: paged", SKY),
    "engine": ("lesson 5: the engine", GREEN),
    "engine, kernels": ("with kernels", BLUE),
    "bfloat16": ("bfloat16", "#33BBEE"),
    "INT8": ("lesson 7: INT8", PURPLE),
    "W8A8": ("lesson 7: W8A8", "#882255"),
    "INT4": ("lesson 7: INT4", "#F0E442"),
    "W4A8": ("lesson 7: W4A8", "#999933"),
    "speculation": ("lesson 8: n-grams", "#202124"),
    "transformers": ("transformers", GREY),
    "transformers, continuous": ("transformers, continuous", GREY),
    "vLLM": ("vLLM, float32", GREY),
    "vLLM, bfloat16": ("vLLM, bfloat16", GREY),
    "llama.cpp": ("llama.cpp, float32", GREY),
    "llama.cpp, Q8_0": ("llama.cpp, Q8_0", GREY),
    "llama.cpp, Q4_0": ("llama.cpp, Q4_0", GREY),
}
"""The name and the colour of each way of the ladder in the figure; other engines are grey."""


@figure("common/bench/figures/ladder.svg")
def ladder() -> Figure:
    """Tokens a second of each lesson's engine, alone and with many requests, beside others on the same weights."""
    measurement = results.read("ladder-smollm2-135m")
    loads = {load["name"]: load["ways"] for load in measurement["loads"]}
    panels = {
        "one stream": {**loads["one stream"], "recompute": loads["recompute"]["recompute"]},
        "8 equal streams": loads["8 equal streams"],
        "32 mixed requests": loads["32 mixed requests"],
    }
    rungs = [way for way in RUNGS if any(way in ways for ways in panels.values())]
    ours = sum(RUNGS[way][1] != GREY for way in rungs)
    fig, all_axes = new_figure(1, 3, sharey=True, figsize=(11, 1.1 + 0.31 * len(rungs)))
    for axes, (name, ways) in zip(all_axes, panels.items()):
        for place, way in enumerate(rungs):
            if way not in ways:
                continue
            speed = ways[way]["tokens_per_second"]
            axes.barh(place, speed, color=RUNGS[way][1], height=0.7)
            axes.text(speed, place, f" {speed:.0f}", va="center", color="#202124")
        axes.axhline(ours - 0.5, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_title(name)
        name_rows(axes, [RUNGS[way][0] for way in rungs])
        axes.set(
            ylim=(len(rungs) - 0.4, -0.6),
            xlim=(0, 1.18 * max(ways[way]["tokens_per_second"] for way in ways)),
            xlabel="tokens/s",
        )
    source_line(fig, measurement)
    return fig


# --- The command ------------------------------------------------------------------------------------------------------


@click.command()
@click.argument("part", default="")
@click.option(
    "--out", type=Path, default=ROOT, help="draw below this folder, and not in the lessons", show_default=False
)
def figures(part: str, out: Path) -> int:
    """Draw the figures of the READMEs, or only those with PART in their path."""
    chosen = {path: draw for path, draw in FIGURES.items() if part in path}
    if not chosen:
        raise CourseError(f"No figure has {part!r} in its path; there are {', '.join(FIGURES)}.")
    failed = False
    for path, draw in chosen.items():
        target = out / path
        try:
            content = svg(draw)
        except (FileNotFoundError, CourseError) as error:
            print(f"{path}: cannot be drawn: {error}. `make bench` measures, or python -m common bench NAME.")
            failed = True
            continue
        changed = not target.exists() or target.read_bytes() != content
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        print(f"{shown(target)}: {'drawn' if changed else 'unchanged'}")
    return int(failed)
