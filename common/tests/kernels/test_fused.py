"""A decoder layer as one compiled operator computes what the lesson's modules compute over the same block tables."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from common import kernels
from common.kernels import huge_pages
from common.kernels.products import use
from solutions.engine import InferenceEngine
from solutions.llama_pytorch import Linear, Llama, SamplingParams, layers_of, load, use_kernels
from solutions.llm_basics import ModelConfig
from solutions.paged_attention import AttentionMetadata, PagedKVCache, cdiv, slot_mapping
from solutions.parallelism import ColumnParallelLinear, Group, RankCoordinates, RowParallelLinear, shard
from solutions.quantization import (
    Int8KVCache,
    Quantization,
    W4A8Method,
    W8A8Method,
    quantize,
    quantize_int8,
    quantized_copy,
)

pytestmark = pytest.mark.skipif(kernels.compiled() is None, reason="no C++ compiler here: no layer is fused")

SHAPES = dict(
    vocab_size=50, hidden_size=50, intermediate_size=70, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=2, head_dim=16,
)  # fmt: skip
MODELS = {
    "no size that a vector divides": {},
    "heads of 64, one for keys": dict(head_dim=64, num_key_value_heads=1),
    "heads of 10": dict(head_dim=10),
    "heads of 80, as many for keys": dict(head_dim=80, num_attention_heads=2, hidden_size=33),
    "heads of 128, all biases": dict(head_dim=128, qkv_bias=True, o_bias=True, mlp_bias=True, num_attention_heads=2),
    "QK norm and rotations of Llama 3": dict(
        qk_norm=True,
        rope_scaling=dict(
            rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "a window in one layer": dict(layer_windows=(None, 5), tie_word_embeddings=True),
}  # fmt: skip
KINDS = {
    "float32": None,
    "int8": Quantization("int8"),
    "w8a8": Quantization("w8a8"),
    "int4": Quantization("int4", 32),
    "int4, symmetric": Quantization("int4", 6, symmetric=True),
    "w4a8": Quantization("w4a8", 32),
    "w4a8, symmetric": Quantization("w4a8", 6, symmetric=True),
}

HAS_BFLOATS = kernels.compiled() is not None and torch.ops.inference_course.has_bfloats()
HAS_QUADS = kernels.compiled() is not None and torch.ops.inference_course.has_quads()
ROUNDED = ({"bfloat16": 5e-3} if HAS_BFLOATS else {}) | ({"int8": 5e-4} if HAS_QUADS else {})
"""How much a model's outputs may differ where this processor rounds the inputs of products, by kind."""


def build(monkeypatch, kind: str = "float32", dtype: torch.dtype = torch.float32, **shapes) -> tuple[Llama, Llama]:
    """A model in float32 whose every number is random, and the same in this dtype, with kernels."""
    torch.manual_seed(0)
    model = Llama(ModelConfig(**{**SHAPES, **shapes})).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3 if parameter.dim() > 1 else 1.0)
    model = model.to(dtype)
    if KINDS[kind] is not None:
        model = quantized_copy(model, KINDS[kind])
    packed = copy.deepcopy(model)
    packed.tie_weights(), model.float()
    monkeypatch.setenv("KERNELS", "fast")
    use_kernels(packed)
    return model, packed


class Requests:
    """Some sequences in a cache's blocks, whose ids are shuffled. Slots that hold no token hold NaN."""

    def __init__(self, model: Llama, block_size: int, lengths: list[int], make: type = PagedKVCache):
        self.model, self.block_size, self.lengths = model, block_size, lengths
        torch.manual_seed(1)
        ids = torch.randperm(sum(cdiv(length, block_size) for length in lengths)).tolist()
        self.tables = [[ids.pop() for _ in range(cdiv(length, block_size))] for length in lengths]
        self.token_ids = [torch.randint(50, (length,)) for length in lengths]
        self.cache = make(model, sum(map(len, self.tables)), block_size)
        if self.cache.keys.is_floating_point():
            self.cache.keys.fill_(torch.nan), self.cache.values.fill_(torch.nan)

    def compute(self, starts: list[int], ends: list[int], run: Callable | None = None) -> torch.Tensor:
        """Compute the tokens from each start to each end, in one batch. Returns their hidden states."""
        new = [end - start for start, end in zip(starts, ends)]
        slots = [s for each in zip(self.tables, starts, new) for s in slot_mapping(*each, self.block_size)]
        query_start = torch.tensor([0, *new]).cumsum(0).tolist()
        metadata = AttentionMetadata(query_start, ends, torch.tensor(slots), self.tables)
        ids = torch.cat([own[start:end] for own, start, end in zip(self.token_ids, starts, ends)])
        positions = torch.cat([torch.arange(start, end) for start, end in zip(starts, ends)])
        with torch.inference_mode():
            return (run or self.model)(ids, positions, kernels.paged(self.cache, metadata))

    def run_layers(self, *batch: list[int]) -> torch.Tensor:
        """As `compute`, from hidden states that are made up, since a rank has only a part of the embedding table."""

        def run(ids: torch.Tensor, positions: torch.Tensor, attend: kernels.PagedAttend) -> torch.Tensor:
            hidden = torch.sin(ids[:, None] + torch.arange(SHAPES["hidden_size"]))
            return self.model.run_layers(hidden, positions, attend, self.cache.layers)

        return self.compute(*batch, run)


