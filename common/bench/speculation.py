"""The speed with speculation, as a ratio to the speed without it, where texts repeat themselves and where they do not.

Each run is a new engine around the same packed model, so its adaptive speculation knows nothing of earlier runs. Rounds
are interleaved and the order of the ways varies. A ratio is taken within a round, so that a change in the machine's
speed affects both of its runs; the result is the median of the ratios.
"""

from __future__ import annotations

import os
import random
import statistics
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch

from common.bench.ladder import Load, check_same, serve, take_turns
from common.bench.peers import Served
from common.bench.results import show_table
from common.checkpoints import find_checkpoint
from common.machine import interleaved_medians, median_seconds
from solutions.llama_pytorch import Llama, SamplingParams, load, use_kernels
from solutions.speculative import propose_ngram

NOTICE = (
    "The library opens at nine in the morning and closes at six in the evening. On Saturdays it closes at two in the "
    "afternoon. Visitors may borrow five books for three weeks. Late books cost ten cents a day. The reading room on "
    "the second floor is quiet. The library is closed on Sundays and on the first Monday of each month."
)
BOAT = (
    "Mia had a small red boat. Every morning she carried it to the lake and let it sail to the other side. One day the "
    "wind was strong, and the boat did not come back. Mia walked around the lake until she found it between the reeds. "
    "It was wet and one sail was torn, but she did not mind. She took it home, dried it by the fire, and sewed the "
    "sail with a blue thread."
)
ORDERS = """def summarize(orders):
    total = 0
    count = 0
    largest = None
    for order in orders:
        if order.cancelled:
            continue
        total += order.price * order.quantity
        count += 1
        if largest is None or order.price > largest.price:
            largest = order
    average = total / count if count else 0
    return {"total": total, "count": count, "average": average, "largest": largest}
"""
CHATS = {  # name: (whether the answer repeats its prompt, the turns: the user's, the assistant's, the user's, ...)
    "quotation": (
        True,
        ["Copy the sentences about opening hours and books from this text, word for word.\n\n" + NOTICE],
    ),
    "rewrite": (
        True,
        [
            "Change the name Ben to Max: Ben has a dog. Ben likes the dog.",
            "Max has a dog. Max likes the dog.",
            "Change the name Mia to Tom: " + BOAT,
        ],
    ),
    "code edit": (
        True,
        [f"Add a print statement that shows the average, and write the whole function.\n\n```python\n{ORDERS}```"],
    ),
    "story": (False, ["Write a short story about a lighthouse keeper who finds a message in a bottle."]),
    "question": (False, ["Why is the sky blue during the day and red in the evening?"]),
    "advice": (False, ["Give me some advice on how to learn to play the piano."]),
}
"""Prompts that SmolLM2 answers as their names say. It copies most of a text that it is asked to change."""

BEGINNINGS = [  # as in what it was trained on: a title, an empty line, a story
    "The Red Kite\n\nOnce there was a",
    "A Very Long Night\n\nOne hot summer afternoon,",
    "The Letter\n\nDo you know",
    "A Day at the Harbour\n\nNobody in the village knew",
]


@dataclass(frozen=True)
class Case(Load):
    is_repetitive: bool | None = None  # whether the answers repeat their prompts; None: the prompts were not chosen so
    fixed: tuple[int, ...] = ()  # fixed numbers of draft tokens that are measured beside adaptive speculation


def encode_chat(tokenizer, turns: list[str]) -> list[int]:
    """Return the tokens of a conversation; for a model without a chat template, those of its last turn."""
    if tokenizer.chat_template is None:
        return tokenizer.encode(turns[-1])[:64]
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)


def chat_cases(tokenizer, quick: bool) -> list[Case]:
    """One stream of each kind; then eight and 32 that repeat their prompts, and as many that do not."""
    num_tokens = 8 if quick else 64
    prompts = {name: encode_chat(tokenizer, turns) for name, (_, turns) in CHATS.items()}
    chosen = ("rewrite", "story") if quick else ("quotation", "rewrite", "code edit", "story", "question")
    fixed, rounds = ((2,), 1) if quick else ((2, 4, 8), 3)
    params = SamplingParams(max_tokens=num_tokens)
    cases = [
        Case(name, [prompts[name]], [params], rounds, is_repetitive=CHATS[name][0], fixed=fixed) for name in chosen
    ]
    for num_streams, length, rounds in [(2, 8, 1)] if quick else [(8, 64, 3), (32, 32, 2)]:
        for is_repetitive in (True, False):
            kinds = [prompts[name] for name, (repeats, _) in CHATS.items() if repeats is is_repetitive]
            several = [kinds[i % len(kinds)] for i in range(num_streams)]
            params = [SamplingParams(max_tokens=length)] * num_streams
            name = "all three that repeat" if is_repetitive else "all three that do not"
            cases.append(Case(name, several, params, rounds, is_repetitive=is_repetitive))
    return cases


def tale_cases(tokenizer, quick: bool) -> list[Case]:
    """Beginnings of stories, for one, eight and 32 streams, greedy and with temperature 0.8."""
    num_tokens = 8 if quick else 96
    prompts = [tokenizer.encode(text) for text in BEGINNINGS]
    cases = []
    for num_streams in (1, 2) if quick else (1, 8, 32):
        for temperature in (0.0, 0.8):
            several = [prompts[i % len(prompts)] for i in range(num_streams)]
            params = [
                SamplingParams(max_tokens=num_tokens, temperature=temperature, seed=i) for i in range(num_streams)
            ]
            fixed = () if num_streams > 1 else (2,) if quick else (2, 4, 8)
            name = "greedy" if temperature == 0 else f"temperature {temperature:g}"
            cases.append(Case(name, several, params, 1 if quick else 5, fixed=fixed))
    return cases


