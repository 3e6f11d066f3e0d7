"""The checks of lesson 8's second file: sizes worked by hand, parts looked at, and the course's own model, asked."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from common.grading import close, equal, exercise, holds, together

# ---------------------------------------------------------------------------------------------------------------
# Memory for two models
# ---------------------------------------------------------------------------------------------------------------

SHAPE = dict(
    vocab_size=30, hidden_size=12, intermediate_size=20, num_attention_heads=4, max_position_embeddings=64,
    rms_norm_eps=1e-5, tie_word_embeddings=True,
)  # fmt: skip
DRAFT = dict(model_type="llama", num_hidden_layers=3, num_key_value_heads=1, head_dim=6, **SHAPE)
TARGET = dict(num_hidden_layers=4, num_key_value_heads=4, head_dim=8, **SHAPE)


@functools.cache
def draft_folder() -> tempfile.TemporaryDirectory:
    """A checkpoint: a random draft of three layers, with one head of six numbers for keys and values."""
    from solutions.llama_pytorch import Llama, parse_config

    folder, generator = tempfile.TemporaryDirectory(prefix="draft-"), torch.Generator().manual_seed(5)
    model = Llama(parse_config(DRAFT))
    tensors = {name: torch.randn(each.shape, generator=generator) for name, each in model.named_parameters()}
    save_file(tensors, Path(folder.name) / "model.safetensors")
    (Path(folder.name) / "config.json").write_text(json.dumps(DRAFT), encoding="utf-8")
    return folder


@exercise("8.10", points=2, seconds=60)
class TestCacheShare:
    def check(self, code, kind: str, dtype: torch.dtype, grid: tuple[int, int], expected: float, draft: bool = True):
        own = object.__new__(code.InferenceEngine)
        own.speculation = code.Speculation(draft_folder().name if draft else None)
        own.kv_cache_dtype = kind
        got = own.cache_share(code.ModelConfig(**TARGET), dtype, *grid)
        name = str(dtype).removeprefix("torch.")
        what = f"cache_share of a rank in a grid of {grid[0]} x {grid[1]}, in {name}"
        what += ", its own blocks in int8" if kind == "int8" else ""
        what += ": target 4 layers x 4 heads x 8, " + ("draft 3 x 1 x 6" if draft else "no draft")
        close(got, expected, f"{what}; it")

    def test_one_rank(self, code):
        self.check(code, "auto", torch.float32, (1, 1), 1 + 18 / 128)

    def test_no_draft(self, code):
        self.check(code, "auto", torch.float32, (2, 1), 1 / 2, draft=False)

    def test_several_ranks(self, code):
        self.check(code, "auto", torch.float32, (2, 1), 1 / 2 + 18 / 128)
        self.check(code, "auto", torch.float32, (2, 2), 1 / 4 + 18 / 128)

    def test_half_the_bytes(self, code):
        self.check(code, "auto", torch.float16, (1, 1), 1 + 18 / 128)

    def test_blocks_in_eight_bits(self, code):
        self.check(code, "int8", torch.float32, (1, 1), (8 + 4) / 32 + 18 / 128)
        self.check(code, "int8", torch.float32, (1, 2), (8 + 4) / 32 / 2 + 18 / 128)

    def test_blocks_that_fit(self, code):
        """A block of `tales` is 81,920 bytes, and one of its draft, with an eighth of the layers, 10,240."""
        settings = dict(dtype=torch.float32, device="cpu", kv_cache_memory=100 * (81_920 + 10_240))
        what = "where 100 blocks of the target (81,920 bytes) and of the draft (10,240) fit"
        try:
            own = code.InferenceEngine("tales", speculative="tales-draft", **settings)
        except ValueError as error:
            holds(False, f"No engine could be made, {what}: {error}", actual=str(error))
        with own:
            equal(own.config.num_blocks, 100, f"how many blocks there are, {what},")


# ---------------------------------------------------------------------------------------------------------------
# What stands behind which seam
# ---------------------------------------------------------------------------------------------------------------


def tiny(code, rank: int = 0):
    """A model of two layers, as this one of two ranks sees it: it samples on rank 0."""
    config = code.ModelConfig(**{**SHAPE, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 4})
    model = code.Llama(config).double().requires_grad_(False)
    model.lm_head.group = code.Group(rank, [0, 1])
    return model


@exercise("8.9", points=4, seconds=60)
class TestBuild:
    def build(self, code, speculation=None, kind: str = "auto", layers: range = range(2), rank: int = 0):
        config = code.EngineConfig(num_blocks=7, block_size=4, num_host_blocks=5)
        runner = code.InferenceEngine.build(config, kind, speculation, tiny(code, rank), layers)
        holds(isinstance(runner, code.ModelRunner), f"build returned {runner!r}, expected a runner.")
        return runner

    def kind(self, code, runner) -> str:
        return "SpeculativeRunner" if isinstance(runner, code.SpeculativeRunner) else "ModelRunner"

    def speculative(self, code, runner):
        """The runner's proposer; the runner must be one that draft tokens."""
        name = self.kind(code, runner)
        holds(
            name == "SpeculativeRunner", f"build made a {name}, where draft tokens are made on this rank.", actual=name
        )
        return runner.proposer

    def blocks(self, code, cache) -> str:
        return "Int8KVCache" if isinstance(cache, code.Int8KVCache) else type(cache).__name__

    def test_nobody_draft_tokens(self, code):
        runner = self.build(code)
        equal(self.kind(code, runner), "ModelRunner", "the runner, where nothing is proposed,")
        equal(self.blocks(code, runner.cache), "PagedKVCache", "the blocks, where none in eight bits are asked for,")
        what = "(layers, blocks, slots, heads, numbers) of the blocks: 2 layers, num_blocks=7, block_size=4"
        equal(tuple(runner.cache.keys.shape), (2, 7, 4, 2, 4), what)
        equal(runner.cache.host_keys.shape[1], 5, "how many blocks there are on the host, with num_host_blocks=5")

    def test_blocks_in_eight_bits(self, code):
        for speculation, what in ((None, "nothing is proposed"), (code.Speculation(), "n-grams draft token")):
            got = self.blocks(code, self.build(code, speculation, "int8").cache)
            equal(got, "Int8KVCache", f"the blocks, with kv_cache_dtype int8, where {what},")

    def test_a_stage(self, code):
        for layers in (range(0, 1), range(1, 2)):
            got = self.build(code, layers=layers).cache
            equal([got.layers, len(got.keys)], [layers, 1], f"the layers of a stage's blocks, and how many: {layers}")

    def test_ngrams(self, code):
        runner = self.build(code, code.Speculation(num_speculative_tokens=3))
        got = type(self.speculative(code, runner)).__name__
        equal(got, "NgramProposer", "what proposes, where no draft is named,")
        equal(
            tuple(runner.cache.keys.shape),
            (2, 7, 4, 2, 4),
            "the shape of the target's blocks, where n-grams draft token,",
        )

    def test_as_many_as_are_asked_for(self, code):
        for number, is_adaptive in ((3, True), (8, False)):
            runner = self.build(code, code.Speculation(None, number, is_adaptive))
            self.speculative(code, runner)
            got = [runner.adaptive.num_speculative_tokens, runner.adaptive.is_adaptive]
            what = f"the runner's `adaptive`, of Speculation(None, {number}, {is_adaptive}): [at most, is it adaptive]"
            equal(got, [number, is_adaptive], what)

    def test_a_draft(self, code):
        for kind in ("auto", "int8"):
            runner = self.build(code, code.Speculation(draft_folder().name), kind)
            proposer, where = self.speculative(code, runner), f"with a draft and kv_cache_dtype {kind}"
            equal(type(proposer).__name__, "DraftProposer", f"what proposes, {where},")
            holds(proposer.cache is not runner.cache, f"Both models write to the same blocks, {where}.", actual="same")
            equal(self.blocks(code, proposer.cache), "PagedKVCache", f"the draft's blocks, {where},")
            what = f"(layers, blocks, slots, heads, numbers) of the draft's blocks, {where}: 3 layers, 1 head of 6"
            equal(tuple(proposer.cache.keys.shape), (3, 7, 4, 1, 6), what)
            equal(
                proposer.cache.host_keys.shape[1], 5, f"how many of the draft's blocks there are on the host, {where},"
            )
            equal(
                proposer.cache.keys.dtype,
                torch.float64,
                f"the dtype of the draft's blocks, {where} and a target in float64,",
            )
            expected = "Int8KVCache" if kind == "int8" else "PagedKVCache"
            equal(self.blocks(code, runner.cache), expected, f"the target's blocks, {where},")

    def test_only_where_tokens_are_sampled(self, code):
        places = {
            "first stage": (range(0, 1), 0),
            "last stage, rank 0": (range(2), 0),
            "last stage, rank 1": (range(2), 1),
        }
        for who in ("n-grams", "a draft"):
            speculation = code.Speculation(draft_folder().name if who == "a draft" else None)
            got = {
                place: self.kind(code, self.build(code, speculation, layers=layers, rank=rank))
                for place, (layers, rank) in places.items()
            }
            expected = {**dict.fromkeys(places, "ModelRunner"), "last stage, rank 0": "SpeculativeRunner"}
            for place in places:
                sentence = (
                    f"In the {place}, the runner is a {got[place]}; expected a {expected[place]} (draft tokens: {who})."
                )
                holds(got[place] == expected[place], sentence, actual=list(got.values()))

    def test_the_draft_is_loaded_only_where_it_draft_tokens(self, code):
        nowhere = code.Speculation(str(Path(draft_folder().name) / "not here"))
        for place, layers, rank in (("first stage", range(0, 1), 0), ("last stage, rank 1", range(2), 1)):
            try:
                self.build(code, nowhere, layers=layers, rank=rank)
            except ValueError as error:
                sentence = f"In the {place}, nothing is proposed, and yet build loads the draft (which is not there)."
                holds(False, sentence, actual=type(error).__name__)

    def test_last_of_two_stages(self, code):
        runner = self.build(code, code.Speculation(), layers=range(1, 2))
        self.speculative(code, runner)
        equal(runner.cache.layers, range(1, 2), "the layers of the last stage's blocks, where n-grams draft token,")


