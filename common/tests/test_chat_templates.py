"""Chat templates: what transformers renders, limits, and where templates are found."""

from __future__ import annotations

import json

import pytest
import tokenizers

from common import chat_templates, template_sandbox
from common.chat_templates import ChatTemplateError, check_messages, find_chat_templates, render_chat
from common.checkpoints import CheckpointError
from common.tokenizer import load_tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <of> a city, in °C",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Łódź", "Oslo"]}}},
    },
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Łódź", "days": 2}}}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "<b>Hi</b> 'there' & \"you\"", "name": None},
    {"role": "assistant", "content": "  Hello.\nHow are you?  "},
]
TALK = [
    {"role": "user", "content": "Is it warm?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "I must ask."},
    {"role": "tool", "content": '{"celsius": 21}', "tool_call_id": "1"},
    {"role": "assistant", "content": "Yes, 21 °C.", "thinking": "It is warm."},
]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "text", "text": " this "}]},
    {"role": "assistant", "content": [{"type": "text", "text": "I see "}]},
]

# As Qwen3 does it: tools, calls, thinking.
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- set reasoning = message.reasoning_content if message.reasoning_content is string else '' %}
    {%- if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
    {{- '<|im_start|>' + message.role }}
    {%- if reasoning and loop.index0 > ns.last_query_index %}
        {{- '\\n<think>\\n' ~ reasoning.strip('\\n') ~ '\\n</think>' }}
    {%- endif %}
    {{- '\\n' + content }}
    {%- if message.tool_calls %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
# As Llama 3.1 does it: a date, tools in the user's turn, a strict order of turns.
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system_message = "" %}{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: " + date_string + "\\n\\n" + system_message }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("This model supports one call") }}{%- endif %}
        {%- for arg_name, arg_val in message.tool_calls[0].function.arguments | items %}
            {{- arg_name + '="' ~ arg_val ~ '"' }}{%- if not loop.last %}{{- ", " }}{%- endif %}
        {%- endfor %}
    {%- else %}
        {{- message.content | tojson if message.content is mapping or message.content is iterable else '' }}
    {%- endif %}
{%- endfor %}"""
# As Mistral does it.
MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant') }}
{% endif %}{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"""

TABLE = {
    "chatml": (CHATML, CHAT, {}),
    "chatml, no prompt": (CHATML, CHAT, {"add_generation_prompt": False}),
    "chatml, continued": (CHATML, CHAT, {"continue_final_message": True}),
    "trimmed, continued": (CHATML.replace("nt']", "nt']|trim"), CHAT, {"continue_final_message": True}),
    "parts": ("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}|{% endfor %}", PARTS, {}),
    "parts, continued": (
        "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}</s>{% endfor %}", PARTS,
        {"continue_final_message": True},
    ),
    "a field, continued": (
        "{% for m in messages %}{{ m.role }}{{ m.reasoning_content }}{{ m.content }}{% endfor %}",
        [*TALK[:1], {"role": "assistant", "content": "", "thinking": "I must"}],
        {"continue_final_message": "reasoning_content"},
    ),
    "qwen3": (QWEN3, TALK, {}),
    "qwen3, tools": (QWEN3, TALK, {"tools": [WEATHER]}),
    "qwen3, no thinking": (QWEN3, TALK[:1], {"enable_thinking": False}),
    "qwen3, system": (QWEN3, CHAT, {"tools": [WEATHER, WEATHER]}),
    "llama 3": (LLAMA3, CHAT, {}),
    "llama 3, a date": (LLAMA3, CHAT, {"date_string": "1 Jan 2025", "tools": [WEATHER]}),
    "llama 3, a call": (LLAMA3, TALK, {}),
    "mistral": (MISTRAL, [*CHAT[1:], {"role": "user", "content": "Fine."}], {}),
    "mistral, refused": (MISTRAL, CHAT, {}),
    "documents": (
        "{% for d in documents %}{{ loop.index }} {{ d.title }}: {{ d['text'] }}\n{% endfor %}", CHAT,
        {"documents": [{"title": "A", "text": "a"}, {"title": "B", "text": "b"}]},
    ),
    "generation": (
        "{% for m in messages %}{% set x = 1 %}{% if m.role == 'assistant' %}{%- generation -%}{% set x = 2 %}\n "
        "{{ m.content }}</s> {% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{{ x }}{% endfor %}", CHAT, {},
    ),
    "tojson": (
        "{{ messages|tojson }}{{ messages|tojson(indent=2) }}{{ messages|tojson(ensure_ascii=true, sort_keys=true) }}"
        "{{ [1, 2.5, none, true]|tojson(separators=(',', ':')) }}{{ '<&>'|tojson }}", TALK, {},
    ),
    "loops": (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ loop.last }}"
        "{% if loop.index > 5 %}{% break %}{% endif %}{% else %}none{% endfor %}"
        "{% for k, v in messages[0].items() if v %}{{ k }}{{ cycler('a', 'b').next() }}{% endfor %}"
        "{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}", CHAT, {},
    ),
    "macros": (
        "{% macro turn(m, sep='|') %}{{ m.role }}{{ sep }}{{ caller() if caller else '' }}{% endmacro %}"
        "{{ turn(messages[0]) }}{% call turn(messages[1], sep='-') %}inside{% endcall %}{% set ns = namespace(a=1) %}"
        "{% set ns.a = ns.a + 2 ** 3 %}{{ ns.a }}{% set block %}{{ 'a' ~ 1 ~ none ~ [2] }}{% endset %}"
        "{{ block|upper }}{% filter lower %}ABC{% endfilter %}",
        CHAT, {},
    ),
    "values": (
        "{{ bos_token }}{{ eos_token }}{{ missing }}{{ missing is defined }}{{ thing.a.b }}{{ thing['a'] }}{{ flag }}"
        "{{ 'a' * 3 }}{{ [1] * 2 }}{{ 7 // 2 }}{{ '%s-%d' % ('x', 3) }}{{ 'x'.join(['a', 'b']) }}{{ dict(a=1) }}"
        "{{ tools is none }}{{ documents is none }}{{ messages[1].name is defined }}", CHAT,
        {"thing": {"a": {"b": (1, 2)}}, "flag": True, "eos_token": "another"},
    ),
    "white space": ("  {% if true %}\n  a\n  {%- endif %}\n\n{# no #}\n b {{ '' }}\n\n", CHAT, {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the smallest tokenizer that there is."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"<s>": 0, "</s>": 1, "a": 2}, merges=[]))
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", TABLE)
def test_equals_transformers(folder, name, monkeypatch):
    transformers = pytest.importorskip("transformers")
    template, messages, values = TABLE[name]
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    ours.chat_templates = {"default": template}
    prompt = values.get("add_generation_prompt", not values.get("continue_final_message"))
    try:
        expected = theirs.apply_chat_template(
            messages, chat_template=template, tokenize=False, **{**values, "add_generation_prompt": prompt}
        )
    except Exception as error:
        with pytest.raises(ChatTemplateError, match=str(error)):
            ours.apply_chat_template(messages, **values)
        return
    before = json.dumps(messages)
    assert ours.apply_chat_template(messages, **values) == expected != ""
    assert json.dumps(messages) == before


def test_nothing_of_python_reaches_a_template():
    class Odd(str):
        secret = "open"

    values = {"odd": Odd("text"), "object": object(), "pair": (1, [Odd("a")])}
    text = render_chat("{{ odd.secret }}|{{ odd }}|{{ object }}|{{ pair[1][0] }}", [{"role": "user"}], **values)
    assert text == "|text|<object>|a"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "not valid Jinja: line 1"),
        ("{{ messages[9]['role'] }}", "refused these messages or failed"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "sandbox forbids"),
        ("{{ raise_exception.__globals__['os'] }}", "sandbox forbids"),
        ("{{ cycler.__init__.__globals__ }}", "sandbox forbids"),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", "sandbox forbids"),
        ("{{ messages.append(1) }}", "sandbox forbids"),
        ("{{ namespace(__class__=1) }}", "sandbox forbids"),
        ("{% set ns = namespace() %}{% set ns.__init__ = 1 %}", "sandbox forbids"),
        ("{% for i in range(1000000000) %}{% endfor %}", "failed: Range too big"),
        ("{% for i in range(99999) %}{% for j in range(9999) %}{{ 'a' * 999 }}{% endfor %}{% endfor %}", "wrote more"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'a' * 10 ** 9 }}", "repeats something 1000000000 times"),
        ("{{ ([0] * 10 ** 8)|length }}", "repeats something"),
        ("{{ 10 ** (10 ** 10) }}", "a power of 10000000000"),
        ("{{ (2 ** 64 * 2 ** 64) ** 64 }}", "value of size"),
        (
            "{% set n = namespace(a='a') %}{% for i in range(40) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
            "value of size",
        ),
        (
            "{% set n = namespace(a=[0]) %}{% for i in range(40) %}{% set n.a = n.a + n.a %}{% endfor %}",
            "value of size",
        ),
        ("{% set n = namespace(a=[0]) %}{% for i in range(40) %}{% set n.a = [n.a, n.a] %}{% endfor %}", "value of"),
        ("{% set n = namespace(a=1) %}{% for i in range(40) %}{% set n.a = dict(x=n.a, y=n.a) %}{% endfor %}", "value"),
        ("{{ '%1000000000d' % 5 }}", "% has a width; 1000 is allowed"),
        ("{{ '%*d' % (10 ** 9, 5) }}", "% has an argument of 1000000000; 1000 is allowed"),
        ("{{ ('%(a)s' * 99999) % {'a': 'b' * 99999} }}", "value of size"),
        ("{{ '%1000000000d'|format(5) }}", "format has a width; 1000 is allowed"),
        ("{{ '{:>1000000000}'.format('a') }}", "format has a width; 1000 is allowed"),
        ("{{ 'a'|center(10 ** 9) }}", "center has an argument of 1000000000; 1000 is allowed"),
        ("{{ 'a'.ljust(10 ** 9) }}", "ljust has an argument"),
        ("{{ [1]|slice(10 ** 9)|list }}", "slice has an argument"),
        ("{{ [[1]]|tojson(indent=10 ** 9) }}", "tojson has an argument"),
        ("{{ range(99999)|map('center', 10 ** 5)|join|length }}", "map has an argument"),
        ("{{ ('a' * 99999).replace('a', 'b' * 99999) }}", "value of size"),
        ("{{ ('a' * 99999)|replace('a', 'b' * 99999) }}", "value of size"),
        ("{{ ('a' * 99999).translate({97: 'b' * 99999}) }}", "value of size"),
        ("{{ ('b' * 9999).join(('a' * 99999)|list) }}", "value of size"),
        ("{{ ('a' * 99999)|list|join('b' * 9999) }}", "value of size"),
        ("{{ lipsum(n=100000) }}", "'lipsum' is undefined"),
    ],
)
def test_hostile_and_failing_templates_are_stopped(template, says):
    with pytest.raises(ChatTemplateError, match=says):
        render_chat(template, [{"role": "user", "content": "Hi"}])


