"""The checks of lesson 3. Small cases are worked by hand; the rest is compared with plain loops, and with lesson 2's
reference, which remembers nothing and computes everything again.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from common.grading import elsewhere, close, equal, exercise, holds, together


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(code, **changes):
    """A tiny model's: 3 layers, 6 query heads on 2 key/value heads, each size another number."""
    sizes = dict(
        vocab_size=23, hidden_size=20, intermediate_size=28, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=40,
    )  # fmt: skip
    return code.ModelConfig(**{**sizes, **changes})


def tiny(code, **changes):
    """A random model in float64, in which no two tokens are equally likely."""
    model = code.Llama(config(code, **changes)).double()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data = 0.1 + 0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.requires_grad_(False)


def counted(model):
    """Notes what goes through the model: (token ids, positions) of each forward, and the rows that get logits."""
    model.seen, model.rows = [], []
    forward, logits = model.forward, model.logits

    def count(token_ids, positions, attend):
        model.seen.append((token_ids.tolist(), positions.tolist()))
        return forward(token_ids, positions, attend)

    def count_rows(hidden):
        model.rows.append(1 if hidden.dim() == 1 else len(hidden))
        return logits(hidden)

    model.forward, model.logits = count, count_rows
    return model


def empty_cache(code, layers: int = 2, kv_heads: int = 2, capacity: int = 5, head_dim: int = 3):
    """A cache without a model's weights behind it, filled with what nobody may read: NaN."""
    stand_in = SimpleNamespace(
        config=config(code, num_hidden_layers=layers, num_key_value_heads=kv_heads, head_dim=head_dim),
        model=SimpleNamespace(norm=SimpleNamespace(weight=torch.zeros(1))),
    )
    cache = code.KVCache(stand_in, capacity)
    cache.keys.fill_(math.nan)
    cache.values.fill_(math.nan)
    return cache


def plain_attention(q, keys, values, first):
    """By loops. q: (T, H, D), the first of them at position `first`; keys, values: (S, K, D), all of the sequence."""
    mixed = torch.zeros_like(q)
    group_size = q.shape[1] // keys.shape[1]
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            seen = first + t + 1
            scores = keys[:seen, h // group_size] @ q[t, h] / math.sqrt(q.shape[2])
            mixed[t, h] = torch.softmax(scores, 0) @ values[:seen, h // group_size]
    return mixed


def refused(call, what: str, left) -> None:
    """`call` must raise ValueError. left(): what there is to be seen of it where it does not, (name, value)."""
    try:
        call()
    except ValueError:
        return
    except Exception as error:
        holds(False, f"{what} should raise ValueError; it raised {type(error).__name__}: {error}")
    name, value = left()
    holds(False, f"{what} should raise ValueError; it left {name} {value}.", actual=value)


def away(model):
    """The model on `meta`. Its look-up refuses ids from the CPU, as a GPU's does, and meta's own does not."""
    model, embed = model.to("meta"), model.embed
    model.embed = lambda token_ids: embed(token_ids + torch.zeros_like(token_ids, device="meta"))
    return model


PROMPT = [3, 14, 15, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]


# --- Many new tokens, more old ones -----------------------------------------------------------------------------------


@exercise("3.1")
class TestOffsetMask:
    def test_by_hand(self, code):
        expected = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
        close(code.offset_mask(torch.tensor([3, 4]), 6), expected, "offset_mask([3, 4], 6 keys)")

    def test_from_the_start(self, code):
        close(
            code.offset_mask(torch.arange(3), 3),
            torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]]).bool(),
            "offset_mask([0, 1, 2], 3 keys), which is lesson 1's causal mask",
        )

    def test_anywhere(self, code):
        expected = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
        close(code.offset_mask(torch.tensor([4, 0, 2]), 5), expected, "offset_mask([4, 0, 2], 5 keys)")
        close(
            code.offset_mask(torch.tensor([7]), 3),
            torch.ones(1, 3).bool(),
            "offset_mask([7], 3 keys): it sees them all",
        )

    def test_on_another_device(self, code):
        positions = torch.tensor([3, 4], device="meta")
        elsewhere(lambda: code.offset_mask(positions, 6), "offset_mask([3, 4], 6 keys)", "`positions.device`")