@mock.patch.dict(os.environ, KERNELS="fast")
def measure_speculation(name: str, draft: str | None, quick: bool) -> dict:
    """Ratios, acceptance and tokens a step. draft: the draft model; None: n-grams of the text itself."""
    model, tokenizer = load(name)
    weight = model.model.norm.weight
    use_kernels(model)
    folder = None if draft is None else str(find_checkpoint(draft))
    plain, _ = load(name)  # for near-ties
    cases = chat_cases(tokenizer, quick) if draft is None else tale_cases(tokenizer, quick)
    rows = [measure_case(case, model, plain, tokenizer, folder) for case in cases]
    show(rows)
    repeats = 1 if quick else 7
    return {
        "model": name,
        "draft": draft,
        "dtype": str(weight.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if weight.is_cuda else "cpu",
        "num_speculative_tokens": 8,
        "row_seconds": measure_rows({"kernels": model, "plain": plain}, repeats),
        "lookup_seconds": measure_lookup(repeats),
        "cases": rows,
    }


@torch.inference_mode()
def measure_rows(models: dict[str, Llama], repeats: int) -> dict[str, dict[int, float]]:
    """Return the seconds of a pass over n tokens, by n, without attention, whose time depends on the context too."""

    def step(model: Llama, num_rows: int) -> float:
        positions = torch.arange(num_rows, device=model.model.norm.weight.device)
        hidden = model(positions + 10, positions, lambda layer, q, k, v: q)
        return float(model.logits(hidden).sum())  # waits until it is done, on a GPU too

    steps = {(way, n): partial(step, model, n) for way, model in models.items() for n in (1, 2, 5, 9, 17, 33)}
    told: dict[str, dict[int, float]] = {way: {} for way in models}
    for (way, n), seconds in interleaved_medians(steps, repeats).items():
        told[way][n] = seconds
    for way, each in told.items():
        print(f"{way}, milliseconds by rows: " + ", ".join(f"{n}: {taken * 1e3:.1f}" for n, taken in each.items()))
    return told


def measure_lookup(repeats: int) -> dict[int, float]:
    """Return the seconds of a lookup, by the length of the text, if the end of the text did not occur before."""
    rng = random.Random(0)
    texts = {length: [rng.randrange(50_000) for _ in range(length)] for length in (1000, 4000)}
    return {length: median_seconds(partial(propose_ngram, text, 8), repeats) for length, text in texts.items()}


def measure_case(case: Case, model: Llama, plain: Llama, tokenizer, draft: str | None) -> dict:
    """Measure one case in all its ways. Streams with the same prompt share its blocks, so prompts take little time."""
    ways: dict[str, dict] = {"none": {}, "adaptive": dict(speculative=draft or "ngram")}
    for k in case.fixed:
        ways[f"k={k}"] = {**ways["adaptive"], "num_speculative_tokens": k, "adaptive_speculation": False}
    servers = {way: partial(serve, model, tokenizer, options) for way, options in ways.items()}
    runs = take_turns(f"{len(case.prompts)} x {case.name}", case, servers, {})
    answers = runs["none"][0].token_ids
    ties = dict.fromkeys(ways, 0)
    temperature = case.params[0].temperature
    if temperature == 0:  # otherwise the tokens may differ
        with mock.patch.dict(os.environ, KERNELS="plain"):
            ties = {way: check_same(plain, case, answers, done[0].token_ids, way) for way, done in runs.items()}
    return {
        "name": case.name,
        "is_repetitive": case.is_repetitive,
        "num_streams": len(case.prompts),
        "temperature": temperature,
        "num_rounds": case.rounds,
        "num_prompt_tokens": sum(map(len, case.prompts)),
        "num_output_tokens": sum(map(len, answers)),
        "answer": tokenizer.decode(answers[0]),
        "ways": {way: row(done, runs["none"], ties[way]) for way, done in runs.items()},
    }


def row(done: list[Served], without: list[Served], ties: int) -> dict:
    """The results of one way. without: the runs without speculation, in the same rounds."""
    ratios = [each.tokens_per_second / other.tokens_per_second for each, other in zip(done, without)]
    num_tokens = sum(map(len, done[0].token_ids))
    num_draft_tokens, rate = (done[0].counts.get(key, 0) for key in ("num_draft_tokens", "acceptance_rate"))
    return {
        "tokens_per_second": statistics.median(each.tokens_per_second for each in done),
        "rounds": [each.tokens_per_second for each in done],
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "num_draft_tokens": num_draft_tokens,
        "acceptance_rate": rate if num_draft_tokens else None,
        # Each step gives a request one token and the accepted draft tokens.
        "tokens_per_step": num_tokens / (num_tokens - round(rate * num_draft_tokens)),
        "near_ties": ties,
    }


def show(rows: list[dict]) -> None:
    groups: dict[str, dict[str, list[str]]] = {}
    for each in rows:
        cells = groups[f"{each['num_streams']} x {each['name']}"] = {}
        for way, told in each["ways"].items():
            rate = told["acceptance_rate"]
            cells[way] = [f"{told['tokens_per_second']:.1f}", f"{told['ratio']:.2f}", str(told["num_draft_tokens"])]
            cells[way] += ["" if rate is None else f"{rate:.0%}", f"{told['tokens_per_step']:.2f}"]
            cells[way].append(str(told["near_ties"]))
    show_table(("tokens/s", "x", "drafts", "right", "tokens/step", "near-ties"), groups)
