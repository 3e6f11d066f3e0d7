"""`make figures`: the plots of the READMEs, each drawn from a measurement (common/bench/measurements) or from
arithmetic.

One style for all: white ground, so that a figure reads the same on a light and on a dark page; colours that a
colour-blind reader can tell apart (Okabe and Ito's palette); lines named where they end, not in a legend. The same
data gives the same bytes, so a figure that changed is a figure whose data changed.

To add one: write a function that returns a Figure, under `@figure("lesson-3-kv-cache/figures/name.svg")`.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import click
import matplotlib

matplotlib.use("Agg")

from matplotlib.figure import Figure
from matplotlib.patches import Circle

from common.bench import results
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
    machine = results.read("machine")
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


# ---------------------------------------------------------------------------------------------------------------
# Lesson 1: rotary embedding, three attention heads, where the parameters are
# ---------------------------------------------------------------------------------------------------------------


@figure("lesson-1-llm-basics/figures/rotary.svg")
def rotary() -> Figure:
    """Left: the hands of a head's clocks at the first positions. Right: a rotated query times rotated keys."""
    import torch

    from solutions.llm_basics import apply_rotary, rotary_frequencies, rotary_tables

    fig = Figure(layout="constrained", figsize=(11, 3.8))
    clocks, products = fig.subplots(1, 2, width_ratios=(1.1, 1))
    shades = matplotlib.colormaps["viridis"]([0.0, 0.17, 0.34, 0.51, 0.68, 0.85])
    for pair, frequency in enumerate(rotary_frequencies(8, 100.0).tolist()):
        x = 2.6 * pair
        clocks.add_patch(Circle((x, 0), 1, fill=False, color="0.7"))
        for position, shade in enumerate(shades):
            dx, dy = math.cos(position * frequency), math.sin(position * frequency)
            clocks.plot([x, x + dx], [0, dy], color=shade)
            if pair == 0:
                clocks.text(x + 1.22 * dx, 1.22 * dy, position, color=shade, ha="center", va="center")
        clocks.text(x, -1.75, f"pair {pair}\n{frequency:.2f} rad a token", ha="center", va="center", fontsize=8)
    clocks.set(xlim=(-1.5, 9.3), ylim=(-2.3, 1.6), aspect="equal")
    clocks.set_title("Four pairs of a head: hands at positions 0 to 5")
    clocks.axis("off")

    q, k = torch.randn(2, 1, 1, 64, generator=torch.Generator().manual_seed(3))
    frequencies = rotary_frequencies(64, 10_000.0)

    def turned(x, positions):
        return apply_rotary(x.expand(len(positions), 1, 64), *rotary_tables(positions, frequencies))[:, 0]

    distances = torch.arange(101)
    for start, style, color in ((100, "-", SKY), (1000, "--", VERMILION), (5000, ":", "black")):
        scores = turned(k, start - distances) @ turned(q, torch.tensor([start]))[0]
        products.plot(distances, scores, style, color=color, label=f"query at position {start}")
    products.set(xlabel="how many tokens the key lies behind the query", ylabel="dot product of the two")
    products.set_title("One query and one key (D = 64), rotated")
    products.legend(frameon=False)
    return fig


SENTENCE = "Anna gave the book to Ben because Anna had finished it. Ben gave the book back to"