@exercise("3.2")
class TestFoldGroups:
    def test_by_hand(self, code):
        q = torch.tensor([[[0.0], [1.0], [2.0], [3.0]], [[10.0], [11.0], [12.0], [13.0]]])
        expected = torch.tensor([[[0.0], [10.0], [1.0], [11.0]], [[2.0], [12.0], [3.0], [13.0]]])
        close(
            code.fold_groups(q, 2),
            expected,
            "fold_groups of 2 tokens with 4 heads, where head h of token t holds 10 t + h, and 2 KV heads",
        )

    def test_every_row(self, code):
        q = noise(5, 6, 4)
        folded = code.fold_groups(q, 2)
        expected = torch.zeros(2, 15, 4)
        for h in range(2):
            for g in range(3):
                for t in range(5):
                    expected[h, g * 5 + t] = q[t, h * 3 + g]
        close(folded, expected, "fold_groups of (5, 6, 4), 2 KV heads: row g * T + t is token t of head h * 3 + g")

    def test_groups_of_one_and_of_all(self, code):
        q = noise(2, 3, 4)
        close(code.fold_groups(q, 3), q.transpose(0, 1), "fold_groups of 3 heads with 3 KV heads")
        close(code.fold_groups(q, 1)[0, 2:4], q[:, 1], "rows 2 and 3 of fold_groups of (2, 3, 4) with 1 KV head")

    def test_the_dtype_stays(self, code):
        for dtype in (torch.bfloat16, torch.float64):
            q = noise(2, 4, 3).to(dtype)
            close(code.fold_groups(q, 4), q.transpose(0, 1), f"fold_groups of 4 heads in {dtype}, 4 KV heads")

    def test_on_another_device(self, code):
        q = noise(2, 4, 3).to("meta")
        elsewhere(lambda: code.fold_groups(q, 2), "fold_groups(q, 2)", "`q.device`", may_fetch=False)


@exercise("3.3", points=2)
class TestAppend:
    def test_first_tokens(self, code):
        cache = empty_cache(code)
        k, v = noise(4, 2, 3, seed=1), noise(4, 2, 3, seed=2)
        got = cache.append(0, k, v)
        holds(got is not None, "append returned None: it returns keys and values.")
        close(got[0], k.transpose(0, 1), "the keys that append returns for the first 4 tokens")
        close(got[1], v.transpose(0, 1), "the values that append returns for the first 4 tokens")
        equal(list(cache.lengths), [4, 0], "lengths of the cache, after 4 tokens in layer 0")

    def test_behind_the_others(self, code):
        cache = empty_cache(code, capacity=6)
        k, v = noise(5, 2, 3, seed=1), noise(5, 2, 3, seed=2)
        cache.append(1, k[:1], v[:1])
        cache.append(1, k[1:4], v[1:4])
        keys, values = cache.append(1, k[4:], v[4:])
        equal(list(cache.lengths), [0, 5], "lengths of the cache, after 1, 3 and 1 tokens in layer 1 alone")
        close(keys, k.transpose(0, 1), "the keys after 1, 3 and 1 tokens")
        close(values, v.transpose(0, 1), "the values after 1, 3 and 1 tokens")

    def test_layers_do_not_mix(self, code):
        cache = empty_cache(code, capacity=9)
        one, two = noise(4, 2, 3, seed=1), noise(3, 2, 3, seed=2)
        cache.append(1, two[:2], two[:2])
        cache.append(0, one[:3], one[:3])
        keys, _ = cache.append(0, one[3:], one[3:])
        close(keys, one.transpose(0, 1), "layer 0's keys, after 2 tokens in layer 1, then 3 and 1 in layer 0")
        keys, _ = cache.append(1, two[2:], two[2:])
        close(keys, two.transpose(0, 1), "layer 1's keys, after 2 tokens in it, 4 in layer 0, and 1 in it again")

    def test_full(self, code):
        cache = empty_cache(code)
        k = noise(6, 2, 3)
        cache.append(0, k[:4], k[:4])
        refused(
            lambda: cache.append(0, k[4:], k[4:]),
            "append of 2 tokens, with 4 of 5 slots filled,",
            lambda: ("lengths", list(cache.lengths)),
        )
        equal(list(cache.lengths), [4, 0], "lengths of the cache, after an append that did not fit")
        holds(
            bool(cache.keys[0, :, 4].isnan().all()),
            "An append that did not fit has stored something all the same.",
            actual="stored",
        )
        try:
            keys, _ = cache.append(0, k[4:5], k[4:5])
        except ValueError:
            holds(False, "append of 1 token, with 4 of 5 slots filled, raised ValueError: it fits.", actual="refused")
        equal(tuple(keys.shape), (2, 5, 3), "the shape of the keys, when the last slot is filled")

    def test_no_other_memory(self, code):
        cache = empty_cache(code)
        k = noise(2, 2, 3)
        keys, values = cache.append(0, k, k)
        holds(
            keys.data_ptr() == cache.keys.data_ptr() and values.data_ptr() == cache.values.data_ptr(),
            "append returns a copy: views of the cache's own memory are enough, and nothing is moved at each token.",
            actual="a copy",
        )


