"""What goes wrong on a rank: runners that fail at one step on one rank."""

from __future__ import annotations

import os
import time

import torch.distributed as dist

from common.config import EngineConfig
from solutions.batching import ModelRunner
from solutions.engine import build_runner
from solutions.scheduler import ModelRunnerOutput, SchedulerOutput


class FaultyRunner(ModelRunner):
    """Computes as it should, until at one step on one rank something happens."""

    rank, step_id, what = 0, 0, ""

    def execute(self, plan: SchedulerOutput, hidden=None) -> ModelRunnerOutput:
        if dist.get_rank() == self.rank and plan.step_id == self.step_id:
            if self.what == "raise":
                raise ValueError("the numbers are too large")
            if self.what == "exit":
                os._exit(3)
            time.sleep(3600)
        return super().execute(plan, hidden)

    def choose(self, request, logits):
        if self.what == "sample" and dist.get_rank() == self.rank and request.prompt_token_ids == [8, 9]:
            range(1.5)
        return super().choose(request, logits)


def make_faulty_runner(rank: int, step_id: int, what: str, config: EngineConfig, model, layers: range) -> ModelRunner:
    plain = build_runner(config, model, layers)
    runner = FaultyRunner(model, plain.cache)
    runner.rank, runner.step_id, runner.what = rank, step_id, what
    return runner
