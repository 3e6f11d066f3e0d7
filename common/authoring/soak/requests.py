"""Random tiny models, requests and settings for an engine, and a tokenizer of letters."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from solutions.llama_pytorch import Llama, SamplingParams, parse_config
from solutions.paged_attention import cdiv

MAX_MODEL_LEN = 64
END = 3
"""The end-of-sequence token of `Letters`."""
LETTERS = "abcdefghijklmnopqrstuvwxyz é🙂"


class Letters:
    """A tokenizer of 40 tokens, each a piece of text; one of them ends a sequence."""

    bos_token_id, eos_token_ids, chat_template, vocab_size = None, frozenset({END}), None, 40

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == END else LETTERS[token_id % 29].encode()[: 1 + token_id // 10]


TINY = dict(
    model_type="llama", vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip


def random_model(seed: int = 0, **changes) -> Llama:
    """A tiny Llama with random weights in float64, so that no two tokens are equally likely."""
    model = Llama(parse_config({**TINY, **changes})).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.requires_grad_(False).copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    return model


FAULTS = ("raises", "is not a number", "forbids all", "too short")


@dataclass(frozen=True)
class Fault:
    """A logits processor that fails, or returns invalid scores, once the output has `after` tokens."""

    what: str  # of FAULTS
    after: int

    def __call__(self, output: Sequence[int], scores: Tensor) -> Tensor:
        if len(output) < self.after:
            return scores
        if self.what == "raises":
            raise LookupError("a fault")
        if self.what == "too short":
            return scores[:3]
        return scores.new_full(scores.shape, -math.inf if self.what == "forbids all" else math.nan)


@dataclass
class Ask:
    """One request of the load."""

    prompt: list[int]
    params: SamplingParams
    priority: int
    tenant: str
    step: int  # when it arrives
    is_impatient: bool  # whether it may be aborted


def random_asks(rng: random.Random, vocabulary: list[int], stories: list[list[int]], num: int) -> list[Ask]:
    """Requests whose prompts often begin alike, with greedy and seeded sampling, stop strings and penalties."""
    asks = []
    for _ in range(num):
        story = rng.choice(stories)
        prompt = story[: rng.randint(1, len(story))] + rng.choices(vocabulary, k=rng.choice([0, 0, 2, 6]))
        params = SamplingParams(
            max_tokens=rng.randint(1, 14),
            n=rng.choice([1, 1, 1, 2, 3]),
            temperature=rng.choice([0.0, 0.0, 1.0]),
            top_p=rng.choice([1.0, 0.9]),
            seed=rng.randint(0, 99),
            ignore_eos=rng.random() < 0.5,
            stop=rng.choice([(), (), ("a",), ("the", "own")]),
            repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            logprobs=rng.choice([None, None, 1]),
        )
        asks.append(Ask(prompt, params, rng.randint(0, 3), rng.choice("abc"), rng.randint(0, 20), rng.random() < 0.15))
    return asks


def random_settings(rng: random.Random, asks: list[Ask]) -> dict:
    """Options of an engine that can serve these requests: with few blocks or many, and any budget and policy."""
    block_size = rng.choice([1, 2, 4, 7, 16])
    longest = max(len(ask.prompt) + ask.params.max_tokens - 1 for ask in asks)
    needed = cdiv(longest, block_size)
    settings = dict(
        block_size=block_size,
        num_blocks=rng.choice([needed, needed + 1, needed + 3, 2 * needed, 3 * needed, 20 * needed]),
        max_num_seqs=rng.choice([1, 3, 8, 64]),
        max_num_batched_tokens=rng.choice([1, 2, 5, 16, 64, 1024]),
        scheduling_policy=rng.choice(["fcfs", "priority", "fair"]),
        preemption=rng.choice(["recompute", "swap"]),
        enable_prefix_caching=rng.random() < 0.6,
        max_model_len=MAX_MODEL_LEN,
    )
    if settings["preemption"] == "swap":
        settings["num_host_blocks"] = rng.choice([1, needed, 4 * needed])
    if rng.random() < 0.15:
        settings.update(
            kv_cache_policy="contiguous", enable_prefix_caching=False, num_blocks=rng.choice([1, 2, 5]),
            num_host_blocks=settings.get("num_host_blocks") and 3,
        )  # fmt: skip
    return settings