@exercise("3.4", points=3)
class TestAttend:
    def attended(self, code, chunks, layer=1, seed=0):
        """Everything that attend gives for 9 tokens that come in chunks of these sizes."""
        cache = empty_cache(code, layers=2, kv_heads=2, capacity=9, head_dim=4)
        q, k, v = noise(9, 6, 4, seed=seed), noise(9, 2, 4, seed=seed + 1), noise(9, 2, 4, seed=seed + 2)
        mixed, start = [], 0
        for size in chunks:
            part = slice(start, start + size)
            mixed.append(cache.attend(layer, q[part], k[part], v[part]))
            start += size
        return torch.cat(mixed), plain_attention(q[:start], k[:start], v[:start], 0), cache

    def test_one_token_sees_itself(self, code):
        cache = empty_cache(code, kv_heads=2, head_dim=4)
        v = noise(1, 2, 4)
        expected = v.repeat_interleave(3, dim=1)
        close(
            cache.attend(0, noise(1, 6, 4), noise(1, 2, 4, seed=1), v),
            expected,
            "attend of the first token: the value of each head's own key/value head",
        )

    def test_a_prompt_then_tokens(self, code):
        mixed, expected, cache = self.attended(code, [5, 1, 1])
        close(mixed[:5], expected[:5], "attend of 5 tokens at once")
        close(mixed[5:], expected[5:], "attend of two single tokens after 5")
        equal(list(cache.lengths), [0, 7], "lengths of the cache, after 7 tokens in layer 1")

    def test_chunks(self, code):
        for chunks in ([3, 3, 3], [1, 7, 1], [7, 2]):
            mixed, expected, _ = self.attended(code, chunks, seed=3)
            close(mixed, expected, f"attend of 9 tokens in chunks of {chunks}")

    def test_each_layer_has_its_own_length(self, code):
        cache = empty_cache(code, layers=2, kv_heads=2, capacity=9, head_dim=4)
        q, k, v = noise(5, 6, 4, seed=6), noise(5, 2, 4, seed=7), noise(5, 2, 4, seed=8)
        for layer, part in ((0, slice(0, 3)), (1, slice(0, 1))):
            cache.attend(layer, q[part], k[part], v[part])
        mixed = cache.attend(0, q[3:], k[3:], v[3:])
        expected = plain_attention(q[3:], k, v, 3)
        close(mixed, expected, "attend of 2 tokens in layer 0, which has 3 already, while layer 1, the last, has 1")

    def test_large_scores(self, code):
        cache = empty_cache(code, kv_heads=1, head_dim=4)
        q, k = torch.full((1, 2, 4), 300.0).half(), torch.full((2, 1, 4), 300.0).half()
        cache.keys, cache.values = cache.keys.half(), cache.values.half()
        v = torch.tensor([[[1.0, 2.0, 3.0, 4.0]], [[3.0, 4.0, 5.0, 6.0]]]).half()
        cache.attend(0, q, k[:1], v[:1])
        mixed = cache.attend(0, q, k[1:], v[1:])
        expected = torch.tensor([2.0, 3.0, 4.0, 5.0]).half().expand(1, 2, 4)
        close(mixed, expected, "attend in float16, with scores of 180,000", rtol=1e-3)

    def test_on_another_device(self, code):
        cache = code.KVCache(away(tiny(code)), 5)
        q, k, v = (noise(3, heads, 4).double().to("meta") for heads in (6, 2, 2))
        elsewhere(lambda: cache.attend(0, q, k, v), "attend(0, q, k, v)", "`q.device`")


