"""The composition matrix: whatever is combined with whatever, the tokens are those of one model and one request.

Six axes. All combinations that need no second process are tried, on a tiny random model (`make test` tries few of them,
in which every pair of values is); on `tales` with its draft, and over ranks, every pair of values is, in some cell.
Cells are exact: float64, plain kernels. The same with the real kernels in float32 holds up to near-ties.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

import pytest
import torch

from common.authoring.soak.load import Models
from common.authoring.soak.requests import Letters
from common.checkpoints import find_checkpoint
from common.config import EngineConfig
from common.tokenizer import load_tokenizer
from solutions import engine, llama_pytorch
from solutions.engine import InferenceEngine
from solutions.llama_pytorch import Llama, SamplingParams, recompute

AXES = {
    "memory": ("contiguous", "paged", "paged, prefixes cached"),
    "quantization": (None, "int8", "int4"),
    "speculative": (None, "ngram", "draft"),
    "pool": ("ample", "tight, recompute", "tight, swap"),
    "tensor_parallel": (1, 2),
    "pipeline_parallel": (1, 2),
}
Cell = tuple  # a value of each axis, in their order
CELLS: list[Cell] = list(product(*AXES.values()))
ALONE = [cell for cell in CELLS if cell[4:] == (1, 1)]
NEAR_TIE, MOST_NEAR_TIES = 1e-3, 0.02
MAX_MODEL_LEN = 96

BEGINNING = "Once upon a time there was a little owl who lived in a tall tree near the river. Every night"
TEXTS = [
    (BEGINNING + " the owl", SamplingParams(max_tokens=18)),
    (BEGINNING + " the owl", SamplingParams(max_tokens=9, ignore_eos=True, logprobs=2)),
    (BEGINNING, SamplingParams(max_tokens=16, temperature=0.8, top_p=0.9, seed=3)),
    ("The fox said: I am a fox. I am a fox. I am", SamplingParams(max_tokens=24, ignore_eos=True)),
    ("The robot", SamplingParams(max_tokens=16, temperature=1.0, top_k=20, seed=5, n=2)),
    ("One day", SamplingParams(max_tokens=20, stop=("the",), repetition_penalty=1.2)),
]
IDS = [list(range(5, 25)), list(range(5, 25)), list(range(5, 23)), [7, 8, 9] * 5, [30, 4], [11, 12, 13]]


@dataclass(frozen=True)
class Subject:
    """A model and its draft, by their folders, what they are asked, and the tokenizer where the folder has none."""

    target: str
    draft: str
    requests: list
    tokenizer: object = None

    @property
    def longest(self) -> int:
        """Tokens of the longest request, its answer included."""
        return max(len(self.encode(prompt)) + params.max_tokens for prompt, params in self.requests)

    def encode(self, prompt: str | list[int]) -> list[int]:
        return self.own_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt

    @functools.cache  # noqa: B019
    def own_tokenizer(self):
        return self.tokenizer or load_tokenizer(find_checkpoint(self.target))

    @functools.cache  # noqa: B019
    def model(self, quantization: str | None, dtype: torch.dtype) -> Llama:
        """One process, no engine: the model that `generate` is given, with the very weights."""
        options = {"quantization": quantization, "group_size": 32, "dtype": dtype, "device": "cpu"}
        return engine.load_model(EngineConfig(model=str(self.target), **options))[0]

    @functools.cache  # noqa: B019
    def answers(self, quantization: str | None, dtype: torch.dtype) -> list[list[llama_pytorch.RequestOutput]]:
        """What lesson 2's `generate` says to each request, a list of its n samples."""
        model, tokenizer = self.model(quantization, dtype), self.own_tokenizer()
        return [
            [llama_pytorch.generate(model, tokenizer, self.encode(prompt), each) for each in params.children()]
            for prompt, params in self.requests
        ]

    def __hash__(self):
        return id(self)


TALES = Subject("tales", "tales-draft", TEXTS)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Subject]:
    """A random model; its draft is the same model with noise in its weights, so that some draft tokens are right."""
    models = Models()
    requests = [(ids, params) for ids, (_, params) in zip(IDS, TEXTS)]
    yield Subject(models.folder("llama"), models.folder("llama", "close"), requests, Letters())
    models.temporary.cleanup()


