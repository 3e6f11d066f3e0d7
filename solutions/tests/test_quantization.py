"""Lesson 7's reference: ranks, chunks, caches and kernels change no quantized token; files come back the same."""

from __future__ import annotations

import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import kernels
from common.authoring.soak.load import drive, options_of
from common.authoring.soak.oracle import Oracle
from common.authoring.soak.requests import MAX_MODEL_LEN, Letters, random_asks
from common.checkpoints import Checkpoint, CheckpointError, find_checkpoint
from common.config import EngineConfig
from common.tests.typed import typed
from solutions.batching import SamplingParams
from solutions.engine import InferenceEngine, load_model
from solutions.llama_pytorch import Linear, causal_attend, layers_of, load_weights, parse_config
from solutions.parallelism import Group, RankCoordinates, shard
from solutions.quantization import (
    Int4Method,
    Int8Method,
    Quantization,
    W8A8Method,
    int8_matmul,
    pack_int4,
    quantization_of,
    quantize,
    quantize_int8,
    save_quantized,
    set_method,
    unpack_int4,
    weight_bytes,
)
from solutions.tests.test_parallelism import STORIES, checkpoints, plain  # noqa: F401  (fixtures)

KINDS = [Quantization("int8"), Quantization("w8a8"), Quantization("int4", 8), Quantization("int4", 6, True)]
KINDS += [Quantization("w4a8", 8)]
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)


def engine(folder, quantization: Quantization | None = None, **settings) -> InferenceEngine:
    settings = {"dtype": torch.float64, "device": "cpu", "max_model_len": MAX_MODEL_LEN, "timeout": 10.0, **settings}
    return InferenceEngine(str(folder), **options_of(quantization), **settings)


def load(name, quantization: Quantization | None, dtype: torch.dtype):
    return load_model(EngineConfig(model=str(name), dtype=dtype, device="cpu", **options_of(quantization)))[0]


def tokens(folder, **settings) -> list[list[int]]:
    with engine(folder, **settings) as own:
        return [output.token_ids for output in own.generate(PROMPTS, PARAMS, progress=False)]


def test_a_nan_is_not_rounded_away():
    """Or a request's NaN would become a number in the cache, and its answer nonsense without an error."""
    numbers, scales = quantize_int8(torch.tensor([[1.0, torch.nan], [torch.inf, 2.0], [3.0, 4.0], [0.0, 0.0]]))
    assert (numbers * scales[:, None]).isnan().any(dim=1).tolist() == [True, True, False, False]
    assert scales[3] == 1


@pytest.mark.parametrize("kernel", ["plain", "fast"])
def test_nan_among_w8a8s_activations_ends_its_request(checkpoints, tmp_path, monkeypatch, kernel):  # noqa: F811
    monkeypatch.setenv("KERNELS", kernel)
    shutil.copytree(checkpoints["qwen2"], tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][39] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    with engine(tmp_path, Quantization("w8a8"), dtype=torch.float32) as own:
        broken, other = own.generate(
            [[39, 5, 6], [7, 8]], SamplingParams(max_tokens=3, ignore_eos=True), progress=False
        )
    assert "NaN" in broken.error and other.finish_reason == "length"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_shares_are_of_the_whole_matrix(checkpoints, kind):  # noqa: F811
    """What three ranks hold, laid side by side, is what one process holds: numbers and scales."""
    folder = checkpoints["qwen3"]
    whole = load(folder, kind, torch.float64)
    numbers = dict(whole.named_parameters())
    for rank in range(3):
        checkpoint = Checkpoint(folder)
        with torch.device("meta"):
            model = type(whole)(parse_config(checkpoint.config)).double()
        absmax = {name: each.abs().amax(1) for name, each in read_all(checkpoint).items() if each.ndim == 2}

        quantize(model, kind)
        shard(model, RankCoordinates(rank, 3, 1), Group(rank, range(3)))
        layers = {path: layer for path, layer in layers_of(model).items() if hasattr(layer, "method")}
        for path, layer in layers.items():
            if len(layer.columns) < layer.shape[1]:
                layer.group = knowing(absmax[f"{path}.weight"])
        load_weights(model, checkpoint)
        for path, layer in layers.items():
            for name, part in layer.method.parts(layer.rows, layer.columns).items():
                mine, theirs = getattr(layer, name), numbers.get(f"{path}.{name}")
                if path == "lm_head":
                    continue  # tied
                theirs = theirs[tuple(slice(axis.start, axis.stop) for axis in part)]
                mine = mine[tuple(slice(size) for size in theirs.shape)]
                assert torch.equal(mine, theirs), f"rank {rank}, {path}.{name}"


