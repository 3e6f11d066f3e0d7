"""Records lesson 3's KV cache during a conversation of three turns. On the page each slot is a block of one token.

from common.watching.cache import watch_cache
watch_cache("run.html")
"""

from __future__ import annotations

import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from common.course import CourseError, files_used, substitutes
from common.watching.page import make_page
from common.watching.recorder import CONFIG

TURNS = (
    "There was once a small owl who lived by the river.",
    "There was once a small owl who lived by the sea.",
    " The owl",
)
"""The second is the first with its last word changed. The third, which begins with a space, continues the second."""
MAX_TOKENS = 12
"""The number of tokens of each answer."""
CAPACITY = 48


def watch_cache(out: str | Path) -> str:
    """Run the conversation with lesson 3's code, the student's if it is active, and write the page.

    Each turn is computed by `resume`, and then each token of the answer by `decode_step`. Returns the text in the cache
    at the end. Raises CourseError if nothing was stored in the cache.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.jsonl"
        text = record_cache(file)
        Path(out).write_text(make_page(file), encoding="utf-8")
    return text


def record_cache(file: Path) -> str:
    """Write only the trace; see `watch_cache`."""
    from solutions import kv_cache, llama_pytorch

    model, tokenizer = llama_pytorch.load("tales", device="cpu")
    cache = kv_cache.KVCache(model, CAPACITY)
    known: list[int] = []
    with file.open("w", encoding="utf-8") as lines:
        recorder = CacheRecorder(cache, tokenizer, lines)
        for turn in TURNS:
            token_ids = [*known, *tokenizer.encode(turn.strip())[1:]] if turn[0] == " " else tokenizer.encode(turn)
            recorder.begin_turn(token_ids)
            logits = kv_cache.resume(model, cache, known[: cache.num_tokens], token_ids)
            for num_left in reversed(range(MAX_TOKENS)):
                token_ids = [*token_ids, int(logits.argmax())]
                recorder.sampled(token_ids[-1], is_last=num_left == 0)
                if num_left:
                    logits = kv_cache.decode_step(model, cache, token_ids[-1])
            known = token_ids
        recorder.end()
    if not recorder.num_steps:
        raise CourseError("There is nothing to watch: `attend` never called `append`.")
    return tokenizer.decode(known[: cache.num_tokens])


class CacheRecorder:
    """Writes a trace as `recorder.py` describes it, in which a turn is a request and a pass of the model is a step."""

    def __init__(self, cache: Any, tokenizer: Any, file: Any):
        self.cache, self.tokenizer, self.file, self.start = cache, tokenizer, file, time.perf_counter()
        self.turn, self.num_steps, self.is_open = -1, 0, False
        self.capacity = cache.keys.shape[2]
        self.line: dict[str, Any] = {}
        self.num_stored, self.num_own = 0, 0  # slots that are filled, and of those, in the table of this turn
        config = {**dict.fromkeys(CONFIG), "block_size": 1, "num_blocks": self.capacity, "num_host_blocks": 0}
        self.write(
            {
                "trace": 1,
                "config": {**config, "max_num_batched_tokens": 512},
                "model": "tales",
                "files": files_used() if substitutes() else "",
            }
        )
        cache.append = partial(self.append, cache.append)

    def write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def now(self) -> float:
        return round(time.perf_counter() - self.start, 6)

    def words(self, token_ids: list[int]) -> dict[int, str]:
        return {each: self.tokenizer.token_bytes(each).decode("utf-8", errors="replace") for each in token_ids}

    def begin_turn(self, token_ids: list[int]) -> None:
        if self.turn >= 0:
            self.line["tables"] = {self.turn: [0]}
        self.turn, self.num_own = self.turn + 1, 0
        request = {"id": f"turn-{self.turn + 1}", "prompt": token_ids, "max_tokens": 0, "priority": 0}
        self.line["requests"] = [{**request, "tenant": "default", "parent": None, "time": self.now()}]
        self.line["vocab"] = self.words(token_ids)

    def append(self, original: Any, layer: int, k: Any, v: Any) -> Any:
        """Call the cache's `append`. At the first layer, which begins a pass, write the slots that the pass fills."""
        if layer == 0:
            self.result(None, {})
            start, num_tokens = self.cache.lengths[0], len(k)
            end = start + num_tokens
            emptied = [[slot, 0] for slot in range(start, self.num_stored)]
            filled = [[slot, 1] for slot in range(start, end)]
            tables = {**self.line.pop("tables", {}), self.turn: [self.num_own, *range(self.num_own, end)]}
            self.num_stored = self.num_own = end
            self.num_steps += 1
            run = [[self.turn, num_tokens, 0, start]]
            rest = {"tables": tables, "blocks": emptied + filled, "free": self.capacity - end, "t": [self.now()] * 3}
            self.write({"plan": self.num_steps, "run": run, **self.line, **rest})
            self.line, self.is_open = {}, True
        return original(layer, k, v)

    def sampled(self, token_id: int, is_last: bool) -> None:
        self.result(token_id, {"vocab": self.words([token_id]), **({"ends": {self.turn: "length"}} if is_last else {})})

    def result(self, token_id: int | None, more: dict[str, Any]) -> None:
        """Write the end of a pass. token_id: the sampled token; None after a chunk of a prompt."""
        if self.is_open:
            state = {"free": self.capacity - self.num_stored, "t": [self.now()] * 3, "seconds": 0.0}
            self.write({"result": self.num_steps, "out": [token_id], **more, **state})
            self.is_open = False

    def end(self) -> None:
        self.write({"free": self.capacity - self.num_stored, "metrics": {}, "ranks": {}})
