"""Tools: how they reach the model, and how calls come back."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("fastapi")
openai = pytest.importorskip("openai")

from common.serving.protocol import Tool  # noqa: E402
from common.serving.tools import TaggedReader, WholeReader, describe  # noqa: E402

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"type": "integer", "maximum": 99}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
GREET = {"type": "function", "function": {"name": "greet"}}
MESSAGES = [{"role": "user", "content": "What is 2 + 3?"}]
ANSWER = (
    'Well:\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>\n<tool_call>{"name": "greet"}'
)
ANSWER += "</tool_call> and <tool_call>no JSON</tool_call> <tool"


def read(reader, pieces) -> list:
    """What a reader finds, with calls as (name, arguments) and text joined."""
    found: list = []
    for each in [item for number, piece in enumerate(pieces, 1) for item in reader.read(piece, number == len(pieces))]:
        if isinstance(each, dict):
            found.append((each["function"]["name"], json.loads(each["function"]["arguments"])))
        elif found and isinstance(found[-1], str):
            found[-1] += each
        else:
            found.append(each)
    return found


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_calls_are_found_however_the_text_is_cut(size):
    pieces = [ANSWER[i : i + size] for i in range(0, len(ANSWER), size)]
    wanted = ["Well:\n", ("add", {"a": 2, "b": 3}), ("greet", {}), "and <tool_call>no JSON</tool_call> <tool"]
    assert read(TaggedReader(), pieces) == wanted
    llama = '{"name": "add", "parameters": {"a": 2, "b": 3}}'
    assert read(WholeReader(), [llama[i : i + size] for i in range(0, len(llama), size)]) == [wanted[1]]


def test_text_is_not_held_back_longer_than_it_must_be():
    reader = TaggedReader()
    for piece, certain in (("a < b", "a < b"), (" <tool", " "), ("box>", "<toolbox>")):
        assert reader.read(piece, is_last=False) == [certain]
    assert read(TaggedReader(), ["x <tool_call>{"]) == ["x <tool_call>{"]
    assert WholeReader().read("Hello", is_last=False) == ["Hello"]
    assert read(WholeReader(), ["{no", " call}"]) == ["{no call}"]


def test_a_template_that_knows_tools_gets_them_and_another_gets_a_message():
    tools = [Tool(**ADD), Tool(**GREET)]
    assert describe(tools, "{{ tools }}", MESSAGES) == (MESSAGES, {"tools": [ADD, GREET]})
    (system, user), values = describe(tools, "{{ messages }}", MESSAGES)
    assert values == {} and user == MESSAGES[0] and system["role"] == "system"
    assert json.dumps(ADD) in system["content"] and "<tool_call>" in system["content"]
    (system, _), _ = describe(tools, "", [{"role": "system", "content": "Be kind."}, *MESSAGES])
    assert system["content"].startswith("Be kind.\n") and json.dumps(GREET) in system["content"]
    assert describe([], "", MESSAGES) == (MESSAGES, {})


def test_a_tool_that_must_be_called_is_called(client):
    """The model knows nothing of tools; the grammar does."""
    asked = {"model": "tales", "messages": MESSAGES, "tools": [ADD, GREET], "temperature": 1, "max_tokens": 200, "n": 3}
    named = {"type": "function", "function": {"name": "add"}}
    for stream in (False, True):
        for choice in ("required", named):
            options = {"tool_choice": choice, "parallel_tool_calls": False, "stream": stream}
            answer = client.chat.completions.create(**asked, **options)
            for calls, content, reason in gather(answer, stream):
                ((name, arguments),) = calls
                assert not content and reason == ("stop" if choice is named else "tool_calls")
                assert name in ("add", "greet") and (name == "greet" or arguments.keys() == {"a", "b"})
                assert choice != named or name == "add"


def gather(answer, stream: bool) -> list[tuple[list, str, str]]:
    """Calls, content and finish_reason of each choice."""
    if not stream:
        return [
            (
                [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls],
                choice.message.content,
                choice.finish_reason,
            )
            for choice in answer.choices
        ]
    found: dict[int, list] = {}
    for chunk in answer:
        (choice,) = chunk.choices
        own = found.setdefault(choice.index, [[], "", None])
        for call in choice.delta.tool_calls or ():
            assert call.index == len(own[0]) and call.id.startswith("call_")
            own[0].append((call.function.name, json.loads(call.function.arguments)))
        own[1] += choice.delta.content or ""
        own[2] = choice.finish_reason or own[2]
    return [tuple(each) for each in found.values()]


def test_a_model_may_call_and_its_call_is_read(client, served, monkeypatch):
    """`tales` will not call of itself, so its tokens are replaced by those of an answer with a call."""
    tokenizer, engine = served[1].tokenizer, served[1].loop.engine
    script = tokenizer.encode(ANSWER, add_special_tokens=False) + [min(tokenizer.eos_token_ids)]
    monkeypatch.setattr(engine.executor.runner, "choose", lambda request, logits: [script[request.sample_index]])
    asked = {"model": "tales", "messages": MESSAGES, "tools": [ADD, GREET], "max_tokens": 300}
    calls = [("add", {"a": 2, "b": 3}), ("greet", {})]
    for stream in (False, True):
        ((found, content, reason),) = gather(client.chat.completions.create(**asked, stream=stream), stream)
        assert found == calls and reason == "tool_calls"
        assert content.strip() == "Well:\nand <tool_call>no JSON</tool_call> <tool"
        one = client.chat.completions.create(**asked, stream=stream, parallel_tool_calls=False)
        assert gather(one, stream)[0][0] == calls[:1]
    scored = client.chat.completions.create(**asked, logprobs=True)  # chunks without text carry none
    assert len(scored.choices[0].logprobs.content) == scored.usage.completion_tokens == len(script)
    plain = client.chat.completions.create(**asked, tool_choice="none").choices[0]
    assert "tool_calls" not in plain.message.model_fields_set  # OpenAI's field is a list or absent, and never null
    assert plain.finish_reason == "stop" and "<tool_call>" in plain.message.content


def test_a_conversation_with_calls_goes_back_to_the_template(served, client):
    template = served[1].tokenizer.chat_template
    served[1].tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls %}{{ c.function.arguments.a + 1 }}"
        "{% endfor %}{{ m.tool_call_id }}|{% endfor %}{{ mood }}{{ tools | length }}"
    )
    calls = [{"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}]
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call_1", "content": "5"},
    ]
    try:
        body = {"messages": messages, "chat_template_kwargs": {"mood": "merry"}, "tools": [ADD]}
        tokens = client.post("/../tokenize", body=body, cast_to=object)["tokens"]
        assert served[1].tokenizer.decode(tokens) == "user:What is 2 + 3?|assistant:3|tool:5call_1|merry1"
        calls[0]["function"]["arguments"] = "{"
        with pytest.raises(openai.BadRequestError, match="arguments of the call of add are not JSON"):
            client.chat.completions.create(model="tales", messages=messages)
    finally:
        served[1].tokenizer.chat_template = template


def test_what_cannot_be_called_is_refused(client):
    for options, words in (
        ({"tool_choice": "required"}, "tools is empty"),
        ({"tools": [ADD], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "not among tools"),
        ({"tools": [ADD], "tool_choice": "required", "response_format": {"type": "json_object"}}, "cannot be combined"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            client.chat.completions.create(model="tales", messages=MESSAGES, **options)