@exercise("3.5")
class TestTruncate:
    def filled(self, code):
        cache = empty_cache(code, capacity=6)
        k = noise(4, 2, 3)
        for layer in range(2):
            cache.append(layer, k, k)
        return cache, k

    def test_shorter(self, code):
        cache, k = self.filled(code)
        cache.truncate(1)
        equal(list(cache.lengths), [1, 1], "lengths of the cache, after truncate(1) of 4")
        equal([cache.keys.shape[2], cache.values.shape[2]], [6, 6], "the capacity, 6 before, after truncate(1)")
        new = noise(2, 2, 3, seed=7)
        keys, _ = cache.append(1, new, new)
        close(
            keys, torch.cat([k[:1], new]).transpose(0, 1), "the keys after truncate(1) and two other tokens in layer 1"
        )

    def test_to_nothing_and_to_all(self, code):
        cache, _ = self.filled(code)
        cache.truncate(4)
        equal(list(cache.lengths), [4, 4], "lengths of the cache, after truncate(4) of 4")
        cache.truncate(0)
        equal(list(cache.lengths), [0, 0], "lengths of the cache, after truncate(0)")
        equal(cache.num_tokens, 0, "num_tokens, after truncate(0)")

    def test_refused(self, code):
        cache, _ = self.filled(code)
        for num_tokens in (5, -1):
            refused(
                lambda n=num_tokens: cache.truncate(n),
                f"truncate({num_tokens}) of 4 tokens",
                lambda: ("lengths", list(cache.lengths)),
            )
        equal(list(cache.lengths), [4, 4], "lengths of the cache, after two truncates that are refused")


# --- Prefill, decode --------------------------------------------------------------------------------------------------


def recomputed(code, model, token_ids):
    """What lesson 2 says of these tokens."""
    with torch.no_grad():
        return code.llama_pytorch.recompute(model, token_ids)


@exercise("3.6", points=2)
class TestPrefill:
    def test_in_one_chunk(self, code):
        model = tiny(code)
        cache = code.KVCache(model, 20)
        got = code.prefill(model, cache, PROMPT)
        expected = recomputed(code, model, PROMPT)
        close(
            got, expected, "prefill of 13 tokens, where hidden_size is 20 and the vocabulary has 23 tokens,", rtol=1e-9
        )
        equal(list(cache.lengths), [13, 13, 13], "lengths of the cache, after a prefill of 13 tokens")

    def test_what_goes_through_the_model(self, code):
        model = counted(tiny(code))
        code.prefill(model, code.KVCache(model, 20), PROMPT[:5], chunk_size=3)
        equal(
            model.seen,
            [([3, 14, 15], [0, 1, 2]), ([9, 2], [3, 4])],
            "(token ids, positions) of the forwards, for 5 tokens in chunks of 3",
        )
        equal(
            model.rows,
            [1],
            "the number of rows that all calls of `logits` get together (only the last token's row is used)",
        )

    def test_chunks(self, code):
        model = tiny(code)
        expected = recomputed(code, model, PROMPT)
        for size in (1, 3, 7, 13, 100):
            got = code.prefill(model, code.KVCache(model, 13), PROMPT, chunk_size=size)
            close(got, expected, f"prefill of 13 tokens in chunks of {size}", rtol=1e-9)

    def test_behind_others(self, code):
        model = tiny(code)
        cache = code.KVCache(model, 20)
        code.prefill(model, cache, PROMPT[:6])
        got = code.prefill(model, cache, PROMPT[6:], chunk_size=4)
        close(
            got, recomputed(code, model, PROMPT), "prefill of 7 tokens after 6 cached ones, in chunks of 4", rtol=1e-9
        )

    def test_on_another_device(self, code):
        model = away(tiny(code))
        cache = code.KVCache(model, 5)
        elsewhere(lambda: code.prefill(model, cache, PROMPT[:5], chunk_size=3), "prefill", "`cache.keys.device`")


