"""/v1/chat/completions: a conversation is answered, as the model's chat template writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from fastapi import Request, Response

from common.chat_templates import choose_template
from common.serving.errors import ApiError
from common.serving.generation import Events, Server, begin, processors, sampling_params
from common.serving.grammar import json_grammar
from common.serving.loop import Delta
from common.serving.protocol import (
    Answer,
    ChatChoice,
    ChatRequest,
    ChatResponse,
    Message,
    NamedToolChoice,
    TokenizeRequest,
    Tool,
    ToolCall,
)
from common.serving.tokens import chat_logprobs
from common.serving.tools import Call, Reader, describe, reader_of, schema_of, tools_of


@dataclass
class Choice:
    """One answer so far."""

    index: int
    reader: Reader
    max_calls: int | None = None
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    finish_reason: str | None = None
    is_begun: bool = False

    def add(self, delta: Delta, is_chosen: bool) -> list[str | Call]:
        """Take what a step has added. Returns the text and the calls that are certain now.

        is_chosen: the request names the tool that is called, so that calling it is no reason of the model's.
        """
        found = self.reader.push(delta.text) + (self.reader.flush() if delta.finish_reason else [])
        self.content += "".join(each for each in found if isinstance(each, str))
        self.calls = [*self.calls, *(each for each in found if isinstance(each, Call))][: self.max_calls]
        self.logprobs += delta.logprobs
        has_called = self.calls and delta.finish_reason == "stop" and not is_chosen
        self.finish_reason = "tool_calls" if has_called else delta.finish_reason
        return found


async def chat(server: Server, request: Request, body: ChatRequest) -> ChatResponse | Response:
    server.check_model(body.model)
    prompt = encode_chat(server, body, tools_of(body))
    max_tokens = server.limit(len(prompt), body.max_completion_tokens or body.max_tokens)
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    schema = schema_of(body)
    own = await processors(server, body, json_grammar(schema) if schema is not None else None)
    params = sampling_params(body, max_tokens, num_logprobs, own)
    generation = await begin(server, request, body, [prompt], [params])
    template = choose_template(server.tokenizer.chat_templates, None, bool(tools_of(body)))
    max_calls = None if body.parallel_tool_calls else 1
    choices = [Choice(i, reader_of(body, template), max_calls) for i in range(body.n)]
    if body.stream:
        head = generation.head("chatcmpl", "chat.completion.chunk")
        return Events(generation, head, partial(parts, server, body, choices), body.stream_options)
    async for deltas in generation.steps():
        for delta in deltas:
            choices[delta.choice].add(delta, isinstance(body.tool_choice, NamedToolChoice))
    return ChatResponse(
        **generation.head("chatcmpl", "chat.completion"),
        choices=[
            ChatChoice(
                index=choice.index,
                message=Answer(
                    content=choice.content or (None if choice.calls else ""),
                    tool_calls=[call.as_dict() for call in choice.calls],
                ),
                finish_reason=choice.finish_reason,
                logprobs=logprobs(server, body, choice.logprobs),
            )
            for choice in choices
        ],
        usage=generation.usage,
    )


def encode_chat(server: Server, body: ChatRequest | TokenizeRequest, tools: Sequence[Tool]) -> list[int]:
    """The prompt's token ids. tools: those that the model is told of."""
    templates = server.tokenizer.chat_templates
    if not templates:
        raise ApiError(
            400,
            f"{server.model_name} has no chat template: it was not trained to converse. Use /v1/completions.",
            param="messages",
        )
    template = choose_template(templates, None, bool(tools))
    messages, values = describe(tools, template, [plain_message(message) for message in body.messages])
    own = {
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": bool(body.continue_final_message),
    }
    text = server.tokenizer.apply_chat_template(messages, **{**(body.chat_template_kwargs or {}), **values, **own})
    return server.encode(text, bool(body.add_special_tokens))  # by default the template alone writes them


def plain_message(message: Message) -> dict:
    """A message as chat templates expect it: text, and the arguments of calls as data."""
    content = message.content or ""
    if not isinstance(content, str):
        content = "\n".join(part.text for part in content)
    role = "system" if message.role == "developer" else message.role
    plain: dict = {"role": role, "content": content}
    if message.name is not None:
        plain["name"] = message.name
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        plain["tool_calls"] = [
            {"type": "function", "id": call.id, "function": {"name": call.function.name, "arguments": arguments(call)}}
            for call in message.tool_calls
        ]
    return plain


def arguments(call: ToolCall) -> dict:
    """A call's arguments as data, which templates expect."""
    try:
        return json.loads(call.function.arguments or "{}")
    except ValueError as error:
        message = f"The arguments of the call of {call.function.name} are not JSON: {error}."
        raise ApiError(400, message, param="messages") from None


def logprobs(server: Server, body: ChatRequest, positions: list) -> dict | None:
    return chat_logprobs(server.tokenizer, positions, body.top_logprobs or 0) if body.logprobs else None


def parts(server: Server, body: ChatRequest, choices: list[Choice], delta: Delta) -> Iterator[dict]:
    """What a step has added to a choice, as the `choices` of chunks, one for each."""
    choice = choices[delta.choice]

    def part(delta: dict, positions: dict | None = None, reason: str | None = None) -> dict:
        return {"index": choice.index, "delta": delta, "logprobs": positions, "finish_reason": reason}

    if not choice.is_begun:
        choice.is_begun = True
        yield part({"role": "assistant", "content": ""})
    num_calls = len(choice.calls)
    found = choice.add(delta, isinstance(body.tool_choice, NamedToolChoice))
    text = "".join(each for each in found if isinstance(each, str))
    positions = None
    if text or choice.finish_reason:  # log-probabilities wait for one of them, since litellm drops all other chunks
        positions, choice.logprobs = logprobs(server, body, choice.logprobs), []
    if text:
        yield part({"content": text}, positions)
    for number, call in enumerate(choice.calls[num_calls:], num_calls):
        yield part({"tool_calls": [{"index": number, **call.as_dict()}]})
    if choice.finish_reason:
        yield part({}, None if text else positions, choice.finish_reason)
