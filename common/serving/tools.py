"""Tools: how a model is told of them, and how its calls are read from its answer.

A chat template that knows `tools` writes them in the form that the model was trained on. There are two forms of a call:

    <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>    Hermes, Qwen; templates that do not know tools
    {"name": "add", "parameters": {"a": 1}}                          Llama 3.1 and later; the whole answer

Where a call is required, a grammar makes the model write JSON and nothing else, whatever its template knows.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

from common.serving.protocol import ChatRequest, NamedToolChoice, Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
PYTHON_TAG = "<|python_tag|>"  # Llama may write it before a call
INSTRUCTION = """\
You may call functions. Their signatures, one JSON object a line:
<tools>
{tools}
</tools>
To call one, write a JSON object with its name and its arguments between <tool_call> and </tool_call>:
<tool_call>
{{"name": "the function's name", "arguments": {{...}}}}
</tool_call>"""
"""What a model is told if its chat template does not know tools. The form is that of Hermes, and Qwen's."""


Call = dict[str, Any]
"""One of an answer's `tool_calls`."""


def make_call(name: str, arguments: str) -> Call:
    """arguments: JSON."""
    function = {"name": name, "arguments": arguments}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def describe(tools: Sequence[Tool], template: str, messages: list[dict]) -> tuple[list[dict], dict]:
    """How tools reach the model: the messages, and what else the chat template is given."""
    if not tools:
        return messages, {}
    described = [tool.model_dump(exclude_none=True) for tool in tools]
    if "tools" in template:
        return messages, {"tools": described}
    text = INSTRUCTION.format(tools="\n".join(map(json.dumps, described)))
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]], {}
    return [{"role": "system", "content": text}, *messages], {}


def tools_of(body: ChatRequest) -> list[Tool]:
    """The tools that the model is told of."""
    return [] if body.tool_choice == "none" else body.tools or []


def schema_of(body: ChatRequest) -> dict | None:
    """The JSON schema of an answer that must be a call, or None if it need not be one."""
    none = {"type": "object", "properties": {}, "additionalProperties": False}
    parameters = {tool.function.name: tool.function.parameters or none for tool in tools_of(body)}
    if isinstance(body.tool_choice, NamedToolChoice):
        return parameters[body.tool_choice.function.name]
    if body.tool_choice != "required":
        return None
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": schema},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, schema in parameters.items()
    ]
    limit = {} if body.parallel_tool_calls else {"maxItems": 1}
    return {"type": "array", "items": {"anyOf": calls}, "minItems": 1, **limit}


def parse_call(text: str) -> Call | None:
    """A call that is written as a JSON object, or None."""
    try:
        value = json.loads(text)
        arguments = value.get("arguments", value.get("parameters", {}))
        return make_call(value["name"], json.dumps(arguments)) if isinstance(value["name"], str) else None
    except (ValueError, AttributeError, KeyError, TypeError):
        return None


class Reader:
    """Reads an answer as it comes. This one finds no calls."""

    def read(self, text: str, is_last: bool) -> list[str | Call]:
        """The text and the calls that are certain after the next piece, in order. is_last: nothing follows it."""
        return [text] if text else []


class TaggedReader(Reader):
    """Finds calls between `<tool_call>` and `</tool_call>`. A call that is no JSON stays text, tags included."""

    def __init__(self):
        self.held = ""
        self.is_inside = False
        self.is_after_call = False

    def read(self, text: str, is_last: bool) -> list[str | Call]:
        self.held += text
        found: list[str | Call] = []
        while (tag := CLOSE if self.is_inside else OPEN) in self.held:
            before, _, self.held = self.held.partition(tag)
            found.append((parse_call(before) or OPEN + before + CLOSE) if self.is_inside else before)
            self.is_inside = not self.is_inside
        if is_last:
            found.append((parse_call(self.held) or OPEN + self.held) if self.is_inside else self.held)
        elif not self.is_inside:
            num_held = max(n for n in range(len(OPEN)) if self.held.endswith(OPEN[:n]))  # perhaps a tag begins
            found.append(self.held[: len(self.held) - num_held])
            self.held = self.held[len(self.held) - num_held :]
        return self.without_gaps(found)

    def without_gaps(self, found: list[str | Call]) -> list[str | Call]:
        """Leave out empty text, and white space that follows a call: models write each call on a line of its own."""
        kept: list[str | Call] = []
        for each in found:
            if isinstance(each, str) and self.is_after_call:
                each = each.lstrip()
            if each:
                self.is_after_call = not isinstance(each, str)
                kept.append(each)
        return kept


class WholeReader(Reader):
    """Keeps the answer until it is complete. name: the tool whose arguments it must be, if there is one.

    must_call: a grammar has seen to it that it is a list of calls. Otherwise it is a call if it looks like one.
    """

    def __init__(self, name: str | None = None, must_call: bool = False):
        self.name = name
        self.must_call = must_call
        self.held = ""

    def read(self, text: str, is_last: bool) -> list[str | Call]:
        self.held += text
        begins = self.held.lstrip()
        if not is_last and (self.must_call or not begins or begins.startswith(("{", PYTHON_TAG))):
            return []
        held, self.held = self.held, ""
        if self.name is not None:
            return [make_call(self.name, held)]
        if self.must_call:
            try:
                return [call for value in json.loads(held) if (call := parse_call(json.dumps(value)))]
            except ValueError:  # max_tokens has cut it off
                return [held]
        return [parse_call(held.strip().removeprefix(PYTHON_TAG)) or held] if held else []


def reader_of(body: ChatRequest, template: str) -> Reader:
    """What reads one answer to this request."""
    if isinstance(body.tool_choice, NamedToolChoice):
        return WholeReader(name=body.tool_choice.function.name, must_call=True)
    if body.tool_choice == "required":
        return WholeReader(must_call=True)
    if not tools_of(body):
        return Reader()
    is_llama = "tools" in template and OPEN not in template and "parameters" in template
    return WholeReader() if is_llama else TaggedReader()
