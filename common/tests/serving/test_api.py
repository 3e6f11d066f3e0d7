"""The API, as the official client and plain HTTP see it."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

from common.sampling import SamplingParams  # noqa: E402
from common.serving.protocol import REFUSED  # noqa: E402
from common.tests.serving.conftest import eventually, is_empty, make_engine  # noqa: E402

PROMPT = "There was once a"
MESSAGES = [{"role": "user", "content": "Tell me a story."}]
IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]


@pytest.fixture(scope="module")
def alone():
    """The same engine, called in Python: what the server must answer, token for token."""
    with make_engine() as engine:
        yield engine


def events(response) -> list[dict]:
    """The chunks of a stream, which must end with [DONE]."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# --- completions ------------------------------------------------------------------------------------------------------


def test_a_completion_is_the_engine_s_own(client, alone):
    for params in ({"temperature": 0}, {"temperature": 0.9, "seed": 7, "top_p": 0.8}):
        wanted = alone.generate(PROMPT, SamplingParams(max_tokens=24, **params), progress=False)[0]
        answer = client.completions.create(model="tales", prompt=PROMPT, max_tokens=24, **params)
        choice = answer.choices[0]
        assert (choice.text, choice.finish_reason, answer.model) == (wanted.text, wanted.finish_reason, "tales")
        assert answer.usage.prompt_tokens == len(wanted.prompt_token_ids) and answer.usage.completion_tokens == 24
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24


