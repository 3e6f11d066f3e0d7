"""The process that tries one variant after another and reports the result of each."""

from __future__ import annotations

import functools
import itertools
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import psutil

READY = "ready"
LOADED, REFUSED, UNCLEAR = "loaded", "refused", "unclear"
MEGABYTES = 2048  # the address space that a variant may take
PROMPT = "the cat <|im_start|> \U0001f680"


def try_variant(seed: int, number: int) -> dict[str, Any]:
    """Make a checkpoint, change it and use it. Returns its kind, the change and the outcome."""
    from common.authoring.fuzz import changes, files

    source = random.Random(f"{seed} {number}")
    kind = source.choice(files.KINDS)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "checkpoint"
        shutil.copytree(made(kind).name, folder)
        os.environ["COURSE_CACHE"] = f"{place}/cache"
        done = changes.change(kind, folder, source)
        path = folder / "tiny.gguf" if kind.startswith("gguf") else folder
        return {"kind": kind, "change": done, **outcome(lambda: use(path), place)}


@functools.cache
def made(kind: str) -> tempfile.TemporaryDirectory:
    """The folder with the unchanged checkpoint of this kind; it is made once in a process."""
    from common.authoring.fuzz import files

    folder = tempfile.TemporaryDirectory()
    files.make(kind, Path(folder.name))
    return folder


def use(path: Path) -> None:
    """Do what an engine does with a checkpoint: load it, encode a text, compute a token, write a chat."""
    import torch

    from solutions.engine import InferenceEngine
    from solutions.llama_pytorch import SamplingParams, causal_attend, load

    model, tokenizer = load(str(path))
    token_ids = tokenizer.encode(PROMPT)[:8] or [0]
    tokenizer.decode(token_ids, skip_special_tokens=False)
    with torch.inference_mode():
        layers = range(model.config.num_hidden_layers)
        hidden = model.embed(torch.tensor(token_ids))
        model.logits(model.run_layers(hidden, torch.arange(len(token_ids)), causal_attend, layers))
    if tokenizer.chat_template is not None:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    with InferenceEngine(str(path), kv_cache_memory=2**22) as engine:
        if engine.config.max_model_len > 4:
            engine.generate([token_ids[:4]], SamplingParams(max_tokens=3), progress=False)


def outcome(action: Callable[[], None], place: str) -> dict[str, Any]:
    """Run the action and classify the result. A CheckpointError is clear if it names a file in `place`."""
    from common.chat_templates import ChatTemplateError
    from common.checkpoints import CheckpointError

    try:
        action()
    except ChatTemplateError as error:
        return {"outcome": REFUSED, "says": str(error)}
    except CheckpointError as error:
        says = str(error)
        is_named = place in says or says.startswith("config.json: ")
        return {"outcome": REFUSED if is_named else UNCLEAR, "says": says.replace(place, "")}
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a library in Rust may raise one that is no Exception
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno}"
        return {"outcome": UNCLEAR, "says": f"{type(error).__name__} at {where}: {str(error)[:300]}"}
    return {"outcome": LOADED, "says": ""}


def work(connection: Connection, target: str, seed: int, first: int) -> None:
    """In the other process: try one variant after another, from number `first` on, until the process is ended. Sends
    `READY` before the first, then the result of each.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.environ |= {"OMP_NUM_THREADS": "1", "KERNELS": "plain"}
    function = resolve_name(target)
    function(seed, -1)  # imports everything, makes the checkpoints' files
    process = psutil.Process()
    if psutil.LINUX:
        process.rlimit(psutil.RLIMIT_AS, (process.memory_info().vms + (MEGABYTES << 20),) * 2)
    connection.send(READY)
    for number in itertools.count(first):
        start = time.monotonic()
        result = function(seed, number)
        connection.send({"seconds": time.monotonic() - start, "megabytes": _peak_megabytes(), **result})


def _peak_megabytes() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)
