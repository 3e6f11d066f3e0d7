"""Named wrong answers to lesson 0's exercises, and right ones in another style."""

from __future__ import annotations

from common.course.catalogue import equivalent, right, wrong, wrong_body

ANSWERS = [
    # 0.1 classify_by_rules
    wrong(
        "0.1",
        "punctuation left on the words: 'good,' is not in the list",
        "bare = word.strip(string.punctuation)",
        "bare = word",
    ),
    wrong("0.1", "capitals left as they are", "text.lower().split()", "text.split()"),
    wrong(
        "0.1",
        "each word of the list counted once, however often it occurs",
        "in text.lower().split()",
        "in dict.fromkeys(text.lower().split())",
    ),
    wrong("0.1", "a sum of 0 counted as negative", "if score == 0:", "if score is None:"),
    wrong_body(
        "0.1",
        "listed words found inside longer ones",
        """
        text = text.lower()
        score = sum(text.count(word) for word in POSITIVE_WORDS) - sum(text.count(word) for word in NEGATIVE_WORDS)
        return "neutral" if score == 0 else "positive" if score > 0 else "negative"
        """,
    ),
    wrong_body(
        "0.1",
        "the first listed word deciding alone",
        """
        for word in text.lower().split():
            bare = word.strip(string.punctuation)
            if bare in POSITIVE_WORDS:
                return "positive"
            if bare in NEGATIVE_WORDS:
                return "negative"
        return "neutral"
        """,
    ),
    wrong("0.1", "words separated by spaces alone", "text.lower().split()", 'text.lower().split(" ")'),
    wrong(
        "0.1",
        "punctuation removed inside words, too",
        "bare = word.strip(string.punctuation)",
        'bare = "".join(each for each in word if each not in string.punctuation)',
    ),
    right(
        "0.1",
        "with lists and a table",
        """
        words = [word.strip(string.punctuation) for word in text.casefold().split()]
        positive = len([word for word in words if word in POSITIVE_WORDS])
        negative = len([word for word in words if word in NEGATIVE_WORDS])
        return {-1: "negative", 0: "neutral", 1: "positive"}[(positive > negative) - (positive < negative)]
        """,
    ),
    right(
        "0.1",
        "with a Counter and a regular expression",
        """
        counts = Counter(re.findall(r"[a-z]+", text.lower()))
        score = sum(counts[word] for word in POSITIVE_WORDS) - sum(counts[word] for word in NEGATIVE_WORDS)
        if score > 0:
            return "positive"
        elif score < 0:
            return "negative"
        else:
            return "neutral"
        """,
        top="""
        import re
        from collections import Counter
        """,
    ),
    # 0.2 next_token_distribution
    wrong("0.2", "nothing subtracted from the logits before exp", "(logit - largest)", "logit"),
    wrong(
        "0.2",
        "logits multiplied by the temperature",
        "(logit - largest) / temperature",
        "(logit - largest) * temperature",
    ),
    wrong("0.2", "temperature ignored, except for 0", "(logit - largest) / temperature", "logit - largest"),
    wrong("0.2", "no division by the sum", "[weight / total for weight in weights]", "weights"),
    wrong(
        "0.2",
        "the last of several largest logits chosen at temperature 0",
        "first = list(logits).index(largest)",
        "first = max(i for i, logit in enumerate(logits) if logit == largest)",
    ),
    wrong(
        "0.2",
        "temperature 0 shared between the largest logits",
        "[float(i == first) for i in range(len(logits))]",
        "[(logit == largest) / list(logits).count(largest) for logit in logits]",
    ),
    wrong(
        "0.2",
        "probability 1 for each of several largest logits at temperature 0",
        "[float(i == first) for i in range(len(logits))]",
        "[float(logit == largest) for logit in logits]",
    ),
    wrong("0.2", "no special case for temperature 0", "if temperature == 0:", "if temperature is None:"),
    wrong("0.2", "a small temperature treated as 0", "if temperature == 0:", "if temperature < 1e-3:"),
    wrong_body(
        "0.2",
        "0 as the largest logit to begin with, so that negative logits are not found",
        """
        if temperature == 0:
            best, largest = 0, 0.0
            for i, logit in enumerate(logits):
                if logit > largest:
                    best, largest = i, logit
            return [1.0 if i == best else 0.0 for i in range(len(logits))]
        weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
        return [weight / sum(weights) for weight in weights]
        """,
    ),
    right(
        "0.2",
        "powers of probabilities",
        """
        biggest = max(logits)
        if not temperature:
            result = [0.0] * len(logits)
            result[max(range(len(logits)), key=logits.__getitem__)] = 1.0
            return result
        powers = [math.exp(logit - biggest) ** (1 / temperature) for logit in logits]
        return [power / math.fsum(powers) for power in powers]
        """,
    ),
    right(
        "0.2",
        "with torch",
        """
        scores = torch.tensor(logits, dtype=torch.float64)
        if temperature == 0:
            return torch.nn.functional.one_hot(scores.argmax(), len(logits)).double().tolist()
        return torch.softmax(scores / temperature, dim=-1).tolist()
        """,
        top="import torch",
    ),
    # 0.3 log_probability
    wrong(
        "0.3", "every token predicted from the prompt alone", "[*prompt_ids, *continuation_ids[:i]]", "list(prompt_ids)"
    ),
    wrong(
        "0.3",
        "logits added up as if they were log-probabilities",
        "math.log(next_token_distribution(logits)[token_id])",
        "logits[token_id]",
    ),
    wrong(
        "0.3",
        "the mean over the tokens instead of the sum",
        "return total",
        "return total / max(len(continuation_ids), 1)",
    ),
    wrong(
        "0.3",
        "prompt and continuation joined as they are, though one may be a tuple and the other a list",
        "[*prompt_ids, *continuation_ids[:i]]",
        "prompt_ids + continuation_ids[:i]",
    ),
    wrong("0.3", "the first token only", "enumerate(continuation_ids)", "enumerate(continuation_ids[:1])"),
    wrong("0.3", "the last token only", "total += math.log", "total = math.log"),
    wrong("0.3", "a logarithm to the base 2", "math.log(", "math.log2("),
    wrong(
        "0.3",
        "probabilities added instead of their logarithms",
        "math.log(next_token_distribution(logits)[token_id])",
        "next_token_distribution(logits)[token_id]",
    ),
    wrong_body(
        "0.3",
        "the logarithm of the product, which underflows",
        """
        product = 1.0
        for i, token_id in enumerate(continuation_ids):
            product *= next_token_distribution(next_token_logits([*prompt_ids, *continuation_ids[:i]]))[token_id]
        return math.log(product)
        """,
    ),
    right(
        "0.3",
        "a growing list, and log-sum-exp",
        """
        ids, result = list(prompt_ids), 0.0
        for token_id in continuation_ids:
            scores = next_token_logits(ids)
            largest = max(scores)
            result += scores[token_id] - largest - math.log(sum(math.exp(score - largest) for score in scores))
            ids = ids + [token_id]
        return result
        """,
    ),
    right(
        "0.3",
        "from the last token to the first",
        """
        ids = [*prompt_ids, *continuation_ids]
        shares = []
        for end in range(len(ids) - 1, len(prompt_ids) - 1, -1):
            shares.append(next_token_distribution(next_token_logits(ids[:end]), 1.0)[ids[end]])
        return math.fsum(map(math.log, shares))
        """,
    ),
    # 0.4 classify_by_llm
    wrong("0.4", "the first token of each label only", 'encode(f" {label}")', 'encode(f" {label}")[:1]'),
    wrong(
        "0.4", "labels without the space that separates them from the prompt", 'encode(f" {label}")', "encode(label)"
    ),
    wrong("0.4", "the least likely label", "max(scores)", "min(scores)"),
    wrong(
        "0.4",
        "the default prompt, whatever prompt is given",
        "encode(prompt.format(text=text))",
        "encode(ZERO_SHOT.format(text=text))",
    ),
    wrong("0.4", "the text alone, without the prompt around it", "encode(prompt.format(text=text))", "encode(text)"),
    wrong_body(
        "0.4",
        "the mean over a label's tokens, which favours long labels",
        """
        prompt_ids = encode(prompt.format(text=text))
        ids = [encode(f" {label}") for label in LABELS]
        scores = [log_probability(each, prompt_ids, next_token_logits) / len(each) for each in ids]
        return LABELS[scores.index(max(scores))]
        """,
    ),
    wrong_body(
        "0.4",
        "the model's likeliest token of all, and neutral if that begins no label",
        """
        logits = next_token_logits(encode(prompt.format(text=text)))
        best = list(logits).index(max(logits))
        for label in LABELS:
            if encode(f" {label}")[0] == best:
                return label
        return "neutral"
        """,
    ),
    wrong("0.4", "the text in small letters", "prompt.format(text=text)", "prompt.format(text=text.lower())"),
    right(
        "0.4",
        "max with a key",
        """
        before = encode(prompt.replace("{text}", text))
        return max(LABELS, key=lambda label: log_probability(encode(" " + label), before, next_token_logits))
        """,
    ),
    # 0.5 weight_bytes
    wrong("0.5", "bits returned as bytes", "(num_parameters * bits + 7) // 8", "num_parameters * bits"),
    wrong("0.5", "two bytes a weight, whatever `bits` says", "num_parameters * bits + 7) // 8", "num_parameters * 2)"),
    wrong("0.5", "half a byte rounded away", " + 7) // 8", ") // 8"),
    wrong(
        "0.5",
        "a whole byte at least for every weight",
        "(num_parameters * bits + 7) // 8",
        "num_parameters * ((bits + 7) // 8)",
    ),
    wrong(
        "0.5",
        "`/`, which leaves a float and its fraction, where whole bytes are asked",
        "(num_parameters * bits + 7) // 8",
        "num_parameters * bits / 8",
    ),
    wrong(
        "0.5",
        "rounded, where half a byte needs a whole one",
        "(num_parameters * bits + 7) // 8",
        "round(num_parameters * bits / 8)",
    ),
    right("0.5", "with ceil", "return math.ceil(num_parameters * bits / 8)"),
    right("0.5", "with divmod", "whole, rest = divmod(num_parameters * bits, 8)\nreturn whole + (rest > 0)"),
    # 0.6 kv_cache_bytes
    wrong("0.6", "keys without values", "2 * num_layers", "num_layers"),
    wrong("0.6", "one layer", "2 * num_layers *", "2 *"),
    wrong("0.6", "one head", " * num_kv_heads", ""),
    wrong("0.6", "one token", " * num_tokens", ""),
    wrong("0.6", "two bytes a number, whatever `bytes_per_number` says", " * bytes_per_number", " * 2"),
    right(
        "0.6",
        "adding up",
        """
        one_vector = head_dim * bytes_per_number
        one_token = sum(2 * num_kv_heads * one_vector for _ in range(num_layers))
        return one_token * num_tokens
        """,
    ),
    # 0.7 flops_per_token
    wrong("0.7", "one operation for a multiplication and an addition", "return 2 * (layers", "return (layers"),
    wrong("0.7", "the gate projection left out", "3 * hidden * shape", "2 * hidden * shape"),
    wrong("0.7", "no head: the scores over the vocabulary are not free", " + hidden * shape.vocab_size", ""),
    wrong(
        "0.7",
        "the embedding counted, though it is only looked up",
        "hidden * shape.vocab_size",
        "2 * hidden * shape.vocab_size",
    ),
    wrong(
        "0.7",
        "keys and values as wide as the queries",
        "kv_width = shape.num_key_value_heads",
        "kv_width = shape.num_attention_heads",
    ),
    wrong(
        "0.7",
        "hidden_size used as the width of all query heads",
        "q_width = shape.num_attention_heads * shape.head_dim",
        "q_width = hidden",
    ),
    wrong(
        "0.7",
        "dot products with the keys counted, but not the sums of the values",
        "2 * context_length",
        "context_length",
    ),
    wrong(
        "0.7",
        "attention counted for each key/value head instead of each query head",
        "context_length * q_width",
        "context_length * kv_width",
    ),
    wrong("0.7", "no attention over the context", "feed_forward + attention", "feed_forward"),
    right(
        "0.7",
        "a list of matrices",
        """
        n, m, width = shape.hidden_size, shape.intermediate_size, shape.head_dim
        q, kv = shape.num_attention_heads * width, shape.num_key_value_heads * width
        matrices = [(n, q), (n, kv), (n, kv), (q, n), (n, m), (n, m), (m, n)]
        layer = sum(2 * rows * columns for rows, columns in matrices)
        heads = shape.num_attention_heads * context_length * (2 * width + 2 * width)
        return shape.num_hidden_layers * (layer + heads) + 2 * n * shape.vocab_size
        """,
    ),
    # 0.8 arithmetic_intensity
    wrong(
        "0.8",
        "the weights read again for every request",
        "(model_bytes + batch_size * cache_bytes)",
        "(batch_size * (model_bytes + cache_bytes))",
    ),
    wrong("0.8", "one KV cache for all requests", " + batch_size * cache_bytes", " + cache_bytes"),
    wrong("0.8", "the operations of one request only", "batch_size * token_flops", "token_flops"),
    wrong("0.8", "the KV cache not read at all", " + batch_size * cache_bytes", ""),
    wrong_body(
        "0.8",
        "bytes per operation, upside down",
        "return (model_bytes + batch_size * cache_bytes) / (batch_size * token_flops)",
    ),
    wrong("0.8", "divided without the fraction", "/ (model_bytes", "// (model_bytes"),
    right("0.8", "per request", "return token_flops / (model_bytes / batch_size + cache_bytes)"),
    # 0.9 decode_ceiling
    wrong("0.9", "reading and computing one after the other", "max(reading, computing)", "(reading + computing)"),
    wrong("0.9", "the faster of the two deciding", "max(reading, computing)", "min(reading, computing)"),
    wrong("0.9", "reading alone deciding", "max(reading, computing)", "reading"),
    wrong("0.9", "computing alone deciding", "max(reading, computing)", "computing"),
    wrong("0.9", "steps a second: a step gives a token to every request of the batch", "batch_size / max", "1 / max"),
    wrong(
        "0.9",
        "the weights read again for every request",
        "(model_bytes + batch_size * cache_bytes)",
        "batch_size * (model_bytes + cache_bytes)",
    ),
    wrong_body(
        "0.9",
        "operations a second (FLOP/s), not divided by the operations of a token",
        """
        intensity = arithmetic_intensity(token_flops, model_bytes, cache_bytes, batch_size)
        return min(peak_flops, intensity * bandwidth)
        """,
    ),
    right(
        "0.9",
        "by the intensity",
        """
        intensity = arithmetic_intensity(token_flops, model_bytes, cache_bytes, batch_size)
        return min(peak_flops, intensity * bandwidth) / token_flops
        """,
    ),
]

EQUIVALENT = [
    equivalent(
        "0.1",
        "a score of 0 has returned already, and a score is a whole number",
        "'positive' if score > 0 else 'negative' -> 'positive' if score >= 0 else 'negative'",
        "'positive' if score > 0 else 'negative' -> 'positive' if score > -1 else 'negative'",
    ),
    equivalent("0.2", "any sequence has `index`", "list(logits) -> logits"),
    equivalent(
        "0.2", "True and False are the numbers 1 and 0, to Python and to every sum", "float(i == first) -> i == first"
    ),
    equivalent(
        "0.5",
        "with 4 bits or a multiple of them, 0 or 4 are left over, and 4 + 6 make a whole byte too",
        "num_parameters * bits + 7 -> num_parameters * bits + 6",
    ),
]
