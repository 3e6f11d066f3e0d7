"""The engine with windows and scaled rotary embeddings: the tokens of lesson 2's loop, whatever is batched or freed.

The model is the first layers of `tales` with a window or a scaling, which no one trained: what counts is that all ways
to compute it agree.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.authoring.soak.invariants import check_books
from common.checkpoints import MODELS
from solutions import kv_cache, paged_attention
from solutions.engine import InferenceEngine
from solutions.llama_pytorch import SamplingParams, generate, load

PROMPTS = [
    "Once upon a time there was a small brown mouse who lived in a big old house near the sea.",
    "Once upon a time there was a small brown mouse who lived in a big old tree and liked to sing all day long.",
    "One day, Lily found a key.",
]
PARAMS = SamplingParams(max_tokens=24, ignore_eos=True)
WINDOWS = {
    "mistral": {"model_type": "mistral", "sliding_window": 12},
    "qwen2, some layers": {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe", "use_sliding_window": True, "sliding_window": 12, "num_experts": 6,
        "num_experts_per_tok": 2, "moe_intermediate_size": 96, "norm_topk_prob": True, "mlp_only_layers": [1],
    },
}  # fmt: skip


NUM_LAYERS = 2


def changed_tales(folder: Path, **changes) -> Path:
    """Write the first layers of `tales` into a folder, with these changes of its config."""
    shutil.copytree(MODELS / "tales", folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": NUM_LAYERS, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        if (layer := re.search(r"layers\.(\d+)\.", name)) and int(layer[1]) >= NUM_LAYERS:
            del tensors[name]
    rewrite = {"qwen2": add_biases, "qwen3_moe": make_experts}.get(config["model_type"])
    if rewrite:
        rewrite(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module", params=WINDOWS)
def folder(request, tmp_path_factory) -> Path:
    """A model with windows."""
    return changed_tales(tmp_path_factory.mktemp("windows") / "model", **WINDOWS[request.param])


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The same layers without."""
    return changed_tales(tmp_path_factory.mktemp("whole") / "model")


def add_biases(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            tensors[name.replace("weight", "bias")] = torch.zeros(len(tensors[name]))


def make_experts(tensors: dict[str, torch.Tensor]) -> None:
    """Each MLP but that of layer 1 becomes six experts, each with some of its channels, which overlap."""
    generator = torch.Generator().manual_seed(0)
    for name, whole in list(tensors.items()):
        layer = name.split(".mlp.")[0]
        if name.endswith("q_proj.weight"):
            for norm in ("q_norm", "k_norm"):
                tensors[name.replace("q_proj", norm)] = torch.ones(40)
        if ".mlp." in name and ".layers.1." not in name:
            del tensors[name]
            tensors[f"{layer}.mlp.gate.weight"] = torch.randn(6, 160, generator=generator)
            for expert in range(6):
                channels = torch.arange(67 * expert, 67 * expert + 96)
                part = whole[:, channels] if "down" in name else whole[channels]
                tensors[name.replace(".mlp.", f".mlp.experts.{expert}.")] = part.contiguous()


@pytest.fixture(scope="module")
def expected(folder) -> list[list[int]]:
    model, tokenizer = load(str(folder), dtype=torch.float64, device="cpu")
    return [generate(model, tokenizer, tokenizer.encode(prompt), PARAMS).token_ids for prompt in PROMPTS]


def test_the_window_matters_and_is_transformers(folder, expected, whole):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = load(str(whole), dtype=torch.float64, device="cpu")
    without = [generate(model, tokenizer, tokenizer.encode(prompt), PARAMS).token_ids for prompt in PROMPTS]
    assert any(one != other for one, other in zip(without, expected)), "the window changes nothing: test something else"
    plain = {"experts_implementation": "eager"}  # the default's product of groups refuses float64
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **plain)
    for prompt, token_ids in zip(PROMPTS, expected):
        prompt_token_ids = torch.tensor([tokenizer.encode(prompt)])
        found = theirs.generate(prompt_token_ids, do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0)
        assert found[0, prompt_token_ids.shape[1] :].tolist() == token_ids


def test_one_sequence_with_a_cache(folder, expected):
    model, tokenizer = load(str(folder), dtype=torch.float64, device="cpu")
    cache = paged_attention.PagedKVCache(model, 32, 4)
    window = 12 if None not in model.config.layer_windows else None
    manager = paged_attention.KVCacheManager(32, 4, sliding_window=window)
    for prompt, token_ids in zip(PROMPTS, expected):
        prompt_token_ids = tokenizer.encode(prompt)
        assert kv_cache.generate(model, tokenizer, prompt_token_ids, PARAMS).token_ids == token_ids
        output = paged_attention.generate(model, tokenizer, prompt_token_ids, PARAMS, cache, manager)
        assert output.token_ids == token_ids
        assert manager.pool.num_free_blocks == 32


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(block_size=4, max_num_batched_tokens=16, num_blocks=40),
        dict(block_size=4, num_blocks=18, max_num_batched_tokens=24),
        dict(block_size=4, num_blocks=18, preemption="swap"),
        dict(block_size=4, enable_prefix_caching=False, speculative="ngram"),
        dict(block_size=4, speculative="tales-draft"),
        dict(kv_cache_policy="contiguous"),
    ],
    ids=str,
)
def test_the_engine_gives_the_same_tokens(folder, expected, options):
    with InferenceEngine(str(folder), dtype="float64", max_model_len=96, **options) as engine:
        for _ in range(2):  # the second time, beginnings are found
            outputs = engine.generate(PROMPTS, PARAMS, progress=False)
            assert [output.token_ids for output in outputs] == expected
            check_books(engine)