@figure("lesson-1-llm-basics/figures/attention.svg")
def attention_heads() -> Figure:
    """Three heads of SmolLM2, reading a sentence in which something happens twice."""
    import torch

    from common.checkpoints import Checkpoint, cached
    from common.tokenizer import load_tokenizer
    from solutions import llm_basics

    heads = {
        (18, 8): "layer 18, head 8\nrests on the first token",
        (11, 1): "layer 11, head 1\nlooks one token back",
        (17, 5): "layer 17, head 5\nlooks for what came next, last time",
    }
    folder = cached("smollm2-135m")
    if folder is None:
        raise CourseError("SmolLM2 is not on this machine; `make run` fetches it")
    checkpoint, tokenizer = Checkpoint(folder), load_tokenizer(folder)
    token_ids = tokenizer.encode(SENTENCE)
    words = [tokenizer.decode([token_id]).strip() for token_id in token_ids]
    config = llm_basics.ModelConfig(49152, 576, 1536, 30, 9, 3, 64, 1e-5, 100_000.0, tie_word_embeddings=True)
    x = checkpoint.results.read("model.embed_tokens.weight")[token_ids]
    frequencies = llm_basics.rotary_frequencies(config.head_dim, config.rope_theta)
    tables = llm_basics.rotary_tables(torch.arange(len(x)), frequencies)
    mask, maps = llm_basics.causal_mask(len(x), len(x)), {}
    for number in range(max(layer for layer, _ in heads) + 1):
        prefix = f"model.layers.{number}."
        names = [name for name in checkpoint.names() if name.startswith(prefix)]
        weights = {name.removeprefix(prefix): checkpoint.read(name) for name in names}
        normed = llm_basics.rms_norm(x, weights["input_layernorm.weight"], config.rms_norm_eps)
        projected = (normed @ weights[f"self_attn.{name}_proj.weight"].T for name in "qk")
        q, k = (llm_basics.apply_rotary(each.unflatten(1, (-1, 64)), *tables) for each in projected)
        for _, head in (each for each in heads if each[0] == number):
            scores = q[:, head] @ k[:, head // 3].T / math.sqrt(config.head_dim)
            maps[number, head] = llm_basics.softmax(scores.masked_fill(~mask, -math.inf))
        x = llm_basics.block(x, weights, config, *tables)

    fig = Figure(layout="constrained", figsize=(12.5, 4.9))
    all_axes = fig.subplots(1, 3, sharey=True)
    for axes, (which, title) in zip(all_axes, heads.items()):
        image = axes.imshow(maps[which], cmap="Blues", vmin=0, vmax=1)
        axes.set_title(title)
        axes.set_xticks(range(len(words)), words, rotation=90, fontsize=9)
        axes.set_yticks(range(len(words)), words, fontsize=9)
        axes.tick_params(length=0)
        axes.grid(False)
        axes.set_xlabel("key: looked at")
    all_axes[0].set_ylabel("query: looks")
    fig.colorbar(image, ax=all_axes, shrink=0.7, label="weight")
    return fig


@figure("lesson-1-llm-basics/figures/parameters.svg")
def where_parameters_are() -> Figure:
    """Shares of embedding, attention and feed-forward network in real models' parameters."""
    from dataclasses import replace

    from solutions.llm_basics import ModelConfig, count_parameters

    models = {
        "SmolLM2-135M": ModelConfig(49152, 576, 1536, 30, 9, 3, 64, tie_word_embeddings=True),
        "Qwen3-0.6B": ModelConfig(151936, 1024, 3072, 28, 16, 8, 128, tie_word_embeddings=True, qk_norm=True),
        "Llama-2-7B": ModelConfig(32000, 4096, 11008, 32, 32, 32, 128),
        "Llama-3-8B": ModelConfig(128256, 4096, 14336, 32, 32, 8, 128),
    }
    fig, axes = new_figure(figsize=(8, 2.9))
    colors = {"embedding and head": BLUE, "attention": VERMILION, "feed-forward": GREEN}
    for row, config in enumerate(models.values()):
        total = count_parameters(config)
        # A part's share is what the count loses when that part shrinks to nothing.
        without = {
            "embedding and head": replace(config, vocab_size=0),
            "attention": replace(config, num_attention_heads=0, num_key_value_heads=0),
            "feed-forward": replace(config, intermediate_size=0),
        }
        left = 0.0
        for part, rest in without.items():
            share = 100 * (total - count_parameters(rest)) / total
            axes.barh(row, share, left=left, color=colors[part], label=part if row == 0 else None, height=0.7)
            axes.text(left + share / 2, row, f"{share:.0f} %", ha="center", va="center", color="white", fontsize=9)
            left += share
        axes.text(101, row, f"{total / 1e6:,.0f} M" if total < 1e9 else f"{total / 1e9:.2f} B", va="center")
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="share of the parameters (the norms have less than 0.1 %)")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(False)
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False)
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
    return recompute_figure(results.read("recompute-smollm2-135m"), "SmolLM2: a token costs more, the more came before")


