"""The checks of lesson 0's exercises. Run them with `make test-lesson-0`, or one exercise with `make test-0.5`."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from common.grading import close, equal, exercise, holds, refuses, together


def numbers(values):
    """Numbers as a tensor, so that `close` can say where they differ; an array will do; anything else as it is."""
    values = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(values, (list, tuple)) and all(isinstance(value, (int, float)) for value in values):
        return torch.tensor([float(value) for value in values], dtype=torch.float64)
    return values


# --- By rules ---------------------------------------------------------------------------------------------------------


@exercise("0.1", points=1)
class TestClassifyByRules:
    def test_one_listed_word(self, code):
        equal(code.classify_by_rules("a great day"), "positive", "classify_by_rules('a great day')")
        equal(code.classify_by_rules("a sad day"), "negative", "classify_by_rules('a sad day')")
        equal(code.classify_by_rules("a day"), "neutral", "classify_by_rules('a day')")

    def test_traps(self, code):
        for text, label in (
            ("It is good, and so are you.", "positive"),
            ("TERRIBLE service", "negative"),
            ("good food, bad seats", "neutral"),
            ("a sad sad story with a happy end", "negative"),
            ("(love!)", "positive"),
            ("We lost the badge on the saddle.", "neutral"),
            ("sad\nbut\ttrue", "negative"),
            ("an ex-cellent print", "neutral"),
            ("", "neutral"),
        ):
            equal(code.classify_by_rules(text), label, f"classify_by_rules({text!r})")

    def test_all_listed_words(self, code):
        for words, label in ((code.POSITIVE_WORDS, "positive"), (code.NEGATIVE_WORDS, "negative")):
            for word in sorted(words):
                equal(code.classify_by_rules(f"So {word}!"), label, f"classify_by_rules('So {word}!')")

    def test_rules_do_not_understand(self, code):
        text = "This movie is not bad."
        equal(code.classify_by_rules(text), "negative", f"classify_by_rules({text!r}), which is all that rules can do,")


# --- By probabilities -------------------------------------------------------------------------------------------------


def distribution(code, logits, temperature):
    """The student's distribution; an arithmetic error becomes a sentence about the numbers that caused it."""
    what = f"next_token_distribution({logits}, {temperature})"
    try:
        return numbers(code.next_token_distribution(logits, temperature))
    except OverflowError:
        question = "Which constant can be taken from all logits, before they are divided by the temperature?"
        holds(False, f"{what}: an exp overflows. {question}", actual="overflow")
    except ZeroDivisionError:
        holds(False, f"{what} divides by zero.", actual="division by zero")


def probabilities(*values):
    return torch.tensor(values, dtype=torch.float64)


