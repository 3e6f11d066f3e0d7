"""Lesson 0: what a language model is as a program, and what it costs to run.

First it classifies sentences twice, with a word list and with a model's probabilities. Then it counts what one token
costs in bytes and operations, and the highest speed that any engine can reach on a given machine. Plain Python: a
token is an int, logits are a list.

    V  vocabulary size, the number of different tokens          H  query heads      D  width of one head
    S  tokens that the new one attends to, itself included      K  key/value heads

FLOP: one addition or multiplication of two numbers. FLOP/s: FLOP per second.
"""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NextTokenLogits = Callable[[list[int]], Sequence[float]]
"""A language model seen from outside: the token ids so far -> V scores, one for each possible next token."""
Encode = Callable[[str], list[int]]
"""Text -> its token ids, without special tokens."""


# --- Classification by rules ------------------------------------------------------------------------------------------

LABELS = ("positive", "negative", "neutral")
POSITIVE_WORDS = frozenset({"good", "great", "excellent", "happy", "love"})
NEGATIVE_WORDS = frozenset({"bad", "terrible", "awful", "sad", "hate"})


def classify_by_rules(text: str) -> str:
    """Return the sentiment of a text: "positive", "negative" or "neutral".

    Each word of POSITIVE_WORDS counts +1 and each word of NEGATIVE_WORDS counts -1; the sign of the sum decides, and 0
    is neutral. Words are separated by white space. Ignore case, and `string.punctuation` around a word. A listed word
    inside a longer one does not count.
    """
    # TODO 0.1: strip each word ("Good," becomes "good"), add up the counts, compare the sum with 0.
    raise NotImplementedError("TODO 0.1")


# --- Classification by probabilities ----------------------------------------------------------------------------------

ZERO_SHOT = "Is the sentiment of the sentence positive, negative or neutral?\n\nSentence: {text}\nSentiment:"
"""A prompt that asks without examples."""
TWO_SHOT = (
    "Is the sentiment of the sentence positive, negative or neutral?\n\n"
    "Sentence: I am delighted with it.\nSentiment: positive\n\n"
    "Sentence: It was a waste of money.\nSentiment: negative\n\n"
    "Sentence: {text}\nSentiment:"
)
"""A prompt that asks after two worked examples."""

SENTENCES = (  # (kind, label, text): written for this lesson; half of them are meant to defeat the word list
    ("says so", "positive", "I love this little cafe."),
    ("says so", "positive", "The food was excellent, and the staff were great!"),
    ("says so", "positive", "We are happy with the result."),
    ("says so", "negative", "The film was terrible."),
    ("says so", "negative", "I hate waiting in this queue."),
    ("says so", "negative", "The room smelled awful."),
    ("other words", "positive", "It kept me smiling to the last page."),
    ("other words", "positive", "Everyone cheered when the band came back."),
    ("other words", "positive", "The battery lasts all week."),
    ("other words", "negative", "It broke after two days."),
    ("other words", "negative", "The soup was cold and the bread was stale."),
    ("other words", "negative", "Nobody answered my calls."),
    ("turned", "positive", "This movie is not bad."),  # the words mean the opposite here
    ("turned", "positive", "I have nothing bad to say about it."),
    ("turned", "positive", "This kills! Play it tonight."),
    ("turned", "negative", "This is not good."),
    ("turned", "negative", "Good luck getting your money back."),
    ("turned", "negative", "What a great way to waste an evening."),
    ("no opinion", "neutral", "The shop opens at nine."),
    ("no opinion", "neutral", "The parcel weighs two kilograms."),
    ("no opinion", "neutral", "The train leaves from platform four."),
    ("no opinion", "neutral", "The book has 300 pages."),
    ("no opinion", "neutral", "My flight has a stop in Oslo."),
    ("no opinion", "neutral", "The Good Friday concert is in the church."),
)


def next_token_distribution(logits: Sequence[float], temperature: float = 1.0) -> list[float]:
    """Turn V logits into V probabilities: exp(logit / temperature), divided by the sum of all of these.

    Temperature 1 is the model as trained; below 1 the distribution is sharper, above 1 more even. Temperature 0 is the
    limit: probability 1 for the largest logit (the first, if several are equal), 0 for the rest. Logits may have any
    size, although math.exp(710) already overflows a float.
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 or more.")
    # TODO 0.2: handle temperature 0 first; otherwise subtract a number from all logits that makes every exp safe.
    raise NotImplementedError("TODO 0.2")


def log_probability(
    continuation_ids: Sequence[int], prompt_ids: Sequence[int], next_token_logits: NextTokenLogits
) -> float:
    """Return the natural logarithm of the probability that the model continues the prompt with exactly these tokens.

    By the chain rule, that is the probability of the first token after the prompt, times that of the second after
    prompt and first token, and so on, at temperature 1. Sum logarithms, because the product may underflow. Both
    sequences may be tuples; do not change them. An empty continuation has probability 1.
    """
    # TODO 0.3: for each token, get the logits after everything before it and add the log of its probability.
    raise NotImplementedError("TODO 0.3")


def classify_by_llm(text: str, next_token_logits: NextTokenLogits, encode: Encode, prompt: str = ZERO_SHOT) -> str:
    """Return the label of LABELS that the model finds likeliest after the prompt.

    prompt: contains {text} where the text belongs, and ends just before the label. The label follows after a space and
    may be several tokens, all of which count. If two labels are equally likely, return the first.
    """
    # TODO 0.4: put the text into the prompt, encode it, compare `log_probability` of the labels.
    raise NotImplementedError("TODO 0.4")


def real_model(name: str = "smollm2-135m") -> tuple[NextTokenLogits, Encode]:
    """Return a real model's two functions, for `classify_by_llm`. They run on lesson 2, which you will write later."""
    import torch

    from solutions.llama_pytorch import causal_attend, load

    model, tokenizer = load(name)

    @functools.lru_cache(maxsize=4)  # all labels follow the same prompt: compute it once
    @torch.inference_mode()
    def logits_after(token_ids: tuple[int, ...]) -> list[float]:
        ids = torch.tensor(token_ids, device=model.lm_head.weight.device)
        hidden = model(ids, torch.arange(len(ids), device=ids.device), causal_attend)
        return model.logits(hidden[-1:])[0].tolist()

    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    return lambda token_ids: logits_after(tuple(token_ids)), encode