# ---------------------------------------------------------------------------------------------------------------
# Lesson 3: with a memory
# ---------------------------------------------------------------------------------------------------------------


@figure("lesson-3-kv-cache/figures/kv-cache.svg")
def kv_cache() -> Figure:
    """Milliseconds for one more token with and without the cache; the scale is logarithmic."""
    measurement = results.read("kv-cache-smollm2-135m")
    rows = measurement["rows"]
    contexts = [row["context"] for row in rows]
    fig, axes = new_figure()
    for way, name, color, dy in (
        ("recompute", "lesson 2: all again", VERMILION, 0),
        ("cache", "lesson 3: the cache", BLUE, 8),
        ("transformers, cache", "transformers' cache", GREY, -8),
    ):
        if way in rows[0]:
            values = [1e3 * row[way] for row in rows]
            axes.plot(contexts, values, "o-", color=color)
            label_end(axes, contexts[-1], values[-1], name, color, dx=8, dy=dy)
    axes.set_yscale("log", base=10)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    axes.set_ylim(30, 2_000)
    axes.set_xlim(0, contexts[-1] * 1.4)
    axes.set_xticks([x for x in contexts if x >= contexts[-1] / 8])
    axes.set_xlabel("tokens before it")
    axes.set_ylabel("milliseconds for one more token")
    axes.set_title("SmolLM2: with a cache a token costs the same, whatever came before")
    source_line(fig, measurement)
    return fig


# ---------------------------------------------------------------------------------------------------------------
# Lesson 4: what blocks waste
# ---------------------------------------------------------------------------------------------------------------


@figure("lesson-4-paged-attention/figures/utilisation.svg")
def utilisation_by_block_size() -> Figure:
    """The share of held slots that has a token in it, for block sizes from 1 to the whole context."""
    import random

    from solutions.paged_attention import utilisation

    rng = random.Random(0)
    lengths = {
        "chats: 20 to 2,000 tokens": ([rng.randint(20, 2000) for _ in range(200)], BLUE),
        "short questions: 5 to 60 tokens": ([rng.randint(5, 60) for _ in range(200)], ORANGE),
    }
    sizes = [2**i for i in range(14)]
    fig, axes = new_figure()
    for name, (sample, color) in lengths.items():
        shares = [100 * utilisation(sample, size) for size in sizes]
        axes.plot(sizes, shares, "o-", color=color)
        place = (24, 106) if color == BLUE else (1, 46)
        axes.text(*place, name, color=color)
    axes.axvline(16, color=GREY, linewidth=1, linestyle=":")
    axes.text(17, 3, "16, the default", color=GREY, fontsize=9)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 16, 256, 8192], ["1", "16", "256", "8,192:\none block a sequence"])
    axes.set_ylim(0, 112)
    axes.set_xlabel("tokens in a block")
    axes.set_ylabel("% of held slots with a token in them")
    axes.set_title("What a sequence reserves, and what it fills")
    return fig


# ---------------------------------------------------------------------------------------------------------------
# Lesson 5: who computes when, and who holds what
# ---------------------------------------------------------------------------------------------------------------


def simulate(prompts: list[int], outputs: list[int], **settings) -> tuple[list, list[dict[int, int]]]:
    """The plans of the reference's scheduler for requests of these lengths, and after each who holds which block.

    No model is needed: a scheduler deals in ids and counts, and whatever was sampled counts as a token.
    """
    from common.config import EngineConfig
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
    """Twelve requests over the steps: in batches that wait for their slowest; in places filled as they fall free."""
    from solutions.scheduler import static_batch

    prompts = [9, 4, 14, 6, 5, 11, 3, 7, 10, 4, 6, 8]
    outputs = [4, 15, 6, 9, 20, 3, 8, 5, 12, 7, 2, 10]
    fig = Figure(layout="constrained", figsize=(9.6, 4.0))
    left, right = fig.subplots(1, 2, sharey=True, sharex=True)

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

    plans, _ = simulate(
        prompts,
        outputs,
        num_blocks=200,
        block_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=12,
        long_prefill_token_threshold=8,
    )
    for step, plan in enumerate(plans):
        for each in plan.scheduled:
            is_prompt = each.start < prompts[int(each.request_id)]
            right.barh(int(each.request_id), 1, left=step, color=ORANGE if is_prompt else BLUE)
    right.set_title(f"continuous, four at a time, 12 tokens a step: {len(plans)} steps")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(axis="y", visible=False)
    left.set_ylabel("request")
    left.set_yticks(range(len(prompts)))
    left.invert_yaxis()
    for color, text, y in ((ORANGE, "reads its prompt", 0.92), (BLUE, "writes", 0.85), ("#9AA0A6", "waits", 0.78)):
        left.text(0.62, y, "■ " + text, color=color, transform=left.transAxes, fontsize=9)
    return fig


