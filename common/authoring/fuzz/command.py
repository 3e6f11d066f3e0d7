"""`make fuzz`: damaged checkpoints of every kind. Each must load, or be refused with an error that names the file.

    make fuzz SECONDS=60
    make fuzz SEED=7 ONLY=123

A variant is a small checkpoint with one or two changes, which follow from the seed and its number. Variants are tried
in another process. If one takes too long or ends the process, a new process is started. The command lists the failures,
grouped by their messages, and how to repeat one.
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import click

from common.authoring.fuzz.variants import LOADED, READY, REFUSED, UNCLEAR
from common.options import number, option
from common.workers import call, kill

LONGEST = 5.0  # seconds for a variant
LONGEST_START = 120.0  # seconds to import everything
HANGS, CRASHES = "hangs", "crashes"
TARGET = "common.authoring.fuzz.variants:try_variant"


@dataclass
class Report:
    """The results of all variants. failures: those that neither loaded nor were refused clearly."""

    counts: Counter = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)
    slowest: float = 0.0
    megabytes: int = 0

    def add(self, result: dict[str, Any]) -> None:
        self.counts[result["outcome"]] += 1
        self.slowest = max(self.slowest, result.get("seconds", 0.0))
        self.megabytes = max(self.megabytes, result.get("megabytes", 0))
        if result["outcome"] not in (LOADED, REFUSED):
            self.failures.append(result)

    @property
    def total(self) -> int:
        return self.counts.total()

    def lines(self) -> list[str]:
        counts = [f"{self.counts[name]:,} {name}" for name in (LOADED, REFUSED, UNCLEAR, HANGS, CRASHES)]
        lines = [f"{self.total:,} variants: {', '.join(counts)}."]
        lines += [f"The slowest took {self.slowest:.1f} s; the process had {self.megabytes:,} MB at most."]
        groups: dict[str, list[dict]] = {}
        for failure in self.failures:
            groups.setdefault(f"{failure['outcome']}: {failure['says'][:160]}", []).append(failure)
        for says, found in sorted(groups.items(), key=lambda item: -len(item[1])):
            lines += ["", f"{len(found)} x {says}"]
            lines += [f"    {each['number']}: {each.get('kind')}: {each.get('change')}" for each in found[:3]]
        return lines


def fuzz(seed: int, seconds: float, most: int | None, target: str = TARGET, longest: float = LONGEST) -> Report:
    """Try variants until the time is over or `most` are tried.

    target: the function that tries a variant. longest: seconds for each.
    """

    def start() -> tuple[subprocess.Popen, Connection, float]:
        return *call("common.authoring.fuzz.variants:work", target, seed, report.total), LONGEST_START

    report, end = Report(), time.monotonic() + seconds
    process, connection, patience = start()
    try:
        while time.monotonic() < end and (most is None or report.total < most):
            result = {"outcome": HANGS, "says": f"took more than {longest:g} s"}
            try:
                if connection.poll(patience):
                    result = connection.recv()
            except (EOFError, OSError):
                result = {"outcome": CRASHES, "says": f"exit status {process.wait()}"}
            patience = longest
            if result == READY:
                continue
            report.add({**result, "number": report.total})
            if result["outcome"] in (HANGS, CRASHES):
                kill(process)
                process, connection, patience = start()
    finally:
        kill(process)
    return report


@click.command("fuzz")
@option("--seconds", "SECONDS", type=number(1, float), default=60.0, help="begin no new variant after these")
@option("--seed", "SEED", type=int, help="determines all variants; default: any")
@option("--variants", "VARIANTS", type=number(1, int), help="stop after this number; default: when the time is over")
@option("--only", "ONLY", type=int, help="this variant and no other, in this process")
def fuzz_command(seconds: float, seed: int | None, variants: int | None, only: int | None) -> int:
    """Load damaged checkpoints: each must work, or be refused by a sentence that names the file."""
    seed = random.randrange(10**6) if seed is None else seed
    if only is not None:
        from common.authoring.fuzz.variants import try_variant

        result = try_variant(seed, only)
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return int(result["outcome"] == UNCLEAR)
    report = fuzz(seed, seconds, variants)
    print("\n".join(report.lines()))
    if report.failures:
        print(f"\nOne of them again:\n\n    python -m common fuzz --seed {seed} --only {report.failures[0]['number']}")
    else:
        print(f"All are clear. The same again:\n\n    python -m common fuzz --seed {seed} --variants {report.total}")
    return int(bool(report.failures))
