"""Runs chat templates: Jinja programs that come with a checkpoint and write a conversation as one text.

They are written for transformers, so they get the same filters, functions and variables as there. They are not trusted.
So they get plain data only, and run in a sandbox (`template_sandbox.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.checkpoints import CheckpointError, read_json
from common.checkpoints.folder import read_text

LARGEST_TEMPLATE = 10_000_000  # bytes of its file
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
REASONING = ("reasoning_content", "thinking", "reasoning")  # synonyms; templates read the first or the second
CONTINUE = "THE_FINAL_MESSAGE_ENDS_HERE "  # a template that strips a message strips this space


class ChatTemplateError(ValueError):
    """A chat cannot be written as a prompt: there is no template, it failed, or the messages do not fit it."""


def find_chat_templates(folder: Path, written: Any) -> dict[str, str]:
    """Returns the chat templates of a checkpoint folder, by name; most folders have none, or only "default".

    written: `chat_template` in tokenizer_config.json, one template or a list of them. As in transformers, files with
    templates take precedence over it, and it takes precedence over a chat_template.json, which models with image input
    have. Raises CheckpointError if one is not text.
    """
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if found := {
        name: read_text(file, LARGEST_TEMPLATE, ", which is no chat template")
        for name, file in files.items()
        if file.is_file()
    }:
        return found
    source = folder / "tokenizer_config.json"
    if written is None and (folder / "chat_template.json").is_file():
        source = folder / "chat_template.json"
        written = read_json(source).get("chat_template")
    several = [{"name": "default", "template": written}] if isinstance(written, str) else written or []
    if isinstance(several, Mapping):
        several = [{"name": name, "template": template} for name, template in several.items()]
    found = {}
    for entry in several if isinstance(several, list) else [several]:
        pair = [entry.get("name"), entry.get("template")] if isinstance(entry, Mapping) else [entry]
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise CheckpointError(
                f"{source}: chat_template is {written!r:.80}; a template is text, and several are a list of objects "
                'with a "name" and a "template".'
            )
        found[pair[0]] = pair[1]
    return found


def choose_template(templates: Mapping[str, str], name: str | None, has_tools: bool) -> str:
    """The template of this name. Without a name it is "tool_use", if it exists and there are tools, else "default"."""
    if name is None:
        name = "tool_use" if has_tools and "tool_use" in templates else "default"
    if name not in templates:
        raise ChatTemplateError(f"there is no chat template {name!r}; there are {', '.join(sorted(templates))}.")
    return templates[name]


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise ChatTemplateError, with the position, for something that is no message."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ChatTemplateError('a chat is a list of messages, such as [{"role": "user", "content": "Hello"}].')
    for position, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        is_parts = isinstance(content, (list, tuple)) and all(isinstance(part, Mapping) for part in content)
        is_without = isinstance(message, Mapping) and content is None and message.get("tool_calls")
        if not (isinstance(content, str) or is_parts or is_without):
            raise ChatTemplateError(
                f'message {position} is {message!r:.200}; it needs a "role" and a "content". The content is text, or a '
                'list of parts such as {"type": "text", "text": "Hello"}; with "tool_calls" it may be left out.'
            )
        if message.get("role") not in ROLES:
            raise ChatTemplateError(
                f"message {position} has the role {message.get('role')!r:.80}; the roles are {', '.join(ROLES)}."
            )


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    /,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool | None = None,
    continue_final_message: bool | str = False,
    **values: Any,
) -> str:
    """Run a chat template. Returns the conversation as the text that the model was trained on.

    messages: each with "role", "content" (text or a list of parts) and other fields of the template. tools, documents:
    JSON objects. add_generation_prompt: end with the opening of the assistant's turn, so that the model answers; True
    unless the final message is continued. continue_final_message: end within the final message, after its content
    (True) or after the field of this name. values: other variables of the template, such as `enable_thinking`. Raises
    ChatTemplateError if the template refuses these messages or is stopped.
    """
    if add_generation_prompt and continue_final_message:
        raise ChatTemplateError(
            "add_generation_prompt and continue_final_message are both set: the model either begins a turn or "
            "continues one."
        )
    for name, objects in (("tools", tools), ("documents", documents)):
        is_list = isinstance(objects, (list, tuple)) and all(isinstance(item, Mapping) for item in objects)
        if objects is not None and not is_list:
            raise ChatTemplateError(f"{name} is {objects!r:.80}; it must be a list of JSON objects.")
    chat = [_message(message) for message in messages]
    if continue_final_message:
        final = _mark_end(chat[-1], continue_final_message, template)
    if add_generation_prompt is None:
        add_generation_prompt = not continue_final_message
    own = {"messages": chat, "tools": _plain(tools), "documents": _plain(documents)}
    text = _run(template, {**_plain(values), **own, "add_generation_prompt": add_generation_prompt})
    if not continue_final_message:
        return text
    end = text.rfind(CONTINUE.strip())
    if end < 0 or final.strip() not in text:
        raise ChatTemplateError(
            f"the chat template leaves out {final!r:.80}, so the final message cannot be continued."
        )
    return text[:end] if text.startswith(CONTINUE, end) else text[:end].rstrip()


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without the fields that are None, and with its reasoning under each name that templates read."""
    kept = _plain({key: value for key, value in message.items() if value is not None})
    reasoning = next((kept[name] for name in REASONING if name in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}


def _mark_end(message: dict[str, Any], field: bool | str, template: str) -> str:
    """Append CONTINUE to a field of the message, "content" if `field` is True. Returns the field's own text."""
    field = field if isinstance(field, str) else "content"
    text = message.get(field)
    fields = [name for name in REASONING if message.get(name) == text] if field in REASONING else [field]
    if not any(name in template for name in fields):
        raise ChatTemplateError(f"the chat template does not read {field!r}, which is to be continued.")
    if isinstance(text, list):
        part = next((part for part in reversed(text) if isinstance(part.get("text"), str)), {})
        text = part.get("text")
        part["text"] = f"{text}{CONTINUE}"
    elif isinstance(text, str):
        message.update({name: text + CONTINUE for name in fields})
    if not isinstance(text, str):
        raise ChatTemplateError(f"the final message has no text in {field!r} that could be continued.")
    return text


def _plain(value: Any) -> Any:
    """The value as plain JSON data. Other objects become their type's name, so that no template can call a method."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (tuple if isinstance(value, tuple) else list)(map(_plain, value))
    kind = next((kind for kind in (str, int, float) if isinstance(value, kind)), None)
    return f"<{type(value).__name__}>" if kind is None else kind(value)


def _run(template: str, values: Mapping[str, Any]) -> str:
    import jinja2  # most commands need none

    from common.template_sandbox import render

    try:
        return render(template, values)
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(f"the chat template is not valid Jinja: line {error.lineno}: {error}") from error
    except jinja2.sandbox.SecurityError as error:
        raise ChatTemplateError(
            f"the chat template tried something that the sandbox forbids: {error} Do not trust this checkpoint."
        ) from error
    except Exception as error:  # a template may raise anything
        raise ChatTemplateError(f"the chat template refused these messages or failed: {error}") from error
