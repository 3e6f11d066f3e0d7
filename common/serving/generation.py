"""What completions and chats share: from a request's body to the engine, and from the engine to the connection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import Request, Response
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from common.sampling import SamplingParams
from common.serving.errors import ApiError, ClientGone, as_api_error
from common.serving.grammar import Grammar, LogitBias, compiled, grammar_of
from common.serving.loop import Delta, EngineLoop, Stream
from common.serving.protocol import PromptTokensDetails, SamplingBody, StreamOptions, Usage
from common.serving.tenants import Tenant, Tenants


@dataclass
class Server:
    """What the routes need."""

    loop: EngineLoop
    model_name: str
    tenants: Tenants

    def __post_init__(self):
        self.tokenizer, self.config = self.loop.engine.tokenizer, self.loop.engine.config

    def check_model(self, model: str | None) -> None:
        if model is not None and model != self.model_name:
            message = f"The model `{model}` does not exist; this server has `{self.model_name}`."
            raise ApiError(404, message, param="model", code="model_not_found")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The text's token ids. Raises ApiError if there are more than the context holds.

        Of a long text, the beginning is encoded first: 20 MB take a minute, in which no other client is served.
        """
        longest = self.config.max_model_len
        size = 8 * longest
        while size < len(text):
            if (num_tokens := len(self.tokenizer.encode(text[:size], add_special_tokens))) > longest + 16:
                rest = f"The first {size} characters of the prompt have {num_tokens} already; shorten it."
                raise self.too_long(rest, "prompt")
            size *= 2
        return self.tokenizer.encode(text, add_special_tokens)

    def limit(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """How many tokens an answer may have. Raises ApiError if prompt and answer together exceed the context."""
        config = self.config
        left = min(config.max_model_len, config.num_blocks * config.block_size) - num_prompt_tokens
        if left < 1:
            raise self.too_long(f"The prompt has {num_prompt_tokens}; shorten it.", "prompt")
        if (max_tokens or 0) > config.max_model_len - num_prompt_tokens:
            rest = f"The prompt has {num_prompt_tokens} and max_tokens is {max_tokens}; shorten one of them."
            raise self.too_long(rest, "max_tokens")
        return max_tokens or left

    def too_long(self, rest: str, param: str) -> ApiError:
        message = f"This model's maximum context length is {self.config.max_model_len} tokens. {rest}"
        return ApiError(400, message, param, "context_length_exceeded")


class Choice(Protocol):
    """Makes chunks of one answer."""

    def parts(self, delta: Delta) -> Iterator[dict]:
        """What a step has added to it, as `choices` of chunks."""


@dataclass
class Generation:
    """A request that the engine has taken: its stream, whose it is, and what it has cost."""

    server: Server
    stream: Stream
    tenant: Tenant
    num_prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    is_ended: bool = False
    watcher: asyncio.Task | None = None

    async def steps(self) -> AsyncIterator[list[Delta]]:
        """What comes with each step, counted. Whatever ends it, nothing of it is left in the engine."""
        try:
            while self.stream.num_open > 0:
                deltas = await self.stream.take()
                num_tokens = 0
                for delta in deltas:
                    num_tokens += len(delta.token_ids)
                    if delta.finish_reason is not None:
                        self.num_cached_tokens += delta.output.metrics.num_cached_tokens
                self.num_output_tokens += num_tokens
                self.tenant.spend(num_tokens)
                yield deltas
        finally:
            self.end()

    def end(self) -> None:
        if not self.is_ended:
            self.is_ended = True
            self.server.loop.finished(self.stream)
            self.tenant.leave()
            self.watcher.cancel()

    async def watch(self, request: Request) -> None:
        """Abort as soon as the client leaves. Once it has sent more than a request, uvicorn reads only when asked."""
        while True:
            with suppress(TimeoutError):
                if (await asyncio.wait_for(request.receive(), 1))["type"] == "http.disconnect":
                    break
        if not self.is_ended:
            self.stream.fail(ClientGone())  # wakes up what reads it
            self.end()

    @property
    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_output_tokens,
            total_tokens=self.num_prompt_tokens + self.num_output_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.num_cached_tokens),
        )

    async def answer(self, body: SamplingBody, prefix: str, kind: str, choices: Sequence[Choice]) -> dict | Response:
        """The events of a stream, or the same chunks as one, with the usage. prefix: of the id. kind: of object."""
        name = f"{prefix}-{self.stream.request_id}"
        head = {"id": name, "object": kind, "created": self.created, "model": self.server.model_name}
        if body.stream:
            return Events(self, head, choices, body.stream_options)
        whole: list[dict] = [{} for _ in choices]
        async for deltas in self.steps():
            for delta in deltas:
                for part in choices[delta.choice].parts(delta):
                    extend(whole[delta.choice], part)
        return {**head, "choices": whole, "usage": self.usage}