def knowing(absmax: torch.Tensor) -> Group:
    """A group that knows a layer's largest magnitudes over all ranks, so that no other process is needed."""

    class Knowing(Group):
        def all_reduce(self, x, op=None):
            return absmax.to(x)

    return Knowing()


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name).double() for name in checkpoint.names()}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KINDS[1], KINDS[3]], ids=str)
@pytest.mark.parametrize(("family", "grid"), [("qwen3", (2, 1)), ("qwen3", (1, 2)), ("qwen3_moe", (2, 1))])
def test_ranks_change_no_token(checkpoints, family, kind, grid):  # noqa: F811
    folder = checkpoints[family]
    alone = tokens(folder, quantization=kind, kv_cache_dtype="int8")
    assert (
        tokens(folder, quantization=kind, kv_cache_dtype="int8", tensor_parallel=grid[0], pipeline_parallel=grid[1])
        == alone
    )


@pytest.mark.parametrize(
    ("family", "kind"),
    [("llama", KINDS[0]), pytest.param("qwen3_moe", KINDS[2], marks=pytest.mark.slow)],
    ids=str,
)
def test_same_tokens_under_load(checkpoints, family, kind):  # noqa: F811
    """INT8 blocks and quantized weights: chunks, preemption, sharing change nothing. The oracle is the same model in
    an engine that computes one request at a time and a token a step."""
    folder, rng = checkpoints[family], random.Random(3)
    asks = [ask for ask in random_asks(rng, list(range(5, 40)), STORIES, 14) if ask.params.n == 1]
    needed = -(-max(len(ask.prompt) + ask.params.max_tokens for ask in asks) // 4)
    with engine(folder, quantization=kind, kv_cache_dtype="int8", max_num_batched_tokens=1) as slow:
        oracle = AloneInEngine(slow)
        settings = dict(num_blocks=needed + 3, block_size=4, max_num_batched_tokens=9, preemption="swap")
        with engine(folder, quantization=kind, kv_cache_dtype="int8", **settings) as own:
            report = drive(own, asks, oracle, rng)
    assert report.counts["preemptions"] and report.counts["swaps_in"] and report.counts["cached"]


class AloneInEngine(Oracle):
    """What a request's answer is when nobody else is there."""

    def __init__(self, own: InferenceEngine):
        super().__init__(own.executor.runner.model, Letters())
        self.engine = own

    def __call__(self, prompt, params, told=()):
        key = (tuple(prompt), params)
        if key not in self.answers:
            self.answers[key] = self.engine.generate([prompt], params, progress=False)[0]
        return self.answers[key]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_saved_and_loaded(checkpoints, kind, tmp_path):  # noqa: F811
    folder = checkpoints["qwen3_moe" if kind == KINDS[0] else "llama"]
    model = load(folder, kind, torch.float64)
    save_quantized(model, kind, folder, tmp_path / "saved")
    again = load(tmp_path / "saved", None, torch.float64)
    for (name, one), (other_name, other) in zip(model.named_parameters(), again.named_parameters()):
        assert name == other_name and one.dtype == other.dtype and torch.equal(one, other), name
    assert tokens(tmp_path / "saved") == tokens(folder, quantization=kind)
    assert tokens(tmp_path / "saved", quantization=kind) == tokens(folder, quantization=kind)


def test_a_quantized_checkpoint_is_not_quantized_again(checkpoints, tmp_path):  # noqa: F811
    model = load(checkpoints["llama"], KINDS[0], torch.float64)
    save_quantized(model, KINDS[0], checkpoints["llama"], tmp_path / "saved")
    with pytest.raises(ValueError, match="is quantized already"):
        engine(tmp_path / "saved", quantization=Quantization("int4"))
    with pytest.raises(CheckpointError, match="quantization_config"):
        parse_config(Checkpoint(tmp_path / "saved").config)
    config = (tmp_path / "saved" / "config.json").read_text().replace("inference-course", "awq")
    (tmp_path / "saved" / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="quantized by 'awq'"):
        engine(tmp_path / "saved")


@pytest.mark.parametrize(
    ("said", "says"),
    [
        ([], r"quantized by \[\]"),
        ("int8", "quantized by 'int8'"),
        (
            {"quant_method": "inference-course"},
            "quantization_config: quantization must be one of int8, w8a8, int4, w4a8; it is ''",
        ),
        ("inference-course", "quantized by 'inference-course'"),
    ],
)
def test_what_does_not_say_how_it_is_quantized_is_refused(said, says):
    with pytest.raises(CheckpointError, match=f"config.json: {says}"):
        quantization_of(SimpleNamespace(folder="made", config={"quantization_config": said}))


def test_a_weight_of_the_wrong_shape_is_refused(checkpoints, tmp_path):  # noqa: F811
    folder = checkpoints["qwen3"]
    tensors = {name: tensor.float() for name, tensor in read_all(Checkpoint(folder)).items()}
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**tensors, name: tensors[name][:, 1:].contiguous()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for kind in KINDS:
        with pytest.raises(CheckpointError, match="down_proj.weight has shape"):
            load(tmp_path, kind, torch.float64)


def test_offload_streams_and_says_what_it_needs(checkpoints):  # noqa: F811
    folder = checkpoints["qwen2"]
    expected = tokens(folder, quantization=Quantization("int8"))
    model = load(folder, Quantization("int8"), torch.float64)
    whole = weight_bytes(model)
    with pytest.raises(ValueError, match="needs (\\d+) at least") as refused:
        engine(folder, quantization=Quantization("int8"), offload=1)
    least = int(str(refused.value).partition("needs ")[2].split()[0])
    for limit in (least, (least + whole) // 2, whole):
        with engine(folder, quantization=Quantization("int8"), offload=limit) as own:
            assert [each.token_ids for each in own.generate(PROMPTS, PARAMS, progress=False)] == expected
            held = weight_bytes(own.executor.runner.model)
            assert held <= limit and (held == whole) == (limit == whole)
    assert tokens(folder, quantization=Quantization("int8"), offload=least, pipeline_parallel=1) == expected


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (("fp4",), "quantization must be one of int8, w8a8, int4, w4a8; it is 'fp4'"),
        (("int4", 7), "group_size must be an even number"),
        (("int4", 8, "no"), "symmetric must be True or False"),
    ],
)
def test_a_quantization_that_does_not_exist(fields, says):
    with pytest.raises(ValueError, match=says):
        Quantization(*fields)


