"""`make soak`: random load on the whole engine. All answers are compared with those of lesson 2's `generate`.

    make soak MINUTES=10

Each run has a number, which determines the model, the speculation, the size of the pool, the kind of preemption and the
requests. Some requests are aborted, and some have a fault of their own. One run in ten uses two processes. Some steps
are interrupted, at any of their lines. After every step the block tables and reference counts are checked. Tokens that
are sampled with a draft model differ from those without, so their distribution over all runs is tested at the end. The
command ends with the first run that fails, and prints how to repeat it.
"""

from __future__ import annotations

import itertools
import random
import signal
import time
import traceback
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from common.course import activate, files_used
from common.options import mine, number, option
from common.progress import progress_bar

if TYPE_CHECKING:
    from common.authoring.soak.load import Report

COUNTED = {
    "runs": ("runs", 0),
    "answers": ("answers", 0),
    "steps": ("steps", 0),
    "chunks": ("chunks of prompts", 20),
    "cached": ("prompt tokens found in the prefix cache", 20),
    "copies": ("blocks copied on write", 60),
    "preemptions": ("preemptions", 20),
    "pipelined": ("  of them with several steps in flight", 100),
    "swaps_out": ("blocks swapped out", 60),
    "swaps_in": ("blocks swapped in", 60),
    "aborted": ("requests aborted", 20),
    "interrupts": ("steps interrupted, at any line", 60),
    "failed": ("requests with a fault of their own", 20),
    "drafts": ("drafts", 20),
    "accepted": ("  accepted", 20),
    "rejected": ("  rejected", 20),
    "drawn": ("tokens drawn with a draft's help", 20),
    "runs with n-grams": ("runs with n-grams", 20),
    "runs with a draft": ("runs with a draft model", 20),
    "runs, adaptive": ("runs with as many draft tokens as pay", 20),
    "runs with tales": ("runs with tales", 20),
    "runs with windows": ("runs with a window in every layer", 60),
    "runs with experts": ("runs with a mixture of experts", 60),
    "runs over processes": ("runs over two processes", 20),
    "runs, contiguous": ("runs with a contiguous cache", 60),
    "runs, int8 cache": ("runs with an INT8 cache", 60),
    "runs, fewer bits": ("runs with quantized weights", 60),
}
"""The label of each count, and the number of runs after which it must not be 0, since a soak that never reaches a case
proves nothing about it."""

UNLIKELY = 1e-6
"""The smallest probability of the sampled tokens' chi-squared statistic at which their distribution counts as right."""


def missing(counts: dict[str, int]) -> list[str]:
    """The labels of the counts that must not be 0 any more, and are."""
    runs = counts["runs"]
    return [label.strip() for name, (label, due) in COUNTED.items() if due and runs >= due and not counts[name]]


def line(total: Report) -> str:
    counts = total.counts
    return (
        f"{counts['runs']} runs, {counts['answers']} answers, {counts['steps']} steps; "
        f"{counts['preemptions']} preemptions, {counts['swaps_out'] + counts['swaps_in']} blocks swapped, "
        f"{counts['aborted']} aborted; draft tokens: {counts['accepted']} right, {counts['rejected']} wrong"
    )


def summary(total: Report, seconds: float) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1))
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{seconds / 60:.1f}", "minutes")
    for name, (label, _) in COUNTED.items():
        table.add_row(f"{total.counts[name]:,}", label)
    if own := total.counts["own_accepted"] + total.counts["own_rejected"]:
        share = total.counts["own_accepted"] / own
        table.add_row(f"{share:.1%}", "of a draft's draft tokens accepted where it is the target itself")
    return table


def verdict(total: Report) -> list[str]:
    """The faults of all runs together, after each run has been found right."""
    from common.authoring.soak.oracle import evenness

    wrong = [f"nothing happened: {', '.join(missed)}"] if (missed := missing(total.counts)) else []
    if len(total.places) >= 200 and (likely := evenness(total.places)) < UNLIKELY:
        wrong.append(
            f"{len(total.places)} tokens that were drawn with a draft's help are not distributed as the model says: "
            f"by chance that happens with probability {likely:.1g}"
        )
    return wrong


@click.command("soak")
@option("--minutes", "MINUTES", type=number(0, float), default=10.0, help="begin no new run after these")
@option("--seed", "SEED", type=int, help="the first run's number; default: any")
@click.option("--only", type=int, metavar="SEED", help="this run and no other")
@mine()
def soak_command(minutes: float, seed: int | None, only: int | None, mine: str) -> int:
    """Put random load on the whole engine, and compare every answer with one that was computed alone."""
    activate(mine)
    print(files_used(), flush=True)
    import torch

    from common.authoring.soak.load import Models, Report, Run

    torch.set_num_threads(1)  # with tiny models, more threads would only wait for each other
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets commands started with "&" ignore it
    console, total, models = Console(), Report(), Models()
    seed = random.randrange(10**6) if seed is None else seed
    code, start, told = 0, time.monotonic(), 0.0
    with progress_bar("soak", 60 * minutes, console.is_terminal) as update:
        try:
            for own in itertools.count(seed) if only is None else [only]:
                run = Run.number(own, models)
                total.add(run.execute(models))
                seconds = time.monotonic() - start
                update(seconds, line(total))
                if not console.is_terminal and seconds > told + 60:
                    told = seconds
                    print(f"{seconds / 60:.0f} min  {line(total)}", flush=True)
                if seconds > 60 * minutes:
                    break
        except KeyboardInterrupt:
            code = 130
        except Exception:
            failure, code = traceback.format_exc(), 1
    console.print(summary(total, time.monotonic() - start))
    same = f" --mine {mine}" if mine else ""
    if code == 1:
        print(f"\n{failure}\n{run}\n")
        print(f"Run {own} failed. To do it again:\n\n    python -m common soak --only {own}{same}")
    elif code == 130:
        print("Stopped by hand; what was done was right.")
    elif only is not None:
        print(f"Run {only} is right.")
    elif wrong := verdict(total):
        code = 1
        print("\n".join(f"Wrong: {each}." for each in wrong))
        print(f"The same runs again:\n\n    python -m common soak --minutes {minutes:g} --seed {seed}{same}")
    else:
        print("All answers are right.")
    return code