@exercise("0.2", points=2)
class TestNextTokenDistribution:
    def test_by_hand(self, code):
        # e^0 : e^(ln 3) = 1 : 3
        logits = [0.0, math.log(3)]
        close(distribution(code, logits, 1.0), probabilities(0.25, 0.75), "next_token_distribution([0, ln 3], 1)")

    def test_temperature(self, code):
        # Half the temperature doubles the logits: 1 : 9. Twice the temperature halves them: 1 : sqrt 3.
        logits = [0.0, math.log(3)]
        close(distribution(code, logits, 0.5), probabilities(0.1, 0.9), "next_token_distribution([0, ln 3], 0.5)")
        root = math.sqrt(3)
        expected = probabilities(1 / (1 + root), root / (1 + root))
        close(distribution(code, logits, 2.0), expected, "next_token_distribution([0, ln 3], 2)")

    def test_default_temperature_is_1(self, code):
        result = numbers(code.next_token_distribution([0.0, math.log(3)]))
        close(result, probabilities(0.25, 0.75), "next_token_distribution([0, ln 3])")

    def test_temperature_0_is_argmax(self, code):
        result = distribution(code, [1.0, 4.0, 4.0, -2.0], 0)
        close(result, probabilities(0, 1, 0, 0), "next_token_distribution([1, 4, 4, -2], 0)")

    def test_temperature_0_does_not_look_at_the_size(self, code):
        result = distribution(code, [-3.0, -1.0, -2.0], 0.0)
        close(result, probabilities(0, 1, 0), "next_token_distribution([-3, -1, -2], 0)")

    def test_large_logits(self, code):
        close(
            distribution(code, [1000.0, 1000.0], 1.0),
            probabilities(0.5, 0.5),
            "next_token_distribution([1000, 1000], 1)",
        )
        expected = probabilities(0.25, 0.75)
        shifted = [-2000.0, -2000.0 + math.log(3)]
        close(
            distribution(code, shifted, 1.0), expected, "next_token_distribution([-2000, -2000 + ln 3], 1)", rtol=1e-9
        )
        close(distribution(code, [0.0, 5.0], 0.001), probabilities(0, 1), "next_token_distribution([0, 5], 0.001)")

    def test_a_small_temperature_is_not_0(self, code):
        # Down to 1e-5, below which the engine itself takes a temperature for 0.
        for temperature in (1e-3, 1e-4, 2e-5):
            logits = [0.0, temperature * math.log(3)]
            what = f"next_token_distribution([0, {temperature:g} x ln 3], {temperature:g})"
            close(distribution(code, logits, temperature), probabilities(0.25, 0.75), what)

    def test_against_torch(self, code):
        logits = torch.randn(50, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 5
        for temperature in (0.3, 1.0, 4.0):
            expected = torch.softmax(logits / temperature, -1)
            what = f"next_token_distribution of 50 random logits at temperature {temperature}"
            close(distribution(code, logits.tolist(), temperature), expected, what)

    def test_leaves_the_logits_alone(self, code):
        logits = [1.0, 3.0, 2.0]
        for temperature in (0.0, 0.5):
            distribution(code, logits, temperature)
            equal(
                logits,
                [1.0, 3.0, 2.0],
                f"the list of logits after next_token_distribution at temperature {temperature}",
            )


SHARES = {
    (): [4, 2, 1, 1],
    (0,): [1, 5, 1, 1],
    (3,): [1, 1, 1, 1],
    (0, 1): [1, 1, 6, 2],
    (0, 1, 2): [3, 3, 1, 1],
    (3, 2): [1, 4, 1, 2],
    (0, 2): [2, 2, 2, 2],
    (3, 0): [1, 1, 5, 1],
}
"""A language of 4 tokens: what was said so far -> how likely each token is to come next, in eighths."""


class Toy:
    """A model made of SHARES; its logits are the logarithms of the shares and some constant, as a model's are."""

    def __init__(self):
        self.asked = []

    def __call__(self, token_ids):
        so_far = tuple(token_ids)
        self.asked.append(so_far)
        holds(
            so_far in SHARES,
            f"next_token_logits was asked about {list(so_far)}: that is not the prompt, followed by what stands before "
            "the token.",
            actual=so_far,
        )
        return [math.log(share) + 1.5 for share in SHARES[so_far]]


@exercise("0.3", points=2)
class TestLogProbability:
    def test_one_token(self, code):
        close(
            math.exp(code.log_probability([1], [], Toy())),
            2 / 8,
            "exp(log_probability([1], [])), where token 1 has 2 of 8 shares,",
        )

    def test_depends_on_the_prompt(self, code):
        result = math.exp(code.log_probability([1], [0], Toy()))
        close(result, 5 / 8, "exp(log_probability([1], [0])), where after 0 token 1 has 5 of 8 shares,")

    def test_several_tokens(self, code):
        result = math.exp(code.log_probability([0, 1, 2], [], Toy()))
        close(result, 4 / 8 * 5 / 8 * 6 / 10, "exp(log_probability([0, 1, 2], [])): 4/8, then 5/8, then 6/10,")

    def test_prompt_and_several_tokens(self, code):
        result = math.exp(code.log_probability((1, 2), (0,), Toy()))
        close(result, 5 / 8 * 6 / 10, "exp(log_probability([1, 2], [0])): 5/8, then 6/10,")

    def test_a_tuple_and_a_list(self, code):
        for continuation, prompt in (([1, 2], (0,)), ((1, 2), [0])):
            what = f"log_probability({continuation}, {prompt})"
            try:
                result = math.exp(code.log_probability(continuation, prompt, Toy()))
            except TypeError:
                kinds = f"a {type(continuation).__name__} and a {type(prompt).__name__}"
                holds(False, f"{what}: {kinds} cannot be joined with `+`; make a new list of both.", actual=kinds)
            close(result, 5 / 8 * 6 / 10, f"exp({what}): 5/8, then 6/10,")

    def test_nothing_has_probability_1(self, code):
        close(float(code.log_probability([], [0], Toy())), 0.0, "log_probability([], [0])")

    def test_long_continuations_do_not_underflow(self, code):
        what = "log_probability of 800 tokens with probability 1/4 each"
        try:
            result = code.log_probability([1] * 800, [2], lambda token_ids: [math.log(3), 0.0])
        except ValueError:
            holds(False, f"{what}: the product of 800 quarters is 0 as a float, and 0 has no log.", actual="log of 0")
        close(result, 800 * math.log(1 / 4), what)

    def test_leaves_the_lists_alone(self, code):
        continuation, prompt = [1, 2], [0]
        code.log_probability(continuation, prompt, Toy())
        equal((continuation, prompt), ([1, 2], [0]), "the two lists after log_probability")


class Words:
    """A tokenizer of words, and a model that likes to finish a label: a stand-in for the real ones.

    " neutral" takes two tokens here, as a rare word does. `tastes` says, for a word in the prompt, how likely the
    model then finds the first token of each label; the rest of the probability goes to the token "well".
    """

    def __init__(self, tastes, second=1.0):
        self.names = ["well", " positive", " negative", " neu", "tral", "positive", "negative", "neutral"]
        self.tastes, self.second = tastes, second
        self.prompts = []

    def encode(self, text):
        for ending, ids in ((" positive", [1]), (" negative", [2]), (" neutral", [3, 4])):
            if text == ending:
                return list(ids)
            if text == ending[1:]:
                return [self.names.index(text)]
        self.prompts.append(text)
        return [100 + len(self.prompts) - 1]

    def next_token_logits(self, token_ids):
        prompt = self.prompts[token_ids[0] - 100]
        shares = [1e-4] * len(self.names)
        if list(token_ids[1:]) == [3]:
            shares[4], shares[0] = self.second, 1 - self.second + 1e-6
        else:
            taste = next((taste for word, taste in self.tastes.items() if word in prompt), (0.1, 0.1, 0.1))
            shares[1:4] = taste
            shares[0] = 1.001 - sum(taste)
            shares[5:8] = 0.2 * taste[1], 0.2 * taste[2], 0.2 * taste[0]  # without the space: other words
        return [math.log(share) for share in shares]


TASTES = {  # word in the text: share of " positive", " negative", " neu"
    "sun": (0.5, 0.2, 0.1),
    "rain": (0.2, 0.5, 0.1),
    "road": (0.1, 0.1, 0.7),
    "fog": (0.05, 0.1, 0.15),  # "neu" leads
    "hail": (0.02, 0.03, 0.01),  # the model would rather say "well"
    "frost": (0.4, 0.05, 0.01),  # here too
}


def labels_of(code, words, texts, *prompt):
    return [code.classify_by_llm(text, words.next_token_logits, words.encode, *prompt) for text in texts]


@exercise("0.4", points=2)
class TestClassifyByLlm:
    def test_follows_the_model(self, code):
        words = Words(TASTES)
        result = labels_of(code, words, ["sun", "rain", "road"])
        equal(
            result, ["positive", "negative", "neutral"], "classify_by_llm of ['sun', 'rain', 'road'], by a toy model,"
        )

    def test_uses_the_prompt(self, code):
        words = Words(TASTES)
        labels_of(code, words, ["Sun {and} rain"], "Text: {text} Answer:")
        holds(
            "Text: Sun {and} rain Answer:" in words.prompts,
            "the model was not given the prompt 'Text: Sun {and} rain Answer:', made of the text and prompt=...",
            actual=tuple(words.prompts),
        )

    def test_counts_all_tokens_of_a_label(self, code):
        # After " neu" the model says "tral" with probability 0.5 only: for "fog", 0.15 x 0.5 is less than 0.1.
        words = Words(TASTES, second=0.5)
        texts = ["fog", "road", "hail", "frost", "else"]
        labels = ["negative", "neutral", "negative", "positive", "positive"]
        what = f"classify_by_llm of {texts}, where ' neutral' is two tokens, the second with probability 1/2,"
        equal(labels_of(code, words, texts), labels, what)

    def test_a_longer_label_has_no_advantage(self, code):
        # P("neu") = 0.3, then P("tral") = 0.9: 0.27 in all, while the mean of the two logarithms is that of 0.52.
        words = Words({"mist": (0.4, 0.1, 0.3)}, second=0.9)
        what = "classify_by_llm('mist'), where the labels have probabilities 0.4, 0.1 and 0.3 x 0.9,"
        equal(labels_of(code, words, ["mist"])[0], "positive", what)


# --- What a token costs -----------------------------------------------------------------------------------------------


def whole_bytes(code, num_parameters, bits):
    """The student's number of bytes, which is an int; 20.0 would pass for 20 when the two are compared."""
    result = code.weight_bytes(num_parameters, bits)
    holds(
        not isinstance(result, float),
        f"weight_bytes({num_parameters}, bits={bits}) is {result!r}, a float. Bytes come whole, as an int: `/` gives a "
        "float even where nothing is left over.",
        actual=result,
    )
    return result


@exercise("0.5", points=1)
class TestWeightBytes:
    def test_by_hand(self, code):
        equal(whole_bytes(code, 10, 16), 20, "weight_bytes(10, bits=16)")
        equal(whole_bytes(code, 10, 32), 40, "weight_bytes(10, bits=32)")

    def test_less_than_a_byte(self, code):
        equal(whole_bytes(code, 10, 4), 5, "weight_bytes(10, bits=4)")
        equal(whole_bytes(code, 7, 4), 4, "weight_bytes(7, bits=4), which is three bytes and a half,")
        equal(whole_bytes(code, 5, 4), 3, "weight_bytes(5, bits=4), which is two bytes and a half,")

    def test_llama(self, code):
        result = whole_bytes(code, 6_738_415_616, 16)
        equal(result, 13_476_831_232, "weight_bytes(6738415616, bits=16), Llama 2 7B,")


@exercise("0.6", points=1)
class TestKvCacheBytes:
    def test_by_hand(self, code):
        # Three layers of five heads of seven numbers, K and V: 210 numbers a token.
        equal(code.kv_cache_bytes(3, 5, 7, 1, 1), 210, "kv_cache_bytes(3 layers, 5 heads of 7, 1 token, 1 byte)")
        equal(code.kv_cache_bytes(3, 5, 7, 11, 4), 9240, "kv_cache_bytes(3 layers, 5 heads of 7, 11 tokens, 4 bytes)")

    def test_default_is_16_bits(self, code):
        equal(code.kv_cache_bytes(3, 5, 7, 11), 4620, "kv_cache_bytes(3 layers, 5 heads of 7, 11 tokens)")

    def test_llama(self, code):
        result = code.kv_cache_bytes(32, 32, 128, 4096)
        equal(result, 2**31, "kv_cache_bytes of Llama 2 7B at 4096 tokens: 2 GiB. It")


def tiny_shape(code):
    """Sizes that are all different, so that none can stand for another. H * D = 30 is not hidden_size."""
    return code.ModelShape(
        name="tiny",
        num_parameters=0,
        vocab_size=100,
        hidden_size=20,
        intermediate_size=50,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=5,
    )


@exercise("0.7", points=3)
class TestFlopsPerToken:
    def test_without_attention(self, code):
        # A layer: 20*30 + 2*20*10 + 30*20 + 3*20*50 = 4600 numbers; three layers and the head: 13800 + 2000.
        equal(code.flops_per_token(tiny_shape(code), 0), 31_600, "flops_per_token(tiny model, context_length=0)")

    def test_attention_grows_with_the_context(self, code):
        # Each of 3 layers and 6 heads: 7 dot products of 5 numbers, 7 values of 5 numbers added up.
        more = code.flops_per_token(tiny_shape(code), 7) - code.flops_per_token(tiny_shape(code), 0)
        equal(more, 2 * 3 * 6 * 7 * (5 + 5), "what 7 tokens of context add to flops_per_token(tiny model)")

    def test_grouped_heads_save_projections_only(self, code):
        shape = tiny_shape(code)
        fewer = replace(shape, num_key_value_heads=1)
        saved = code.flops_per_token(shape, 9) - code.flops_per_token(fewer, 9)
        equal(saved, 2 * 3 * 2 * 20 * 5, "what one key/value head less saves in flops_per_token(tiny model, 9)")

    def test_llama(self, code):
        result = code.flops_per_token(code.LLAMA_2_7B, 0)
        equal(result, 13_214_154_752, "flops_per_token(Llama 2 7B, 0), twice its weights without the embedding,")
        equal(code.flops_per_token(code.LLAMA_3_8B, 8192), 19_304_284_160, "flops_per_token(Llama 3 8B, 8192)")


# --- What a machine allows --------------------------------------------------------------------------------------------


@exercise("0.8", points=1)
class TestArithmeticIntensity:
    def test_one_request(self, code):
        close(
            float(code.arithmetic_intensity(200.0, 90.0, 10.0, 1)),
            2.0,
            "arithmetic_intensity(200 FLOP, 90 + 10 bytes, batch 1)",
        )

    def test_weights_are_read_once(self, code):
        result = code.arithmetic_intensity(200.0, 90.0, 0.0, 9)
        close(float(result), 20.0, "arithmetic_intensity(200 FLOP, 90 bytes of weights, no cache, batch 9)")

    def test_each_reads_its_own_cache(self, code):
        result = code.arithmetic_intensity(210.0, 90.0, 10.0, 3)
        close(float(result), 5.25, "arithmetic_intensity(210 FLOP, 90 bytes of weights, 10 of cache, batch 3)")


@exercise("0.9", points=2)
class TestDecodeCeiling:
    def test_reading_binds(self, code):
        # 90 + 3 x 10 bytes at 60 bytes/s: 2 s for 3 tokens; the 600 operations need 0.6 s.
        result = code.decode_ceiling(200.0, 90.0, 10.0, 3, 60.0, 1000.0)
        close(float(result), 1.5, "decode_ceiling(200 FLOP, 90 + 3 x 10 bytes, batch 3, 60 bytes/s, 1000 FLOP/s)")

    def test_computing_binds(self, code):
        # 600 operations at 100 FLOP/s: 6 s for 3 tokens.
        result = code.decode_ceiling(200.0, 90.0, 10.0, 3, 60.0, 100.0)
        close(float(result), 0.5, "decode_ceiling(200 FLOP, 90 + 3 x 10 bytes, batch 3, 60 bytes/s, 100 FLOP/s)")

    def test_h100(self, code):
        # Read 13.214e9 bytes at 3.35e12 a second: 253.5 steps. Compute 13.214e9 FLOP at 989e12: 74845 tokens.
        speeds = [code.decode_ceiling(13.214e9, 13.214e9, 0.0, batch, 3.35e12, 989e12) for batch in (1, 16, 1000)]
        what = "decode_ceiling(Llama 2 7B in 16 bits, no context, batch 1, 16 and 1000, an H100)"
        close(numbers(speeds), numbers([253.519, 16 * 253.519, 74844.86]), what, rtol=1e-4)

    def test_context_keeps_the_batch_from_paying(self, code):
        # With 0.537e9 bytes of cache for each request, 1000 of them read 550e9 bytes: 0.164 s for 1000 tokens.
        result = code.decode_ceiling(13.214e9, 13.214e9, 0.537e9, 1000, 3.35e12, 989e12)
        close(
            float(result), 6088.5, "decode_ceiling(Llama 2 7B, 1024 tokens of context, batch 1000, an H100)", rtol=1e-4
        )


@together()
class TestTogether:
    def test_both_paradigms(self, code):
        words = Words(TASTES)
        equal(labels_of(code, words, ["rain"]), ["negative"], "your classify_by_llm on your log_probability")
        equal(code.classify_by_rules("rain"), "neutral", "classify_by_rules('rain')")

    def test_from_shape_to_speed(self, code):
        shape = code.LLAMA_2_7B
        read = code.weight_bytes(code.flops_per_token(shape, 0) // 2, 16)
        cache = code.kv_cache_bytes(
            shape.num_hidden_layers, shape.num_key_value_heads, shape.head_dim, num_tokens=1024, bytes_per_number=2
        )
        speed = code.decode_ceiling(code.flops_per_token(shape, 1024), read, cache, 1, 3.35e12, 989e12)
        # 32 layers of 202,375,168 numbers, and 131,072,000 in the head; two bytes each.
        equal(
            read, 2 * (32 * 202_375_168 + 131_072_000), "bytes of Llama 2 7B's weights that multiply, by your functions"
        )
        close(float(speed), 243.6185, "tokens/s of Llama 2 7B on an H100, from your own functions", rtol=1e-5)
