"""/v1/chat/completions: a conversation is answered, as the model's chat template writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fastapi import Request, Response

from common.chat_templates import choose_template
from common.serving.errors import ApiError
from common.serving.generation import Server, begin
from common.serving.grammar import json_grammar
from common.serving.loop import Delta
from common.serving.protocol import ChatRequest, Message, NamedToolChoice, TokenizeRequest, Tool, ToolCall
from common.serving.tokens import chat_logprobs
from common.serving.tools import Reader, describe, reader_of, schema_of, tools_of


async def chat(server: Server, request: Request, body: ChatRequest) -> dict | Response:
    server.check_model(body.model)
    prompt = encode_chat(server, body, tools_of(body))
    max_tokens = body.max_completion_tokens or body.max_tokens
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    schema = schema_of(body)
    grammar = None if schema is None else json_grammar(schema)
    generation = await begin(server, request, body, [prompt], max_tokens, num_logprobs, grammar=grammar)
    template = choose_template(server.tokenizer.chat_templates, None, bool(tools_of(body)))
    choices = [Choice(server, body, i, reader_of(body, template)) for i in range(body.n)]
    if body.stream:
        return await generation.answer(body, "chatcmpl", "chat.completion.chunk", choices)
    answer = await generation.answer(body, "chatcmpl", "chat.completion", choices)
    for choice in answer["choices"]:
        message = choice["message"] = choice.pop("delta")
        message["content"] = message["content"] or (None if "tool_calls" in message else "")
    return answer


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
    plain = {"role": "system" if message.role == "developer" else message.role, "content": content}
    plain |= message.model_dump(include={"name", "tool_call_id"}, exclude_none=True)
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


@dataclass
class Choice:
    """Makes chunks of one answer."""

    server: Server
    body: ChatRequest
    index: int
    reader: Reader
    num_calls: int = 0
    positions: list[dict[int, float]] = field(default_factory=list)  # log-probabilities that were not sent yet
    is_begun: bool = False

    def parts(self, delta: Delta) -> Iterator[dict]:
        if not self.is_begun:
            self.is_begun = True
            yield self.part({"role": "assistant", "content": ""})
        found, reason = self.reader.read(delta.text, delta.finish_reason is not None), delta.finish_reason
        text = "".join(each for each in found if isinstance(each, str))
        self.positions += delta.logprobs
        logprobs = None
        if self.body.logprobs and (text or reason):  # they wait for one of these: litellm drops all other chunks
            logprobs = chat_logprobs(self.server.tokenizer, self.positions, self.body.top_logprobs or 0)
            self.positions = []
        if text:
            yield self.part({"content": text}, logprobs)
        for call in found:
            if not isinstance(call, str) and (self.num_calls == 0 or self.body.parallel_tool_calls):
                yield self.part({"tool_calls": [{"index": self.num_calls, **call}]})
                self.num_calls += 1
        if reason:
            is_own = not isinstance(self.body.tool_choice, NamedToolChoice)  # the model's own reason to end
            reason = "tool_calls" if reason == "stop" and self.num_calls and is_own else reason
            yield self.part({}, None if text else logprobs, reason)

    def part(self, delta: dict, logprobs: dict | None = None, reason: str | None = None) -> dict:
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
