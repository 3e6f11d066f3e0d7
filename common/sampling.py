"""`SamplingParams`, the options of a request: how its tokens are chosen, and when its output ends. And its checks."""

from __future__ import annotations

import copy
import hashlib
import math
import operator
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from itertools import islice
from numbers import Integral, Real
from typing import Any

from common.config import shown


def stable_hash(*numbers: int) -> int:
    """Hash whole numbers into a seed of 63 bits, the same in every process and on every machine."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


GREEDY = 1e-5  # a lower temperature means 0: scores divided by it would leave the range of float32
MAX_SAMPLES = 1024
MAX_LOGPROBS = 1024
"""Each sample is a request, and log probabilities are sorted for each token: more would hold up all other requests."""
MAX_ENTRIES = 10_000
"""The most entries that a list may have: an endless iterator, such as `itertools.repeat`, would fill the memory."""
NO_SEQUENCES = (bytes, bytearray, memoryview, Mapping, Set)
"""Types that are no list of token ids, although iterating over them may give whole numbers."""
MAX_PROMPT = 2**22
"""The most token ids that are read of a prompt, more than any context has: a generator may have no end."""
MAX_STOP_CHARACTERS = 10_000
"""The most characters that a request's stop strings have together: every token is compared with all of them."""


def check_params(params: Any) -> SamplingParams:
    """Returns the parameters of a request; the defaults for None. Raises ValueError if they are something else."""
    if params is not None and not isinstance(params, SamplingParams):
        raise ValueError(f"params must be SamplingParams(...); it is {shown(params)}.")
    return params or SamplingParams()


def check_kind(kind: type, **values: Any) -> None:
    """Raise ValueError for a keyword argument that is not of this kind, str or int. True and False are no numbers."""
    for name, value in values.items():
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} must be {'text' if kind is str else 'a whole number'}; it is {shown(value)}.")


def list_prompts(prompts: Any) -> list:
    """Returns prompts as a list. A single prompt, text or token ids, becomes a list of one."""
    if isinstance(prompts, (str, *NO_SEQUENCES)):
        return [prompts]
    try:
        several = list(prompts)
    except TypeError:
        return [prompts]
    return [several] if several and hasattr(several[0], "__index__") else several


