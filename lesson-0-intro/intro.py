"""Lesson 0: what a language model is as a program, and what it asks of a machine.

Two halves. The first classifies sentences twice, by a list of words and by a model's probabilities. The second
counts, on paper, what one token costs: bytes to hold, bytes to read, operations to do; and from these the speed
that no engine on a given machine can pass. Plain Python throughout: a token is an int, logits are a list.

    V  vocabulary size: how many different tokens there are     H  query heads      D  width of one head
    S  tokens that the new one looks at, itself included        K  key/value heads

FLOP: one addition or one multiplication of two numbers. FLOP/s: how many of them in a second.
"""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NextTokenLogits = Callable[[list[int]], Sequence[float]]
"""The token ids so far -> V scores, one for each token that may come next. A language model, seen from outside."""
Encode = Callable[[str], list[int]]
"""Text -> its token ids, without special tokens."""


# ---------------------------------------------------------------------------------------------------------------
# By rules
# ---------------------------------------------------------------------------------------------------------------

LABELS = ("positive", "negative", "neutral")
POSITIVE_WORDS = frozenset({"good", "great", "excellent", "happy", "love"})
NEGATIVE_WORDS = frozenset({"bad", "terrible", "awful", "sad", "hate"})


def classify_by_rules(text: str) -> str:
    """The sentiment of a text, by counting words: "positive", "negative" or "neutral".

    Each occurrence of a word in POSITIVE_WORDS counts +1, each of one in NEGATIVE_WORDS -1; the sign of the sum
    decides, and 0 is neutral. Words are separated by white space; capitals make no difference, nor does
    punctuation (`string.punctuation`) around a word. A listed word inside a longer one is not an occurrence.
    """
    # TODO 0.1: make each word bare ("Good," is "good"), add up, compare with 0.
    raise NotImplementedError("TODO 0.1")


# ---------------------------------------------------------------------------------------------------------------
# By probabilities
# ---------------------------------------------------------------------------------------------------------------

ZERO_SHOT = "Is the sentiment of the sentence positive, negative or neutral?\n\nSentence: {text}\nSentiment:"
"""A prompt that asks."""
TWO_SHOT = (
    "Is the sentiment of the sentence positive, negative or neutral?\n\n"
    "Sentence: I am delighted with it.\nSentiment: positive\n\n"
    "Sentence: It was a waste of money.\nSentiment: negative\n\n"
    "Sentence: {text}\nSentiment:"
)
"""A prompt that asks and shows how it is answered, twice."""