@figure("lesson-5-batching/figures/pool.svg")
def pool_through_time() -> Figure:
    """Who holds which block of a pool that is too small for all, step by step; preemptions are marked."""
    import numpy as np

    prompts, outputs = [10, 7, 13, 5, 9, 6], [16, 20, 9, 18, 12, 14]
    settings = dict(max_num_seqs=6, max_num_batched_tokens=16, long_prefill_token_threshold=8)
    plans, pools = simulate(prompts, outputs, num_blocks=20, block_size=4, **settings)
    picture = np.full((20, len(plans)), np.nan)
    for step, pool in enumerate(pools):
        for block, owner in pool.items():
            picture[block, step] = owner
    fig, axes = new_figure(figsize=(8.4, 3.8))
    colors = matplotlib.colors.ListedColormap([BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY])
    axes.imshow(picture, cmap=colors, vmin=0, vmax=5, aspect="auto", interpolation="nearest")
    for step, plan in enumerate(plans):
        for name in plan.preempted_ids:
            axes.plot(step, -1.1, "v", color=colors(int(name)), clip_on=False)
    axes.text(-0.4, -1.7, "▼ makes room for others", color=GREY, fontsize=9)
    for request in range(6):
        axes.text(1.01, 0.95 - 0.11 * request, f"■ request {request}", color=colors(request), transform=axes.transAxes)
    axes.set_xlabel("step")
    axes.set_ylabel("block")
    axes.set_yticks(range(0, 20, 4))
    axes.grid(visible=False)
    return fig


# ---------------------------------------------------------------------------------------------------------------
# Lesson 6: who is idle
# ---------------------------------------------------------------------------------------------------------------


@figure("lesson-6-parallelism/figures/timeline.svg")
def pipeline() -> Figure:
    """When two stages computed, measured: with one batch under way, and with two."""
    measurement = results.read("grids-smollm2-135m")
    fig = Figure(layout="constrained", figsize=(8.5, 3.6))
    for axes, way in zip(fig.subplots(2, 1, sharex=True), ("two stages, one batch", "two stages, two batches")):
        stages = measurement["ways"][way]["timeline"]
        for row, stage in enumerate(stages):
            for step, _, began, ended in stage:
                color = (BLUE, ORANGE)[step % 2] if "two batches" in way else BLUE
                axes.barh(row, ended - began, left=began, height=0.7, color=color, edgecolor="white", linewidth=0.6)
        axes.set_yticks(range(len(stages)), [f"stage {row}" for row in range(len(stages))])
        axes.invert_yaxis()
        axes.set_title(way.removeprefix("two stages, ") + " under way")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds")
    axes.set_xlim(0, 0.9 * max(stage[-1][3] for stage in stages))
    source_line(fig, measurement)
    return fig


# ---------------------------------------------------------------------------------------------------------------
# Lesson 7: what fewer bits cost
# ---------------------------------------------------------------------------------------------------------------