def test_a_stream_says_the_same_in_pieces(client, alone):
    wanted = alone.generate(PROMPT, SamplingParams(max_tokens=24), progress=False)[0]
    stream = client.completions.create(
        model="tales", prompt=PROMPT, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == wanted.text
    assert len(chunks) > 10 and len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24


def test_each_chunk_has_the_usage_so_far_if_that_is_asked_for(client):
    for is_asked in (False, True):
        options = {"include_usage": True, "continuous_usage_stats": is_asked}
        chunks = client.completions.create(
            model="tales", prompt=PROMPT, max_tokens=6, logit_bias={"500": 100}, stream=True, stream_options=options
        )
        *counts, last = [chunk.usage and chunk.usage.completion_tokens for chunk in chunks]
        assert last == 6 and len(counts) == 6
        if is_asked:
            assert all(number <= count <= 6 for number, count in enumerate(counts, 1))  # the reader may be late
        else:
            assert counts == [None] * 6


def test_several_prompts_and_samples_keep_their_numbers(client, alone):
    prompts = [PROMPT, alone.tokenizer.encode("The owl said")]
    answer = client.completions.create(
        model="tales", prompt=[alone.tokenizer.encode(PROMPT), prompts[1]], n=2, max_tokens=8, temperature=1, seed=3
    )
    outputs = alone.generate(prompts, SamplingParams(max_tokens=8, temperature=1, seed=3, n=2), progress=False)
    wanted = [each.text for output in outputs for each in (output, *output.siblings)]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == wanted
    assert answer.usage.completion_tokens == 32


def test_stop_strings_and_echo(client, alone):
    wanted = alone.generate(PROMPT, SamplingParams(max_tokens=64, stop="."), progress=False)[0]
    answer = client.completions.create(
        model="tales", prompt=PROMPT, max_tokens=64, temperature=0, stop=["."], echo=True
    )
    assert answer.choices[0].text == PROMPT + wanted.text and answer.choices[0].finish_reason == "stop"


def test_logprobs_of_a_completion(client, alone):
    params = SamplingParams(max_tokens=6, logprobs=3)
    wanted = alone.generate(PROMPT, params, progress=False)[0]
    answer = client.completions.create(model="tales", prompt=PROMPT, max_tokens=6, temperature=0, logprobs=3)
    found = answer.choices[0].logprobs
    assert "".join(found.tokens) == answer.choices[0].text
    assert found.text_offset == [len("".join(found.tokens[:i])) for i in range(6)]
    assert found.token_logprobs == [likely[token_id] for token_id, likely in zip(wanted.token_ids, wanted.logprobs)]
    assert all(
        len(top) == 3 and max(top.values()) == chosen for top, chosen in zip(found.top_logprobs, found.token_logprobs)
    )


def test_a_prompt_s_own_logprobs(client, alone):
    """What evaluation harnesses ask: how likely was this text?"""
    from solutions.llama_pytorch import causal_attend

    text = "There was once a thoughtful toad. " * 12  # several chunks of a prompt, and it is asked for twice
    prompt = alone.tokenizer.encode(text)
    tokens = torch.tensor(prompt)
    model = alone.executor.runner.model
    with torch.inference_mode():
        hidden = model(tokens, torch.arange(len(prompt)), causal_attend)
        wanted = model.logits(hidden).log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
    for stream in (False, False, True):
        asked = {"model": "tales", "prompt": text, "max_tokens": 0, "echo": True, "logprobs": 1, "stream": stream}
        answer = client.completions.create(**asked)
        answers = [answer] if not stream else list(answer)
        (choice,) = (each.choices[0] for each in answers if each.choices[0].text)
        found = choice.logprobs
        assert choice.text == text.strip() or choice.text == text
        assert found.token_logprobs[0] is None and found.top_logprobs[0] is None and len(found.tokens) == len(prompt)
        assert torch.allclose(torch.tensor(found.token_logprobs[1:]), wanted, atol=1e-4)
        assert answers[-1].choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 0 if not stream else True
    both = client.completions.create(model="tales", prompt=[text, PROMPT], max_tokens=2, n=2, echo=True, logprobs=0)
    assert [len(each.logprobs.tokens) for each in both.choices] == [len(prompt) + 2] * 2 + [7] * 2
    assert all(None not in each.logprobs.token_logprobs[1:] for each in both.choices)


def test_a_bias_forbids_and_forces(client, alone):
    letter = alone.tokenizer.encode("x", add_special_tokens=False)[-1]
    asked = {"model": "tales", "prompt": PROMPT, "max_tokens": 5, "temperature": 1}
    assert client.completions.create(**asked, logit_bias={letter: 100}).choices[0].text.strip() == "x" * 5
    chosen = alone.generate(PROMPT, SamplingParams(max_tokens=1), progress=False)[0].token_ids[0]
    asked["temperature"], asked["logprobs"] = 0, 0
    assert (
        client.completions.create(**asked, logit_bias={chosen: -100}).choices[0].logprobs.tokens[0]
        != (client.completions.create(**asked).choices[0].logprobs.tokens[0])
    )


# --- chats ------------------------------------------------------------------------------------------------------------


def test_a_chat_is_what_the_template_makes_of_it(client, served, alone):
    text = served[1].tokenizer.apply_chat_template(MESSAGES)
    prompt = alone.tokenizer.encode(text, add_special_tokens=False)
    wanted = alone.generate([prompt], SamplingParams(max_tokens=16), progress=False)[0]
    answer = client.chat.completions.create(model="tales", messages=MESSAGES, max_tokens=16, temperature=0)
    assert answer.choices[0].message.content == wanted.text and answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(prompt) and answer.choices[0].finish_reason == "length"


def test_a_chat_s_stream_begins_with_the_role_and_ends_with_a_reason(client):
    asked = {"model": "tales", "messages": MESSAGES, "max_tokens": 12, "temperature": 0, "n": 2}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert own[0].delta.role == "assistant" and own[0].delta.content == ""
        assert "".join(each.delta.content or "" for each in own) == choice.message.content
        assert own[-1].finish_reason == "length" and own[-1].delta.content is None
        assert all(each.finish_reason is None for each in own[:-1])


def test_logprobs_of_a_chat(client):
    asked = {"model": "tales", "messages": MESSAGES, "max_tokens": 5, "temperature": 0, "logprobs": True}
    answer = client.chat.completions.create(**asked, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == 5 and all(len(each.top_logprobs) == 2 for each in content)
    assert b"".join(bytes(each.bytes) for each in content).decode() == answer.choices[0].message.content
    assert all(each.top_logprobs[0].token == each.token for each in content)  # the likeliest was chosen
    streamed = list(client.chat.completions.create(**asked, top_logprobs=2, stream=True))
    pieces = [piece for chunk in streamed if chunk.choices[0].logprobs for piece in chunk.choices[0].logprobs.content]
    assert pieces == content
    # The first bytes of two characters: a chunk without text would have to carry the first one's log-probability.
    first_bytes = {"max_tokens": 2, "logit_bias": {3 + 0xC3: 100}, "stream": True}
    choices = [chunk.choices[0] for chunk in client.chat.completions.create(**asked | first_bytes)]
    found = [each for each in choices if each.logprobs]
    assert [token.bytes for each in found for token in each.logprobs.content] == [[0xC3]] * 2
    assert all(each.delta.content or each.finish_reason for each in found)
    assert all(not each.top_logprobs for each in client.chat.completions.create(**asked).choices[0].logprobs.content)


def test_parts_of_a_message_and_other_roles(client):
    parts = [{"type": "text", "text": "Tell me"}, {"type": "text", "text": "a story."}]
    messages = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": parts}]
    answer = client.chat.completions.create(model="tales", messages=messages, max_completion_tokens=4)
    assert answer.usage.completion_tokens == 4


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "body", "status", "words"),
    [
        ("completions", {"prompt": PROMPT, "model": "gpt"}, 404, "`gpt` does not exist; this server has `tales`"),
        ("completions", {}, 400, "prompt: Field required"),
        ("completions", {"prompt": ""}, 400, "prompt must not be empty"),
        ("completions", [], 400, "The body must be a JSON object"),
        ("completions", {"prompt": [3, -1]}, 400, "prompt.1: Input should be greater than or equal to 0; it is -1."),
        ("completions", {"prompt": PROMPT, "skip_special_tokens": False}, 400, "skip_special_tokens is not supported"),
        ("completions", {"prompt": PROMPT, "suffix": "end"}, 400, "suffix is not supported"),
        ("completions", {"prompt": PROMPT, "temperature": -1}, 400, "temperature: Input should be greater than"),
        ("completions", {"prompt": PROMPT, "n": 100}, 400, "100 sequences in one request; this server holds 72"),
        ("completions", {"prompt": PROMPT, "max_tokens": 2000}, 400, "max_tokens is 2000; shorten one of them"),
        ("completions", {"prompt": "a " * 2000}, 400, "maximum context length is 1024 tokens"),
        ("completions", {"prompt": [5] * 1025, "max_tokens": 8}, 400, "The prompt has 1025; shorten it."),
        ("completions", {"prompt": [5000]}, 400, "5000"),
        ("completions", {"prompt": PROMPT, "logit_bias": {"9999": 1}}, 400, "'9999' is not a token id below 1024"),
        ("completions", {"prompt": PROMPT, "logit_bias": {"9": 101}}, 400, "must be from -100 to 100"),
        ("completions", {"prompt": PROMPT, "structured_outputs": {"regex": "(a"}}, 400, "unclosed group"),
        ("completions", {"prompt": PROMPT, "structured_outputs": {}}, 400, "needs one of json, regex"),
        ("completions", {"prompt": PROMPT, "stream_options": {}}, 400, "stream_options needs stream"),
        ("chat/completions", {"messages": []}, 400, "messages: List should have at least 1 item"),
        ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, 400, "messages.0.role: Input should be"),
        ("chat/completions", {"messages": MESSAGES, "top_logprobs": 3}, 400, "top_logprobs needs logprobs"),
        ("chat/completions", {"messages": IMAGE}, 400, "content.0.type: Input should be 'text'; it is 'image_url'."),
        ("chat/completions", {"messages": MESSAGES, "echo": True}, 400, "echo is not supported"),
        ("chat/completions", {"messages": MESSAGES, "tool_choice": {"type": "tools"}}, 400, "tool_choice.type: Input"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(url, route, body, status, words):
    answer = httpx.post(f"{url}/v1/{route}", json=body)
    error = answer.json()["error"]
    assert answer.status_code == status and words in error["message"]
    assert error["type"] == "invalid_request_error" and error.keys() == {"message", "type", "param", "code"}


def test_bodies_that_are_no_json_and_routes_that_are_none(url):
    def answer_to(content: bytes, kind: str) -> str:
        return httpx.post(f"{url}/v1/completions", content=content, headers={"Content-Type": kind}).text

    assert "is not JSON: Expecting property name enclosed in double quotes, at char" in answer_to(
        b"{", "application/json"
    )
    assert "must be application/json" in answer_to(b'{"prompt": "x"}', "application/x-www-form-urlencoded")  # curl -d
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("PUT", "/health", 405)):
        answer = httpx.request(method, url + path)
        assert answer.status_code == status and "/docs" in answer.json()["error"]["message"]


def test_a_body_that_is_nested_deeply_is_no_failure_of_the_server(url):
    """How deep is too deep is Python's affair, and differs between its versions."""
    for depth in (10, 900, 100_000):
        nested = '{"a": ' * depth + "1" + "}" * depth
        body = f'{{"messages": {json.dumps(MESSAGES)}, "max_tokens": 1, "chat_template_kwargs": {nested}}}'
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers)
        assert answer.status_code in (200, 400) and (depth > 10 or answer.status_code == 200)
        if answer.status_code == 400:
            assert answer.json()["error"]["message"] in (
                "The body is nested too deeply.",
                "There was an error parsing the body.",
            )


