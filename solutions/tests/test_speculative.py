"""Lesson 8's reference: the same tokens, sooner. What is drawn is distributed as the model says, exactly; what is not
drawn is what lesson 2 says, whatever was proposed, refused, preempted, swapped, forked or aborted meanwhile.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import pytest
import torch
from safetensors.torch import save_file

from common.authoring.soak.invariants import check_books
from common.authoring.soak.load import Pipelined, drive
from common.authoring.soak.oracle import Oracle
from common.authoring.soak.requests import MAX_MODEL_LEN, Letters, random_asks, random_model, random_settings
from common.checkpoints import Checkpoint
from common.config import EngineConfig
from solutions import engine as engine_module
from solutions import llama_pytorch, speculative
from solutions.batching import Engine
from solutions.engine import InferenceEngine
from solutions.kv_cache import KVCache, cache_bytes, prefill
from solutions.llama_pytorch import SamplingParams, adjust_logits, load, recompute, sampling_probs
from solutions.paged_attention import KVCacheManager, PagedKVCache, hash_block
from solutions.scheduler import ModelRunnerOutput, Request, ScheduledRequest, Scheduler
from solutions.speculative import (
    AdaptiveSpeculation,
    Draft,
    DraftProposer,
    Lookahead,
    NgramProposer,
    SpeculativeRunner,
    accept_or_recover,
    expected_tokens,
    generate,
    propose_ngram,
    rejection_sample,
)

STORIES = [list(range(5, 30)), [*range(5, 15), *range(30, 40)], [7] * 20]


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    monkeypatch.setenv("KERNELS", "plain")


@pytest.fixture
def model():
    return MODEL


def perturbed_model(amount: float, seed: int = 5, **changes) -> llama_pytorch.Llama:
    """`random_model`, and a little noise on every weight: a draft that is right now and then."""
    model, generator = random_model(**changes), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * amount)
    return model


@cache
def fresh_logits(model, token_ids: tuple[int, ...]) -> torch.Tensor:
    """Lesson 2's logits of what comes after a text, computed once for all tests."""
    with torch.inference_mode():
        return recompute(model, token_ids)


def alone(model, prompt, params, tokenizer=None) -> llama_pytorch.RequestOutput:
    """What lesson 2's `generate` gives."""
    return llama_pytorch.generate(
        model,
        tokenizer or Letters(),
        prompt,
        params,
        next_logits=lambda token_ids: fresh_logits(model, tuple(token_ids)),
    )


MODEL, OFTEN_RIGHT, KNOWS_NOTHING = random_model(), perturbed_model(0.05), random_model(9, num_hidden_layers=1)
DRAFTS = {
    "one that is often right": OFTEN_RIGHT,
    "n-grams": None,
    "one that knows nothing": KNOWS_NOTHING,
    "the model itself": MODEL,
}


@pytest.fixture(params=[*list(DRAFTS)[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in list(DRAFTS)[2:])])
def draft(request):
    return DRAFTS[request.param]


# --- Sampled draft tokens: exact, by enumeration ----------------------------------------------------------------------


class Chance:
    """Stands in for torch where randomness is asked for. `rand` is answered with the number that is due to this
    generator; what `multinomial` is given is noted, and 0 drawn.
    """

    def __init__(self):
        self.uniforms: dict = {}
        self.weights: list[tuple[object, torch.Tensor]] = []

    def __call__(self, uniforms: dict, function, *arguments):
        """Call a function with these uniforms. Returns its result, and what was drawn from."""
        self.uniforms, self.weights = uniforms, []
        return function(*arguments), self.weights

    def rand(self, *shape, generator, **options) -> float:
        return self.uniforms[generator]

    def multinomial(self, weights, num_samples, *, generator, **options) -> int:
        assert num_samples == 1 and (weights >= 0).all() and weights.sum() > 0
        self.weights.append((generator, weights / weights.sum()))
        return 0

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.fixture
def chance(monkeypatch):
    stand_in = Chance()
    monkeypatch.setattr(speculative, "torch", stand_in)
    return stand_in


def kept_below(chance: Chance, target: torch.Tensor, draft: torch.Tensor, token_id: int) -> float:
    """Which uniforms keep this draft token: those below the result. Found by bisection, to ten digits."""

    def is_kept(uniform: float) -> bool:
        return chance({None: uniform}, speculative.accept_or_recover, target, draft, token_id, None)[0][0]

    low, high = 0.0, 1.0
    if is_kept(1 - 2**-53):
        low = 1.0
    elif is_kept(1e-11):
        while high - low > 1e-10:
            middle = (low + high) / 2
            low, high = (middle, high) if is_kept(middle) else (low, middle)
    for uniform in (0.05, 0.95):
        assert is_kept(uniform) == (uniform < low), "it is kept above a uniform that does not keep it"
    return low


