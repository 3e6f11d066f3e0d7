"""`make watch-engine`: records the engine while it answers as in `make run`, and writes an HTML file that replays it.

The trace is written beside the page: `run.jsonl` for `run.html`. COMPARE takes the trace of another run.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from functools import partial
from pathlib import Path

import click

from common.course import counted, files_used, substitutes
from common.options import engine_options, mine, number, option, threads
from common.sampling import SamplingParams
from common.start import OptionError, option_errors, start_engine
from common.student.chat import Talker, talker_of
from common.student.serve import BEGINNINGS, QUESTIONS
from common.watching.chrome import chrome_events
from common.watching.page import make_page, prepare
from common.watching.recorder import recording
from common.watching.trace import read_trace, totals

PATH = click.Path(path_type=Path, dir_okay=False)


@click.command("watch-engine")
@option("--out", "OUT", type=PATH, default=Path("run.html"), help="the page; its trace is written beside it, as .jsonl")
@option("--compare", "COMPARE", type=PATH, help="the trace of another run, to be shown beside this one")
@option("--trace", "TRACE", type=PATH, help="also write Chrome trace events, which ui.perfetto.dev opens")
@option("--requests", "REQUESTS", type=number(), default=8, help="prompts at once: those of make run, repeated")
@option("--samples", "SAMPLES", type=number(), default=1, help="answers to each prompt")
@click.option("--max-tokens", type=number(), default=48, help="of an answer")
@click.option("--temperature", type=float, default=0.0)
@click.option("--seed", type=int, default=0, help="the same seed, the same answers")
@mine()
@engine_options
@threads
def watch_engine(out: Path, compare: Path | None, trace: Path | None, mine: str, threads: int | None, **options) -> int:
    """Record the engine while it answers, and write a page that replays it step by step."""
    count, samples = options.pop("requests"), options.pop("samples")
    sampling = {name: options.pop(name) for name in ("max_tokens", "temperature", "seed")}
    with option_errors():
        params = SamplingParams(n=samples, **sampling)
    own = out.with_suffix(".jsonl")
    prepare(out)
    if compare is not None and (not compare.is_file() or compare.resolve() == own.resolve()):
        raise OptionError(f"COMPARE is {compare}: it must be the .jsonl of another run, and OUT another name than its.")
    other = compare and read_trace(compare)
    with tempfile.TemporaryDirectory() as folder:
        make = None
        if options["tensor_parallel"] * options["pipeline_parallel"] > 1:
            from common.watching.ranks import timed_engine

            make = partial(timed_engine, Path(folder))
        with start_engine(options, mine, threads, make) as engine:
            talker = talker_of(engine, Path(options["model"]).name, params)
            failure = record(engine, prompts(talker, count), params, own, Path(folder))
    done = read_trace(own)
    if not done.steps:
        raise failure or OptionError("No step was computed: there is nothing to show.")
    out.write_text(make_page(own, other and compare), encoding="utf-8")
    if trace is not None:
        trace.write_text(json.dumps(chrome_events(done)), encoding="utf-8")
    found = totals(done)
    written = ", ".join(map(str, (out, own, *([trace] if trace else []))))
    sizes = {"step": found.num_steps, "token": found.num_output_tokens, "preemption": found.num_preemptions}
    print(f"{', '.join(counted(number, noun) for noun, number in sizes.items())}. {whose()}")
    print(f"Written: {written}. Open {out} in a browser.")
    if failure:
        print("The run ended early, and the page shows it until then.", file=sys.stderr)
        raise failure
    return 0


def prompts(talker: Talker, count: int) -> list[list[int]]:
    """The tokens of `count` prompts: those of `make run`, repeated."""
    texts = QUESTIONS if talker.has_template else BEGINNINGS
    return [talker.encode(text) for text in itertools.islice(itertools.cycle(texts), count)]


def whose() -> str:
    """A sentence that says whose modules run."""
    return files_used() if substitutes() else "The reference's modules."


def record(engine, prompts: list[list[int]], params: SamplingParams, file: Path, folder: Path) -> Exception | None:
    """Answer the prompts and write the trace. Returns the error that ended the run early, or None."""
    failure = None
    with file.open("w", encoding="utf-8") as lines, recording(engine, lines, whose()) as recorder:
        try:
            engine.generate(prompts, params)
        except ValueError as error:
            failure = OptionError(str(error))
        except Exception as error:  # perhaps a mistake in the student's scheduler: the page shows the steps before it
            failure = error
        if any(folder.iterdir()):
            from common.watching.ranks import rank_times

            recorder.rank_times = rank_times(folder, recorder.begin)
    return failure