@exercise("3.7")
class TestDecodeStep:
    def test_after_a_prompt(self, code):
        model = tiny(code)
        cache = code.KVCache(model, 20)
        code.prefill(model, cache, PROMPT)
        for n, token_id in enumerate((4, 11, 0), 1):
            got = code.decode_step(model, cache, token_id)
            expected = recomputed(code, model, [*PROMPT, 4, 11, 0][: 13 + n])
            close(got, expected, f"decode_step number {n} after 13 tokens", rtol=1e-9)

    def test_what_goes_through_the_model(self, code):
        model = counted(tiny(code))
        cache = code.KVCache(model, 20)
        code.prefill(model, cache, PROMPT[:4])
        model.seen, model.rows = [], []
        code.decode_step(model, cache, 8)
        equal(model.seen, [([8], [4])], "(token ids, positions) of the forward of decode_step after 4 tokens")
        equal(model.rows, [1], "the number of rows that `logits` gets")

    def test_on_another_device(self, code):
        model = away(tiny(code))
        cache = code.KVCache(model, 5)
        elsewhere(lambda: code.decode_step(model, cache, 8), "decode_step", "`cache.keys.device`")


WORDS = [b" w%d" % i for i in range(23)]
WORDS[1] = b"ab"
EOS = 22


class Words:
    """A tokenizer whose token i is the word i; the last one ends a sequence."""

    bos_token_id, eos_token_ids, chat_template, vocab_size = None, frozenset({EOS}), None, 23

    def token_bytes(self, token_id: int) -> bytes:
        return b"" if token_id == EOS else WORDS[token_id]


@exercise("3.8", points=2)
class TestGenerate:
    def both(self, code, prompt=PROMPT, pieces=None, model=None, **settings):
        model = model or tiny(code)
        params = code.SamplingParams(**{"max_tokens": 12, "ignore_eos": True, **settings})
        expected = code.llama_pytorch.generate(model, Words(), prompt, params)
        shown = [] if pieces is None else pieces
        return code.generate(model, Words(), list(prompt), params, shown.append), expected

    def check(self, output, expected, case):
        holds(output is not None, "generate returned None: is a `return` missing?")
        equal(output.token_ids, expected.token_ids, f"token_ids: {case}")
        equal(output.text, expected.text, f"text: {case}")
        equal(output.finish_reason, expected.finish_reason, f"finish_reason: {case}")

    def test_each_token_computed_once(self, code):
        model = counted(tiny(code))
        params = code.SamplingParams(max_tokens=5, ignore_eos=True)
        output = code.generate(model, Words(), list(PROMPT), params)
        holds(output is not None, "generate returned None: is a `return` missing?")
        sizes, positions = [len(ids) for ids, _ in model.seen], [p for _, positions in model.seen for p in positions]
        equal(sizes, [13, 1, 1, 1, 1], "how many tokens each forward computes, for a prompt of 13 and an answer of 5,")
        equal(positions, list(range(13 + 4)), "the positions that go through the model, for 13 + 5 tokens")

    def test_greedy(self, code):
        pieces = []
        output, expected = self.both(code, pieces=pieces)
        self.check(output, expected, "12 greedy tokens, beside lesson 2's generate")
        texts = [output.text, "".join(pieces)]
        equal(texts, [expected.text, expected.text], "[output.text, the pieces that on_text gets, joined]")

    def test_sampled(self, code):
        output, expected = self.both(code, temperature=1.0, top_p=0.9, seed=4)
        self.check(output, expected, "temperature 1, top_p 0.9, seed 4")
        output, expected = self.both(code, repetition_penalty=1.5, logprobs=2)
        self.check(output, expected, "repetition_penalty 1.5")
        equal(len(output.logprobs), len(expected.logprobs), "the number of entries in logprobs")

    def test_until_the_context_is_full(self, code):
        output, expected = self.both(code, prompt=PROMPT * 3, max_tokens=50)
        self.check(output, expected, "a prompt of 39 tokens in a context of 40")
        output, expected = self.both(code, prompt=PROMPT * 2, max_tokens=200)
        self.check(output, expected, "a prompt of 26 tokens in a context of 40, max_tokens=200")

    def test_stop(self, code):
        first = self.both(code)[1]
        word = WORDS[first.token_ids[3]].decode()
        output, expected = self.both(code, stop=[word])
        self.check(output, expected, f"stop={word!r}")

    def test_one_token(self, code):
        output, expected = self.both(code, prompt=[7], max_tokens=1)
        self.check(output, expected, "a prompt of one token, max_tokens=1")

    def test_two_tokens(self, code):
        output, expected = self.both(code, prompt=[7, 9])
        self.check(output, expected, "a prompt of two tokens")

    def test_refused(self, code):
        model = tiny(code)
        outputs = []
        refused(
            lambda: outputs.append(code.generate(model, Words(), [], code.SamplingParams(max_tokens=3))),
            "generate of an empty prompt",
            lambda: ("an answer of tokens", outputs[0] and outputs[0].token_ids),
        )