def outcome(chance: Chance, target: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """How what `accept_or_recover` makes of a token drawn from `draft` is distributed: (V,), float64."""
    found = torch.zeros(len(target), dtype=torch.float64)
    for token_id in range(len(target)):
        drawn = float(draft[token_id])
        if drawn == 0:
            continue
        kept = kept_below(chance, target, draft, token_id)
        found[token_id] += drawn * kept
        if kept < 1:
            above = {None: (1 + kept) / 2}
            (is_kept, _), weights = chance(above, speculative.accept_or_recover, target, draft, token_id, None)
            assert not is_kept and len(weights) == 1
            found += drawn * (1 - kept) * weights[0][1].double()
    return found


def distributions(num: int, seed: int = 0) -> list[torch.Tensor]:
    """Random ones over four tokens: even, sharp, and with zeros."""
    generator, found = torch.Generator().manual_seed(seed), []
    for i in range(num):
        scores = torch.randn(4, generator=generator, dtype=torch.float64) * (0.3, 1, 3, 10)[i % 4]
        if i % 3 == 0:
            scores[torch.randperm(4, generator=generator)[: 1 + i % 2]] = -torch.inf
        found.append(scores.softmax(-1))
    return found


def floats(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


GRID = [torch.tensor(c, dtype=torch.float64) / 2 for c in product(range(3), repeat=4) if sum(c) == 2]
EDGES = {
    "equal": (floats(0.1, 0.2, 0.3, 0.4), floats(0.1, 0.2, 0.3, 0.4)),
    "disjoint": (floats(0.5, 0.5, 0, 0), floats(0, 0, 0.9, 0.1)),
    "one-hot draft": (floats(0.1, 0.2, 0.3, 0.4), floats(0, 1, 0, 0)),
    "one-hot target": (floats(0, 0, 0, 1), floats(0.4, 0.3, 0.2, 0.1)),
    "both one-hot": (floats(0, 0, 0, 1), floats(1, 0, 0, 0)),
    "zeros of the target where the draft has some": (floats(0, 0.6, 0.4, 0), floats(0.25, 0.25, 0.25, 0.25)),
    "a draft that hardly ever": (floats(1 - 1e-12, 1e-12, 0, 0), floats(1e-12, 1 - 1e-12, 0, 0)),
}


def test_one_draft_token_is_exact(chance):
    """One draft token becomes a token distributed as the target, for a grid of a hundred pairs and for random ones."""
    pairs = [*product(GRID, repeat=2), *zip(distributions(24), distributions(24, seed=1))]
    for target, draft in pairs:
        torch.testing.assert_close(outcome(chance, target, draft), target, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", EDGES)
def test_one_draft_token_is_exact_at_the_edges(chance, name):
    target, draft = EDGES[name]
    torch.testing.assert_close(outcome(chance, target, draft), target, rtol=0, atol=1e-9)


def test_equal_keeps_all_and_disjoint_none(chance):
    for both in [*GRID, *distributions(12)]:
        for token_id in both.nonzero().flatten().tolist():
            assert kept_below(chance, both, both.clone(), token_id) == 1
    target, draft = EDGES["disjoint"]
    for token_id in (2, 3):
        assert kept_below(chance, target, draft, token_id) < 1e-10
        _, weights = chance({None: 0.0}, speculative.accept_or_recover, target, draft, token_id, None)
        torch.testing.assert_close(weights[0][1], target)


def test_one_draft_token_in_float32(chance):
    """Rounded distributions, whose sums are not quite 1, and a draft that differs from the target by rounding alone."""
    for target, draft in zip(distributions(24), distributions(24, seed=1)):
        target, draft = target.float(), draft.float()
        torch.testing.assert_close(outcome(chance, target, draft), target.double(), rtol=0, atol=1e-6)
    up, down = torch.tensor(2.0), torch.tensor(-1.0)
    for target in distributions(24):
        target = target.float()
        for draft in (target.nextafter(up), target.nextafter(down).clamp(min=0), (target.double() * 1.0000003).float()):
            torch.testing.assert_close(outcome(chance, target, draft), target.double(), rtol=0, atol=1e-6)


def chain_of(seed: int, k: int):
    """A random chain over four tokens: a function that gives each beginning the distribution of what follows."""
    every = [prefix for length in range(k + 1) for prefix in product(range(4), repeat=length)]
    return dict(zip(every, distributions(len(every), seed))).__getitem__


def emitted(chance: Chance, target, draft, k: int) -> Counter:
    """With which probability `rejection_sample` emits each sequence, when the k draft tokens are drawn from `draft`."""
    kept_of = cache(lambda path: kept_below(chance, target(path[:-1]), draft(path[:-1]), path[-1]))
    found = Counter()
    for path in product(range(4), repeat=k):
        drawn = 1.0
        for i, token_id in enumerate(path):
            drawn *= float(draft(path[:i])[token_id])
        if drawn == 0:
            continue
        rows = torch.stack([target(path[:i]) for i in range(k + 1)])
        probs = torch.stack([draft(path[:i]) for i in range(k)])
        for num_kept in range(k + 1):
            probability, uniforms = drawn, {}
            for i in range(num_kept):
                probability, uniforms[i] = probability * kept_of(path[: i + 1]), kept_of(path[: i + 1]) / 2
            if num_kept < k:
                kept = kept_of(path[: num_kept + 1])
                probability, uniforms[num_kept] = probability * (1 - kept), (1 + kept) / 2
            if probability == 0:
                continue
            arguments = (rows, probs, list(path), lambda i: i)
            tokens, weights = chance(uniforms, speculative.rejection_sample, *arguments)
            assert len(tokens) == num_kept + 1 and tuple(tokens[:num_kept]) == path[:num_kept]
            assert [generator for generator, _ in weights] == [num_kept], "drawn once, by the token's own generator"
            for token_id, weight in enumerate(weights[0][1].tolist()):
                found[(*path[:num_kept], token_id)] += probability * weight
    return found


def completed(found: Counter, target, length: int) -> dict:
    """Let the target go on behind what was emitted: how whole sequences are distributed."""
    whole = Counter()
    for tokens, chance in found.items():
        for rest in product(range(4), repeat=length - len(tokens)):
            sequence, weight = (*tokens, *rest), chance
            for i in range(len(tokens), length):
                weight *= float(target(sequence[:i])[sequence[i]])
            whole[sequence] += weight
    return whole


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_chain_is_exact(chance, k, seed):
    """All paths of draft tokens, all places where one is refused: sequences are distributed as the target's own."""
    target, draft = chain_of(2 * seed, k), chain_of(2 * seed + 1, k)
    found = completed(emitted(chance, target, draft, k), target, k + 1)
    expected = completed(Counter({(): 1.0}), target, k + 1)
    for sequence in product(range(4), repeat=k + 1):
        assert found[sequence] == pytest.approx(expected[sequence], abs=1e-9), sequence


# --- Sampled draft tokens: chi-squared on real draws ------------------------------------------------------------------

LEAST_P = 1e-4
"""Seeds are fixed, so a test passes always or never; a right answer had one chance in ten thousand of the latter."""


def p_value(counts: Counter, expected: dict) -> float:
    """Of Pearson's chi-squared test: how likely right draws are at least so far from `expected`, probabilities by
    outcome. Outcomes expected less than five times are taken together. 0: something came that cannot come.
    """
    num = sum(counts.values())
    if any(expected.get(each, 0) < 1e-12 for each in counts):
        return 0.0
    cells, rare = [], [0.0, 0.0]
    for each, probability in expected.items():
        if probability * num >= 5:
            cells.append((counts[each], probability * num))
        else:
            rare = [rare[0] + counts[each], rare[1] + probability * num]
    if rare[1] >= 5:
        cells.append(tuple(rare))
    if len(cells) < 2:
        return 1.0  # too many outcomes for so few draws: the places, one by one, have to tell
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def test_the_p_value_is_one():
    """Known quantiles, and right draws: about one in ten is below a tenth."""
    even = dict.fromkeys("abcd", 0.25)
    for seen, wanted in (((100, 100, 100, 100), 1.0), ((110, 90, 110, 90), 0.2615), ((120, 100, 100, 80), 0.0460)):
        assert p_value(Counter(dict(zip("abcd", seen))), even) == pytest.approx(wanted, abs=1e-4)
    rng, below = random.Random(0), 0
    for _ in range(400):
        below += p_value(Counter(rng.choices("abcd", k=200)), even) < 0.1
    assert 20 <= below <= 60
    assert p_value(Counter("abcde"), even) == 0


@pytest.mark.slow
def test_many_draws_of_one_draft_token():
    """A hundred thousand, with torch's own randomness."""
    target, draft, num = floats(0.05, 0.15, 0.3, 0.5), floats(0.4, 0.1, 0.45, 0.05), 100_000
    generator = torch.Generator().manual_seed(1)
    drafts = torch.multinomial(draft, num, True, generator=generator).tolist()
    counts = Counter(accept_or_recover(target, draft, draft_token, generator)[1] for draft_token in drafts)
    assert p_value(counts, dict(enumerate(target.tolist()))) > LEAST_P
    assert p_value(counts, dict(enumerate([0.055, 0.15, 0.295, 0.5]))) < LEAST_P, "half a percent more is seen"


@pytest.mark.slow
def test_many_draws_of_a_chain():
    """Runs of two draft tokens: accepted, recovered and bonus tokens."""
    target, draft, num = chain_of(2, 2), chain_of(3, 2), 20_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculative, "torch", stand_in := Chance())
        expected = emitted(stand_in, target, draft, 2)
    generator = torch.Generator().manual_seed(2)
    beginnings = [(), *((a,) for a in range(4)), *product(range(4), repeat=2)]
    wanted, offered = ({each: chain(each) for each in beginnings} for chain in (target, draft))
    first = torch.multinomial(offered[()], num, True, generator=generator).tolist()
    counts = Counter()
    for a in first:
        b = int(torch.multinomial(offered[(a,)], 1, generator=generator))
        probs = torch.stack([offered[()], offered[(a,)]])
        rows = torch.stack([wanted[()], wanted[(a,)], wanted[(a, b)]])
        counts[tuple(rejection_sample(rows, probs, [a, b], lambda i: generator))] += 1
    assert p_value(counts, expected) > LEAST_P
    assert {len(tokens) for tokens in counts} == {1, 2, 3}


# --- The engine of lesson 5 with the runner of lesson 8 ---------------------------------------------------------------


class AsItIs:
    """An executor that the soak does not take for one whose runner it may replace."""

    def __init__(self, inner: Pipelined):
        self.inner, self.depth = inner, inner.depth
        self.submit, self.collect, self.close = inner.submit, inner.collect, inner.close


class CheckedDraft(DraftProposer):
    """Compares every row that it draft tokens from with what the draft model says to the whole text, computed alone."""

    def __init__(self, model, cache):
        super().__init__(model, cache)
        self.num_fresh = self.num_stale = 0

    def draw(self, draft, logits):
        fresh = fresh_logits(self.model, tuple(draft.token_ids))
        is_fresh = torch.allclose(logits, fresh, rtol=0, atol=1e-9)
        self.num_fresh, self.num_stale = self.num_fresh + is_fresh, self.num_stale + (not is_fresh)
        return super().draw(draft, logits)


class AnyNumber(AdaptiveSpeculation):
    """Another number of draft tokens for each request in each step."""

    def __init__(self, most: int, seed: int):
        super().__init__(most, is_adaptive=False)
        self.rng = random.Random(seed)

    def limits(self, request_ids):
        return [self.rng.randint(0, self.num_speculative_tokens) for _ in request_ids]


class SpeculativeEngine(Engine):
    """Draft tokens from a model in memory, or from n-grams. What can be found in the prefix cache is checked after
    every step.
    """

    def __init__(self, model, tokenizer, draft=None, most=4, adaptive=None, depth=1, **settings):
        self.model = model
        self.texts: dict[bytes, list[int]] = {}  # by the hash of its last block: a text whose blocks can be found
        config = EngineConfig(**settings).resolve(model.config, cache_bytes(model.config, 1, 8))

        def blocks(model):
            return PagedKVCache(model, config.num_blocks, config.block_size, config.num_host_blocks)

        self.proposer = NgramProposer() if draft is None else CheckedDraft(draft, blocks(draft))
        adaptive = adaptive or AdaptiveSpeculation(most, is_adaptive=False)
        self.runner = SpeculativeRunner(model, blocks(model), self.proposer, adaptive)
        super().__init__(AsItIs(Pipelined(self.runner, depth)), tokenizer, config)
        if draft is not None:
            self.scheduler.num_lookahead_tokens = most

    def step(self):
        reports = super().step()
        check_books(self)
        size = self.config.block_size
        for request in self.scheduler.running:
            block_hash = None
            for i, block in enumerate(self.manager.block_tables[request.request_id]):
                start, end = i * size, (i + 1) * size
                is_verified = end <= min(request.num_computed_tokens, request.num_tokens)
                if not is_verified:
                    assert block.block_hash is None, "a block of draft tokens can be found"
                    break
                block_hash = hash_block(block_hash, request.all_token_ids[start:end])
                if block.block_hash is not None:
                    assert block.block_hash == block_hash, "a block is found by what it does not hold"
                    self.texts[block_hash.value] = request.all_token_ids[:end]
        return reports

    def check_cached(self) -> int:
        """Compare what can be found with keys and values computed anew. Returns how many blocks were compared."""
        cache, size, cached = self.runner.cache, self.config.block_size, self.manager.pool.cached
        longest = sorted((text for value, text in self.texts.items() if value in cached), key=len, reverse=True)
        compared = set()
        for text in longest[:4]:
            fresh, block_hash = KVCache(self.model, len(text)), None
            with torch.inference_mode():
                prefill(self.model, fresh, text)
            for start in range(0, len(text), size):
                block_hash = hash_block(block_hash, text[start : start + size])
                block = cached.get(block_hash.value)
                if block is None:
                    continue
                compared.add(block.block_id)
                for found, computed in ((cache.keys, fresh.keys), (cache.values, fresh.values)):
                    wanted = computed[:, :, start : start + size].transpose(1, 2)
                    torch.testing.assert_close(found[:, block.block_id], wanted, rtol=0, atol=1e-9)
        return len(compared)


def outputs_of(engine: Engine, prompts, params) -> list:
    return engine.generate(prompts, params, progress=False)


# --- Sampled draft tokens, through the whole engine -------------------------------------------------------------------

SMALL = dict(vocab_size=6)
START = [4, 5, 4]
RULES = {
    "top_k": dict(temperature=4.0, top_k=3),
    "top_p": dict(temperature=4.0, top_p=0.7),
    "min_p": dict(temperature=5.0, min_p=0.2),
    "penalties": dict(temperature=3.0, top_k=4, repetition_penalty=1.5, presence_penalty=1.0, frequency_penalty=0.5),
}
NUM_TOKENS = 4
"""The first is sampled in the prompt's step. Two draft tokens follow, and a bonus if both are accepted; or one draft
token after a recovered token, and a bonus."""


def plain_distribution(model, params: SamplingParams, num_tokens: int) -> dict:
    """How plain decoding's outputs are distributed, from the model by enumeration."""
    found, beginnings = {}, {(): 1.0}
    for _ in range(num_tokens):
        found = {}
        for tokens, chance in beginnings.items():
            logits = adjust_logits(recompute(model, [*START, *tokens]), params, START, list(tokens), ())
            for token_id, probability in enumerate(sampling_probs(logits, params).tolist()):
                if probability:
                    found[(*tokens, token_id)] = chance * probability
        beginnings = found
    return found


def sampled_through_engine(rule: dict, num: int) -> tuple[Counter, dict, float]:
    """Outputs of many requests, how they should be distributed, and the acceptance rate. A draft that knows nothing,
    few of whose draft tokens are right: so most outputs contain a recovered token.
    """
    model, draft = random_model(**SMALL), random_model(9, num_hidden_layers=1, **SMALL)
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, n=4, **rule)
    settings = dict(num_blocks=400, block_size=8, max_num_seqs=128, max_num_batched_tokens=512, max_model_len=16)
    with SpeculativeEngine(model, Letters(), draft, most=3, **settings) as engine:
        engine.proposer.draw = lambda *arguments: DraftProposer.draw(engine.proposer, *arguments)
        engine.step = lambda: Engine.step(engine)  # unwatched: others do that, and here it is to be quick
        outputs = []
        for first in range(0, num // 4, 32):
            seeds = range(first, min(first + 32, num // 4))
            outputs += outputs_of(engine, [START] * len(seeds), [replace(params, seed=seed) for seed in seeds])
        rate = engine.metrics().acceptance_rate
    counts = Counter(tuple(each.token_ids) for output in outputs for each in [output, *output.siblings])
    return counts, plain_distribution(model, replace(params, n=1), NUM_TOKENS), rate


def p_values(counts: Counter, expected: dict) -> list[float]:
    """Of whole outputs, and of each place by itself: accepted, recovered or bonus."""
    found = [p_value(counts, expected)]
    for place in range(NUM_TOKENS):
        seen, wanted = Counter(), Counter()
        for tokens in counts:
            seen[tokens[place]] += counts[tokens]
        for tokens, probability in expected.items():
            wanted[tokens[place]] += probability
        found.append(p_value(seen, wanted))
    return found


def check_distribution(rule: dict, num: int) -> None:
    counts, expected, rate = sampled_through_engine(rule, num)
    assert sum(counts.values()) == num and 0.1 < rate < 0.9
    assert min(p_values(counts, expected)) > LEAST_P


def test_the_engine_draws_what_the_model_says():
    """Seeded requests and siblings, few tokens of which are likely: distributed as plain decoding's, by chi-squared."""
    check_distribution(RULES["top_k"], 480)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["top_p", "min_p", "penalties"])
def test_the_engine_draws_what_the_model_says_under_other_rules(rule):
    check_distribution(RULES[rule], 1200)


def test_a_draft_token_and_its_verification_are_independent():
    """One position, many seeds, known logits: a draft token is sampled with other random numbers than it is judged."""
    target, offered, num = floats(0.3, 0.3, 0.2, 0.2), floats(0.7, 0.1, 0.1, 0.1), 1500
    proposer = DraftProposer(MODEL, None)
    runner, counts = SpeculativeRunner(MODEL, None, proposer, AdaptiveSpeculation(1)), Counter()
    for seed in range(num):
        params = SamplingParams(temperature=1.0, seed=seed)
        before = ScheduledRequest("a", 0, [5], 0, [], params, 1, [5], [0], frozenset(), 9)
        runner.drafts["a"] = draft = Draft(before, [5, 0], 1)
        draft.append(*proposer.draw(draft, offered.log()))
        after = replace(before, token_ids=[0, *draft.draft_token_ids], num_spec_tokens=1)
        counts[runner.choose(after, target.log().expand(2, 4))[0]] += 1
    assert p_value(counts, dict(enumerate(target.tolist()))) > LEAST_P


def recovered_from_the_target(target, draft, token_id, generator):
    if float(speculative.torch.rand((), generator=generator)) * float(draft[token_id]) < float(target[token_id]):
        return True, token_id
    return False, int(speculative.torch.multinomial(target, 1, generator=generator))


def kept_always(target, draft, token_id, generator):
    return True, token_id


def kept_by_the_target_alone(target, draft, token_id, generator):
    if float(speculative.torch.rand((), generator=generator)) < float(target[token_id]):
        return True, token_id
    return False, int(speculative.torch.multinomial((target - draft).clamp(min=0), 1, generator=generator))


@pytest.mark.parametrize(
    "wrong",
    [
        recovered_from_the_target,
        pytest.param(kept_always, marks=pytest.mark.slow),
        pytest.param(kept_by_the_target_alone, marks=pytest.mark.slow),
    ],
)
def test_what_is_wrong_is_seen(wrong, monkeypatch):
    """The tests above go red where draft tokens are kept or replaced by another rule."""
    monkeypatch.setattr(speculative, "accept_or_recover", wrong)
    target, draft = floats(0.05, 0.15, 0.3, 0.5), floats(0.4, 0.1, 0.45, 0.05)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speculative, "torch", stand_in := Chance())
        assert (outcome(stand_in, target, draft) - target).abs().max() > 0.01
    counts, expected, _ = sampled_through_engine(RULES["top_k"], 480)
    assert min(p_values(counts, expected)) < LEAST_P / 1000


# --- Whatever is proposed, the same tokens ----------------------------------------------------------------------------


class Alone(Oracle):
    """The soak's oracle, with `alone`'s memory."""

    def __call__(self, prompt, params, told=()):
        most = min(params.max_tokens, MAX_MODEL_LEN - len(prompt))
        params = replace(params, max_tokens=most, min_tokens=min(params.min_tokens, most))
        return alone(self.model, prompt, params, self.tokenizer)


def check_equal(output, wanted) -> None:
    """Tokens, text, reason, and log-probabilities one by one."""
    told, expected = ((each.token_ids, each.text, each.finish_reason) for each in (output, wanted))
    assert told == expected
    assert len(output.logprobs) == len(wanted.logprobs)
    for one, other in zip(output.logprobs, wanted.logprobs):
        assert list(one) == list(other) and list(one.values()) == pytest.approx(list(other.values()), abs=1e-9)


PROMPT = [5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]
LENGTH = 24


@pytest.mark.parametrize("most", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_every_max_tokens(model, draft, most):
    """In one batch, each with another end: none has a token too many or too few, among accepted draft tokens or
    not. And where every draft token is right, k of them and a bonus come of every step."""
    whole = alone(model, PROMPT, SamplingParams(max_tokens=LENGTH, ignore_eos=True, logprobs=2))
    params = [SamplingParams(max_tokens=n, ignore_eos=True, logprobs=2) for n in range(1, LENGTH + 1)]
    with SpeculativeEngine(model, Letters(), draft, most, num_blocks=200, block_size=4) as engine:
        outputs = outputs_of(engine, [PROMPT] * LENGTH, params)
        metrics = engine.metrics()
    for n, output in enumerate(outputs, 1):
        assert (output.token_ids, output.finish_reason) == (whole.token_ids[:n], "length")
        check_equal(replace_end(output), llama_pytorch.RequestOutput(whole.token_ids[:n], "", None, whole.logprobs[:n]))
    assert 0 < metrics.num_draft_tokens and metrics.num_accepted_tokens <= metrics.num_draft_tokens


def replace_end(output) -> llama_pytorch.RequestOutput:
    """Its tokens and log-probabilities alone."""
    return llama_pytorch.RequestOutput(output.token_ids, "", None, output.logprobs)


def test_the_model_as_its_own_draft(model):
    """All its draft tokens are right, drawn or not: k + 1 tokens a step, from the second step on."""
    params = SamplingParams(max_tokens=41, ignore_eos=True)
    for temperature in (0.0, 1.0):
        with SpeculativeEngine(model, Letters(), model, 4, num_blocks=30, block_size=16) as engine:
            (output,) = outputs_of(engine, [PROMPT[:3]], replace(params, temperature=temperature, seed=1))
            metrics = engine.metrics()
        assert len(output.token_ids) == 41 and metrics.acceptance_rate == 1
        assert metrics.num_steps == 1 + 40 // 5
        assert (metrics.num_draft_tokens, metrics.num_accepted_tokens) == (32, 32)


def test_every_stop_token(model, draft):
    """Each token of an answer as the one that ends it: among accepted draft tokens, a bonus, a token instead of a wrong
    draft token."""
    whole = alone(model, PROMPT, SamplingParams(max_tokens=LENGTH, ignore_eos=True))
    every = sorted(set(whole.token_ids))
    params = [SamplingParams(max_tokens=LENGTH, ignore_eos=True, stop_token_ids=[t], logprobs=0) for t in every]
    params += [SamplingParams(max_tokens=LENGTH, ignore_eos=True, stop_token_ids=every, min_tokens=n) for n in (3, 9)]
    with SpeculativeEngine(model, Letters(), draft, 4, num_blocks=300, block_size=4) as engine:
        outputs = outputs_of(engine, [PROMPT] * len(params), params)
    for output, each in zip(outputs, params):
        wanted = alone(model, PROMPT, each)
        assert wanted.finish_reason == "stop" or each.min_tokens
        check_equal(output, wanted)


def test_every_end_of_sequence(model, draft):
    whole = alone(model, PROMPT, SamplingParams(max_tokens=LENGTH, ignore_eos=True))
    params = SamplingParams(max_tokens=LENGTH, logprobs=1)
    for end in sorted(set(whole.token_ids)):
        tokenizer = Letters()
        tokenizer.eos_token_ids = {end}
        with SpeculativeEngine(model, tokenizer, draft, 4, num_blocks=30, block_size=4) as engine:
            (output,) = outputs_of(engine, [PROMPT], params)
        assert output.finish_reason == "stop" and output.token_ids[-1] == end
        check_equal(output, alone(model, PROMPT, params, tokenizer))


def test_every_stop_string(model, draft):
    """Every character of an answer's text, and every piece of three."""
    text = alone(model, PROMPT, SamplingParams(max_tokens=LENGTH, ignore_eos=True)).text
    assert len(text) > 10
    stops = sorted({text[i : i + n] for n in (1, 3) for i in range(len(text) - n + 1)})
    params = [SamplingParams(max_tokens=LENGTH, ignore_eos=True, stop=stop, logprobs=1) for stop in stops]
    with SpeculativeEngine(model, Letters(), draft, 4, num_blocks=600, block_size=4) as engine:
        outputs = outputs_of(engine, [PROMPT] * len(params), params)
    for output, each in zip(outputs, params):
        wanted = alone(model, PROMPT, each)
        assert wanted.finish_reason == "stop"
        check_equal(output, wanted)


PENALTIES = [
    dict(repetition_penalty=1.4),
    dict(repetition_penalty=0.7, presence_penalty=1.5),
    dict(frequency_penalty=0.8),
    dict(presence_penalty=-0.5, frequency_penalty=-0.3),
    dict(min_tokens=7, stop_token_ids=list(range(4, 40))),
    dict(min_tokens=5, stop_token_ids=list(range(0, 40, 2)), frequency_penalty=0.4),
]


@pytest.mark.parametrize("seed", [3, pytest.param(None, marks=pytest.mark.slow)])
def test_penalties_and_min_tokens(model, draft, seed):
    """They depend on the text so far, draft tokens included. Greedy; with n-grams also sampled."""
    temperature = 0.0 if seed is None or draft is not None else 0.8
    params = [
        SamplingParams(max_tokens=LENGTH, ignore_eos=True, logprobs=1, temperature=temperature, seed=seed, **each)
        for each in PENALTIES
    ]
    with SpeculativeEngine(model, Letters(), draft, 4, num_blocks=100, block_size=4) as engine:
        outputs = outputs_of(engine, [PROMPT] * len(params), params)
    for output, each in zip(outputs, params):
        check_equal(output, alone(model, PROMPT, each))


# --- Whatever else happens, the same tokens ---------------------------------------------------------------------------


def tight_settings(rng: random.Random, asks) -> dict:
    """Like the soak's, but always tight and never so small that a test lasts long."""
    block_size = rng.choice([1, 2, 4, 7])
    needed = -(-max(len(ask.prompt) + ask.params.max_tokens - 1 for ask in asks) // block_size)
    return dict(
        block_size=block_size, num_blocks=needed + rng.choice([0, 1, 3]), max_num_seqs=rng.choice([4, 8]),
        max_num_batched_tokens=rng.choice([6, 16, 48]), enable_prefix_caching=True, max_model_len=MAX_MODEL_LEN,
        scheduling_policy=rng.choice(["fcfs", "priority", "fair"]), preemption=rng.choice(["recompute", "swap"]),
    )  # fmt: skip


def soak(model, draft, seeds, settings_for, is_adaptive=False, **changes) -> Counter:
    """Random requests and settings, as in lesson 5. A draft model's tokens are not sampled: where they are, tokens are
    others, and only their distribution is the same."""
    totals = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        asks = random_asks(rng, list(range(5, 40)), STORIES, 12)
        if draft is not None:
            asks = [replace(ask, params=replace(ask.params, temperature=0.0)) for ask in asks]
        settings = settings_for(rng, asks) | changes
        adaptive = AdaptiveSpeculation(4) if is_adaptive else AnyNumber(rng.randint(2, 5), seed)
        depth = (1, 2, 3)[seed % 3]
        try:
            engine = SpeculativeEngine(
                model, Letters(), draft, adaptive.num_speculative_tokens, adaptive, depth, **settings
            )
            report = drive(engine, asks, Alone(model, Letters()), rng)
            totals["compared blocks"] += engine.check_cached()
        except Exception as error:
            raise AssertionError(f"seed {seed}, depth {depth}, {settings}") from error
        totals.update(report.counts)
        totals["outputs"] += report.counts["answers"]
        totals["accepted"] += engine.metrics().num_accepted_tokens
    return totals


WHAT = ("preemptions", "swaps_out", "swaps_in", "copies", "chunks", "cached", "aborted", "drafts", "pipelined")


def test_same_tokens_as_alone(model, draft):
    totals = soak(model, draft, (10, 12), tight_settings)
    for what in (*WHAT, "accepted", "compared blocks"):
        assert totals[what] > 0, f"too few {what} for a soak: {totals}"


@pytest.mark.slow
def test_same_tokens_as_alone_many_times(model, draft):
    soak(model, draft, range(100, 104), tight_settings)
    soak(model, draft, range(200, 203), random_settings)
    soak(model, draft, range(300, 302), tight_settings, is_adaptive=True)


def test_draft_tokens_that_are_hardly_ever_right_are_never_found(model):
    """Full blocks of rejected draft tokens, in a pool where everything is looked for: blocks of one token."""
    totals = soak(model, KNOWS_NOTHING, range(50, 51), tight_settings, block_size=1, num_blocks=80)
    assert totals["drafts"] > 5 * totals["accepted"] and totals["compared blocks"] > 20 and totals["cached"]


@pytest.mark.parametrize("depth", [1, 3])
def test_who_is_gone_is_forgotten(model, depth):
    """What is kept of a request is forgotten with it, however it ended: by its length, by a stop token or
    string, by an abort in mid-flight. It is told with the next step there is."""
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (1, 2, 9)]
    text = alone(model, PROMPT, params[2])
    params += [replace(params[2], stop=text.text[:2]), replace(params[2], stop_token_ids=text.token_ids[3:4])]
    with SpeculativeEngine(model, Letters(), OFTEN_RIGHT, 4, depth=depth, num_blocks=60, block_size=4) as engine:
        for number, each in enumerate(params):
            engine.add_request(PROMPT, each, f"{number}")
        engine.add_request(PROMPT, replace(params[2], n=3), "aborted")
        for _ in range(4):
            engine.step()
        engine.abort("aborted")
        while engine.has_unfinished_requests:
            engine.step()
        engine.add_request([5], SamplingParams(max_tokens=1), "last")
        engine.step()
        runner = engine.runner
        for kept in (runner.drafts, runner.adaptive.acceptances, runner.proposer.num_computed):
            assert not kept.keys() - {"last"}


# --- The draft model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preemption", "depth"),
    [("swap", 1), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("recompute", 3), ("swap", 3)))],
)
def test_the_drafts_cache_is_complete(model, preemption, depth):
    """Long answers in a tight pool, some draft tokens correct: each is made from what the draft model says
    to the whole text, the bonus and every token instead of a rejected one included."""
    settings = dict(num_blocks=14, block_size=4, max_num_batched_tokens=12, preemption=preemption)
    with SpeculativeEngine(
        model, Letters(), OFTEN_RIGHT, 4, AnyNumber(4, 0), depth, enable_prefix_caching=False, **settings
    ) as engine:
        params = SamplingParams(max_tokens=30, ignore_eos=True)
        prompts = [PROMPT[: 3 + i] for i in range(5)]
        outputs = outputs_of(engine, prompts, params)
        metrics, proposer = engine.metrics(), engine.proposer
    for prompt, output in zip(prompts, outputs):
        check_equal(output, alone(model, prompt, params))
    assert metrics.num_preemptions >= 3
    assert 0.2 < metrics.acceptance_rate < 0.9 and metrics.num_draft_tokens - metrics.num_accepted_tokens > 20
    assert proposer.num_stale == 0 and proposer.num_fresh > 100