def both(monkeypatch, models, batches, *given) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What each of two models computes for these batches: the first with plain kernels."""
    found = []
    for model, choice in zip(models, ("plain", "fast")):
        monkeypatch.setenv("KERNELS", choice)
        requests = Requests(model, *given)
        found.append([requests.compute(*batch) for batch in batches])
    return list(zip(*found))


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


BATCHES = [([0, 0, 0], [1, 19, 40]), ([1, 19, 40], [2, 20, 41]), ([2, 20, 41], [9, 37, 42])]
"""Prompts of three lengths; a decoding step; a chunk and draft tokens beside a decoding request."""


@pytest.mark.parametrize("block_size", [1, 7, 16])
@pytest.mark.parametrize("name", MODELS)
def test_layers(name, block_size, monkeypatch):
    models = build(monkeypatch, **MODELS[name])
    layer = models[1].model.layers[0]
    assert layer.native_attention is not None and layer.native_mlp is not None
    for expected, actual in both(monkeypatch, models, BATCHES, block_size, [9, 37, 42]):
        assert error(actual, expected) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_layers(kind, monkeypatch):
    models = build(monkeypatch, kind)
    layer = models[1].model.layers[0]
    assert layer.native_mlp is not None
    # In eight bits a last digit can move an activation to the next whole number: what is exact is the product (below).
    limit = 2e-2 if "a8" in kind else ROUNDED.get(kind, 1e-5)
    for expected, actual in both(monkeypatch, models, BATCHES, 7, [9, 37, 42]):
        assert error(actual, expected) < limit


@pytest.mark.parametrize("kind", KINDS)
def test_weights_lie_together_and_kernels_follow_them(kind, monkeypatch):
    _, model = build(monkeypatch, kind)
    layer, x = model.model.layers[0].mlp.down_proj, torch.randn(3, SHAPES["intermediate_size"])
    before, old = layer(x), [parameter.data for parameter in model.parameters()]  # `old` keeps their memory
    if sys.platform == "linux":
        assert len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()}) == 1
    huge_pages.move(model)
    assert torch.equal(layer(x), before)
    for parameter in layer.parameters():
        parameter.fill_(128 if kind in ("int8", "w8a8") and parameter.dtype == torch.uint8 else 0)  # what stands for 0
    assert not layer(x).any() and any(tensor.any() for tensor in old)
    monkeypatch.delattr("mmap.MADV_HUGEPAGE", raising=False)  # another system
    address = layer.weight.data_ptr()
    huge_pages.move(model)
    assert layer.weight.data_ptr() == address


class RoundingCache(PagedKVCache):
    """Keys and values are rounded to bfloat16 when they are written."""

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        super().write(layer, slots, k.bfloat16().float(), v.bfloat16().float())


def rounding_product(layer: Linear, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return F.linear(x.bfloat16().float(), layer.weight, bias)


@pytest.mark.parametrize("rows", [1, 5, 13, 90])
@pytest.mark.parametrize(("outputs", "columns"), [(5, 7), (48, 64), (33, 1001)])
def test_products_of_bfloats(rows, outputs, columns, monkeypatch):
    torch.manual_seed(rows)
    layer, x = Linear(columns, outputs).bfloat16(), torch.randn(rows, columns)
    layer.weight = torch.nn.Parameter(torch.randn(outputs, columns).bfloat16(), requires_grad=False)
    layer.bias = torch.nn.Parameter(torch.randn(outputs), requires_grad=False)
    expected = F.linear(x.bfloat16().float() if HAS_BFLOATS else x, layer.weight.float(), layer.bias)
    kernels.pack_floats(layer)
    assert kernels.native(layer) is not None
    with torch.inference_mode():
        assert error(layer(x), expected) < 1e-6


def compute_with(monkeypatch, model: Llama, choice: str, make: Callable, block_size: int) -> tuple:
    """The cache and the hidden states of all batches, kernels being plain or fast."""
    monkeypatch.setenv("KERNELS", choice)
    requests = Requests(model, block_size, [9, 37, 42], make)
    return requests.cache, torch.cat([requests.compute(*batch) for batch in BATCHES])


@pytest.mark.parametrize("block_size", [1, 7, 16])
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(name, block_size, monkeypatch):
    """Where the processor multiplies no bfloat16, weights in bfloat16 give the very digits of float32. Elsewhere the
    inputs of each product are rounded as well. Keys and values may be rounded or not.
    """
    rounded, packed = build(monkeypatch, dtype=torch.bfloat16, **MODELS[name])
    wide = copy.deepcopy(rounded)
    wide.tie_weights(), use_kernels(wide)
    assert packed.model.layers[0].native_mlp is not None and packed.lm_head.weight.dtype == torch.bfloat16
    cache, hidden = compute_with(monkeypatch, packed, "fast", PagedKVCache, block_size)
    if HAS_BFLOATS:
        for layer in rounded.modules():
            if isinstance(layer, Linear):
                use(layer, apply=rounding_product)
        assert error(hidden, compute_with(monkeypatch, rounded, "plain", PagedKVCache, block_size)[1]) < 3e-3
    else:
        expected_cache, expected = compute_with(monkeypatch, wide, "fast", PagedKVCache, block_size)
        assert torch.equal(hidden, expected) and torch.equal(cache.keys.nan_to_num(), expected_cache.keys.nan_to_num())
        assert torch.equal(packed.logits(hidden), wide.logits(hidden))
    halves, hidden = compute_with(monkeypatch, packed, "fast", partial(PagedKVCache, dtype=torch.bfloat16), block_size)
    assert halves.keys.dtype == torch.bfloat16
    assert torch.equal(halves.keys[0].nan_to_num(), cache.keys[0].bfloat16().nan_to_num())  # the first layer's
    # What differs in its last digit may be rounded to the next bfloat16.
    assert error(hidden, compute_with(monkeypatch, rounded, "plain", RoundingCache, block_size)[1]) < 3e-3


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_bfloat16_beside_fewer_bits(kind, monkeypatch):
    """What is no number of few bits is in bfloat16, and the cache of others takes and gives it."""
    rounded, packed = build(monkeypatch, kind, torch.bfloat16, qkv_bias=True, qk_norm=True, tie_word_embeddings=True)
    for make in (partial(PagedKVCache, dtype=torch.bfloat16), partial(Int8KVCache, dtype=torch.bfloat16)):
        _, hidden = compute_with(monkeypatch, packed, "fast", make, 7)
        plain = RoundingCache if make.func is PagedKVCache else Int8KVCache
        assert hidden.dtype == torch.float32
        assert error(hidden, compute_with(monkeypatch, rounded, "plain", plain, 7)[1]) < 3e-2


@pytest.mark.parametrize("rows", [1, 2, 5, 13])
@pytest.mark.parametrize(
    ("outputs", "columns", "group_size"), [(5, 10, 32), (48, 64, 32), (33, 1002, 128), (16, 70, 6)]
)
def test_products_of_four_bits_by_eight(rows, outputs, columns, group_size, monkeypatch):
    """Sums of whole numbers are exact, whatever the numbers are: only scaling them rounds."""
    torch.manual_seed(rows)
    layer, method = Linear(columns, outputs), W4A8Method(group_size, symmetric=False)
    layer.method = method
    for name, tensor in method.quantized(layer, lambda *part: torch.randn(outputs, columns)).items():
        setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
    layer.weight[0], layer.weight[-1] = 255, 0  # the numbers 15 and 0
    x = torch.randn(rows, columns)
    x[0], x[-1] = 3.0, -2.0  # 127 and -127 throughout
    with torch.inference_mode():
        expected = layer(x)
        kernels.pack_w4a8(layer, group_size)
        assert kernels.has_kernel(layer)
        assert error(layer(x), expected) < 2e-6


@pytest.mark.parametrize("rows", [1, 3, 6, 13, 90])
@pytest.mark.parametrize(("outputs", "columns"), [(5, 7), (48, 64), (33, 1001)])
def test_products_of_eight_bits_by_sixteen(rows, outputs, columns, monkeypatch):
    """Numbers of sixteen bits are not rounded: only the sums are, as floats."""
    torch.manual_seed(rows)
    layer = Linear(columns, outputs)
    numbers, scale = quantize_int8(torch.randn(outputs, columns))
    numbers[0], numbers[-1] = 127, -127
    layer.weight, layer.weight_scale = (torch.nn.Parameter(each, requires_grad=False) for each in (numbers, scale))
    x = torch.randint(-32512, 32513, (rows, columns)).float()
    x[:, 0], x[-1, 1:] = 32512, -32512
    expected = F.linear(x.double(), numbers.double()).mul(scale).float() / 1024
    kernels.pack_int8(layer)
    assert kernels.has_kernel(layer)
    with torch.inference_mode():
        assert error(layer(x / 1024), expected) < 2e-6


@pytest.mark.parametrize("rows", [1, 5, 6, 13, 90])
@pytest.mark.parametrize(("outputs", "columns"), [(5, 7), (48, 64), (33, 1001)])
def test_products_of_whole_numbers_are_exact(rows, outputs, columns, monkeypatch):
    torch.manual_seed(rows)
    layer, method = Linear(columns, outputs), W8A8Method()
    numbers, scale = quantize_int8(torch.randn(outputs, columns))
    numbers[0], numbers[-1] = 127, -127  # the sums that saturate where pairs are added in sixteen bits
    layer.weight = torch.nn.Parameter(numbers, requires_grad=False)
    layer.weight_scale = torch.nn.Parameter(scale, requires_grad=False)
    layer.method = method
    x = torch.randn(rows, columns)
    x[0], x[-1] = 3.0, 0.0
    with torch.inference_mode():
        expected = layer(x)
        kernels.pack_w8a8(layer)
        assert kernels.has_kernel(layer)
        assert torch.equal(layer(x), expected)


class Louder:
    """The other ranks of a group, whose shares of every token are twice as large."""

    def all_reduce(self, x: torch.Tensor, op: object) -> torch.Tensor:
        assert op == torch.distributed.ReduceOp.MAX
        return 2 * x


@pytest.mark.parametrize("method", [W8A8Method(), W4A8Method(32, symmetric=False)], ids=["w8a8", "w4a8"])
def test_a_part_of_a_token_has_the_scale_of_the_whole(method, monkeypatch):
    torch.manual_seed(0)
    layer, numbers = Linear(96, 20), torch.randn(20, 192)
    layer.method, layer.shape, layer.columns, layer.group = method, (20, 192), range(96, 192), Louder()
    for name, tensor in method.quantized(layer, lambda rows, columns: numbers[:, columns.start : columns.stop]).items():
        setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
    x = torch.randn(7, 96)
    with torch.inference_mode():
        expected = layer.method.apply(layer, x)
        method.process_weights_after_loading(layer)
        assert kernels.has_kernel(layer) and kernels.native(layer) is None  # nothing fuses it
        assert error(layer.method.apply(layer, x), expected) < 2e-6


def test_a_long_context(monkeypatch):
    """Of which all but the last tokens are in the cache already, as numbers of any kind."""
    models = build(monkeypatch, num_hidden_layers=1)
    found = []
    for model, choice in zip(models, ("plain", "fast")):
        monkeypatch.setenv("KERNELS", choice)
        requests = Requests(model, 16, [5000, 1])
        requests.cache.keys.normal_(), requests.cache.values.normal_()
        found.append(requests.compute([4990, 0], [5000, 1]))
    assert error(found[1], found[0]) < 1e-5


def test_a_cache_of_others(monkeypatch):
    """Keys and values in eight bits are written and read outside."""
    models = build(monkeypatch)
    for expected, actual in both(monkeypatch, models, BATCHES, 7, [9, 37, 42], Int8KVCache):
        assert error(actual, expected) < 1e-2


class TwoThreads(Group):
    """Two ranks of a group as threads of this process."""

    def __init__(self, rank: int, parts: list, barrier: threading.Barrier):
        super().__init__(rank, (0, 1))
        self.parts, self.barrier = parts, barrier

    def all_reduce(self, x: torch.Tensor, op: object = None) -> torch.Tensor:
        self.parts[self.rank] = x.clone()
        self.barrier.wait()
        total = torch.maximum(*self.parts) if op == torch.distributed.ReduceOp.MAX else self.parts[0] + self.parts[1]
        self.barrier.wait()
        return x.copy_(total)


@pytest.mark.parametrize("kind", ["float32", "int8", "int4, symmetric", "bfloat16"])
def test_ranks(kind, monkeypatch):
    """Each rank's share of a layer is two operators, too, and what they add up is the whole layer's output."""
    torch.manual_seed(0)
    shapes = {**SHAPES, "qkv_bias": True, "o_bias": True, "mlp_bias": True, "intermediate_size": 72}
    whole = Llama(ModelConfig(**shapes)).requires_grad_(False)
    for parameter in whole.parameters():
        parameter.normal_(std=0.3)
    whole, dtype = whole.bfloat16().float(), torch.bfloat16 if kind == "bfloat16" else torch.float32
    expected = whole if KINDS.get(kind) is None else quantized_copy(whole, KINDS[kind])
    parts, barrier, found, lock = [None, None], threading.Barrier(2), {}, threading.Lock()

    def rank(number: int) -> None:
        with torch.device("meta"):
            model = Llama(whole.config).to(dtype)
        if KINDS.get(kind) is not None:
            quantize(model, KINDS[kind])
        shard(model, RankCoordinates(number, 2, 1), TwoThreads(number, parts, barrier))
        for path, layer in layers_of(model.model.layers).items():
            tensors = dict(whole.model.layers.get_submodule(path).named_parameters())
            layer.load(lambda name, *part, own=tensors: own[name][tuple(slice(p.start, p.stop) for p in part) or ...])
        model.model.norm.load(lambda name: torch.ones(SHAPES["hidden_size"]))
        use_kernels(model, column=ColumnParallelLinear, row=RowParallelLinear)
        with lock:  # random numbers are made from one state
            requests = Requests(model, 7, [9, 37, 42])
        found[number] = model, [requests.run_layers(*batch) for batch in BATCHES]

    monkeypatch.setenv("KERNELS", "fast")
    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    monkeypatch.setenv("KERNELS", "plain")
    for model, hidden in found.values():
        layer = model.model.layers[1]
        assert layer.native_attention is not None and layer.native_mlp is not None
        requests = Requests(expected, 7, [9, 37, 42])
        for batch, actual in zip(BATCHES, hidden):
            assert error(actual, requests.run_layers(*batch)) < ROUNDED.get(kind, 1e-5)
    assert len(found) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_dtype": "int8"},
        {"speculative": "tales-draft"},
        {"quantization": "w4a8", "group_size": 32},
        pytest.param({"tensor_parallel": 2, "pipeline_parallel": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_engine_in_bfloat16(options, monkeypatch):
    """A cell of each axis beside it. Its weights are in memory once, in half the bytes of float32."""
    monkeypatch.setenv("KERNELS", "fast")
    found = []
    for more in ({}, options):
        with InferenceEngine("tales", dtype="bfloat16", device="cpu", timeout=60.0, **more) as engine:
            outputs = engine.generate(["One day", "The robot said"], SamplingParams(max_tokens=12), progress=False)
            found.append([output.token_ids for output in outputs])
            if not more:
                model = engine.executor.runner.model
                assert engine.executor.runner.cache.keys.dtype == torch.bfloat16
                floats = sum(tensor.numel() for tensor in load("tales", torch.float32, "cpu")[0].parameters())
                assert kernels.held_bytes(model) < 1.1 * 2 * floats
    if "quantization" not in options:
        assert found[0] == found[1]


def test_nan_stays_with_its_request(monkeypatch):
    _, packed = build(monkeypatch)
    packed.model.embed_tokens.weight[0] = torch.nan  # of token 0
    requests = Requests(packed, 4, [6, 6])
    requests.token_ids = [torch.zeros(6, dtype=torch.long), torch.arange(1, 7)]
    hidden = requests.compute([0, 0], [6, 6])
    assert hidden[:6].isnan().all() and not hidden[6:].isnan().any()


@pytest.mark.slow
@pytest.mark.parametrize("march", ["x86-64-v2", "x86-64-v3"])
def test_fewer_instructions(march, monkeypatch):
    """The same tests on kernels that are compiled for an older processor."""
    if sys.platform != "linux" or os.uname().machine != "x86_64" or "KERNELS_MARCH" in os.environ:
        pytest.skip("the names are those of x86-64")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "layers or exact or nan or bits",
    ]
    result = subprocess.run(command, env={**os.environ, "KERNELS_MARCH": march}, capture_output=True, text=True)
    assert result.returncode == 0 and "skipped" not in result.stdout, result.stdout[-2000:]