def test_unknown_fields_are_ignored_and_null_is_the_default(url):
    body = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0}
    plain = httpx.post(f"{url}/v1/completions", json=body).json()
    neutral = {name: [] if value is None else value for name, value in REFUSED.items() if name != "echo"}
    odd = {**body, **neutral, "no_such_field": 1, "top_p": None, "n": None, "stop": None, "user": "me"}
    assert httpx.post(f"{url}/v1/completions", json=odd).json()["choices"] == plain["choices"]


def test_a_prompt_of_megabytes_is_refused_without_encoding_all_of_it(url, served, monkeypatch):
    sizes: list[int] = []
    tokenizer = served[1].tokenizer
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, *rest: (sizes.append(len(text)), encode(text, *rest))[1])
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": "once " * 1_000_000, "max_tokens": 1})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "context_length_exceeded"
    assert max(sizes) <= 64 * served[1].config.max_model_len
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": ["once"] * 1000, "max_tokens": 1})
    assert answer.status_code == 400 and len(sizes) < 10


def test_a_model_without_a_chat_template_says_so(served, url):
    tokenizer = served[1].tokenizer
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        answer = httpx.post(f"{url}/v1/chat/completions", json={"messages": MESSAGES})
        assert answer.status_code == 400 and "no chat template" in answer.json()["error"]["message"]
    finally:
        tokenizer.chat_template = template