def test_draft_tokens_are_the_drafts_own(model):
    """A draft that is never right, whose draft tokens are those it makes of each text by itself."""
    draft = KNOWS_NOTHING
    with SpeculativeEngine(model, Letters(), draft, 3, num_blocks=30, block_size=16) as engine:
        submit, seen = engine.executor.submit, []
        engine.executor.submit = lambda plan: (seen.extend(plan.scheduled), submit(plan))
        outputs_of(engine, [PROMPT], SamplingParams(max_tokens=20, ignore_eos=True))
    proposed = [each for each in seen if each.num_spec_tokens]
    assert len(proposed) > 10
    for each in proposed:
        text = [*each.prompt_token_ids, *each.output_token_ids]
        wanted = alone(draft, text, SamplingParams(max_tokens=each.num_spec_tokens, ignore_eos=True)).token_ids
        assert each.token_ids[-each.num_spec_tokens :] == wanted


def test_proposals_shrink_to_the_room_there_is(model):
    """A pool that just holds the request: draft tokens end where its blocks do, and nobody is preempted for them."""
    params = SamplingParams(max_tokens=13, ignore_eos=True)
    for num_blocks, block_size in ((4, 4), (2, 8), (1, 16), (16, 1)):
        settings = dict(num_blocks=num_blocks, block_size=block_size, max_model_len=17)
        with SpeculativeEngine(model, Letters(), model, 8, **settings) as engine:
            (output,) = outputs_of(engine, [PROMPT[:4]], params)
            metrics = engine.metrics()
        check_equal(output, alone(model, PROMPT[:4], params))
        assert metrics.num_preemptions == 0 and metrics.acceptance_rate == 1 and metrics.num_accepted_tokens > 0


