"""Answers that must match a grammar: they do, whatever else the engine does at the same time."""

from __future__ import annotations

import copy
import json
import pickle
import re

import pytest
import torch

pytest.importorskip("llguidance")

from common.sampling import SamplingParams
from common.serving.grammar import Grammar, LLMatcher, json_grammar
from common.tests.serving.conftest import is_empty, make_engine

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["owl", "toad", "robot"]},
        "friends": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "friends"],
    "additionalProperties": False,
}
PROMPT = "There was once a"


def fits(text: str) -> bool:
    """Whether a text is JSON that matches SCHEMA."""
    value = json.loads(text)
    return (
        set(value) == set(SCHEMA["required"])
        and isinstance(value["name"], str)
        and len(value["name"]) <= 12
        and type(value["age"]) is int
        and 0 <= value["age"] <= 120
        and value["kind"] in ("owl", "toad", "robot")
        and len(value["friends"]) <= 3
        and all(isinstance(friend, str) and len(friend) <= 8 for friend in value["friends"])
    )


def grammar(engine, text: str | None = None) -> Grammar:
    return Grammar(str(engine.tokenizer.folder), text or json_grammar(SCHEMA))


WAYS = {
    "alone": {"max_batch_size": 1},
    "together": {},
    "recomputed": {"num_blocks": 24},
    "swapped": {"num_blocks": 24, "preemption": "swap", "num_host_blocks": 64},
    "ngram": {"speculative": "ngram", "adaptive_speculation": False, "num_speculative_tokens": 4},
    "draft": {"speculative": "tales-draft", "adaptive_speculation": False, "num_speculative_tokens": 3},
    "draft, preempted": {"speculative": "tales-draft", "num_blocks": 32},
}


RANKS = {"tensor parallel": {"tensor_parallel": 2}, "pipeline parallel": {"pipeline_parallel": 2}}
"""In a pipeline the rank that samples is another process, and the grammar goes there."""


@pytest.mark.parametrize(
    "options",
    [*WAYS.values(), *(pytest.param(each, marks=pytest.mark.slow) for each in RANKS.values())],
    ids=[*WAYS, *RANKS],
)
def test_answers_match_their_schema(options):
    """At temperature 1, some of them with n above 1, beside requests without a grammar."""
    with make_engine(**options) as engine:
        constrained = SamplingParams(temperature=1, max_tokens=200, n=2, seed=1, logits_processors=[grammar(engine)])
        params = [constrained, SamplingParams(temperature=1, max_tokens=100, seed=2)] * 4
        outputs = engine.generate([f"{PROMPT} {i}" for i in range(8)], params, progress=False)
        for first in outputs[::2]:
            for output in (first, *first.siblings):
                assert output.finish_reason == "stop" and fits(output.text), output
        assert all(output.finish_reason in ("stop", "length") for output in outputs)
        assert engine.totals.num_preemptions > 0 or "num_blocks" not in options
        assert engine.totals.num_draft_tokens > 0 or "speculative" not in options
        assert is_empty(engine)


def test_speculation_and_preemption_change_no_token():
    """The same seeds draw the same tokens, wherever they are drawn with the target's own random numbers."""
    texts = []
    for way in ("alone", "recomputed", "swapped", "ngram"):
        with make_engine(**WAYS[way]) as engine:
            params = [
                SamplingParams(temperature=1, max_tokens=200, seed=seed, logits_processors=[grammar(engine)])
                for seed in range(6)
            ]
            texts.append([output.text for output in engine.generate([PROMPT] * 6, params, progress=False)])
    assert texts[0] == texts[1] == texts[2] == texts[3] and len(set(texts[0])) == 6


def test_a_grammar_s_parser_goes_where_it_is_asked():
    """A function of the output alone: whatever was asked before, the answer is a new parser's."""
    with make_engine() as engine:
        used, logits = grammar(engine), torch.zeros(1100)  # an embedding with more rows than there are tokens
        text = '{"name": "Ada", "age": 36, "kind": "owl", "friends": []}'
        output: list[int] = []
        while not output or output[-1] not in engine.tokenizer.eos_token_ids:  # a way to write it in allowed tokens
            allowed = [i for i, score in enumerate(used(output, logits).tolist()) if score == 0]
            written = b"".join(map(engine.tokenizer.token_bytes, output)).decode()
            rest = text.removeprefix(written)
            fitting = [
                i
                for i in allowed
                if (piece := engine.tokenizer.token_bytes(i).decode(errors="replace")) and rest.startswith(piece)
            ]
            output.append(max(fitting, key=lambda i: len(engine.tokenizer.token_bytes(i)), default=allowed[0]))
            assert 1024 not in allowed
        generator = torch.Generator().manual_seed(0)
        for _ in range(60):
            length = int(torch.randint(0, len(output) + 1, (), generator=generator))
            asked = output[:length]
            if length % 3 == 0:
                asked = [*asked, 5, 6]  # draft tokens that the grammar forbids
            assert torch.equal(used(asked, logits), grammar(engine)(asked, logits)), asked
        assert torch.equal(used([5, 6, 7], logits), logits)  # forbidden: whatever follows is rejected
        again = [copy.deepcopy(used), pickle.loads(pickle.dumps(used))]
        assert all(torch.equal(each(output[:3], logits), used(output[:3], logits)) for each in again)