SENTENCES = (  # (kind, label, text): written for this lesson, half of them to defeat the list of words
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
    """Scores to probabilities: exp(logit / temperature) over the sum of them. logits: V numbers. Returns V numbers.

    Temperature 1 is the model as it was trained, below 1 sharper, above 1 more even. Temperature 0 means the
    limit: probability 1 for the largest logit (the first, if several are) and 0 for the rest. Holds for logits
    of any size, though math.exp(710) is already too large for a float.
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 or more.")
    # TODO 0.2: first the case 0; otherwise subtract something from all logits that makes every exp safe.
    raise NotImplementedError("TODO 0.2")


def log_probability(
    continuation_ids: Sequence[int], prompt_ids: Sequence[int], next_token_logits: NextTokenLogits
) -> float:
    """The natural logarithm of the probability that the model, given the prompt, goes on with exactly these tokens.

    By the chain rule: the probability of the first token after the prompt, times that of the second after prompt
    and first token, and so on; the logarithm makes the product a sum, which does not underflow. At temperature 1.
    Leaves both sequences, which may be tuples, as they are. The empty continuation has probability 1.
    """
    # TODO 0.9: for each token: ask for the logits of all that stands before it, add the log of its share.
    raise NotImplementedError("TODO 0.9")


def classify_by_llm(text: str, next_token_logits: NextTokenLogits, encode: Encode, prompt: str = ZERO_SHOT) -> str:
    """The sentiment of a text, by the model: the label of LABELS that it finds likeliest after the prompt.

    prompt: has {text} where the text belongs, and ends where the label would follow. A label follows it after a
    space, as a word of its own, and may be several tokens: the probability of all of them counts, so that labels
    of different lengths compare honestly. Of equally likely labels the first counts.
    """
    # TODO 0.3: put the text into the prompt, encode it, compare `log_probability` of the labels.
    raise NotImplementedError("TODO 0.3")


def real_model(name: str = "smollm2-135m") -> tuple[NextTokenLogits, Encode]:
    """A real model's two functions, to hand to `classify_by_llm`. It runs on the code of lesson 2, which you will
    write yourself: the only place where a lesson looks ahead.
    """
    import torch

    from solutions.llama_pytorch import causal_attend, load

    model, tokenizer = load(name)

    @functools.lru_cache(maxsize=4)  # the labels are compared after the same prompt: compute it once
    @torch.inference_mode()
    def logits_after(token_ids: tuple[int, ...]) -> list[float]:
        ids = torch.tensor(token_ids, device=model.lm_head.weight.device)
        hidden = model(ids, torch.arange(len(ids), device=ids.device), causal_attend)
        return model.logits(hidden[-1:])[0].tolist()

    return (
        lambda token_ids: logits_after(tuple(token_ids)),
        lambda text: tokenizer.encode(text, add_special_tokens=False),
    )


# ---------------------------------------------------------------------------------------------------------------
# What a token costs
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelShape:
    """A model, and what fixes its costs: from `vocab_size` on, numbers of its `config.json` by their names there."""

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
    """Memory for the weights, in whole bytes, rounded up. bits: for each weight; 32, 16 (float16, bfloat16), 8 or 4."""
    # TODO 0.4: a byte has 8 bits, and half a byte takes a whole one.
    raise NotImplementedError("TODO 0.4")


def kv_cache_bytes(
    num_layers: int, num_kv_heads: int, head_dim: int, num_tokens: int, bytes_per_number: int = 2
) -> int:
    """Memory, in bytes, to remember a sequence of `num_tokens`, so that none of them is computed twice.

    What is remembered is the subject of lessons 1 and 3: in each layer, for each token, every key/value head keeps
    one vector of `head_dim` numbers as key and another as value.
    """
    # TODO 0.5: how many numbers for one token in one layer? Then layers, tokens, bytes.
    raise NotImplementedError("TODO 0.5")


def flops_per_token(shape: ModelShape, context_length: int) -> int:
    """Operations to compute one token, the `context_length`-th of its sequence: it looks at that many, itself included.

    A matrix of n x m numbers applied to a vector takes n * m multiplications and as many additions. Per layer:

        query     hidden_size -> H * D         gate and up   hidden_size -> intermediate_size, each
        key       hidden_size -> K * D         down          intermediate_size -> hidden_size
        value     hidden_size -> K * D
        output    H * D -> hidden_size

    and in attention every query head takes, with each of the S tokens it looks at, one dot product of D numbers
    with the key, and adds the value, D numbers, times a weight. After the last layer the head, hidden_size ->
    vocab_size. The embedding is looked up, which costs no operation. Norms, softmax and the like are left out:
    they grow with hidden_size, the matrices with its square.
    """
    # TODO 0.6: count the numbers in the matrices, and the pairs that attention multiplies; each is two FLOP.
    raise NotImplementedError("TODO 0.6")


# ---------------------------------------------------------------------------------------------------------------
# What a machine allows
# ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What a machine can do at best. bandwidth: bytes read from memory in a second; peak_flops: FLOP/s."""

    name: str
    bandwidth: float
    peak_flops: float


# GPUs: NVIDIA's data sheets and, for the RTX 4090, its Ada architecture paper; dense bfloat16 tensor cores, sums in
# float32. The figures twice as large that are often quoted assume that half of the weights are zero. CPU: 12 channels
# of DDR5-4800, 8 bytes each; 96 cores at 2.4 GHz, each two units of 8 float32 lanes; a multiply-add is two FLOP.
H100 = Machine("H100 SXM", 3.35e12, 989e12)
A100 = Machine("A100 SXM 80 GB", 2.039e12, 312e12)
RTX_4090 = Machine("RTX 4090", 1.008e12, 165.2e12)
EPYC_9654 = Machine("EPYC 9654", 12 * 8 * 4.8e9, 96 * 2.4e9 * 2 * 2 * 8)


def arithmetic_intensity(token_flops: float, model_bytes: float, cache_bytes: float, batch_size: int) -> float:
    """Operations for every byte that is read, in one step that computes one token for each of `batch_size` requests.

    token_flops: operations for one token. model_bytes: the weights, read once a step and used for all requests.
    cache_bytes: the KV cache of one request; each request has its own and reads all of it.
    """
    # TODO 0.7: what is done for all of them, over what is read for all of them.
    raise NotImplementedError("TODO 0.7")


def decode_ceiling(
    token_flops: float, model_bytes: float, cache_bytes: float, batch_size: int, bandwidth: float, peak_flops: float
) -> float:
    """Tokens a second, of all requests together, that no engine on this machine can pass: its roofline.

    Arguments as in `arithmetic_intensity`; bandwidth in bytes/s, peak_flops in FLOP/s. At best reading and computing
    overlap completely: a step then lasts as long as the slower of the two. From Williams, Waterman and Patterson,
    "Roofline: An Insightful Visual Performance Model" (2009).
    """
    # TODO 0.8: how long does the step read, how long does it compute, how many tokens does it give?
    raise NotImplementedError("TODO 0.8")