@figure("lesson-7-quantization/figures/quality.svg")
def quality() -> Figure:
    """Perplexity against bytes, for INT8, W8A8 and INT4 in groups, plain and with scales for activations."""
    measurement = results.read("quality-smollm2-135m")
    rows = measurement["rows"]
    exact = rows[0]["perplexity"]
    fig = Figure(layout="constrained", figsize=(10, 4.2))
    eight, four = fig.subplots(1, 2, width_ratios=(1, 2.4), sharey=True)
    for axes in (eight, four):
        axes.axhline(exact, color=GREY, linewidth=1, linestyle=":")
        axes.set_xlabel("MB of weights")
    for row in rows:
        if row["kind"] in ("int8", "w8a8"):
            eight.plot([row["bytes"] / 1e6], [row["perplexity"]], "o", color=BLUE)
            dy = -10 if row["kind"] == "int8" else 10
            label_end(eight, row["bytes"] / 1e6, row["perplexity"], row["kind"].upper(), BLUE, dx=8, dy=dy)
    eight.set_xlim(130, 142)
    eight.set_ylabel("perplexity")
    eight.set_title("eight bits")
    eight.text(130.3, exact + 0.15, f"float32, {rows[0]['bytes'] / 1e6:.0f} MB", color=GREY, fontsize=8)
    styles = {
        (False, False): ("asymmetric", ORANGE, "o-"),
        (True, False): ("symmetric", VERMILION, "s-"),
        (False, True): ("asymmetric, activation-aware", SKY, "o--"),
        (True, True): ("symmetric, activation-aware", GREEN, "s--"),
    }
    for (symmetric, aware), (name, color, style) in styles.items():
        chosen = [
            row
            for row in rows
            if row["kind"] == "int4" and (row["symmetric"], row["activation_aware"]) == (symmetric, aware)
        ]
        four.plot(
            [row["bytes"] / 1e6 for row in chosen],
            [row["perplexity"] for row in chosen],
            style,
            color=color,
            label=name,
        )
        for row in chosen:
            size = str(row["group_size"])
            four.annotate(size, (row["bytes"] / 1e6, row["perplexity"]), (4, 5), textcoords="offset points", fontsize=8)
    four.set_title("four bits, in groups of 32, 64 and 128")
    four.legend(frameon=False, fontsize=9)
    source_line(fig, measurement)
    return fig


# ---------------------------------------------------------------------------------------------------------------
# Lesson 8: what guesses give
# ---------------------------------------------------------------------------------------------------------------