def test_a_draft_with_a_shorter_context(model):
    """It draft tokens as long as it knows the positions; behind them nobody does, and all goes on."""
    draft = random_model(max_position_embeddings=24)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    with SpeculativeEngine(model, Letters(), draft, 4, num_blocks=30, block_size=16) as engine:
        positions = []
        embed = draft.forward
        draft.forward = lambda ids, at, attend: (positions.append(int(at.max())), embed(ids, at, attend))[1]
        engine.proposer.draw = lambda *arguments: DraftProposer.draw(engine.proposer, *arguments)
        (output,) = outputs_of(engine, [PROMPT], params)
        metrics = engine.metrics()
    check_equal(output, alone(model, PROMPT, params))
    assert max(positions) == 23 and metrics.acceptance_rate == 1
    assert metrics.num_accepted_tokens >= 8 and metrics.num_steps > 30 - metrics.num_accepted_tokens - 3


def scheduled_with_lookahead(lengths: dict[str, int], num_blocks: int, num_steps: int, depth: int = 1):
    """The plans of a scheduler with eight slots for draft tokens, blocks of four, and no draft tokens."""
    manager = KVCacheManager(num_blocks, 4, enable_prefix_caching=False)
    config = EngineConfig(max_num_seqs=8, max_num_batched_tokens=64, long_prefill_token_threshold=64, num_host_blocks=0)
    scheduler = Scheduler(manager, config)
    scheduler.num_lookahead_tokens, scheduler.depth = 8, depth
    for arrival, (request_id, length) in enumerate(lengths.items()):
        params = SamplingParams(max_tokens=20)
        scheduler.add(Request(request_id, [5] * length, params, 20, arrival=arrival))
    for _ in range(num_steps):
        plan = scheduler.schedule()
        yield plan, manager
        sampled = {each.request_id: [7] for each in plan.scheduled if each.sample_index is not None}
        scheduler.update_from_output(plan, ModelRunnerOutput(plan.step_id, sampled))


