"""What a request may ask of sampling: the default for None, and a refusal that names the field for what cannot be."""

from __future__ import annotations

import math
import pickle
import re
from dataclasses import fields
from fractions import Fraction
from itertools import repeat
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.sampling import MAX_STOP_CHARACTERS, SamplingParams
from solutions.llama_pytorch import adjust_logits, check_prompt, sample, top_logprobs


class Vanishing:
    """Can be pickled, and not read again."""

    def __call__(self, output, scores):
        return scores

    def __reduce__(self):
        return int, ("not a number",)


@pytest.mark.parametrize(("processor", "says"), [(lambda output, scores: scores, "pickle"), (Vanishing(), "invalid")])
def test_a_logits_processor_that_cannot_be_sent_fails_when_it_is_called(processor, says):
    """Then it ends its own request; an error while it is sent would end the engine."""
    sent = pickle.loads(pickle.dumps(SamplingParams(logits_processors=[processor], seed=7)))
    assert sent.seed == 7
    with pytest.raises(ValueError, match=f"cannot be sent to the process that samples: .*{says}"):
        sent.logits_processors[0]([], torch.zeros(3))
    assert pickle.loads(pickle.dumps(SamplingParams(logits_processors=[max]))) == SamplingParams(
        logits_processors=[max]
    )


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (lambda scores: None, "an object of type NoneType; it must return a tensor of floats of shape (4,) on cpu"),
        (lambda scores: scores.tolist(), "an object of type list"),
        (lambda scores: scores.numpy(), "an object of type ndarray"),
        (lambda scores: scores[:0], "a tensor of floats of shape (0,) on cpu"),
        (lambda scores: scores[None], "a tensor of floats of shape (1, 4) on cpu"),
        (lambda scores: scores > 0, "a tensor of torch.bool of shape (4,)"),
        (lambda scores: scores.to("meta"), "a tensor of floats of shape (4,) on meta"),
        (lambda scores: scores * math.nan, "no token with a score that is a number: the highest is nan"),
        (lambda scores: scores - math.inf, "no token with a score that is a number: the highest is -inf"),
        (lambda scores: scores + math.inf, "no token with a score that is a number: the highest is inf"),
    ],
)
def test_what_a_logits_processor_may_return(returned, says):
    """In place of token 0, without a word, or of a library's error."""
    scores = torch.arange(4.0)
    params = SamplingParams(logits_processors=[lambda output, scores: scores, lambda output, scores: returned(scores)])
    with pytest.raises(ValueError, match="logits_processors .*" + re.escape(says)):
        params.process([], scores)
    half = SamplingParams(logits_processors=[lambda output, scores: scores.half()])
    assert half.process([], scores).dtype == torch.float16 and SamplingParams().process([], scores) is scores


def test_none_is_the_default():
    assert SamplingParams(**dict.fromkeys([field.name for field in fields(SamplingParams)])) == SamplingParams()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 1.5), ("n", 10**9), ("logprobs", 10**6), ("prompt_logprobs", 10**6), ("stop_token_ids", range(10**5)),
        ("stop", [5] * 1000), ("n", 0), ("n", True), ("top_k", 1.5), ("top_k", -1), ("top_p", 1e-46), ("top_p", 0),
        ("top_p", 1.1), ("min_p", -0.1), ("temperature", -1), ("temperature", math.inf), ("temperature", math.nan),
        ("temperature", "1"), ("seed", "a"), ("seed", 1.5), ("max_tokens", 0), ("max_tokens", 2.5),
        ("min_tokens", 129), ("min_tokens", -1), ("logprobs", -1), ("logprobs", 1.5), ("repetition_penalty", 1e39),
        ("repetition_penalty", 0), ("presence_penalty", -1e39), ("frequency_penalty", math.nan), ("stop", ["a", ""]),
        ("stop", 5), ("stop", b"ab"), ("stop", "x" * 1_000_000), ("stop_token_ids", [[1]]),
        ("stop_token_ids", [1.5]), ("stop_token_ids", [-1]), ("stop_token_ids", [True]), ("ignore_eos", "no"),
        ("ignore_eos", 1),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"SamplingParams: {name} must be ") as refusal:
        SamplingParams(**{name: value})
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize("name", ["n", "seed", "stop"])
def test_what_cannot_be_written_is_refused_by_name_too(name):
    with pytest.raises(
        ValueError, match=f"SamplingParams: {name} must be .*; it is an object of type (int|tuple) that"
    ):
        SamplingParams(**{name: 10**5000})  # Python writes no number of so many digits


@pytest.mark.parametrize("name", ["stop", "stop_token_ids", "logits_processors"])
def test_an_endless_list_is_refused(name):
    entry = {"stop": "a", "stop_token_ids": 3, "logits_processors": max}[name]
    with pytest.raises(ValueError, match=f"SamplingParams: {name} must be .*at most 10000"):
        SamplingParams(**{name: repeat(entry)})


def test_numbers_of_other_libraries_mean_what_python_s_do():
    params = SamplingParams(temperature=Fraction(1, 2), top_p=np.float32(0.5), seed=np.int64(3), top_k=np.int8(4))
    assert params == SamplingParams(temperature=0.5, top_p=0.5, seed=3, top_k=4)
    assert repr(params) == repr(SamplingParams(temperature=0.5, top_p=0.5, seed=3, top_k=4))  # a seed is hashed so


def test_the_longest_stop_string_that_is_taken():
    assert SamplingParams(stop="x" * MAX_STOP_CHARACTERS).stop == ("x" * MAX_STOP_CHARACTERS,)
    with pytest.raises(ValueError, match=f"at most {MAX_STOP_CHARACTERS} characters"):
        SamplingParams(stop=["x" * MAX_STOP_CHARACTERS, "y"])


@pytest.mark.parametrize("settings", [{"temperature": 1e-40}, {"temperature": 1.0, "top_p": 1e-6}])
def test_settings_that_leave_one_token_give_the_likeliest(settings):
    logits = torch.tensor([0.0, 3.0, -2.0, 2.9])
    assert {sample(logits, SamplingParams(seed=1, **settings), index) for index in range(20)} == {1}


def test_penalties_at_their_limits_give_numbers():
    params = SamplingParams(repetition_penalty=1e3, presence_penalty=-1e3, frequency_penalty=1e3)
    adjusted = adjust_logits(torch.randn(9), params, [1, 2], [3] * 1000, [])
    assert adjusted.isfinite().all()


def test_stop_tokens_and_logprobs_beyond_the_vocabulary():
    logits = torch.tensor([0.0, 1.0, 2.0])
    adjusted = adjust_logits(logits, SamplingParams(min_tokens=1), [0], [], {2, 50})
    assert adjusted.tolist() == [0.0, 1.0, -math.inf]
    assert sorted(top_logprobs(logits, 0, 50)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [([], "empty"), ([1, 100.9], "100.9"), ([1, "a"], "'a'"), ([1, 10], "token id 10"), ([-1], "token id -1")],
)
def test_prompts_that_cannot_be_continued(prompt, says):
    config = SimpleNamespace(max_position_embeddings=8, vocab_size=10)
    with pytest.raises(ValueError, match=says):
        check_prompt(prompt, config, SamplingParams())