def pairwise(cells: list[Cell]) -> list[Cell]:
    """Few of these cells, such that any two values that stand together in a cell stand together in one of the few."""

    def pairs(cell: Cell) -> set:
        return set(combinations(enumerate(cell), 2))

    missing, chosen = set().union(*map(pairs, cells)), []
    while missing:
        chosen.append(max(cells, key=lambda cell: len(pairs(cell) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


PAIRS = [cell for cell in pairwise(CELLS) if cell[4:] != (1, 1)]
FEW = pairwise(ALONE)


def name(cell: Cell) -> str:
    return " | ".join(str(value) for value in cell)


def settings_of(cell: Cell, subject: Subject) -> dict:
    """What `InferenceEngine` is told. A tight pool can just serve the longest request."""
    memory, quantization, speculative, pool, tensor, pipeline = cell
    is_paged, (pool, _, preemption) = memory.startswith("paged"), pool.partition(", ")
    block_size = 4 if is_paged else MAX_MODEL_LEN
    tight = -(-subject.longest // block_size) if is_paged else 2
    num_blocks = 120 if pool == "ample" else tight
    return dict(
        kv_cache_policy="paged" if is_paged else "contiguous",
        enable_prefix_caching=memory.endswith("cached"),
        quantization=quantization,
        group_size=32,
        speculative=subject.draft if speculative == "draft" else speculative,
        num_speculative_tokens=3 if speculative else None,
        adaptive_speculation=False,  # or the clock would decide what is tried
        preemption=preemption or "recompute",
        num_blocks=num_blocks,
        num_host_blocks=2 * num_blocks if preemption == "swap" else None,
        block_size=block_size,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=24,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
    )


def run(cell: Cell, subject: Subject, dtype: torch.dtype):
    """The answers of a cell, each with its siblings, and what the engine counted."""
    with InferenceEngine(subject.target, dtype=dtype, device="cpu", **settings_of(cell, subject)) as own:
        prompts, params = zip(*subject.requests)
        outputs = own.generate(prompts, params, progress=False)
        assert own.manager.pool.num_free_blocks == len(own.manager.pool.blocks)
        return [[output, *output.siblings] for output in outputs], own.metrics()


def keeps_its_draw(cell: Cell, params: SamplingParams) -> bool:
    """Whether the very tokens are promised. Sampled draft tokens change them, and keep the distribution: that is tested
    where it can be counted, in test_speculative.py.
    """
    return params.temperature == 0 or cell[2] != "draft"


def check_exact(cell: Cell, subject: Subject) -> None:
    outputs, metrics = run(cell, subject, torch.float64)
    for (prompt, params), got, wanted in zip(subject.requests, outputs, subject.answers(cell[1], torch.float64)):
        for own, alone in zip(got, wanted):
            assert own.finish_reason in ("stop", "length")
            assert len(own.logprobs) == (len(own.token_ids) if params.logprobs is not None else 0)
            if keeps_its_draw(cell, params):
                assert (own.token_ids, own.text, own.finish_reason) == (
                    alone.token_ids,
                    alone.text,
                    alone.finish_reason,
                ), prompt
    assert (metrics.num_draft_tokens > 0) == (cell[2] is not None)
    assert (metrics.num_cached_tokens > 0) >= (cell[0] == "paged, prefixes cached")
    if cell[3] != "ample":
        assert metrics.num_preemptions > 0 or cell[0] == "contiguous"  # there, who has no block waits for one


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setenv("KERNELS", "plain")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def letters(monkeypatch):
    """The tiny model's folders have no tokenizer."""
    monkeypatch.setattr(engine, "load_tokenizer", lambda folder: Letters())


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, marks=[] if cell in FEW else pytest.mark.slow) for cell in ALONE], ids=name
)
def test_every_combination_in_one_process(cell, tiny, plain, letters):
    check_exact(cell, tiny)


@pytest.mark.slow
@pytest.mark.parametrize("cell", FEW, ids=name)
def test_every_pair_on_tales(cell, plain):
    check_exact(cell, TALES)


@pytest.mark.slow
@pytest.mark.parametrize("cell", PAIRS, ids=name)
def test_every_pair_over_ranks(cell, plain):
    check_exact(cell, TALES)


def test_the_few_have_every_pair():
    """Or the two tests above would promise more than they try."""

    def pairs(cells):
        return {pair for cell in cells for pair in combinations(enumerate(cell), 2)}

    assert pairs(FEW) == pairs(ALONE) and pairs([*PAIRS, *ALONE]) == pairs(CELLS)


@pytest.mark.slow
def test_every_pair_with_kernels(monkeypatch):
    """float32, and all that kernels do to the order of sums: the same tokens, up to the first near-tie."""
    monkeypatch.setenv("KERNELS", "fast")
    near_ties = count = 0
    for cell in FEW:
        outputs, _ = run(cell, TALES, torch.float32)
        monkeypatch.setenv("KERNELS", "plain")
        model = TALES.model(cell[1], torch.float32)
        for (_, params), got, wanted in zip(TALES.requests, outputs, TALES.answers(cell[1], torch.float32)):
            if params.temperature or params.repetition_penalty != 1:
                continue  # a near-tie of what was drawn or adjusted is not one of the model's logits
            count += 1
            if got[0].token_ids != wanted[0].token_ids:
                pairs = zip(got[0].token_ids, wanted[0].token_ids)
                place = next(i for i, (a, b) in enumerate(pairs) if a != b)
                with torch.inference_mode():
                    best = recompute(model, [*got[0].prompt_token_ids, *wanted[0].token_ids[:place]]).topk(2).values
                assert float(best[0] - best[1]) < NEAR_TIE, name(cell)
                near_ties += 1
        monkeypatch.setenv("KERNELS", "fast")
    assert near_ties <= MOST_NEAR_TIES * count


@pytest.mark.slow
def test_everything_at_once(plain):
    """Every option of every lesson in one engine, against the quantized single process with the same blocks."""
    params = [SamplingParams(max_tokens=24), SamplingParams(max_tokens=24, ignore_eos=True)]
    prompts = [BEGINNING, "The fox said: I am a fox. I am"]
    common = dict(quantization="int4", group_size=32, kv_cache_dtype="int8", dtype=torch.float64, device="cpu")
    tight = dict(block_size=8, num_blocks=12, num_host_blocks=30, preemption="swap", scheduling_policy="fair")
    with InferenceEngine("tales", num_blocks=60, **common) as alone:
        expected = [each.token_ids for each in alone.generate(prompts, params, progress=False)]
    with InferenceEngine(
        "tales", tensor_parallel=2, pipeline_parallel=2, speculative="tales-draft", max_model_len=64, **common, **tight
    ) as own:
        assert [each.token_ids for each in own.generate(prompts * 2, params * 2, progress=False)] == expected * 2
        assert own.metrics().num_accepted_tokens > 0
    # Whole layers only: what is streamed from disk is one rank's business as well.
    with InferenceEngine("tales", speculative="ngram", offload=2_000_000, **common, **tight, max_model_len=64) as own:
        assert [each.token_ids for each in own.generate(prompts, params, progress=False)] == expected


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(kv_cache_policy="contiguous", enable_prefix_caching=True), "there are no blocks to share"),
        (dict(num_speculative_tokens=3), "there is no source of draft tokens"),
        (dict(speculative="ngram", num_speculative_tokens=0), "num_speculative_tokens must be a whole number"),
        (dict(tensor_parallel=5), "tensor_parallel is 5"),
        (dict(pipeline_parallel=9), "pipeline_parallel is 9"),
        (dict(quantization="fp4"), "quantization must be one of"),
        (dict(preemption="torch.swap"), "preemption must be one of"),
        (dict(timeout=float("inf")), "timeout must be a number of at most"),
        (dict(quantization="int4", group_size=2**40), "group_size must be a whole number of at most"),
        (dict(offload=1), "offload is 1 bytes"),
        (dict(max_model_len=2000), "max_model_len is 2000"),
        (dict(device="gpu"), "device is 'gpu', which torch cannot use here; it can use cpu"),
        (dict(device="cuda:99"), "device is 'cuda:99', which torch cannot use here; it can use cpu"),
        (dict(device="meta"), "device is 'meta', which torch cannot use here"),
        (dict(device="cpu", num_blocks=10**6, block_size=2**24), "num_blocks=1000000 blocks of .* this machine has"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_with_a_reason(settings, says):
    with pytest.raises(ValueError, match=says):
        InferenceEngine("tales", **settings)