def encode_prompt(prompt: Any, tokenizer: Any) -> list[int]:
    """Returns the token ids of a prompt. Raises ValueError if it is neither text nor a list of whole numbers."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    try:
        token_ids = list(islice(prompt, MAX_PROMPT))
        if isinstance(prompt, NO_SEQUENCES) or any(isinstance(token_id, bool) for token_id in token_ids):
            raise TypeError(f"it is {shown(prompt)}")
        return [operator.index(token_id) for token_id in token_ids]
    except TypeError as error:
        raise ValueError(f"prompt must be text or a list of token ids, which are whole numbers: {error}.") from None


def refuse(name: str, rule: str, value: object) -> None:
    raise ValueError(f"SamplingParams: {name} must be {rule}; it is {shown(value)}.")


@dataclass(frozen=True)
class Untransferable:
    """Stands for logits processors that could not be sent to the process that samples. reason: what pickle says."""

    reason: str

    def __call__(self, output: Sequence[int], scores: Any) -> Any:
        raise ValueError(
            f"logits_processors cannot be sent to the process that samples: {self.reason}. Define them in a module."
        )


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop. Names and meanings are vLLM's, but temperature is 0 by default and
    max_tokens 128. None gives any field its default. Raises ValueError with the name of the field that is wrong.
    """

    temperature: float = 0.0  # 0: always the likeliest token; 1: the model's own distribution; higher: more even
    top_k: int = 0  # keep the k likeliest tokens; 0: all
    top_p: float = 1.0  # keep the likeliest tokens that together have this probability
    min_p: float = 0.0  # keep tokens at least this fraction as likely as the likeliest
    seed: int | None = None  # the same seed draws the same tokens; None: different ones every time
    n: int = 1  # the number of samples for one prompt
    max_tokens: int = 128
    min_tokens: int = 0  # the first `min_tokens` tokens neither end the request nor belong to a stop string
    stop: str | Sequence[str] = ()  # strings that end the text and are not part of it
    stop_token_ids: Sequence[int] = ()  # tokens that end the text, like the end of sequence
    ignore_eos: bool = False  # continue after an end of sequence
    logprobs: int | None = None  # report at each step this many of the likeliest tokens, and the chosen one
    prompt_logprobs: int | None = None  # the same for each token of the prompt but the first
    repetition_penalty: float = 1.0  # divides positive scores of tokens in prompt or output, multiplies negative ones
    presence_penalty: float = 0.0  # subtracted once from the score of each token in the output
    frequency_penalty: float = 0.0  # subtracted once for each occurrence of the token in the output
    logits_processors: Sequence[Callable[[Sequence[int], Any], Any]] = ()
    """Each is called with the output's token ids and the scores (V,) of the next token, and returns new scores."""

    def __post_init__(self):
        values = {f.name: f.default if (v := getattr(self, f.name)) is None else v for f in fields(self)}
        limits = {  # kind of number, lowest, highest
            "temperature": (Real, 0, 1e6), "top_k": (Integral, 0, math.inf), "top_p": (Real, 1e-6, 1),
            "min_p": (Real, 0, 1), "seed": (Integral, -(2**63), 2**63), "n": (Integral, 1, MAX_SAMPLES),
            "max_tokens": (Integral, 1, math.inf), "min_tokens": (Integral, 0, values["max_tokens"]),
            "logprobs": (Integral, 0, MAX_LOGPROBS), "prompt_logprobs": (Integral, 0, MAX_LOGPROBS),
            "repetition_penalty": (Real, 1e-3, 1e3),
            "presence_penalty": (Real, -1e3, 1e3), "frequency_penalty": (Real, -1e3, 1e3),
        }  # fmt: skip
        for name, (kind, low, high) in limits.items():
            value = values[name]
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            if value is not None and not (is_number and low <= value <= high):
                rule = f"from {low:g} to {high:g}" if high < math.inf else f"of at least {low:g}"
                refuse(name, f"a {'whole ' if kind is Integral else ''}number {rule}", value)
            if value is not None:  # torch knows no Fraction, and a seed is hashed as it is written: np.int64(3)
                values[name] = int(value) if kind is Integral else float(value)
        for name in ("stop", "stop_token_ids", "logits_processors"):
            several = isinstance(values[name], Iterable) and not isinstance(values[name], str)
            values[name] = tuple(islice(values[name], MAX_ENTRIES + 1)) if several else (values[name],)
        if not all(isinstance(string, str) and string for string in values["stop"]):
            refuse("stop", "one or several strings that are not empty", values["stop"])
        if (length := sum(map(len, values["stop"]))) > MAX_STOP_CHARACTERS:
            refuse("stop", f"at most {MAX_STOP_CHARACTERS} characters long in all", length)
        for name in ("stop_token_ids", "logits_processors"):
            if len(values[name]) > MAX_ENTRIES:
                refuse(name, f"a list of at most {MAX_ENTRIES} entries", values[name])
        if not all(isinstance(i, Integral) and not isinstance(i, bool) and i >= 0 for i in values["stop_token_ids"]):
            refuse("stop_token_ids", "token ids", values["stop_token_ids"])
        if not isinstance(values["ignore_eos"], bool):
            refuse("ignore_eos", "True or False", values["ignore_eos"])
        if not all(map(callable, values["logits_processors"])):
            refuse("logits_processors", "functions of the output and the scores", values["logits_processors"])
        if values["temperature"] < GREEDY:
            values["temperature"] = 0.0
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle logits processors separately: if that fails, only their own request fails, and not the whole step."""
        try:
            sent = pickle.dumps(self.logits_processors)
        except Exception as error:
            sent = pickle.dumps((Untransferable(str(error)),))
        return {**self.__dict__, "logits_processors": sent}

    def __setstate__(self, state: dict[str, Any]) -> None:
        try:
            processors = pickle.loads(state["logits_processors"])
        except Exception as error:
            processors = (Untransferable(str(error)),)
        self.__dict__.update(state, logits_processors=processors)

    def process(self, output: Sequence[int], scores: Any) -> Any:
        """Apply the logits processors. Returns the new scores.

        output: the token ids so far. scores: (V,). Raises ValueError if a processor returns another type or shape, or
        if the highest score is no finite number.
        """

        def described(scores: Any) -> str:
            if not hasattr(scores, "is_floating_point"):
                return f"an object of type {type(scores).__name__}"
            kind = "floats" if scores.is_floating_point() else scores.dtype
            return f"a tensor of {kind} of shape {tuple(scores.shape)} on {scores.device}"

        wanted = described(scores) if self.logits_processors else ""
        for process in self.logits_processors:
            scores = process(output, scores)
            if (got := described(scores)) != wanted:
                raise ValueError(f"one of logits_processors returned {got}; it must return {wanted}.")
        if self.logits_processors and not math.isfinite(best := float(scores.max())):
            raise ValueError(f"logits_processors left no token with a score that is a number: the highest is {best}.")
        return scores

    def children(self) -> list[SamplingParams]:
        """Returns the parameters of the n samples, each a request with n=1.

        The first keeps the seed; each other one gets a seed made from it. Each has copies of the logits processors,
        which may remember how far the output is. Raises ValueError if those cannot be copied.
        """
        samples = []
        for child in range(self.n):
            try:
                processors = copy.deepcopy(self.logits_processors)
            except Exception as error:  # there may be a lock or an open file in one of them
                raise ValueError(
                    f"SamplingParams: logits_processors cannot be copied, and each sample needs its own: {error}."
                ) from None
            seed = self.seed if self.seed is None or not child else stable_hash(self.seed, child)
            samples.append(replace(self, n=1, seed=seed, logits_processors=processors))
        return samples


def check_prompt(prompt_token_ids: Sequence[int], config: Any, params: SamplingParams) -> None:
    """Raise ValueError, with the reason, for a prompt that cannot be continued. config: the model's `ModelConfig`."""
    if not len(prompt_token_ids):
        raise ValueError("The prompt is empty: there is no token to continue from.")
    if len(prompt_token_ids) >= config.max_position_embeddings:
        raise ValueError(
            f"The prompt has {len(prompt_token_ids)} tokens; the context has {config.max_position_embeddings}, and at "
            "least one is needed for the output."
        )
    for token_id in prompt_token_ids:
        if not isinstance(token_id, Integral):
            raise ValueError(f"The prompt has {shown(token_id)} among its token ids, which are whole numbers.")
        if not 0 <= token_id < config.vocab_size:
            raise ValueError(
                f"The prompt has token id {shown(token_id)}; the vocabulary ends at {config.vocab_size - 1}."
            )
    if params.n != 1:
        raise ValueError(f"SamplingParams: n is {params.n}; generate makes one sample: call it for params.children().")