# ---------------------------------------------------------------------------------------------------------------
# A conversation
# ---------------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TALK = [
    {"role": "system", "content": "Tell a tale."},
    {"role": "user", "content": "Of an owl."},
    {"role": "assistant", "content": "It was old."},
    {"role": "user", "content": "What did it say?"},
]
WRITTEN = "<s>system: Tell a tale.\nuser: Of an owl.\nassistant: It was old.\nuser: What did it say?\nassistant:"


def storyteller(code, **settings):
    settings = {"dtype": torch.float64, "device": "cpu", "num_blocks": 24, **settings}
    return code.InferenceEngine("tales", **settings)


@exercise("8.12", points=1, seconds=60)
class TestChat:
    def asked(self, code, messages, params=None):
        """The answer of an engine whose model has a template, what it was asked, and the engine."""
        with storyteller(code) as own:
            own.tokenizer.chat_template = TEMPLATE
            params, asked = params or code.SamplingParams(max_tokens=2), copy.deepcopy(messages)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                output = own.chat(asked, params)
            equal(asked, messages, "the messages that chat was given, afterwards,")
            equal(printed.getvalue(), "", "what chat prints, which shows no progress bar,")
            holds(
                isinstance(output, code.RequestOutput),
                f"chat returned a {type(output).__name__}, expected one RequestOutput.",
                actual=type(output).__name__,
            )
            return output, own

    def test_one_beginning(self, code):
        output, _ = self.asked(code, TALK[1:2])
        what = "how often token 1, <s>, stands in the prompt, where the template writes it once"
        equal(list(output.prompt_token_ids).count(1), 1, what)

    def test_the_whole_conversation_as_one_text(self, code):
        output, own = self.asked(code, TALK)
        read = own.tokenizer.decode(list(output.prompt_token_ids), skip_special_tokens=False)
        equal(read, WRITTEN, "the prompt, read back from its tokens,")
        expected = own.tokenizer.encode(WRITTEN, add_special_tokens=False)
        equal(list(output.prompt_token_ids), expected, f"the tokens of the prompt {WRITTEN!r}")

    def test_the_answer(self, code):
        params = code.SamplingParams(max_tokens=5, temperature=0.8, seed=4, ignore_eos=True)
        output, own = self.asked(code, TALK[1:2], params)
        prompt = own.tokenizer.encode("<s>user: Of an owl.\nassistant:", add_special_tokens=False)
        expected = own.generate([prompt], params, progress=False)[0]
        equal(output.token_ids, expected.token_ids, "the tokens of the answer: temperature 0.8, seed 4, max_tokens 5")
        equal(output.text, expected.text, "the text of the answer")