def test_room_for_draft_tokens_is_given_where_there_is_room():
    *_, (plan, _) = scheduled_with_lookahead({"a": 4, "b": 4}, 20, 2)
    assert [len(each.block_table) for each in plan.scheduled] == [4, 4], "4 + 1 + 8 tokens, in blocks of 4"


def test_room_for_draft_tokens_is_given_up_before_anyone_is_preempted():
    """Two requests whose tokens fit to the end of the test; their draft tokens fit only at first. In each order, and
    wherever in its blocks each stands."""
    for a, b in product(range(1, 9), repeat=2):
        needed = sum(-(-(length + 9) // 4) for length in (a, b))
        for plan, manager in scheduled_with_lookahead({"a": a, "b": b}, needed, 10):
            assert not plan.preempted_ids, f"prompts of {a} and {b}, {needed} blocks, step {plan.step_id}"
            held = {request_id: len(table) for request_id, table in manager.block_tables.items()}
            assert sum(held.values()) <= needed
        assert [each.start for each in plan.scheduled] == [a + 8, b + 8]


# --- Does it pay? -----------------------------------------------------------------------------------------------------


def test_expected_tokens_against_simulation():
    generator = torch.Generator().manual_seed(0)
    for rate, k in product((0.0, 0.3, 0.8, 1.0), (0, 1, 3, 7)):
        is_right = torch.rand(20_000, k, generator=generator, dtype=torch.float64) < rate
        tokens = 1 + is_right.long().cumprod(-1).sum(-1).double()
        error = float(tokens.std()) / len(tokens) ** 0.5
        assert expected_tokens(rate, k) == pytest.approx(float(tokens.mean()), abs=4 * error + 1e-12)


def simulated(
    step_time: Callable[[int], float],
    rates: Callable[[int, int], float],
    num_requests: int = 1,
    draft_time: float = 0.0,
    num_steps: int = 96,
    seed: int = 0,
    most: int = 8,
) -> tuple[float, list[list[int]]]:
    """An engine of numbers alone. step_time: seconds by number of tokens; rates(request, step): the probability that a
    draft token is accepted; draft_time: of a pass of the draft model; times vary by a tenth. Returns the speed as a
    multiple of that without speculation, and the limits of each step.
    """
    rng, adaptive, ids = random.Random(seed), AdaptiveSpeculation(most), [str(i) for i in range(num_requests)]
    made, seconds, drafting, num_tokens, every = dict.fromkeys(ids, 0), 0.0, 0.0, 0, []
    for step in range(num_steps):
        taken = drafting + step_time(num_requests + sum(made.values())) * rng.uniform(0.9, 1.1)
        adaptive.observe_step(num_requests, sum(made.values()), taken)
        seconds += taken
        for i, (request_id, k) in enumerate(made.items()):
            num_accepted = next((j for j in range(k) if rng.random() >= rates(i, step)), k)
            num_tokens += 1 + num_accepted
            if k:
                adaptive.acceptances[request_id].observe(k, num_accepted)
        limits = adaptive.limits(ids)
        made, drafting = dict(zip(ids, limits)), draft_time * max(limits)
        every.append(limits)
    return num_tokens * step_time(num_requests) / num_requests / seconds, every


STEP_TIMES = {  # seconds by number of tokens
    "weights take the time": lambda n: 0.046 + 0.0024 * (n - 1),  # SmolLM2 with kernels, two threads
    "the second token costs the most": lambda n: 0.063 if n == 1 else 0.100 + 0.0026 * n,  # and without
    "Python takes the time": lambda n: 0.0066 + 0.00007 * n,  # tales
    "64 tokens are free": lambda n: 0.02 * max(1, n / 64),  # as on a GPU
}


@pytest.mark.parametrize("name", STEP_TIMES)
@pytest.mark.parametrize("num_requests", [1, 8, pytest.param(32, marks=pytest.mark.slow)])
def test_speculation_never_costs_much(name, num_requests):
    """Whatever a step takes and however rarely a draft token is accepted."""
    for draft_time in (0.0, 0.3 * STEP_TIMES[name](num_requests)):
        for rate in (0.0, 0.3, 0.6):
            args = STEP_TIMES[name], lambda request, step, rate=rate: rate, num_requests, draft_time
            ratio = sum(simulated(*args, seed=seed)[0] for seed in range(4)) / 4
            assert ratio > 0.93, f"{draft_time=}, {rate=}"


def test_speculation_pays_where_it_can():
    """At 0.95 the best number, known beforehand, gives 5.4 and 7.7 with one request, and 1.25 with 32."""
    often = lambda request, step: 0.95  # noqa: E731
    assert simulated(STEP_TIMES["weights take the time"], often)[0] > 4
    assert simulated(STEP_TIMES["64 tokens are free"], often)[0] > 6
    assert simulated(STEP_TIMES["weights take the time"], often, 32)[0] > 1.1
    assert simulated(STEP_TIMES["Python takes the time"], often, 8, draft_time=0.002)[0] > 1.4
    # A quarter of the requests copy their prompts, and the others do not.
    mixed = lambda request, step: 0.95 if request % 4 == 0 else 0.1  # noqa: E731
    _, limits = simulated(STEP_TIMES["64 tokens are free"], mixed, 8)
    assert min(limits[90][0::4]) > max(limits[90][1:4])


def test_the_number_of_draft_tokens_follows_the_text():
    """All are accepted, then none, then all again."""
    rates = lambda request, step: 0.0 if 60 <= step < 200 else 1.0  # noqa: E731
    _, limits = simulated(STEP_TIMES["weights take the time"], rates, num_steps=300)
    made = {step: each for step, (each,) in enumerate(limits, 1) if step % AdaptiveSpeculation.REST_EVERY}
    assert {k for step, k in made.items() if 10 < step <= 60} == {8}
    turned = min(step for step, k in made.items() if step > 60 and k == 0)
    assert turned < 120
    probes = [step for step, k in made.items() if turned < step <= 200 and k]
    assert {made[step] for step in probes} == {AdaptiveSpeculation.PROBE_TOKENS} and len(probes) >= 3
    assert all(later - earlier >= AdaptiveSpeculation.PROBE_EVERY for earlier, later in pairwise(probes))
    assert min(step for step, k in made.items() if step > 200 and k == 8) < 200 + 3 * AdaptiveSpeculation.PROBE_EVERY


def test_without_adaptation_there_are_always_as_many():
    assert AdaptiveSpeculation(3, is_adaptive=False).limits(["a", "b"]) == [3, 3]


# --- One sequence -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("most", "temperature"), [(4, 0.0), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((0, 0.0), (4, 1.0)))]
)
def test_generate_gives_lesson_2s_tokens(model, most, temperature):
    whole = alone(model, PROMPT, SamplingParams(max_tokens=LENGTH, ignore_eos=True, temperature=temperature, seed=4))
    common = dict(max_tokens=LENGTH, temperature=temperature, seed=4, logprobs=1)
    every = [SamplingParams(**common | {"max_tokens": n}, ignore_eos=True) for n in range(1, LENGTH + 1)]
    every += [SamplingParams(**common, ignore_eos=True, stop_token_ids=[t]) for t in sorted(set(whole.token_ids))]
    every += [
        SamplingParams(**common, ignore_eos=True, stop=whole.text[i : i + 2]) for i in range(0, len(whole.text) - 1, 2)
    ]
    every += [SamplingParams(**common, ignore_eos=True, **each) for each in PENALTIES]
    for params in every:
        check_equal(
            generate(model, Letters(), PROMPT, params, num_speculative_tokens=most), alone(model, PROMPT, params)
        )


def test_generate_shows_the_same_pieces(model):
    params, pieces, expected = SamplingParams(max_tokens=LENGTH, ignore_eos=True), [], []
    generate(model, Letters(), PROMPT, params, pieces.append)
    llama_pytorch.generate(model, Letters(), PROMPT, params, expected.append)
    assert pieces == expected


def test_generate_to_the_end_of_the_context():
    model = random_model(max_position_embeddings=20)
    for length in (1, 12, 18, 19):
        params = SamplingParams(max_tokens=50, ignore_eos=True)
        output = generate(model, Letters(), (PROMPT * 2)[:length], params)
        check_equal(output, alone(model, (PROMPT * 2)[:length], params))
        assert len(output.token_ids) == 20 - length
    for prompt, says in (([], "empty"), ([5] * 20, "20 tokens"), ([40], "token id 40")):
        with pytest.raises(ValueError, match=says):
            generate(model, Letters(), prompt, SamplingParams())


@torch.inference_mode()
def test_fewer_passes_where_the_text_repeats_itself():
    """A text known beforehand, of a model that copies: a fifth of the passes. Where nothing repeats, as many as tokens.
    And every row is what computing all again gives."""
    model = random_model()
    for text, k, passes in (([5, 6, 7] * 14, 4, 8), ([5, 6, 7] * 14, 9, 4), (list(range(40)), 4, 36)):
        lookahead = Lookahead(model, len(text), lambda tokens, k=k: propose_ngram(tokens, k))
        for n in range(4 if k == 4 and passes == 36 else 3, len(text)):
            torch.testing.assert_close(lookahead.next_logits(text[:n]), recompute(model, text[:n]), rtol=0, atol=1e-9)
        assert lookahead.num_passes <= passes + 3
        assert lookahead.num_passes >= (len(text) - 4) // (k + 1)


@torch.inference_mode()
def test_lookahead_takes_wrong_draft_tokens_back():
    """Draft tokens of which some are right: none, or some first ones, or all."""
    model, rng = random_model(), random.Random(0)
    text = rng.choices(range(5, 30), k=60)

    def propose(tokens):
        k = rng.randint(0, 5)
        right = text[len(tokens) : len(tokens) + k]
        return [token if rng.random() < 0.7 else (token + 1) % 40 for token in right]

    lookahead = Lookahead(model, len(text), propose)
    for n in range(3, len(text)):
        torch.testing.assert_close(lookahead.next_logits(text[:n]), recompute(model, text[:n]), rtol=0, atol=1e-9)
    assert 15 < lookahead.num_passes < 50


# --- The assembled engine ---------------------------------------------------------------------------------------------

CONFIG = dict(
    model_type="llama", vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target, a draft that is often right, one that knows nothing, and one of another vocabulary."""
    models = {
        "target": (MODEL, CONFIG),
        "draft": (OFTEN_RIGHT, CONFIG),
        "blind": (KNOWS_NOTHING, CONFIG | dict(num_hidden_layers=1)),
        "foreign": (random_model(9, vocab_size=41), CONFIG | dict(vocab_size=41)),
    }
    found = {}
    for name, (model, config) in models.items():
        found[name] = folder = tmp_path_factory.mktemp(name)
        save_file({key: each.detach().clone() for key, each in model.named_parameters()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return found


@pytest.fixture
def letters(monkeypatch):
    monkeypatch.setattr(engine_module, "load_tokenizer", lambda folder: Letters())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def assembled(folders, draft: str | None = None, **settings) -> InferenceEngine:
    settings = {"dtype": torch.float64, "device": "cpu", "max_model_len": MAX_MODEL_LEN, "timeout": 10.0, **settings}
    speculative = str(folders[draft]) if draft in folders else draft
    return InferenceEngine(str(folders["target"]), speculative=speculative, **settings)


@pytest.mark.parametrize("speculative", ["ngram", "draft", "blind"])
@pytest.mark.parametrize("is_adaptive", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_assembled_engine(folders, letters, model, speculative, is_adaptive):
    params = SamplingParams(max_tokens=LENGTH, ignore_eos=True)
    prompts = [PROMPT, PROMPT[:5], [7] * 9]
    settings = dict(num_blocks=13, block_size=4, preemption="swap", num_speculative_tokens=3)
    with assembled(folders, speculative, adaptive_speculation=is_adaptive, **settings) as engine:
        outputs = outputs_of(engine, prompts, params)
        totals, each = engine.metrics(), [output.metrics for output in outputs]
    for prompt, output in zip(prompts, outputs):
        check_equal(output, alone(model, prompt, params))
    for name in ("num_draft_tokens", "num_accepted_tokens", "num_output_tokens"):
        assert getattr(totals, name) == sum(getattr(metrics, name) for metrics in each)
    assert totals.num_accepted_tokens <= totals.num_draft_tokens
    assert totals.acceptance_rate == totals.num_accepted_tokens / max(1, totals.num_draft_tokens)
    if not is_adaptive:
        assert totals.num_draft_tokens > 20 and (speculative != "draft" or totals.acceptance_rate > 0.2)


def test_accepted_tokens_are_those_that_cost_no_step(folders, letters):
    """Each step brings a request one token, and each accepted draft token one more."""
    params = SamplingParams(max_tokens=LENGTH, ignore_eos=True)
    with assembled(folders, "draft", adaptive_speculation=False, num_blocks=100) as engine:
        submit, samples = engine.executor.submit, []

        def watch(plan):
            samples.extend(each for each in plan.scheduled if each.sample_index is not None)
            submit(plan)

        engine.executor.submit = watch
        outputs_of(engine, [PROMPT, PROMPT[:5], [7] * 9], params)
        metrics = engine.metrics()
    assert metrics.num_output_tokens == len(samples) + metrics.num_accepted_tokens == 3 * LENGTH
    assert metrics.num_draft_tokens == sum(each.num_spec_tokens for each in samples)


def test_an_accepted_draft_token_that_ends_the_answer_is_counted(folders, letters):
    """The model as its own draft: every draft token that became output was accepted, the last one too."""
    whole = alone(MODEL, PROMPT, SamplingParams(max_tokens=LENGTH, ignore_eos=True)).token_ids
    end = next(i for i, token_id in enumerate(whole) if token_id not in whole[:i] and i in (2, 3, 4))
    params = SamplingParams(max_tokens=LENGTH, ignore_eos=True, stop_token_ids=[whole[end]])
    with assembled(folders, "target", adaptive_speculation=False, num_speculative_tokens=9) as engine:
        (output,) = outputs_of(engine, [PROMPT], params)
    assert output.token_ids == whole[: end + 1]
    assert output.metrics.num_accepted_tokens == end, "all but the first token were proposed"


@pytest.mark.parametrize(
    ("draft", "settings", "says"),
    [
        (None, dict(num_speculative_tokens=3), 'there is no source of draft tokens: set speculative="ngram"'),
        (
            "ngram",
            dict(num_speculative_tokens=0),
            "num_speculative_tokens must be a whole number of at least 1; it is 0",
        ),
        ("ngram", dict(num_speculative_tokens=2.5), "num_speculative_tokens must be .* it is 2.5"),
        ("foreign", {}, "has another vocabulary than .* \\(41 and 40 tokens\\)"),
        ("no-such-model", {}, "no model is called 'no-such-model'"),
        ("ngram", dict(kv_cache_policy="contiguous", enable_prefix_caching=True), "enable_prefix_caching is True"),
        ("draft", dict(kv_cache_policy="contiguous", enable_prefix_caching=True), "enable_prefix_caching is True"),
        ("ngram", dict(max_batch_size=0), "max_batch_size must be a whole number of at least 1; it is 0"),
        ("ngram", dict(max_num_seqs=0), "max_num_seqs must be"),
        (
            "ngram",
            dict(preemption="swap", num_host_blocks=10**6, block_size=2**16),
            "num_host_blocks=1000000 blocks of block_size=65536 tokens would take .* bytes; this machine has",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(folders, letters, draft, settings, says):
    with pytest.raises(ValueError, match=says):
        assembled(folders, draft, **settings)


def test_a_vocabulary_of_the_same_size_with_other_tokens_is_refused(folders, letters, monkeypatch):
    class Others(Letters):
        def token_bytes(self, token_id: int) -> bytes:
            return super().token_bytes((token_id + 1) % 40)

    own = folders["draft"]
    monkeypatch.setattr(engine_module, "load_tokenizer", lambda folder: Others() if folder == own else Letters())
    with pytest.raises(ValueError, match="another vocabulary .* they must mean the same to both"):
        assembled(folders, "draft")


def test_contiguous_with_a_draft(folders, letters, model):
    """One block a request: its draft tokens have room to the end of it."""
    params = SamplingParams(max_tokens=LENGTH, ignore_eos=True)
    settings = dict(kv_cache_policy="contiguous", num_blocks=2, adaptive_speculation=False)
    with assembled(folders, "draft", **settings) as engine:
        outputs = outputs_of(engine, [PROMPT, PROMPT[:5], [7] * 9], params)
    for prompt, output in zip([PROMPT, PROMPT[:5], [7] * 9], outputs):
        check_equal(output, alone(model, prompt, params))


def test_no_chat_without_a_template(folders, letters):
    with assembled(folders, "ngram") as engine, pytest.raises(ValueError, match="no chat template"):
        engine.chat([{"role": "user", "content": "hello"}])


def test_chat_is_the_template_and_no_more(folders, monkeypatch, model):
    """The template's text, encoded once, without the special tokens that a tokenizer adds of itself."""

    class Talking(Letters):
        chat_template = "yes"

        def apply_chat_template(self, messages):
            return "".join(each["content"] for each in messages)

        def encode(self, text, add_special_tokens=True):
            return [1] * add_special_tokens + [5 + ord(letter) % 30 for letter in text]

    monkeypatch.setattr(engine_module, "load_tokenizer", lambda folder: Talking())
    params = SamplingParams(max_tokens=9)
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "brief"}]
    with assembled(folders, "draft") as engine:
        output = engine.chat(messages, params)
        for wrong in ([1], "mood", {1: "merry"}):
            with pytest.raises(ValueError, match="chat_template_kwargs must be a mapping from names to values"):
                engine.chat(messages, params, wrong)
    assert output.prompt_token_ids == [5 + ord(letter) % 30 for letter in "bebrief"]
    check_equal(output, alone(model, output.prompt_token_ids, params, Talking()))


