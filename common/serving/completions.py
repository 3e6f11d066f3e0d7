"""/v1/completions: a prompt is continued."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from fastapi import Request, Response

from common.serving.generation import Generation, Server, begin, events, sampling_params
from common.serving.loop import Delta
from common.serving.protocol import CompletionChoice, CompletionRequest, CompletionResponse
from common.serving.tokens import completion_logprobs


@dataclass
class Choice:
    """One answer so far."""

    index: int
    prompt_token_ids: list[int]
    pieces: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    num_characters: int = 0  # of the tokens whose log-probabilities were sent
    finish_reason: str | None = None


async def complete(server: Server, request: Request, body: CompletionRequest) -> CompletionResponse | Response:
    server.check_model(body.model)
    prompts = encode_prompts(server, body)
    params = [sampling_params(body, server.limit(len(each), body.max_tokens or 1), body.logprobs) for each in prompts]
    generation = await begin(server, request, body, prompts, params)
    choices = [Choice(i, prompts[i // body.n]) for i in range(generation.num_choices)]
    if body.stream:
        return events(chunks(generation, body, choices))
    async for delta in generation.deltas():
        choice = choices[delta.choice]
        choice.pieces.append(delta.text)
        choice.token_ids += delta.token_ids
        choice.logprobs += delta.logprobs
        choice.finish_reason = delta.finish_reason
    return CompletionResponse(
        id=f"cmpl-{generation.stream.request_id}",
        created=generation.created,
        model=server.model_name,
        choices=[
            CompletionChoice(
                index=choice.index,
                text=echo(server, body, choice) + "".join(choice.pieces),
                finish_reason=choice.finish_reason,
                logprobs=logprobs(server, body, choice, choice.token_ids, choice.logprobs),
            )
            for choice in choices
        ],
        usage=generation.usage,
    )


def encode_prompts(server: Server, body: CompletionRequest) -> list[list[int]]:
    """The prompts as token ids: one or several, each text or token ids."""
    prompts = body.prompt
    if isinstance(prompts, str) or isinstance(prompts[0], int):
        prompts = [prompts]
    return [server.encode(each, body.add_special_tokens) if isinstance(each, str) else each for each in prompts]


def echo(server: Server, body: CompletionRequest, choice: Choice) -> str:
    return server.tokenizer.decode(choice.prompt_token_ids) if body.echo else ""


def logprobs(server: Server, body: CompletionRequest, choice: Choice, token_ids: list[int], positions: list):
    """The log-probabilities of these tokens, which follow those that were asked about before."""
    if body.logprobs is None:
        return None
    found = completion_logprobs(server.tokenizer, token_ids, positions, body.logprobs, choice.num_characters)
    choice.num_characters += sum(map(len, found["tokens"]))
    return found


async def chunks(generation: Generation, body: CompletionRequest, choices: list[Choice]) -> AsyncIterator[dict]:
    server = generation.server
    head = {
        "id": f"cmpl-{generation.stream.request_id}",
        "object": "text_completion",
        "created": generation.created,
        "model": server.model_name,
    }
    usage = {"usage": None} if body.includes_usage else {}

    def chunk(choice: Choice, text: str, delta: Delta | None = None) -> dict:
        positions = delta and logprobs(server, body, choice, delta.token_ids, delta.logprobs)
        reason = delta.finish_reason if delta else None
        own = {"index": choice.index, "text": text, "logprobs": positions, "finish_reason": reason}
        return {**head, "choices": [own], **usage}

    if body.echo:
        for choice in choices:
            yield chunk(choice, echo(server, body, choice))
    async for delta in generation.deltas():
        if delta.text or delta.finish_reason or body.logprobs is not None:
            yield chunk(choices[delta.choice], delta.text, delta)
    if body.includes_usage:
        yield {**head, "choices": [], "usage": generation.usage.model_dump()}