def test_what_is_large_and_harmless_is_written():
    template = (
        "{{ messages|map(attribute='content')|join(', ') }}{{ 'a'|center(1000)|length }}{{ '%05.1f|%s' % (1, 'x') }}"
    )
    template += "{{ [messages, messages]|length }}{{ messages[0].content.replace('x', 'yy')|length }}"
    template += "{{ {'a': 1}|tojson(indent=2) }}"
    messages = [{"role": "user", "content": "x" * 1000}] * 1000
    text = render_chat(template, messages)
    assert text == ", ".join(["x" * 1000] * 1000) + '1000001.0|x22000{\n  "a": 1\n}'


@pytest.mark.parametrize(
    "inner", ["{% for j in range(99999) %}{% endfor %}", "{{ f(i) }}", "{% call g() %}{% endcall %}"]
)
def test_a_template_that_writes_nothing_for_ever_is_stopped(inner, monkeypatch):
    monkeypatch.setattr(template_sandbox, "LONGEST_TIME", 0.2)
    loop = "{% for i in range(99999) %}{% for k in range(99999) %}" + inner + "{% endfor %}{% endfor %}"
    with pytest.raises(ChatTemplateError, match="it ran for more than 0.2 seconds"):
        render_chat(
            "{% macro f(x) %}{% endmacro %}{% macro g() %}{{ caller() }}{% endmacro %}" + loop,
            [{"role": "user", "content": "Hi"}],
        )


