"""/v1/completions: a prompt is continued."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field

from fastapi import Request, Response

from common.serving.generation import Events, Generation, Server, begin, processors, sampling_params
from common.serving.loop import Delta
from common.serving.protocol import CompletionChoice, CompletionRequest, CompletionResponse
from common.serving.tokens import completion_logprobs


@dataclass
class Piece:
    """A part of one answer, or, in the end, all of it."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, float] | None] = field(default_factory=list)  # None: of the first token of a prompt
    finish_reason: str | None = None

    def __iadd__(self, other: Piece) -> Piece:
        self.text += other.text
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.finish_reason = other.finish_reason
        return self


async def complete(server: Server, request: Request, body: CompletionRequest) -> CompletionResponse | Response:
    server.check_model(body.model)
    prompts = await encode_prompts(server, body)
    own = await processors(server, body)
    prompt_logprobs = body.logprobs if body.echo else None
    params = [
        sampling_params(body, server.limit(len(each), body.max_tokens or 1), body.logprobs, own, prompt_logprobs)
        for each in prompts
    ]
    generation = await begin(server, request, body, prompts, params)
    head = generation.head("cmpl", "text_completion")
    pieces = Pieces(generation, body, prompts)
    if body.stream:
        return Events(generation, head, pieces.parts, body.stream_options)
    answers = [Piece() for _ in range(generation.num_choices)]
    async for deltas in generation.steps():
        for delta in deltas:
            for piece in pieces.of(delta):
                answers[delta.choice] += piece
    return CompletionResponse(
        **head,
        choices=[CompletionChoice(**choice(server, body, number, answer, 0)) for number, answer in enumerate(answers)],
        usage=generation.usage,
    )


async def encode_prompts(server: Server, body: CompletionRequest) -> list[list[int]]:
    """The prompts as token ids: one or several, each text or token ids. Other clients are served between two."""
    prompts = body.prompt
    if isinstance(prompts, str) or isinstance(prompts[0], int):
        prompts = [prompts]
    server.loop.check_size(len(prompts))
    encoded = []
    for prompt in prompts:
        encoded.append(server.encode(prompt, body.add_special_tokens) if isinstance(prompt, str) else prompt)
        await asyncio.sleep(0)
    return encoded


@dataclass
class Pieces:
    """What is added to each choice: first the prompt, if `echo` asks for it, then the answer as it comes."""

    generation: Generation
    body: CompletionRequest
    prompts: list[list[int]]
    scores: dict[int, dict] = field(default_factory=dict)  # of a prompt's tokens, by its number; a first sample's
    offsets: dict[int, int] = field(default_factory=dict)  # of the choices that have begun: characters of their tokens

    def of(self, delta: Delta) -> Iterator[Piece]:
        body, number = self.body, delta.choice // self.body.n
        self.scores.setdefault(number, delta.output.prompt_logprobs)
        if body.echo and delta.choice not in self.offsets:
            prompt = self.prompts[number]
            known = [self.scores[number].get(position) for position in range(len(prompt))]
            yield Piece(self.generation.server.tokenizer.decode(prompt), prompt, known)
        self.offsets.setdefault(delta.choice, 0)
        if body.max_tokens == 0:  # one token was computed, since the engine computes no fewer
            self.generation.num_output_tokens = 0
            yield Piece(finish_reason=delta.finish_reason)
        else:
            yield Piece(delta.text, delta.token_ids, delta.logprobs, delta.finish_reason)

    def parts(self, delta: Delta) -> Iterator[dict]:
        """The same as the `choices` of chunks, one for each."""
        for piece in self.of(delta):
            if piece.text or piece.finish_reason or self.body.logprobs is not None:
                offset = self.offsets.get(delta.choice, 0)
                part = choice(self.generation.server, self.body, delta.choice, piece, offset)
                if part["logprobs"]:
                    self.offsets[delta.choice] = offset + sum(map(len, part["logprobs"]["tokens"]))
                yield part


def choice(server: Server, body: CompletionRequest, number: int, piece: Piece, offset: int) -> dict:
    """One of `choices`. offset: the number of characters of the tokens before this piece."""
    logprobs = None
    if body.logprobs is not None:
        logprobs = completion_logprobs(server.tokenizer, piece.token_ids, piece.logprobs, body.logprobs, offset)
    return {"index": number, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}
