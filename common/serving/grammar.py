"""Answers that must match a grammar: `llguidance` says which tokens may come next, and the others get a score of -inf.

A `Grammar` is one of a request's `logits_processors`. It is a function of the output so far, so batching, preemption
and speculation need nothing of their own. A draft token that the grammar forbids has probability 0 and is rejected. A
draft model is asked through the same function and proposes none of them. What it keeps in memory is only a parser that
stands somewhere in the output; it goes back or forward to where it is asked.

From Willard and Louf, "Efficient Guided Generation for Large Language Models" (2023); llguidance parses with Earley's
algorithm and walks a trie of the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from torch import Tensor

from common.serving.errors import NOT_FOLLOWED
from common.serving.protocol import SamplingBody
from common.tokenizer import Tokenizer, load_tokenizer

ANY_OBJECT = {"type": "object"}
JSON_OPTIONS = {"whitespace_pattern": r" ?"}
"""A model that may write any white space can write nothing else for ever."""
LIMITS = LLParserLimits(initial_lexer_fuel=200_000, step_lexer_fuel=20_000, verbose_errors=False)
"""With llguidance's own, five and ten times these, a mask of the pattern a{100000} takes the engine a second."""


class Vocabulary:
    """A tokenizer as llguidance wants it."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.eos_token_id = min(tokenizer.eos_token_ids)
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
        self.ids = {data: token_id for token_id, data in enumerate(self.tokens) if data}
        self.longest = max(map(len, self.tokens))
        self.special_token_ids = [token_id for token_id, data in enumerate(self.tokens) if not data]

    def __call__(self, text: str) -> list[int]:
        """The tokens of a text that the grammar forces.

        Where `encode` puts a space in front, the longest tokens are taken one after the other: the text stands in the
        middle of an answer, and the space would be forbidden.
        """
        token_ids = self.tokenizer.encode(text, add_special_tokens=False)
        data = text.encode()
        if b"".join(self.tokens[token_id] for token_id in token_ids) == data:
            return token_ids
        token_ids = []
        while data:
            size = next(size for size in range(self.longest, 0, -1) if data[:size] in self.ids)
            token_ids.append(self.ids[data[:size]])
            data = data[size:]
        return token_ids


@lru_cache(maxsize=4)
def vocabulary(folder: str) -> LLTokenizer:
    """The trie of a checkpoint's vocabulary: half a second of work for 50,000 tokens."""
    tokenizer = load_tokenizer(folder)
    if not tokenizer.eos_token_ids:
        raise ValueError("This model has no token that ends an answer, so it cannot follow a grammar.")
    return LLTokenizer(TokenizerWrapper(Vocabulary(tokenizer)), eos_token=sorted(tokenizer.eos_token_ids))


@dataclass
class Compiled:
    """A parser at the beginning of an answer; to be copied. All copies share a lexer: where one fails, all do later."""

    matcher: LLMatcher
    is_spoilt: bool = False


@lru_cache(maxsize=128)
def compiled(folder: str, grammar: str) -> Compiled:
    """Raises ValueError if the grammar is wrong."""
    matcher = LLMatcher(vocabulary(folder), grammar, log_level=0, limits=LIMITS)
    first = matcher.deep_copy()
    if not first.is_error():
        first.compute_logit_bias()  # a schema that no text matches is found out here
    if first.is_error():
        raise ValueError(f"The grammar cannot be used: {first.get_error()}")
    return Compiled(matcher)


