"""The figures of lessons 0 to 4: one model, one request, and its memory.

They import lessons when they are drawn, since a copy of the course may be without the solutions of some.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from common.bench import results
from common.bench.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    figure,
    footnote,
    label_end,
    name_rows,
    new_figure,
    source_line,
)
from common.checkpoints import cached
from common.course import CourseError

# --- Lesson 0: the roofline -------------------------------------------------------------------------------------------


@figure("lesson-0-intro/figures/roofline.svg")
def roofline() -> Figure:
    """The two ceilings of the measured machine, and SmolLM2 in float32 below them.

    A step reads each weight once (4 bytes) and uses it for every token (2 operations), so a step of B tokens has B / 2
    operations a byte. This leaves out the cache of keys and values, which is small for these short contexts.
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
    axes.set(
        ylim=(bandwidth / 16, peak * 3),
        xlim=(line[0], line[-1]),
        xlabel="arithmetic intensity: operations for each byte read",
        ylabel="GFLOP/s",
        title="Decoding one stream is bound by memory, prefill by arithmetic",
    )
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


# --- Lesson 1: rotary embedding, three attention heads, where the parameters are --------------------------------------


@figure("lesson-1-llm-basics/figures/rotary.svg")
def rotary() -> Figure:
    """Left: the pairs of a head, as clock hands, at the first positions. Right: a rotated query times rotated keys."""
    from solutions.llm_basics import apply_rotary, rotary_frequencies, rotary_tables

    fig, (clocks, products) = new_figure(1, 2, width_ratios=(1.1, 1), figsize=(11, 3.8))
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
    from solutions.llama_pytorch import causal_attend, load

    heads = {
        (18, 8): "layer 18, head 8\nrests on the first token",
        (11, 1): "layer 11, head 1\nlooks one token back",
        (17, 5): "layer 17, head 5\nlooks for what came next, last time",
    }
    if cached("smollm2-135m") is None:
        raise CourseError("SmolLM2 is not on this machine; `make run` fetches it")
    model, tokenizer = load("smollm2-135m", torch.float32, "cpu")
    token_ids = tokenizer.encode(SENTENCE)
    words = [tokenizer.decode([token_id]).strip() for token_id in token_ids]
    maps = {}

    def attend(layer: int, q, k, v):
        for _, head in (each for each in heads if each[0] == layer):
            scores = q[:, head] @ k[:, head // 3].T / math.sqrt(q.shape[-1])
            mask = torch.ones_like(scores, dtype=torch.bool).triu(1)
            maps[layer, head] = scores.masked_fill(mask, -math.inf).softmax(-1)
        return causal_attend(layer, q, k, v)

    with torch.inference_mode():
        model(torch.tensor(token_ids), torch.arange(len(token_ids)), attend)
    fig, all_axes = new_figure(1, 3, sharey=True, figsize=(12.5, 4.9))
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
    name_rows(axes, models)
    axes.set(xlim=(0, 100), xlabel="share of the parameters (the norms have less than 0.1 %)")
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
    axes.set(
        xlim=(1, batches[-1] * 24), xlabel="requests in the batch", ylabel="tokens/s of all requests together, at most"
    )
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    axes.set_title("Batching is nearly free, until the caches are what is read")
    model_and_machine = "Llama 2 7B, 16 bits, one H100 SXM (3.35 TB/s, 989 TFLOP/s), if its memory were large enough"
    footnote(fig, f"By arithmetic: {model_and_machine}")
    return fig


# --- Lessons 2 and 3: seconds for one more token, without a cache and with one ----------------------------------------


def over_contexts(name: str, title: str, ways: dict[str, tuple[str, str, int]]) -> tuple[Figure, matplotlib.axes.Axes]:
    """Plot the milliseconds for the next token against the number of tokens before it.

    ways: of each its name in the figure, its colour, and how many points above the end of its line the name stands.
    """
    measurement = results.read(name)
    rows = measurement["rows"]
    contexts = [row["context"] for row in rows]
    fig, axes = new_figure()
    for way, (label, color, dy) in ways.items():
        if way in rows[0]:
            values = [1e3 * row[way] for row in rows]
            axes.plot(contexts, values, "o-", color=color)
            label_end(axes, contexts[-1], values[-1], label, color, dx=8, dy=dy)
    axes.set(xlim=(0, contexts[-1] * 1.5), xticks=[x for x in contexts if x >= contexts[-1] / 8])
    axes.set_ylim(bottom=0)
    axes.set(xlabel="tokens before it", ylabel="milliseconds for one more token", title=title)
    source_line(fig, measurement)
    return fig, axes


@figure("lesson-2-llama-pytorch/figures/recompute.svg")
def recompute() -> Figure:
    ways = {
        "recompute": ("ours: all again", VERMILION, 0),
        "transformers, no cache": ("transformers, no cache", ORANGE, 0),
        "transformers, cache": ("transformers, with its cache", BLUE, 0),
    }
    return over_contexts("recompute-smollm2-135m", "SmolLM2: a token costs more, the more came before", ways)[0]


@figure("lesson-3-kv-cache/figures/kv-cache.svg")
def kv_cache() -> Figure:
    """Milliseconds for the next token. The scale is logarithmic, because two lines are far below the third."""
    ways = {
        "recompute": ("lesson 2: all again", VERMILION, 0),
        "cache": ("lesson 3: the cache", BLUE, 8),
        "transformers, cache": ("transformers' cache", GREY, -8),
    }
    title = "SmolLM2: with a cache a token costs the same, whatever came before"
    fig, axes = over_contexts("kv-cache-smollm2-135m", title, ways)
    axes.set_yscale("log", base=10)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}")
    axes.set_ylim(30, 2_000)
    return fig


# --- Lesson 4: slots that blocks waste --------------------------------------------------------------------------------


@figure("lesson-4-paged-attention/figures/utilisation.svg")
def utilisation_by_block_size() -> Figure:
    """The share of held slots that contain a token, for block sizes from 1 to the whole context."""
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
    axes.set(
        ylim=(0, 112),
        xlabel="tokens in a block",
        ylabel="% of held slots with a token in them",
        title="What a sequence reserves, and what it fills",
    )
    return fig