def test_int8_blocks_take_less(checkpoints):  # noqa: F811
    """The same memory holds more blocks: D numbers of a byte and a scale, where there were D numbers."""
    sizes = {}
    for kind in ("auto", "int8"):
        with engine(checkpoints["qwen2"], kv_cache_dtype=kind, kv_cache_memory=10**6, max_num_seqs=10**4) as own:
            sizes[kind] = own.config.num_blocks
    assert sizes["int8"] / sizes["auto"] == pytest.approx(4 * 8 / (4 + 8), rel=0.02)


def test_every_pair_of_nibbles():
    pairs = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    assert torch.equal(unpack_int4(pack_int4(pairs)), pairs)
    every = torch.arange(256).to(torch.uint8).view(16, 16)
    assert torch.equal(pack_int4(unpack_int4(every)), every)


def test_int8_products_are_exact():
    a = torch.full((3, 5000), 127, dtype=torch.int8)
    b = torch.where(torch.arange(5000) % 2 == 0, 127, 126).to(torch.int8).expand(2, 5000)
    assert torch.equal(int8_matmul(a, b).long(), a.long() @ b.long().T)


@pytest.mark.skipif(kernels.compiled() is None, reason="no C++ compiler here: there are no compiled kernels")
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 40])
@pytest.mark.parametrize(("outputs", "columns"), [(70, 160), (33, 30), (1100, 64)])
@pytest.mark.parametrize(
    "method",
    [Int8Method(), W8A8Method(), *(Int4Method(*each) for each in ((6, True), (32, False), (128, True), (128, False)))],
    ids=lambda method: f"{type(method).__name__}{vars(method)}",
)
def test_compiled_products(method, rows, outputs, columns):
    """Against the plain ones, for few rows and many, short groups, and sizes that fill no panel."""
    generator = torch.Generator().manual_seed(rows)
    with torch.device("meta"):
        layer = Linear(columns, outputs)
    set_method(layer, method)
    weight, x = (torch.randn(size, columns, generator=generator) for size in (outputs, rows))
    layer.load(lambda name, *part: weight)
    expected = layer(x)
    layer.method.process_weights_after_loading(layer)
    assert kernels.has_kernel(layer)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("is_packed", [False, True])
