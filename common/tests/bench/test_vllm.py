"""vLLM beside ours, with a stand-in for it: what its process is sent and answers, and that it stands still between."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from common.bench import peers as rivals

STAND_IN = """
from types import SimpleNamespace as Thing
SamplingParams = lambda **given: Thing(**given)

class LLM:
    '''Answers each request with its prompt's last token plus 1, 2, ...: a token of each in a step.'''

    def __init__(self, folder, **options):
        assert options["dtype"] == "float32" and not options["enable_prefix_caching"]
        self.llm_engine, self.work = self, {}
        print("vLLM says something of its own")

    def add_request(self, name, prompt, params):
        self.work[name] = Thing(last=prompt["prompt_token_ids"][-1], left=params.max_tokens, answer=[])

    def has_unfinished_requests(self):
        return any(each.left for each in self.work.values())

    def step(self):
        going = {name: each for name, each in self.work.items() if each.left}
        for each in going.values():
            each.left -= 1
            each.answer.append(each.last + len(each.answer) + 1)
        return [Thing(request_id=name, outputs=[Thing(token_ids=each.answer)]) for name, each in going.items()]
"""


def wait_until(happened: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGSTOP")
def test_requests_and_answers(tmp_path):
    (tmp_path / "vllm.py").write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    vllm = rivals.Vllm(str(python), tmp_path, torch.float32, 2)
    try:
        for _ in range(2):
            served = vllm.serve([[5, 6], [30]], [3, 1])
            assert served.token_ids == [[7, 8, 9], [31]]
            assert [len(times) for times in served.times] == [3, 1] and served.times[0] == sorted(served.times[0])
            if sys.platform == "linux":
                wait_until(lambda: "T (stopped)" in Path(f"/proc/{vllm.process.pid}/status").read_text())
    finally:
        vllm.close()
    assert vllm.process.poll() is not None


def test_without_it(tmp_path):
    with pytest.raises(rivals.Unable, match="VLLM_PYTHON does not name"):
        rivals.Vllm(None, tmp_path, torch.float32, 2)
    with pytest.raises(rivals.Unable, match="no-such-python"):
        rivals.Vllm(str(tmp_path / "no-such-python"), tmp_path, torch.float32, 2)
    with pytest.raises(rivals.Unable, match="ended with status 1"):
        rivals.Vllm(sys.executable, tmp_path, torch.float32, 2)  # an environment without vLLM