@dataclass(eq=False)
class Grammar:
    """A logits processor. folder: the checkpoint's. grammar: llguidance's own form, as `grammar_of` returns it."""

    folder: str
    grammar: str
    source: Compiled | None = None
    matcher: LLMatcher | None = None  # a copy of the source's
    consumed: list[int] = field(default_factory=list)  # the tokens that the matcher has seen

    def __getstate__(self) -> dict[str, Any]:
        """A copy, in this process or another, begins at the beginning."""
        return {**self.__dict__, "source": None, "matcher": None, "consumed": []}

    def __call__(self, output: Sequence[int], logits: Tensor) -> Tensor:
        """Set the scores of tokens that must not follow the output to -inf. logits: (V,); returns (V,).

        After an output that the grammar forbids, anything may follow: these are scores after a draft token that is
        going to be rejected.
        """
        if self.source is None or self.source.is_spoilt:
            self.source = compiled(self.folder, self.grammar)
            self.matcher, self.consumed = self.source.matcher.deep_copy(), []
        mask = self.matcher.compute_logit_bias() if self.move_to(output) else None
        if self.matcher.is_error():
            self.source.is_spoilt = True
            compiled.cache_clear()
            raise ValueError(f"{NOT_FOLLOWED}: {self.matcher.get_error()}")
        if mask is None:
            return logits
        allowed = torch.frombuffer(bytearray(mask), dtype=torch.uint8)
        is_forbidden = torch.ones(logits.shape, dtype=torch.bool)  # an embedding may have more rows than tokens
        is_forbidden[: len(allowed)] = allowed == 0
        return logits.masked_fill(is_forbidden.to(logits.device), -torch.inf)

    def move_to(self, output: Sequence[int]) -> bool:
        """Bring the matcher to the end of this output. Returns False if the grammar forbids the output."""
        pairs = enumerate(zip(self.consumed, output))
        num_same = next((i for i, (old, new) in pairs if old != new), min(len(self.consumed), len(output)))
        if num_same < len(self.consumed):
            self.matcher.rollback(len(self.consumed) - num_same)
            del self.consumed[num_same:]
        new = list(output[num_same:])
        num_taken = self.matcher.try_consume_tokens(new)
        self.consumed += new[:num_taken]
        return num_taken == len(new)


def json_grammar(schema: dict[str, Any] | str) -> str:
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_OPTIONS)
    except ValueError as error:
        raise ValueError(f"The JSON schema cannot be used: {error}") from None


def grammar_of(body: SamplingBody) -> str | None:
    """The grammar that a request asks for, or None. Raises ValueError if it asks for two, or for no known kind."""
    found: list[str] = []
    if body.response_format is not None and body.response_format.type != "text":
        schema = body.response_format.json_schema
        found.append(json_grammar(schema.schema_ if schema else ANY_OBJECT))
    if (asked := body.structured_outputs) is not None:
        makers = (
            (asked.json_, json_grammar),
            (ANY_OBJECT if asked.json_object else None, json_grammar),
            (asked.regex, LLMatcher.grammar_from_regex),
            (asked.choice and "start: " + " | ".join(map(json.dumps, asked.choice)), LLMatcher.grammar_from_lark),
            (asked.grammar, LLMatcher.grammar_from_lark),
        )
        found += [make(value) for value, make in makers if value is not None]
        if not found:
            raise ValueError("structured_outputs needs one of json, regex, choice, grammar and json_object.")
    if len(found) > 1:
        raise ValueError("response_format and structured_outputs ask for more than one grammar; one is possible.")
    return found[0] if found else None


class LogitBias:
    """A logits processor that adds a number to the scores of some tokens. asked: a request's logit_bias.

    Raises ValueError for what is no token or no bias.
    """

    def __init__(self, asked: dict[str, float], vocab_size: int):
        for name, value in asked.items():
            if not name.isdecimal() or int(name) >= vocab_size:
                raise ValueError(f"logit_bias: {name!r} is not a token id below {vocab_size}.")
            if not -100 <= value <= 100:
                raise ValueError(f"logit_bias: the bias of token {name} must be from -100 to 100; it is {value}.")
        bias = {int(name): value for name, value in asked.items()}  # "05" is 5, too
        self.token_ids, self.values = torch.tensor(list(bias)), torch.tensor(list(bias.values()))

    def __call__(self, output: Sequence[int], logits: Tensor) -> Tensor:
        return logits.index_add(0, self.token_ids.to(logits.device), self.values.to(logits))