def test_int4_of_ranks_whose_columns_begin_with_an_odd_number(is_packed):
    """Their parts add up to the whole; only saved pairs cannot be cut, and that is said."""
    ranges = range(13), range(5), range(5, 7), range(7, 13)
    whole, *parts = layers = [Linear(len(columns), 6) for columns in ranges]
    for layer, columns in zip(layers, ranges):
        layer.shape, layer.columns = whole.shape, columns
        set_method(layer, Int4Method(4, False))
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 13, generator=generator) for rows in (6, 3))
    for layer in layers:
        layer.load(lambda name, rows, columns: weight[rows.start : rows.stop, columns.start : columns.stop])
        if is_packed:
            layer.method.process_weights_after_loading(layer)
    total = sum(layer(x[:, layer.columns.start : layer.columns.stop]) for layer in parts)
    torch.testing.assert_close(total, whole(x))
    with pytest.raises(ValueError, match="this rank's columns begin with number 5"):
        Int4Method(4, False, is_saved=True).parts(range(6), range(5, 7))


@pytest.mark.parametrize("kind", [KINDS[0], Quantization("int4", 32)], ids=str)
def test_kernels_leave_other_dtypes_alone(kind, monkeypatch):
    """They compute in float32; a model in float64 keeps its plain layers."""
    monkeypatch.setenv("KERNELS", "fast")
    model = load("tales", kind, torch.float64)
    assert not any(kernels.has_kernel(layer) for layer in layers_of(model).values() if hasattr(layer, "method"))
    with torch.inference_mode():
        assert model.logits(model(torch.arange(5, 9), torch.arange(4), causal_attend)).dtype == torch.float64


@pytest.mark.parametrize("kind", [KINDS[0], Quantization("int4", 32)], ids=str)
def test_packed_quantized_model(kind, monkeypatch):
    """With kernels a model says what it says without, up to rounding; and it takes no more memory."""
    monkeypatch.setenv("KERNELS", "fast")
    packed = load("tales", kind, torch.float32)
    monkeypatch.setenv("KERNELS", "plain")
    model = load("tales", kind, torch.float32)
    ids, positions = torch.arange(5, 45), torch.arange(40)
    assert weight_bytes(model) <= weight_bytes(packed) < 1.05 * weight_bytes(model)  # a last group is filled up
    with torch.inference_mode():
        one, other = (each.logits(each(ids, positions, causal_attend)) for each in (packed, model))
    # Some processors' kernels round the activations of INT8 to sixteen bits.
    torch.testing.assert_close(one, other, rtol=1e-3, atol=5e-3 if kind.kind == "int8" else 1e-3)
    if kernels.compiled() is not None:
        products = [module for module in packed.modules() if hasattr(module, "method")]
        assert all(kernels.has_kernel(module) for module in products if module is not packed.model.embed_tokens)


@pytest.mark.parametrize("options", [["--kind", "int8"], ["--kind", "int4", "--symmetric", "--activation-aware"]])
def test_the_command(options, tmp_path, monkeypatch, capsys):
    """A checkpoint in, a smaller one out, which the engine loads as it is; and nothing is overwritten."""
    monkeypatch.setenv("COURSE_MODULES", "")
    monkeypatch.setattr(
        "common.bench.quality.text_of_python", lambda: "There was once a small owl who lived by the river."
    )
    folder = tmp_path / "smaller"
    assert typed("quantize", "--model", "tales", "--out", str(folder), *options) == 0
    size = (folder / "model.safetensors").stat().st_size
    assert size < 0.6 * sum(file.stat().st_size for file in find_checkpoint("tales").glob("*.safetensors"))
    monkeypatch.undo()
    with InferenceEngine(str(folder), dtype=torch.float64, device="cpu") as own:
        assert len(own.generate(["One day"], PARAMS, progress=False)[0].text) > 10
    assert typed("quantize", "--model", "tales", "--out", str(folder), *options) == 2
    assert typed("quantize", "--model", str(folder), "--out", str(tmp_path / "again")) == 2
    assert "not empty" in (said := capsys.readouterr().err) and "is quantized already" in said