# --- what is asked of a template ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "list of messages"),
        ("Hello", "list of messages"),
        (["Hello"], "message 0 is 'Hello'"),
        ([{"role": "user"}], 'needs a "role" and a "content"'),
        ([{"role": "user", "content": ["Hello"]}], 'needs a "role" and a "content"'),
        ([{"role": "user", "content": 5}], 'needs a "role" and a "content"'),
        ([*CHAT, {"role": "robot", "content": "Hi"}], "message 3 has the role 'robot'"),
        ([{"content": "Hi"}], "message 0 has the role None"),
    ],
)
def test_messages_that_are_none_are_refused(messages, says):
    with pytest.raises(ChatTemplateError, match=says):
        check_messages(messages)


@pytest.mark.parametrize("messages", [CHAT, TALK, PARTS])
def test_messages_that_are_some(messages):
    check_messages(messages)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"continue_final_message": True, "add_generation_prompt": True}, "are both set"),
        ({"continue_final_message": "mood"}, "does not read 'mood'"),
        ({"tools": [len]}, "tools is .*must be a list of JSON objects"),
        ({"documents": ["text"]}, "documents is .*must be a list of JSON objects"),
        ({"tools": 5}, "tools is 5; it must be a list of JSON objects"),
        ({"tools": (tool for tool in [{}])}, "tools is <generator .*must be a list of JSON objects"),
    ],
)
def test_what_cannot_be_asked_is_refused(values, says):
    with pytest.raises(ChatTemplateError, match=says):
        render_chat(CHATML, CHAT, **values)