# ---------------------------------------------------------------------------------------------------------------
# Together
# ---------------------------------------------------------------------------------------------------------------


@together(seconds=120)
class TestTogether:
    """Your whole file: whatever proposes, and whatever is quantized, the tokens are those without draft tokens."""

    PROMPTS = ("The owl said", '"Is it you?" said Moss. "It is me," said Fern. "Is it you?" said Moss. "It is')

    def told(self, code, **settings) -> tuple[list[list[int]], int]:
        """The tokens of each answer, and how many draft tokens were made."""
        params = code.SamplingParams(max_tokens=12, ignore_eos=True)
        with storyteller(code, num_blocks=14, block_size=4, max_model_len=48, **settings) as own:
            outputs = own.generate(self.PROMPTS, params, progress=False)
            equal(own.manager.pool.num_free_blocks, 14, "how many of 14 blocks are free when all have finished")
            return [output.token_ids for output in outputs], own.metrics().num_draft_tokens

    def test_the_same_tokens(self, code):
        for settings in ({}, {"quantization": "int8", "kv_cache_dtype": "int8"}):
            expected, _ = self.told(code, **settings)
            for who in ("ngram", "tales-draft"):
                got, num_draft_tokens = self.told(code, speculative=who, adaptive_speculation=False, **settings)
                what = f"speculative={who!r}" + "".join(f", {name}={value!r}" for name, value in settings.items())
                equal(got, expected, f"the tokens of two answers, with {what}, against those without draft tokens,")
                holds(num_draft_tokens > 0, f"Nothing was proposed, with {what}.")
