"""Token ids as text for an answer, and log-probabilities in the two forms that OpenAI's API has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LOWEST_LOGPROB = -9999.0
"""JSON has no minus infinity; this is vLLM's number for it."""

Logprobs = dict[int, float]
"""Of one position, by token id: the chosen token first, then the likeliest."""


def token_text(tokenizer: Any, token_id: int) -> tuple[str, bytes]:
    """A token as text and as bytes. A special token, which adds nothing to an answer's text, is written out."""
    data = tokenizer.token_bytes(token_id)
    text = data.decode(errors="replace") if data else tokenizer.decode([token_id], skip_special_tokens=False)
    return text, data or text.encode()


def number(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def chat_logprobs(tokenizer: Any, positions: Sequence[Logprobs], num_top: int) -> dict:
    """`choices[].logprobs` of a chat. positions: one for each token. num_top: how many alternatives are shown."""

    def entry(token_id: int, logprob: float) -> dict:
        text, data = token_text(tokenizer, token_id)
        return {"token": text, "logprob": number(logprob), "bytes": list(data)}

    content = []
    for position in positions:
        chosen, likeliest = next(iter(position.items())), sorted(position.items(), key=lambda item: -item[1])
        content.append({**entry(*chosen), "top_logprobs": [entry(*item) for item in likeliest[:num_top]]})
    return {"content": content}


def completion_logprobs(
    tokenizer: Any, token_ids: Sequence[int], positions: Sequence[Logprobs | None], num_top: int, offset: int
) -> dict:
    """`choices[].logprobs` of a completion. positions: one for each token; None for the first one of a prompt, which
    nothing precedes. offset: number of characters of the answer before these tokens.
    """
    found: dict[str, list] = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
    for token_id, position in zip(token_ids, positions):
        text = token_text(tokenizer, token_id)[0]
        found["tokens"].append(text)
        found["text_offset"].append(offset)
        offset += len(text)
        if position is None:
            found["token_logprobs"].append(None)
            found["top_logprobs"].append(None)
            continue
        found["token_logprobs"].append(number(position[token_id]))
        shown = list(position.items())[: num_top + 1] if num_top else []
        found["top_logprobs"].append({token_text(tokenizer, other)[0]: number(value) for other, value in shown})
    return found