# --- the small routes -------------------------------------------------------------------------------------------------


def test_models(client):
    (model,) = client.models.list().data
    assert model.id == "tales" and model.max_model_len == 1024 and client.models.retrieve("tales") == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt")


def test_tokenize_and_back(url, served):
    asked = {"prompt": PROMPT, "return_token_strs": True}
    found = httpx.post(f"{url}/tokenize", json=asked).json()
    assert found["tokens"] == served[1].tokenizer.encode(PROMPT) and found["count"] == len(found["tokens"])
    assert found["max_model_len"] == 1024 and "".join(found["token_strs"]) == "<s> " + PROMPT
    assert httpx.post(f"{url}/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": PROMPT}
    answer = httpx.post(f"{url}/detokenize", json={"tokens": [5, 1024]})
    assert answer.status_code == 400 and "token id 1024" in answer.json()["error"]["message"]
    chat = httpx.post(f"{url}/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    text = served[1].tokenizer.apply_chat_template(MESSAGES)
    assert chat == served[1].tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"choice": []}, "structured_outputs.choice: List should have at least 1 item"),
        ({"json": True}, "structured_outputs.json: Input should be a valid dictionary"),
        ({"json": "{"}, "The JSON schema cannot be used: EOF"),
    ],
)
def test_a_grammar_that_says_nothing_is_named(url, asked, message):
    answer = httpx.post(f"{url}/v1/completions", json={"prompt": PROMPT, "structured_outputs": asked})
    assert answer.status_code == 400 and answer.json()["error"]["message"].startswith(message)


def test_health_version_and_the_openapi_page(url):
    assert httpx.get(f"{url}/health").status_code == httpx.get(f"{url}/ping").status_code == 200
    assert httpx.get(f"{url}/version").json()["version"]
    schema = httpx.get(f"{url}/openapi.json").json()
    assert "/v1/chat/completions" in schema["paths"] and "422" not in json.dumps(schema)
    assert httpx.get(f"{url}/docs").status_code == 200


def test_nothing_is_left_behind(served):
    eventually(lambda: is_empty(served[1].loop.engine))
    assert not served[1].loop.streams and not served[1].loop.readers
