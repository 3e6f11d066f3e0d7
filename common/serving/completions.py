"""/v1/completions: a prompt is continued."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fastapi import Request, Response

from common.serving.generation import Generation, Server, begin
from common.serving.loop import Delta
from common.serving.protocol import CompletionRequest
from common.serving.tokens import completion_logprobs


async def complete(server: Server, request: Request, body: CompletionRequest) -> dict | Response:
    server.check_model(body.model)
    prompts = await encode_prompts(server, body)
    prompt_logprobs = body.logprobs if body.echo else None
    generation = await begin(server, request, body, prompts, body.max_tokens or 1, body.logprobs, prompt_logprobs)
    choices: list[Choice] = []
    for prompt in prompts:
        scores: dict[int, dict[int, float]] = {}
        choices += [Choice(generation, body, len(choices) + i, prompt, scores) for i in range(body.n)]
    return await generation.answer(body, "cmpl", "text_completion", choices)


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
class Choice:
    """Makes chunks of one answer: first the prompt, if `echo` asks for it, then what the engine adds."""

    generation: Generation
    body: CompletionRequest
    index: int
    prompt: list[int]
    scores: dict[int, dict[int, float]]  # of the prompt's tokens, by position; the engine gives them to one sample only
    is_begun: bool = False
    offset: int = 0  # characters of its tokens so far

    def parts(self, delta: Delta) -> Iterator[dict]:
        body = self.body
        if body.echo and not self.is_begun:
            self.is_begun = True
            self.scores.update(delta.output.prompt_logprobs)
            known = [self.scores.get(position) for position in range(len(self.prompt))]
            yield self.part(self.generation.server.tokenizer.decode(self.prompt), self.prompt, known)
        if body.max_tokens == 0:  # one token was computed, since the engine computes no fewer
            self.generation.num_output_tokens = 0
            yield self.part(finish_reason=delta.finish_reason)
        elif delta.text or delta.finish_reason or body.logprobs is not None:
            yield self.part(delta.text, delta.token_ids, delta.logprobs, delta.finish_reason)

    def part(
        self,
        text: str = "",
        token_ids: Sequence[int] = (),
        positions: Sequence[dict[int, float] | None] = (),  # None: of the first token of a prompt
        finish_reason: str | None = None,
    ) -> dict:
        """One of `choices`. positions: the log-probabilities of each token, if they are asked for."""
        logprobs = None
        if (num_top := self.body.logprobs) is not None:
            tokenizer = self.generation.server.tokenizer
            logprobs = completion_logprobs(tokenizer, token_ids, positions, num_top, self.offset)
            self.offset += sum(map(len, logprobs["tokens"]))
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