# --- What a token costs, and what a machine allows --------------------------------------------------------------------


@dataclass(frozen=True)
class ModelShape:
    """The sizes that determine a model's cost. From `vocab_size` on, the names are those of its `config.json`."""

    name: str
    num_parameters: int
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


SMOLLM2_135M = ModelShape("SmolLM2 135M", 134_515_008, 49_152, 576, 1536, 30, 9, 3, 64)
LLAMA_2_7B = ModelShape("Llama 2 7B", 6_738_415_616, 32_000, 4096, 11_008, 32, 32, 32, 128)
LLAMA_3_8B = ModelShape("Llama 3 8B", 8_030_261_248, 128_256, 4096, 14_336, 32, 32, 8, 128)
LLAMA_2_70B = ModelShape("Llama 2 70B", 68_976_648_192, 32_000, 8192, 28_672, 80, 64, 8, 128)


def weight_bytes(num_parameters: int, bits: int) -> int:
    """Return the memory for the weights, in bytes, rounded up. bits: per weight; 32, 16, 8 or 4."""
    # TODO 0.5: a byte has 8 bits, and half a byte needs a whole one.
    raise NotImplementedError("TODO 0.5")


def kv_cache_bytes(
    num_layers: int, num_kv_heads: int, head_dim: int, num_tokens: int, bytes_per_number: int = 2
) -> int:
    """Return the memory, in bytes, for the keys and values of a sequence, so that no token is computed twice.

    In each layer and for each token, every key/value head stores a key and a value of `head_dim` numbers each
    (lessons 1 and 3).
    """
    # TODO 0.6: count the numbers for one token in one layer, then multiply by layers, tokens and bytes.
    raise NotImplementedError("TODO 0.6")


def flops_per_token(shape: ModelShape, context_length: int) -> int:
    """Return the FLOP to compute one token that attends to `context_length` tokens, itself included.

    Multiplying an n x m matrix by a vector takes n * m multiplications and as many additions. Per layer:

        query     hidden_size -> H * D         gate and up   hidden_size -> intermediate_size, each
        key       hidden_size -> K * D         down          intermediate_size -> hidden_size
        value     hidden_size -> K * D
        output    H * D -> hidden_size

    In attention, for each of the S tokens, every query head computes one dot product with the key (D numbers) and adds
    the value (D numbers) times a weight. After the last layer comes the output head, hidden_size -> vocab_size. The
    embedding is a lookup and costs nothing. Norms and softmax are left out: they grow with hidden_size, the matrices
    with its square.
    """
    # TODO 0.7: count the numbers in the matrices, and the pairs that attention multiplies; each is two FLOP.
    raise NotImplementedError("TODO 0.7")


@dataclass(frozen=True)
class Machine:
    """What a machine can do at best."""

    name: str
    bandwidth: float  # bytes per second from memory
    peak_flops: float  # FLOP/s


# GPUs: NVIDIA's data sheets (RTX 4090: the Ada architecture paper), dense bfloat16 tensor cores summing in float32. The
# figures twice as large that are often quoted assume that half of the weights are zero. CPU: 12 channels of DDR5-4800,
# 8 bytes each; 96 cores at 2.4 GHz, each with two units of 8 float32 lanes; a multiply-add is two FLOP.
H100 = Machine("H100 SXM", 3.35e12, 989e12)
A100 = Machine("A100 SXM 80 GB", 2.039e12, 312e12)
RTX_4090 = Machine("RTX 4090", 1.008e12, 165.2e12)
EPYC_9654 = Machine("EPYC 9654", 12 * 8 * 4.8e9, 96 * 2.4e9 * 2 * 2 * 8)


def arithmetic_intensity(token_flops: float, model_bytes: float, cache_bytes: float, batch_size: int) -> float:
    """Return the FLOP per byte read, in a step that computes one token for each of `batch_size` requests.

    token_flops: for one token. model_bytes: the weights, read once per step for all requests. cache_bytes: the KV cache
    of one request; each request has its own and reads all of it.
    """
    # TODO 0.8: divide the operations for all requests by the bytes read for all requests.
    raise NotImplementedError("TODO 0.8")


def decode_ceiling(
    token_flops: float, model_bytes: float, cache_bytes: float, batch_size: int, bandwidth: float, peak_flops: float
) -> float:
    """Return the highest tokens per second, over all requests, that this machine allows: its roofline.

    Arguments as in `arithmetic_intensity`; bandwidth in bytes/s, peak_flops in FLOP/s. At best, reading and computing
    overlap completely, so a step lasts as long as the slower of the two. From Williams, Waterman and Patterson,
    "Roofline: An Insightful Visual Performance Model" (2009).
    """
    # TODO 0.9: compute the seconds of reading and of computing; the slower one limits the step's tokens.
    raise NotImplementedError("TODO 0.9")