@exercise("3.9", points=2)
class TestResume:
    def run(self, code, cached, token_ids):
        """The logits that resume gives, those that a fresh computation gives, and what went through the model."""
        model = tiny(code)
        cache = code.KVCache(model, 40)
        code.prefill(model, cache, cached)
        expected = recomputed(code, model, token_ids)
        counted(model)
        got = code.resume(model, cache, cached, token_ids)
        return got, expected, [position for _, positions in model.seen for position in positions], cache

    def test_a_turn_more(self, code):
        got, expected, positions, cache = self.run(code, PROMPT[:6], PROMPT)
        close(got, expected, "resume with 6 tokens in the cache and 7 new ones after them", rtol=1e-9)
        equal(positions, list(range(6, 13)), "the positions that are computed, with 6 of 13 tokens in the cache")
        equal(cache.num_tokens, 13, "num_tokens of the cache, after resume")

    def test_another_word_in_the_middle(self, code):
        changed = [*PROMPT[:4], 20, *PROMPT[5:]]
        got, expected, positions, _ = self.run(code, PROMPT, changed)
        equal(
            positions,
            list(range(4, 13)),
            "the positions that are computed, where token 4 of 13 differs from the cached one",
        )
        close(got, expected, "resume where token 4 of 13 differs from the cached one", rtol=1e-9)

    def test_nothing_in_common(self, code):
        got, expected, positions, _ = self.run(code, PROMPT[:5], [1, *PROMPT[1:8]])
        equal(
            positions,
            list(range(8)),
            "the positions that are computed, where the first token differs from the cached one",
        )
        close(got, expected, "resume where the first token differs from the cached one", rtol=1e-9)

    def test_the_very_same(self, code):
        got, expected, positions, _ = self.run(code, PROMPT, PROMPT)
        equal(positions, [12], "the positions that are computed, where nothing was changed: the last, for its logits")
        close(got, expected, "resume of exactly what is in the cache", rtol=1e-9)

    def test_shorter(self, code):
        got, expected, positions, cache = self.run(code, PROMPT, PROMPT[:5])
        close(got, expected, "resume of the first 5 of 13 tokens in the cache", rtol=1e-9)
        equal(positions, [4], "the positions that are computed, for the first 5 of 13 tokens in the cache")
        equal(cache.num_tokens, 5, "num_tokens of the cache, after resume")


# --- What it costs, what it wastes, what it gains ---------------------------------------------------------------------