def test_blocks_are_freed_as_they_leave_the_window(folder, expected):
    with InferenceEngine(str(folder), dtype="float64", max_model_len=96, block_size=4) as engine:
        is_mistral = engine.config.sliding_window == 12
        engine.add_request(PROMPTS[0], PARAMS)
        held = []
        while engine.scheduler.requests:
            engine.step()
            check_books(engine)
            held.append(len(engine.manager.pool.blocks) - engine.manager.pool.num_free_blocks)
        num_tokens = len(engine.tokenizer.encode(PROMPTS[0])) + 24
        assert (held[-2] <= 12 // 4 + 2) if is_mistral else (held[-2] >= num_tokens // 4)


def test_a_prefix_is_found_by_its_end(folder, expected):
    """As in vLLM: with a window in every layer, a hit needs the last blocks of the prefix, and not its beginning."""
    options = dict(dtype="float64", max_model_len=96, block_size=4, num_blocks=40)
    with InferenceEngine(str(folder), **options) as engine:
        engine.generate(PROMPTS[:1], PARAMS, progress=False)
        prompt = engine.tokenizer.encode(PROMPTS[0])
        hashes = [paged_attention.hash_block(None, prompt[:4])]
        for start in range(4, len(prompt) - 4, 4):
            hashes.append(paged_attention.hash_block(hashes[-1], prompt[start : start + 4]))
        has_windows = engine.config.sliding_window == 12
        for evicted, num_hit in ((0, len(hashes) if has_windows else 0), (len(hashes) - 1, len(hashes) - 1)):
            block = engine.manager.pool.find(hashes[evicted])
            engine.manager.pool.forget(block)
            before = engine.metrics().num_cached_tokens
            [output] = engine.generate(PROMPTS[:1], PARAMS, progress=False)
            assert output.token_ids == expected[0]
            assert engine.metrics().num_cached_tokens - before == 4 * num_hit
            check_books(engine)
            assert engine.manager.pool.num_free_blocks == 40


def test_samples_and_a_long_prompt(folder):
    """Siblings share what their parent's window has not passed, or compute the prompt themselves."""
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=3, n=3, ignore_eos=True)
    with InferenceEngine(str(folder), dtype="float64", max_model_len=160, block_size=4, max_num_seqs=2) as engine:
        together = engine.generate([" ".join(PROMPTS[:2])], params, progress=False)[0]
        check_books(engine)
    model, tokenizer = load(str(folder), dtype=torch.float64, device="cpu")
    prompt = tokenizer.encode(" ".join(PROMPTS[:2]))
    alone = [generate(model, tokenizer, prompt, child).token_ids for child in params.children()]
    assert [sample.token_ids for sample in [together, *together.siblings]] == alone


@pytest.mark.slow
def test_ranks_and_eight_bits(folder, expected):
    options = dict(dtype="float64", max_model_len=96, block_size=4)
    with InferenceEngine(str(folder), tensor_parallel=2, pipeline_parallel=2, **options) as engine:
        assert [output.token_ids for output in engine.generate(PROMPTS, PARAMS, progress=False)] == expected
    with InferenceEngine(str(folder), kv_cache_dtype="int8", **options) as engine:
        first = [output.token_ids for output in engine.generate(PROMPTS, PARAMS, progress=False)]
        assert [output.token_ids for output in engine.generate(PROMPTS[::-1], PARAMS, progress=False)] == first[::-1]


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope"])
def test_scaled_rotary_embeddings(kind, tmp_path):
    """In the engine, as in vLLM, the frequencies are those of the longest text that it accepts."""
    scaling = {"rope_type": kind, "factor": 2.0}
    if kind in ("yarn", "longrope"):
        scaling["original_max_position_embeddings"] = 32
    if kind == "longrope":
        scaling |= {"short_factor": [1.0] * 20, "long_factor": [1 + i / 8 for i in range(20)]}  # of pairs of channels
    changes = {"max_position_embeddings": 32} if kind == "dynamic" else {}
    folder = changed_tales(tmp_path / "model", rope_scaling=scaling, **changes)
    model, tokenizer = load(str(folder), dtype=torch.float64, device="cpu")
    for max_model_len in (64, 32):  # beyond the original context of 32 tokens, and within it
        model.max_length = max_model_len
        params = SamplingParams(max_tokens=min(24, max_model_len - 24), ignore_eos=True)
        prompts = [tokenizer.encode(prompt)[:20] for prompt in PROMPTS]
        expected = [generate(model, tokenizer, prompt, params).token_ids for prompt in prompts]
        options = dict(dtype="float64", max_model_len=max_model_len, block_size=4, max_num_batched_tokens=16)
        with InferenceEngine(str(folder), **options) as engine:
            outputs = engine.generate(prompts, params, progress=False)
            assert [output.token_ids for output in outputs] == expected
        if kind == "longrope" and max_model_len == 32:
            model.max_length = None
            for prompt, token_ids in zip(prompts, expected):  # within it, lesson 2's loop finds the same by itself
                assert generate(model, tokenizer, prompt, params).token_ids == token_ids