@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_memory_is_that_of_both_caches(folders, letters, kind):
    """`kv_cache_memory` bounds what target and draft take together, and is used but for a block."""
    settings = dict(kv_cache_memory=300_000, max_batch_size=10_000, kv_cache_dtype=kind, block_size=4)
    with assembled(folders, "ngram", **settings) as engine:
        without = engine.config.num_blocks
    for name in ("draft", "blind"):
        with assembled(folders, name, **settings) as engine:
            runner, blocks = engine.executor.runner, engine.config.num_blocks
            caches = (runner.cache, runner.proposer.cache)
            held = sum(each.nbytes for cache in caches for each in cache.device_tensors)
            assert all(cache.keys.shape[1] == blocks for cache in caches)
            assert held <= 300_000 < held * (blocks + 1) / blocks
            assert blocks < without
            assert caches[1].keys.dtype == torch.float64
        config = llama_pytorch.parse_config(Checkpoint(folders[name]).config)
        assert sum(each.nbytes for each in caches[1].device_tensors) == cache_bytes(config, blocks * 4, 8)


def test_lookahead_is_for_drafts(folders, letters):
    with assembled(folders, "draft", num_speculative_tokens=7) as engine:
        assert engine.scheduler.num_lookahead_tokens == 7
    for other in (None, "ngram"):
        with assembled(folders, other) as engine:
            assert engine.scheduler.num_lookahead_tokens == 0
            assert isinstance(engine.config, EngineConfig)


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["ngram", "draft"])
@pytest.mark.parametrize("grid", [(2, 1), (1, 2)])
def test_on_several_ranks(folders, letters, model, grid, draft):
    """Draft tokens are made and verified on the rank that samples, wherever that is; random load in a tight pool."""
    rng = random.Random(1)
    asks = random_asks(rng, list(range(5, 40)), STORIES, 14)
    if draft != "ngram":
        asks = [replace(ask, params=replace(ask.params, temperature=0.0)) for ask in asks]
    needed = -(-max(len(ask.prompt) + ask.params.max_tokens for ask in asks) // 4)
    settings = dict(num_blocks=needed + 3, block_size=4, max_num_batched_tokens=16, preemption="swap")
    settings |= dict(tensor_parallel=grid[0], pipeline_parallel=grid[1], adaptive_speculation=False)
    with assembled(folders, draft, **settings) as engine:
        report = drive(engine, asks, Alone(model, Letters()), rng)
        assert engine.metrics().num_accepted_tokens > 5
    assert report.counts["preemptions"] and report.counts["drafts"]


@pytest.mark.slow
@pytest.mark.parametrize("speculative", ["ngram", "tales-draft"])
def test_tales(speculative):
    """The course's own model and draft, in float64: the same tokens, in fewer steps."""
    torch.set_num_threads(1)
    model, tokenizer = load("tales", torch.float64, "cpu")
    prompts = [tokenizer.encode(text) for text in ("There was once a small owl", "Long ago, in a dark wood")]
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    with InferenceEngine(
        "tales",
        speculative=speculative,
        adaptive_speculation=False,
        dtype=torch.float64,
        device="cpu",
        max_model_len=128,
    ) as engine:
        outputs = outputs_of(engine, prompts, params)
        metrics = engine.metrics()
    for prompt, output in zip(prompts, outputs):
        check_equal(output, alone(model, prompt, params, tokenizer))
    if speculative != "ngram":
        assert metrics.acceptance_rate > 0.3 and metrics.num_steps < 45
