"""/v1/completions: a prompt is continued."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fastapi import Request, Response

from common.serving.generation import Generation, Server, begin, events, processors, sampling_params
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
    if body.stream:
        return events(chunks(generation, body, prompts))
    answers = [Piece() for _ in range(generation.num_choices)]
    async for number, piece in pieces(generation, body, prompts):
        answers[number] += piece
    return CompletionResponse(
        **head(generation, "text_completion"),
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


async def pieces(
    generation: Generation, body: CompletionRequest, prompts: list[list[int]]
) -> AsyncIterator[tuple[int, Piece]]:
    """What is added to each choice: first the prompt, if `echo` asks for it, then the answer as it comes."""
    scores: dict[int, dict] = {}  # of the prompts' tokens, by the prompt's number; the first sample brings them
    begun: set[int] = set()
    async for delta in generation.deltas():
        number, prompt = delta.choice // body.n, prompts[delta.choice // body.n]
        scores.setdefault(number, delta.output.prompt_logprobs)
        if body.echo and delta.choice not in begun:
            begun.add(delta.choice)
            known = [scores[number].get(position) for position in range(len(prompt))]
            yield delta.choice, Piece(generation.server.tokenizer.decode(prompt), prompt, known)
        if body.max_tokens == 0:  # one token was computed, since the engine computes no fewer
            generation.num_output_tokens = 0
            yield delta.choice, Piece(finish_reason=delta.finish_reason)
        else:
            yield delta.choice, Piece(delta.text, delta.token_ids, delta.logprobs, delta.finish_reason)


def head(generation: Generation, kind: str) -> dict:
    """What an answer and all its chunks have in common."""
    return {
        "id": f"cmpl-{generation.stream.request_id}",
        "object": kind,
        "created": generation.created,
        "model": generation.server.model_name,
    }


def choice(server: Server, body: CompletionRequest, number: int, piece: Piece, offset: int) -> dict:
    """One of `choices`. offset: the number of characters of the tokens before this piece."""
    logprobs = None
    if body.logprobs is not None:
        logprobs = completion_logprobs(server.tokenizer, piece.token_ids, piece.logprobs, body.logprobs, offset)
    return {"index": number, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}


async def chunks(generation: Generation, body: CompletionRequest, prompts: list[list[int]]) -> AsyncIterator[dict]:
    own, offsets = head(generation, "text_completion"), [0] * generation.num_choices
    usage = {"usage": None} if body.includes_usage else {}
    async for number, piece in pieces(generation, body, prompts):
        if piece.text or piece.finish_reason or body.logprobs is not None:
            part = choice(generation.server, body, number, piece, offsets[number])
            offsets[number] += sum(map(len, part["logprobs"]["tokens"])) if part["logprobs"] else 0
            yield {**own, "choices": [part], **usage}
    if body.includes_usage:
        yield {**own, "choices": [], "usage": generation.usage.model_dump()}