@figure("lesson-8-speculative/figures/speculation.svg")
def speculation() -> Figure:
    """Tokens a second with speculation, as a ratio to none: by what the text is like, and by the number of streams."""
    chats, tales = results.read("speculation-smollm2-135m"), results.read("speculation-tales")
    fig = Figure(layout="constrained", figsize=(10.4, 4.2))
    left, right = fig.subplots(1, 2, width_ratios=(1.35, 1), sharey=True)

    singles = [case for case in chats["cases"] if case["num_streams"] == 1]
    shades = {"adaptive": BLUE, "k=2": "#BDD7EE", "k=4": SKY, "k=8": "#9AA0A6"}
    ways = [way for way in shades if way in singles[0]["ways"]]
    width = 0.84 / len(ways)
    for place, case in enumerate(singles):
        for i, way in enumerate(ways):
            x = place + (i - (len(ways) - 1) / 2) * width
            left.bar(x, case["ways"][way]["ratio"], width * 0.92, color=shades[way], label=way if place == 0 else None)
    left.set_xticks(
        range(len(singles)),
        [f"{case['name']}\n{right_share([case]).replace(' of', chr(10) + 'of')}" for case in singles],
    )
    left.tick_params(axis="x", length=0)
    left.set_ylabel("tokens/s, times those without guesses")
    left.set_title("SmolLM2, n-grams, one stream")
    named = {"adaptive": "as many guesses as pay", **{f"k={k}": f"always {k}" for k in (2, 4, 8)}}
    handles, _ = left.get_legend_handles_labels()
    left.legend(handles, [named[way] for way in ways], frameon=False, fontsize=9, loc="upper right")

    lines = (
        (chats, lambda case: case["is_repetitive"], "n-grams, repeating", BLUE),
        (chats, lambda case: case["is_repetitive"] is False, "n-grams, not repeating", VERMILION),
        (tales, lambda case: case["temperature"] == 0, "draft model, greedy", GREEN),
        (tales, lambda case: case["temperature"] > 0, "draft model, drawn", ORANGE),
    )
    ends = []
    for measurement, belongs, name, color in lines:
        cases = [case for case in measurement["cases"] if belongs(case)]
        counts = sorted({case["num_streams"] for case in cases})
        ratios = [
            statistics.geometric_mean(
                case["ways"]["adaptive"]["ratio"] for case in cases if case["num_streams"] == count
            )
            for count in counts
        ]
        right.plot(range(len(counts)), ratios, "o-", color=color)
        right.set_xticks(range(len(counts)), counts)
        ends.append((ratios[-1], len(counts) - 1, f"{name}\n{right_share(cases)}", color))
    top = 1.12 * max(
        max(case["ways"][way]["ratio"] for case in singles for way in ways),
        max(case["ways"]["adaptive"]["ratio"] for case in tales["cases"]),
    )
    # Names of lines that end side by side stand in a stack, its middle where theirs is, in the order of the ends.
    ends.sort()
    gap = top / 9
    lowest = max(0.07 * top, statistics.mean(ratio for ratio, *_ in ends) - gap * (len(ends) - 1) / 2)
    for i, (_, x, name, color) in enumerate(ends):
        height = lowest + i * gap
        right.annotate(
            name,
            (x, height),
            (10, 0),
            textcoords="offset points",
            color=color,
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    right.set_xlim(-0.2, 3.9)
    right.set_xlabel("streams at once")
    right.set_title("as many guesses as pay")
    for axes in (left, right):
        axes.axhline(1, color="#202124", linewidth=1, linestyle=":")
        axes.set_ylim(0, top)
        axes.grid(axis="x", visible=False)
    source_line(fig, chats)
    return fig


def right_share(cases: list[dict]) -> str:
    """How many of the guesses that paid were right, in all these cases together, in words for a figure."""
    told = [case["ways"]["adaptive"] for case in cases]
    num_guesses = sum(each["num_guesses"] for each in told)
    if not num_guesses:
        return "no guesses"
    num_right = sum(each["num_guesses"] * (each["acceptance_rate"] or 0) for each in told)
    return f"{num_right / num_guesses:.0%} right of {num_guesses:,}"


# ---------------------------------------------------------------------------------------------------------------
# The ladder
# ---------------------------------------------------------------------------------------------------------------


RUNGS = {
    "recompute": ("lesson 2: recompute", VERMILION),
    "cache": ("lesson 3: KV cache", ORANGE),
    "paged": ("lesson 4: paged", SKY),
    "engine": ("lesson 5: the engine", GREEN),
    "engine, kernels": ("with kernels", BLUE),
    "INT8": ("lesson 7: INT8", PURPLE),
    "INT4": ("lesson 7: INT4", "#F0E442"),
    "speculation": ("lesson 8: n-grams", "#202124"),
    "transformers": ("transformers", GREY),
    "transformers, continuous": ("transformers, continuous", GREY),
    "llama.cpp": ("llama.cpp, float32", GREY),
}
"""A way of the ladder -> what it is called in the figure, and its colour; engines of others are grey."""


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
    fig = Figure(layout="constrained", figsize=(11, 1.1 + 0.31 * len(rungs)))
    for axes, (name, ways) in zip(fig.subplots(1, 3, sharey=True), panels.items()):
        for place, way in enumerate(rungs):
            if way not in ways:
                continue
            speed = ways[way]["tokens_per_second"]
            axes.barh(place, speed, color=RUNGS[way][1], height=0.7)
            axes.text(speed, place, f" {speed:.0f}", va="center", color="#202124")
        axes.axhline(ours - 0.5, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_title(name)
        axes.set_yticks(range(len(rungs)), [RUNGS[way][0] for way in rungs])
        axes.set_ylim(len(rungs) - 0.4, -0.6)  # the first on top
        axes.set_xlim(0, 1.18 * max(ways[way]["tokens_per_second"] for way in ways))
        axes.set_xlabel("tokens/s")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
    source_line(fig, measurement)
    return fig


# ---------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------


def svg(draw: Callable[[], Figure]) -> bytes:
    """The figure as SVG: the same bytes for the same data."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "backend": "Agg"}):
        draw().savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return b"".join(line.rstrip() + b"\n" for line in buffer.getvalue().splitlines())


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