@pytest.mark.parametrize(
    ("template", "message", "says"),
    [
        ("{% for m in messages %}{{ m.role }}{% endfor %}content", CHAT[2], "leaves out"),
        (
            "{{ messages[-1].content }}",
            {"role": "assistant", "content": [{"type": "image"}]},
            "has no text in 'content'",
        ),
        ("{{ messages[-1].content }}", {"role": "assistant", "tool_calls": [CALL]}, "has no text in 'content'"),
    ],
)
def test_a_final_message_that_cannot_be_continued(template, message, says):
    with pytest.raises(ChatTemplateError, match=says):
        render_chat(template, [message], continue_final_message=True)


# --- where templates are found --------------------------------------------------------------------------------------


def test_where_a_template_is_found(tmp_path):
    assert find_chat_templates(tmp_path, None) == {}
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of a processor"}')
    assert find_chat_templates(tmp_path, None) == {"default": "of a processor"}
    assert find_chat_templates(tmp_path, "of the config") == {"default": "of the config"}
    several = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert find_chat_templates(tmp_path, several) == {"default": "a", "tool_use": "b"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/rag.jinja").write_text("for documents")
    (tmp_path / "chat_template.jinja").write_text("of the file")
    assert find_chat_templates(tmp_path, several) == {"default": "of the file", "rag": "for documents"}


@pytest.mark.parametrize("written", [5, [5], [{"name": "default"}], [{"name": 1, "template": "a"}], {"default": 5}])
def test_templates_that_are_none(tmp_path, written):
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template is .*a template is text"):
        find_chat_templates(tmp_path, written)


def test_template_files_that_are_none(tmp_path, monkeypatch):
    (tmp_path / "chat_template.json").write_text('{"chat_template": 5}')
    with pytest.raises(CheckpointError, match=r"chat_template\.json: chat_template is 5"):
        find_chat_templates(tmp_path, None)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: cannot be read as text"):
        find_chat_templates(tmp_path, None)
    monkeypatch.setattr(chat_templates, "LARGEST_TEMPLATE", 1)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: has 2 bytes"):
        find_chat_templates(tmp_path, None)


def test_which_of_several_is_used(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_templates = {"default": "default", "tool_use": "with tools", "rag": "with documents"}
    assert tokenizer.apply_chat_template(CHAT) == "default"
    assert tokenizer.apply_chat_template(CHAT, tools=[WEATHER]) == "with tools"
    assert tokenizer.apply_chat_template(CHAT, tools=[WEATHER], chat_template="rag") == "with documents"
    with pytest.raises(ChatTemplateError, match="no chat template 'none'; there are default, rag, tool_use"):
        tokenizer.apply_chat_template(CHAT, chat_template="none")


def test_values_cannot_take_the_place_of_the_messages(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_templates = {"default": "{{ messages[0].content }}{{ template }}"}
    assert tokenizer.apply_chat_template(CHAT, messages=[], template="x") == "Be brief.x"