@exercise("3.10")
class TestCacheBytes:
    def test_by_hand(self, code):
        sizes = config(code, hidden_size=48, num_hidden_layers=2, num_key_value_heads=1, head_dim=5)
        expected = 2 * 3 * 2 * 1 * 5 * 1
        equal(
            code.cache_bytes(sizes, 3, 1),
            expected,
            "cache_bytes of 3 tokens (2 layers, 6 heads, 1 KV head, head_dim 5, hidden_size 48, 1 byte a number)",
        )

    def test_smollm2(self, code):
        smollm2 = config(code, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64)
        equal(code.cache_bytes(smollm2, 1, 4), 46_080, "cache_bytes of 1 token of SmolLM2 in float32")
        equal(code.cache_bytes(smollm2, 8192, 4), 377_487_360, "cache_bytes of 8192 tokens of SmolLM2 in float32")
        equal(code.cache_bytes(smollm2, 1, 2), 23_040, "cache_bytes of 1 token of SmolLM2 in 16 bits")

    def test_nothing(self, code):
        equal(code.cache_bytes(config(code), 0, 4), 0, "cache_bytes of 0 tokens")


@exercise("3.11")
class TestPaddingWaste:
    def test_by_hand(self, code):
        close(code.padding_waste([10, 20, 30, 40]), 0.375, "padding_waste([10, 20, 30, 40])")

    def test_all_alike(self, code):
        close(code.padding_waste([7, 7, 7]), 0.0, "padding_waste([7, 7, 7])")
        close(code.padding_waste([5]), 0.0, "padding_waste([5])")

    def test_one_is_long(self, code):
        close(code.padding_waste([1000, 1, 1, 1]), 1 - 1003 / 4000, "padding_waste([1000, 1, 1, 1])")


@exercise("3.12")
class TestLatencySummary:
    def test_by_hand(self, code):
        summary = code.latency_summary(10.0, [10.5, 10.75, 11.5])
        holds(summary is not None, "latency_summary returned None: is a `return` missing?")
        close(summary.time_to_first_token, 0.5, "time_to_first_token: made at 10, tokens at 10.5, 10.75 and 11.5")
        close(summary.time_per_output_token, 0.5, "time_per_output_token: made at 10, tokens at 10.5, 10.75 and 11.5")
        close(summary.slowest_gap, 0.75, "slowest_gap: made at 10, tokens at 10.5, 10.75 and 11.5")

    def test_one_token(self, code):
        summary = code.latency_summary(1.0, [3.0])
        close(summary.time_to_first_token, 2.0, "time_to_first_token of a request with one token")
        close(summary.time_per_output_token, 0.0, "time_per_output_token of a request with one token")
        close(summary.slowest_gap, 0.0, "slowest_gap of a request with one token")

    def test_a_stutter(self, code):
        summary = code.latency_summary(0.0, [4.0, 4.25, 4.5, 7.5, 7.75])
        close(summary.time_per_output_token, 0.9375, "time_per_output_token: tokens at 4, 4.25, 4.5, 7.5 and 7.75")
        close(summary.slowest_gap, 3.0, "slowest_gap: tokens at 4, 4.25, 4.5, 7.5 and 7.75")


@together()
class TestTogether:
    """Your whole file: the same tokens, each computed once; and back, and on."""

    def test_same_tokens(self, code):
        for kv_heads in (1, 2, 6):
            model = tiny(code, num_key_value_heads=kv_heads)
            params = code.SamplingParams(max_tokens=15, temperature=1.0, seed=kv_heads, ignore_eos=True)
            expected = code.llama_pytorch.generate(model, Words(), PROMPT, params)
            output = code.generate(model, Words(), PROMPT, params)
            equal(output.token_ids, expected.token_ids, f"15 sampled tokens of a model with {kv_heads} KV heads")

    def test_there_and_back(self, code):
        model = tiny(code)
        cache = code.KVCache(model, 30)
        code.prefill(model, cache, PROMPT, chunk_size=4)
        for token_id in (1, 2, 3):
            code.decode_step(model, cache, token_id)
        cache.truncate(13)
        got = code.decode_step(model, cache, 4)
        close(
            got,
            recomputed(code, model, [*PROMPT, 4]),
            "decode_step of a token, after truncate has removed three others",
            rtol=1e-9,
        )
