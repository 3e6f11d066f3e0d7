"""What the engine can do after a lesson that it could not before: counted and measured on this machine.

    make finale-lesson-3

`make test-lesson-N` shows it as soon as it finds the lesson complete. What runs is the student's own code: of this
lesson, and of those before it that are known to be complete; nothing but `tales`, the small model that lies in the
repository, is needed. Counts come first, since they are the same everywhere; times are of one run.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import click
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from common import course
from common.course import LESSONS, ROOT, CourseError, Lesson, modules_of
from common.options import lesson_number

GAINS = {
    0: "You can say how fast an engine can be before anybody has written it.",
    1: "Plain functions of yours read a text and know what may come next.",
    2: "A Llama of your own reads its weights from disk and tells a story.",
    3: "It remembers: every token is computed once.",
    4: "Its memory is cut into blocks, and what begins alike is kept once.",
    5: "It serves many people at once, and nobody waits for the others.",
    6: "One model runs on several processes, none of which holds all of it.",
    7: "The same model takes a quarter of the memory, and hardly gets worse.",
    8: "It guesses ahead and says the same, in fewer steps; and it is whole.",
}
"""What each lesson makes possible."""

PROMPT = "Do you know"
LONGEST = 60.0
"""Seconds after which a measurement is given up."""


@dataclass
class Finale:
    """Rows of (what, before, now); and a text that the engine has written."""

    rows: list[tuple[str, str, str]]
    text: str = ""


# ---------------------------------------------------------------------------------------------------------------
# The measurements: one for each lesson, each a few seconds
# ---------------------------------------------------------------------------------------------------------------


def lesson_0() -> Finale:
    from common.bench.cli import gemm_rate, read_bandwidth
    from solutions.intro import SMOLLM2_135M, decode_ceiling, flops_per_token, kv_cache_bytes, weight_bytes

    bandwidth, flops, shape, context = read_bandwidth(512, 5) * 1e9, gemm_rate(1024, 5) * 1e9, SMOLLM2_135M, 256

    def ceiling(bits: int, batch_size: int) -> str:
        cache = kv_cache_bytes(shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim, context, 4)
        weights = weight_bytes(shape.num_parameters, bits)
        rate = decode_ceiling(flops_per_token(shape, context), weights, cache, batch_size, bandwidth, flops)
        return f"{rate:.0f} tokens/s"

    return Finale(
        [
            ("this machine reads", "", f"{bandwidth / 1e9:.1f} GB/s"),
            ("and computes", "", f"{flops / 1e9:.0f} GFLOP/s"),
            (f"so {shape.name} in float32 gives at most", "", ceiling(32, 1)),
            ("in 4 bits", "", ceiling(4, 1)),
            ("in 4 bits, to 8 people at once", "", ceiling(4, 8)),
        ]
    )


def lesson_1() -> Finale:
    import torch

    from common.checkpoints import Checkpoint, find_checkpoint
    from common.tokenizer import load_tokenizer
    from solutions.llama_pytorch import parse_config
    from solutions.llm_basics import count_parameters, forward, perplexity, softmax

    checkpoint = Checkpoint(find_checkpoint("tales"))
    config, tokenizer = parse_config(checkpoint.config), load_tokenizer(checkpoint.folder)
    weights = {name: checkpoint.read(name).float() for name in checkpoint.names()}
    ids = torch.tensor(tokenizer.encode(unseen_story(0)))
    start = time.perf_counter()
    logits = forward(ids, weights, config)
    seconds = time.perf_counter() - start
    likely = softmax(forward(torch.tensor(tokenizer.encode(PROMPT)), weights, config)[-1])
    words = [f"{tokenizer.decode([int(i)])!r} {likely[i]:.0%}" for i in likely.topk(3).indices]
    return Finale(
        [
            ("numbers in the model, by your formula", "", f"{count_parameters(config):,}"),
            ("perplexity on a story it has not seen", "", f"{perplexity(logits, ids):.2f}"),
            ("that of somebody who knows nothing", "", f"{config.vocab_size:,}"),
            (f"after {PROMPT!r}", "", ", ".join(words)),
            ("time for the whole story, in one pass", "", f"{seconds * 1e3:.0f} ms"),
        ]
    )


def lesson_2() -> Finale:
    from solutions.llama_pytorch import SamplingParams, generate, load

    model, tokenizer = load("tales")
    start = time.perf_counter()
    output = generate(
        model, tokenizer, tokenizer.encode(PROMPT), SamplingParams(temperature=0.8, seed=1, max_tokens=80)
    )
    seconds = time.perf_counter() - start
    return Finale(
        [
            ("read from disk into your model", "", f"{sum(each.numel() for each in model.parameters()):,} numbers"),
            ("told", "", f"{len(output.token_ids)} tokens, {len(output.token_ids) / seconds:.0f} a second"),
        ],
        PROMPT + output.text,
    )


def lesson_3() -> Finale:
    from solutions import kv_cache, llama_pytorch
    from solutions.llama_pytorch import SamplingParams, load

    model, tokenizer = load("tales")
    computed: list[int] = []
    model.register_forward_pre_hook(lambda module, arguments: computed.append(len(arguments[0])))
    prompt, params = tokenizer.encode(PROMPT), SamplingParams(max_tokens=96, ignore_eos=True)

    def told(generate: Callable) -> tuple[list[int], int, float]:
        computed.clear()
        start = time.perf_counter()
        output = generate(model, tokenizer, prompt, params)
        return output.token_ids, sum(computed), len(output.token_ids) / (time.perf_counter() - start)

    (expected, before, slow), (tokens, now, fast) = told(llama_pytorch.generate), told(kv_cache.generate)
    return Finale(
        [
            ("tokens computed, to say 96", f"{before:,}", f"{now:,}"),
            ("tokens a second", f"{slow:.0f}", f"{fast:.0f}"),
            same(expected, tokens),
        ]
    )


def lesson_4() -> Finale:
    from solutions.llama_pytorch import load
    from solutions.paged_attention import KVCacheManager, PagedKVCache, PagedSequence, compute

    model, tokenizer = load("tales")
    shared = tokenizer.encode(unseen_story(0))[:96]
    prompts = [shared + tokenizer.encode(unseen_story(i), add_special_tokens=False)[:16] for i in range(8)]
    longest, block_size = 256, 16
    manager = KVCacheManager(256, block_size)
    cache = PagedKVCache(model, 256, block_size)
    computed: list[int] = []
    model.register_forward_pre_hook(lambda module, arguments: computed.append(len(arguments[0])))
    for i, prompt in enumerate(prompts):
        compute(model, cache, manager, PagedSequence(str(i), prompt))
    held = (len(manager.pool.blocks) - manager.pool.num_free_blocks) * block_size
    return Finale(
        [
            (
                f"slots for 8 requests of {len(prompts[0])} tokens, each up to {longest}",
                f"{8 * longest:,}",
                f"{held:,}",
            ),
            ("tokens computed; the first 96 are the same", f"{sum(map(len, prompts)):,}", f"{sum(computed):,}"),
        ]
    )


def lesson_5() -> Finale:
    from solutions.batching import Engine
    from solutions.llama_pytorch import SamplingParams, load

    model, tokenizer = load("tales")
    prompts = [tokenizer.encode(unseen_story(i))[: 8 + 4 * i] for i in range(8)]
    params = SamplingParams(max_tokens=32, ignore_eos=True)
    with Engine(model, tokenizer, num_blocks=64, enable_prefix_caching=False) as engine:
        alone = [engine.generate([prompt], params, progress=False)[0].token_ids for prompt in prompts]
        before = engine.metrics()
        together = [output.token_ids for output in engine.generate(prompts, params, progress=False)]
        after = engine.metrics()
    num_tokens, num_steps = sum(map(len, together)), after.num_steps - before.num_steps
    return Finale(
        [
            ("steps, to answer 8 people", f"{before.num_steps}", f"{num_steps}"),
            ("output tokens in a step", f"{num_tokens / before.num_steps:.1f}", f"{num_tokens / num_steps:.1f}"),
            (
                "tokens a second, of all together",
                f"{before.tokens_per_second:.0f}",
                f"{num_tokens / (after.seconds - before.seconds):.0f}",
            ),
            same([id for each in alone for id in each], [id for each in together for id in each]),
        ]
    )


def lesson_6() -> Finale:
    import torch

    from solutions.llama_pytorch import SamplingParams
    from solutions.parallelism import ParallelEngine

    params, told = SamplingParams(max_tokens=48, ignore_eos=True), []
    # In float64, where the order of a sum changes no token.
    for num_ranks in (1, 2):
        with ParallelEngine("tales", tensor_parallel=num_ranks, dtype=torch.float64, num_blocks=64) as engine:
            told.append((engine.num_bytes_read, engine.generate([PROMPT], params, progress=False)[0].token_ids))
    (one, expected), (two, tokens) = told
    return Finale(
        [
            ("processes that share each layer", "1", "2"),
            ("bytes of weights that one of them holds", f"{one[0]:,}", " and ".join(f"{each:,}" for each in two)),
            same(expected, tokens),
        ]
    )


def lesson_7() -> Finale:
    import math

    import torch

    from solutions.llama_pytorch import causal_attend, load
    from solutions.llm_basics import perplexity
    from solutions.quantization import Quantization, quantized_copy, weight_bytes

    model, tokenizer = load("tales")
    stories = [torch.tensor(tokenizer.encode(unseen_story(i))) for i in range(4)]

    @torch.inference_mode()
    def perplexity_of(model) -> float:
        each = [model.logits(model(ids, torch.arange(len(ids)), causal_attend)) for ids in stories]
        return math.exp(sum(math.log(perplexity(logits, ids)) for logits, ids in zip(each, stories)) / len(stories))

    before = weight_bytes(model), perplexity_of(model)
    rows = []
    for name, kind in {"8 bits": Quantization("int8"), "4 bits": Quantization("int4")}.items():
        small = quantized_copy(model, kind)
        rows.append((f"weights, {name}", f"{before[0] / 1e6:.2f} MB", f"{weight_bytes(small) / 1e6:.2f} MB"))
        rows.append((f"perplexity on unseen stories, {name}", f"{before[1]:.4f}", f"{perplexity_of(small):.4f}"))
    return Finale(rows)


def lesson_8() -> Finale:
    from solutions.engine import InferenceEngine
    from solutions.llama_pytorch import SamplingParams

    params, told = SamplingParams(max_tokens=64, ignore_eos=True), []
    for draft in (None, "tales-draft"):
        with InferenceEngine("tales", speculative=draft, num_blocks=64) as engine:
            told.append((engine.generate([PROMPT], params, progress=False)[0].token_ids, engine.metrics()))
    (expected, before), (tokens, now) = told
    settings = dict(tensor_parallel=2, quantization="int8", kv_cache_dtype="int8", speculative="tales-draft")
    with InferenceEngine("tales", num_blocks=256, **settings) as engine:
        drawn = [SamplingParams(temperature=0.8, seed=seed, max_tokens=64) for seed in range(8)]
        outputs = engine.generate([PROMPT] * 8, drawn, progress=False)
        whole = engine.metrics()
    return Finale(
        [
            ("steps, to say 64 tokens", f"{before.num_steps}", f"{now.num_steps}"),
            ("guesses of the draft that were right", "", f"{now.acceptance_rate:.0%}"),
            same(expected, tokens),
            (
                "8 requests: 2 processes, INT8, guesses",
                "",
                f"{whole.num_output_tokens} tokens in {whole.num_steps} steps",
            ),
        ],
        PROMPT + outputs[0].text,
    )


def unseen_story(number: int) -> str:
    """One that the model was not trained on."""
    from common.models.training.stories import story

    return story(random.Random(f"held out {number}"))


def same(expected: list[int], tokens: list[int]) -> tuple[str, str, str]:
    equal = sum(a == b for a, b in zip(expected, tokens))
    return "the same tokens as before", "", f"{equal} of {len(expected)}"


MEASUREMENTS: dict[int, Callable[[], Finale]] = {
    0: lesson_0,
    1: lesson_1,
    2: lesson_2,
    3: lesson_3,
    4: lesson_4,
    5: lesson_5,
    6: lesson_6,
    7: lesson_7,
    8: lesson_8,
}


# ---------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------


def complete_lessons(below: int) -> list[int]:
    """Those that the last grading of exactly these files found complete."""
    from common.student.grade import is_passed, kept

    return [
        lesson.number
        for lesson in LESSONS[:below]
        if all(is_passed(kept(module, module.module)) for module in modules_of(lesson.number))
    ]


def show(lesson: Lesson, finale: Finale, console: Console) -> None:
    has_before = any(before for _, before, _ in finale.rows)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_header=has_before)
    table.add_column("")
    for column in ["before", "now"] if has_before else ["now"]:
        table.add_column(column, justify="right")
    for what, before, now in finale.rows:
        cells = [Text(what), Text(before), Text(now, "bold")]
        table.add_row(*(cells if has_before else [cells[0], cells[2]]))
    console.print(f"[bold]{GAINS[lesson.number]}[/]")
    console.print(Padding(table, (0, 0, 0, 2)))
    if finale.text:
        console.print(Padding(Text(finale.text.strip(), "italic"), (1, 0, 0, 2)))
    yours = [str(each.number) for each in LESSONS if each.slug in course.substitutes()]
    model = " with tales" if lesson.number else ""
    code = f"your code of lesson{'s' if len(yours) > 1 else ''} {', '.join(yours)}"
    console.print(Text(f"Measured{model} on {code}; times are of this one run.", "dim"))


@click.command()
@lesson_number
def finale_lesson(lesson_number: int) -> int:
    """Measure what a lesson is worth, once it is complete."""
    console = Console(highlight=False)
    try:
        course.activate("")
        lesson = course.lesson(lesson_number)
        if left := [id for module in modules_of(lesson.number) for id in course.to_do(module.module)]:
            raise CourseError(f"Lesson {lesson.number} is not complete: {', '.join(left)} still to do.")
        numbers = [*complete_lessons(lesson.number), lesson.number]
        course.activate(",".join(map(str, numbers)))
        os.environ["KERNELS"] = "plain"  # so that it is the student's code that runs
        if lesson.number:
            import torch

            torch.set_num_threads(1)  # for so small a model others only stand in the way
        show(lesson, MEASUREMENTS[lesson.number](), console)
    except CourseError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        console.print(Text(f"This could not be measured: {what}. Does make test-lesson-{lesson.number} pass?", "red"))
        return 1
    return 0


def celebrate(number: int, console: Console) -> None:
    """In a process of its own, so that whatever happens there is no worse than that nothing is shown."""
    console.print("[dim]What that is worth is being measured; Ctrl-C leaves it out.[/]")
    command = [sys.executable, "-m", "common", "finale-lesson", str(number)]
    try:
        result = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=LONGEST)
    except KeyboardInterrupt:
        result = None
    except subprocess.TimeoutExpired:
        console.print(f"[dim]It took longer than {LONGEST:g} s, and was left out: make finale-lesson-{number}[/]")
        return
    if result is None or result.returncode:
        console.print(f"[dim]Left out. make finale-lesson-{number} shows it, or why not.[/]")