def test_an_answer_whose_grammar_is_too_hard_spoils_no_other():
    """What llguidance has compiled is shared. One answer that it cannot follow would end all later ones."""
    hard = LLMatcher.grammar_from_regex("(b{1,9}|xa{9999999})c")
    with make_engine() as engine:
        first, second, logits = grammar(engine, hard), grammar(engine, hard), torch.zeros(1024)
        ids = {engine.tokenizer.token_bytes(token_id): token_id for token_id in range(1024)}
        a, b, x = ids[b"a"], ids[b"b"], ids[b"x"]
        allowed, after = first([], logits), first([b], logits)
        with pytest.raises(ValueError, match="cannot be followed any further"):
            for length in range(4):
                second([x, *[a] * length], logits)
        assert torch.equal(first([b], logits), after) and torch.equal(grammar(engine, hard)([], logits), allowed)
        assert after.isinf().any()


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (LLMatcher.grammar_from_regex("[a-c]{3}-[0-9]{2}"), "[a-c]{3}-[0-9]{2}"),
        (LLMatcher.grammar_from_lark('start: "yes" | "no"'), "yes|no"),
        (json_grammar({"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}), r"\[.*, ?.*\]"),
    ],
)
def test_other_grammars(text, pattern):
    with make_engine() as engine:
        params = SamplingParams(temperature=1, n=8, seed=5, max_tokens=40, logits_processors=[grammar(engine, text)])
        output = engine.generate(PROMPT, params, progress=False)[0]
        assert all(re.fullmatch(pattern, each.text) for each in (output, *output.siblings))


def test_over_http(client):
    """The official client's words for it, and vLLM's."""
    asked = {"model": "tales", "max_tokens": 200, "temperature": 1, "n": 4}
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    messages = [{"role": "user", "content": "Who lives here?"}]
    answer = client.chat.completions.create(**asked, messages=messages, response_format=form)
    assert all(fits(choice.message.content) for choice in answer.choices)
    answer = client.chat.completions.create(
        model="tales", messages=messages, max_tokens=100, response_format={"type": "json_object"}, temperature=0
    )
    if answer.choices[0].finish_reason == "stop":  # nothing bounds its length
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    for wanted, pattern in (
        ({"choice": ["north", 'so"uth']}, 'north|so"uth'),
        ({"regex": "[0-9]{4}"}, "[0-9]{4}"),
        ({"json": {"type": "integer", "maximum": 99, "minimum": 10}}, "[0-9]{2}"),
        ({"grammar": 'start: "a" "b"'}, "ab"),
    ):
        answer = client.completions.create(**asked, prompt=PROMPT, extra_body={"structured_outputs": wanted})
        assert all(re.fullmatch(pattern, choice.text) for choice in answer.choices), answer


def test_a_schema_that_nothing_matches_is_the_clients_mistake(client):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match="The grammar cannot be used"):
        client.completions.create(
            model="tales", prompt=PROMPT, extra_body={"structured_outputs": {"json": {"$ref": "#"}}}
        )


@pytest.mark.parametrize("regex", ["a{100000}", "xa{100000}"])
def test_a_grammar_that_is_too_hard_is_the_clients_mistake(client, regex):
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match="cannot be followed any further"):
        client.completions.create(model="tales", prompt=PROMPT, extra_body={"structured_outputs": {"regex": regex}})


@pytest.mark.slow
@pytest.mark.parametrize("way", ["together", "ngram", "draft"])
def test_200_of_200(way):
    with make_engine(**{**WAYS[way], "max_batch_size": 32, "num_blocks": 1024}) as engine:
        params = [
            SamplingParams(temperature=1, max_tokens=300, seed=seed, logits_processors=[grammar(engine)])
            for seed in range(200)
        ]
        outputs = engine.generate([PROMPT] * 200, params, progress=False)
        assert sum(output.finish_reason == "stop" and fits(output.text) for output in outputs) == 200
