"""Lesson 3's reference: lesson 2's tokens, whatever the chunks, the family and the number of heads."""

from __future__ import annotations

import pytest
import torch

from common.authoring.soak.requests import Letters, random_model
from solutions import llama_pytorch
from solutions.kv_cache import KVCache, decode_step, generate, prefill, resume
from solutions.llama_pytorch import SamplingParams, recompute

SHAPES = {
    "grouped": {},
    "one KV head": dict(num_key_value_heads=1),
    "as many KV heads": dict(num_key_value_heads=4),
    "wide heads": dict(head_dim=12),
    "qwen2, biases": dict(model_type="qwen2"),
    "qwen3, norms of q and k": dict(model_type="qwen3", head_dim=6),
}
PROMPT = list(range(5, 36))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk_size", [1, 3, 7, 31])
@torch.inference_mode()
def test_logits_are_those_of_computing_all_again(shape, chunk_size):
    model = random_model(**SHAPES[shape])
    cache = KVCache(model, 40)
    torch.testing.assert_close(prefill(model, cache, PROMPT, chunk_size), recompute(model, PROMPT))
    torch.testing.assert_close(decode_step(model, cache, 7), recompute(model, [*PROMPT, 7]))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_tokens(shape):
    model = random_model(**SHAPES[shape])
    for params in (SamplingParams(max_tokens=20), SamplingParams(max_tokens=20, temperature=1.0, seed=2, top_p=0.9)):
        for prompt in (PROMPT, PROMPT[:1]):
            alone = llama_pytorch.generate(model, Letters(), prompt, params)
            assert generate(model, Letters(), prompt, params) == alone


@torch.inference_mode()
def test_a_conversation_goes_on_from_what_is_cached():
    model = random_model()
    cache, cached = KVCache(model, 64), []
    for turn in (PROMPT[:9], PROMPT[:20], [*PROMPT[:11], 2, 2, 2], [*PROMPT[:11], 2, 2, 2], PROMPT[:5]):
        torch.testing.assert_close(resume(model, cache, cached, turn), recompute(model, turn))
        cached = turn
        assert cache.num_tokens == len(turn)