def extend(whole: dict, part: dict) -> None:
    """Add the next chunk's part to what came before it: texts and lists grow, and all else is what came first."""
    for name, value in part.items():
        if whole.get(name) is None:
            whole[name] = value
        elif isinstance(value, dict):
            extend(whole[name], value)
        elif isinstance(value, str | list):
            whole[name] += value


async def begin(
    server: Server,
    request: Request,
    body: SamplingBody,
    prompts: Sequence[list[int]],
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    grammar: str | None = None,
) -> Generation:
    """Give the prompts to the engine. Raises ApiError and whatever `EngineLoop.submit` raises.

    The last four are the engine's words for what a request asks. grammar: one beside those that every request may ask
    for. For a stream it returns with the first token. What fails before is answered with a status, so that a load
    balancer may ask another replica.
    """
    limits = [server.limit(len(prompt), max_tokens) for prompt in prompts]
    own = await processors(server, body, grammar)
    params = [sampling_params(body, limit, own, logprobs=logprobs, prompt_logprobs=prompt_logprobs) for limit in limits]
    tenant: Tenant = request.scope["state"]["tenant"]
    server.loop.check()
    tenant.admit()
    try:
        salt = tenant.salt(body.cache_salt)
        stream = await server.loop.submit(prompts, params, tenant=tenant.name, priority=body.priority, cache_salt=salt)
    except BaseException:
        tenant.leave()
        raise
    generation = Generation(server, stream, tenant, sum(map(len, prompts)))
    tenant.spend(generation.num_prompt_tokens)
    generation.watcher = asyncio.create_task(generation.watch(request))
    if body.stream:
        try:
            await stream.begun()
        except BaseException:
            generation.end()
            raise
    return generation


async def processors(server: Server, body: SamplingBody, grammar: str | None) -> list[Any]:
    """The logits processors of a request. Raises ValueError if one is wrong, before anything is computed."""
    asked = grammar_of(body)
    if grammar and asked:
        raise ValueError("response_format and structured_outputs cannot be combined with a tool that must be called.")
    grammar = grammar or asked
    found: list[Any] = []
    if body.logit_bias:
        found.append(LogitBias(body.logit_bias, server.config.model_config.vocab_size))
    if grammar is not None:
        if body.min_tokens:
            raise ValueError("min_tokens cannot be combined with a grammar, which may end the answer earlier.")
        folder = str(server.tokenizer.folder)
        await asyncio.to_thread(compiled, folder, grammar)  # takes up to a second
        found.append(Grammar(folder, grammar))
    return found


def sampling_params(body: SamplingBody, max_tokens: int, processors: Sequence[Any], **more: Any) -> SamplingParams:
    """The engine's words for what a request asks."""
    same = ("n", "temperature", "top_p", "min_p", "seed", "stop_token_ids", "ignore_eos", "presence_penalty")
    values = {name: getattr(body, name) for name in (*same, "frequency_penalty", "repetition_penalty")}
    return SamplingParams(
        **values,
        **more,
        top_k=max(0, body.top_k),
        min_tokens=min(body.min_tokens, max_tokens),
        max_tokens=max_tokens,
        stop=body.stop or (),
        logits_processors=processors,
    )


def event(data: dict) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(data, inf_nan_mode="null") + b"\n\n"


class Events(Response):
    """Server-sent events: chunks as JSON, then [DONE]. A failure is a chunk with `error`, as OpenAI's.

    head: what all chunks have in common. options: whether the usage is sent. What a step brings is sent at once,
    however many chunks it is.

    Starlette's StreamingResponse would watch for the client's leaving in one more task, and add a generator to what is
    run for each token.
    """

    media_type = "text/event-stream"

    def __init__(self, generation: Generation, head: dict, choices: Sequence[Choice], options: StreamOptions | None):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["Content-Length"]
        self.generation, self.head, self.choices, self.options = generation, head, choices, options or StreamOptions()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        head, usage = self.head, {"usage": None} if self.options.include_usage else {}
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for deltas in self.generation.steps():
                parts = [part for delta in deltas for part in self.choices[delta.choice].parts(delta)]
                if usage and self.options.continuous_usage_stats:
                    usage = {"usage": self.generation.usage.model_dump()}
                if data := b"".join([event({**head, "choices": [part], **usage}) for part in parts]):
                    await send({"type": "http.response.body", "body": data, "more_body": True})
            last = event({**head, "choices": [], "usage": self.generation.usage.model_dump()}) if usage else b""
        except ClientGone:
            return
        except Exception as error:  # the status is sent already
            last = event(as_api_error(error).body)
        await send({"type": "http.response.body", "body": last + b"data: [DONE]\n\n"})
