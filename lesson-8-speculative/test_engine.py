"""The checks of lesson 8's second file: sizes worked by hand, the parts of a runner, and answers of a model."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from common.grading import close, equal, exercise, holds, together

# --- Memory for two models --------------------------------------------------------------------------------------------

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
class TestSlotBytes:
    def check(
        self, code, kind: str, dtype: torch.dtype, grid: tuple[int, int], expected: int, draft: bool = True, **options
    ):
        from solutions.llama_pytorch import parse_config

        options |= dict(tensor_parallel=grid[0], pipeline_parallel=grid[1])
        config = code.EngineConfig(kv_cache_dtype=kind, dtype=dtype, **options)
        draft_config = parse_config(DRAFT) if draft else None
        got = code.slot_bytes(config, code.ModelConfig(**TARGET), draft_config)
        what = f"slot_bytes on a grid of {grid[0]} x {grid[1]} ranks, in {str(dtype).removeprefix('torch.')}"
        what += ", kv_cache_dtype int8" if kind == "int8" else ""
        what += ", quantization int8" if config.quantization else ""
        what += ", for a target of 4 layers x 4 heads x 8 and " + ("a draft of 3 x 1 x 6" if draft else "no draft")
        equal(got, expected, f"{what},")

    def test_one_rank(self, code):
        """Two tensors, keys and values, of 4 x 4 x 8 numbers; of the draft 3 x 1 x 6; four bytes each."""
        self.check(code, "auto", torch.float32, (1, 1), 1024, draft=False)
        self.check(code, "auto", torch.float32, (1, 1), 1024 + 144)

    def test_no_draft(self, code):
        self.check(code, "auto", torch.float32, (2, 1), 512, draft=False)

    def test_several_ranks(self, code):
        self.check(code, "auto", torch.float32, (2, 1), 512 + 144)
        self.check(code, "auto", torch.float32, (2, 2), 256 + 144)
        self.check(code, "auto", torch.float32, (1, 2), 512 + 144)

    def test_half_the_bytes(self, code):
        self.check(code, "auto", torch.float16, (1, 1), 512 + 72)
        self.check(code, "auto", torch.float64, (1, 1), 2048 + 288)

    def test_blocks_in_eight_bits(self, code):
        """Each of 2 x 4 x 4 heads has 8 bytes and a scale."""
        self.check(code, "int8", torch.float32, (1, 1), 32 * (8 + 4), draft=False)
        self.check(code, "int8", torch.float16, (1, 1), 32 * (8 + 2), draft=False)
        self.check(code, "int8", torch.float32, (1, 1), 32 * (8 + 4) + 144)
        self.check(code, "int8", torch.float32, (1, 2), 16 * (8 + 4) + 144)

    def test_quantized_weights(self, code):
        """They do not change keys and values."""
        self.check(code, "auto", torch.float32, (1, 1), 1024, draft=False, quantization="int8")

    def test_blocks_that_fit(self, code):
        """A block of `tales` is 81,920 bytes, and one of its draft, with an eighth of the layers, 10,240."""
        options = dict(dtype=torch.float32, device="cpu", kv_cache_memory=100 * (81_920 + 10_240))
        what = "where 100 blocks of the target (81,920 bytes) and of the draft (10,240) fit"
        try:
            config, _ = code.resolve(code.EngineConfig(model="tales", speculative="tales-draft", **options))
        except ValueError as error:
            holds(False, f"The options could not be resolved, {what}: {error}", actual=str(error))
        equal(config.num_blocks, 100, f"num_blocks {what}")


# --- The parts of a rank ----------------------------------------------------------------------------------------------


def tiny(code, rank: int = 0):
    """A model of two layers, as rank 0 or 1 of a tensor-parallel pair sees it: rank 0 samples."""
    config = code.ModelConfig(**{**SHAPE, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 4})
    model = code.Llama(config).double().requires_grad_(False)
    model.lm_head.group = SimpleNamespace(rank=rank, size=2)
    return model


@exercise("8.11", points=4, seconds=60)
class TestBuildRunner:
    def build(self, code, layers: range = range(2), rank: int = 0, **options):
        options = {"num_blocks": 7, "block_size": 4, "num_host_blocks": 5, "dtype": torch.float64, **options}
        config = code.EngineConfig(**{"device": "cpu", **options})
        runner = code.build_runner(config, tiny(code, rank), layers)
        holds(isinstance(runner, code.ModelRunner), f"build_runner returned {runner!r}, expected a ModelRunner.")
        return runner

    def kind(self, code, runner) -> str:
        return "SpeculativeRunner" if isinstance(runner, code.SpeculativeRunner) else "ModelRunner"

    def speculative(self, code, runner, kind: str = ""):
        """The runner's proposer, of this kind; the runner must be a SpeculativeRunner."""
        name = self.kind(code, runner)
        sentence = f"build_runner returned a {name}, expected a SpeculativeRunner: this rank proposes draft tokens."
        holds(name == "SpeculativeRunner", sentence, actual=name)
        got = type(runner.proposer).__name__
        holds(kind in ("", got), f"With a draft model the proposer is a {got}; expected a {kind}.", actual=got)
        return runner.proposer

    def blocks(self, cache) -> str:
        from solutions.quantization import Int8KVCache

        return "Int8KVCache" if isinstance(cache, Int8KVCache) else type(cache).__name__

    def test_nothing_is_proposed(self, code):
        runner = self.build(code)
        equal(self.kind(code, runner), "ModelRunner", "the class of the runner, where speculative=None,")
        equal(self.blocks(runner.cache), "PagedKVCache", "the class of the cache, with kv_cache_dtype auto,")
        what = "the shape (layers, blocks, slots, heads, head_dim) of the cache, with num_blocks=7 and block_size=4,"
        equal(tuple(runner.cache.keys.shape), (2, 7, 4, 2, 4), what)
        equal(runner.cache.host_keys.shape[1], 5, "the number of blocks on the host, with num_host_blocks=5")

    def test_blocks_in_eight_bits(self, code):
        for speculative in (None, "ngram"):
            got = self.blocks(self.build(code, speculative=speculative, kv_cache_dtype="int8").cache)
            what = f"the class of the cache, with kv_cache_dtype int8 and speculative={speculative!r},"
            equal(got, "Int8KVCache", what)

    def test_a_stage(self, code):
        for layers in (range(0, 1), range(1, 2)):
            got = self.build(code, layers).cache
            what = f"[layers of the cache, their number] on a stage with the layers {layers}"
            equal([got.layers, len(got.keys)], [layers, 1], what)

    def test_ngrams(self, code):
        runner = self.build(code, speculative="ngram", num_speculative_tokens=3)
        got = type(self.speculative(code, runner)).__name__
        equal(got, "NgramProposer", 'the class of the proposer, with speculative="ngram",')
        equal(tuple(runner.cache.keys.shape), (2, 7, 4, 2, 4), "the shape of the target's cache, with n-grams,")

    def test_as_many_as_are_asked_for(self, code):
        for number, is_adaptive in ((3, True), (8, False)):
            options = dict(num_speculative_tokens=number, adaptive_speculation=is_adaptive)
            runner = self.build(code, speculative="ngram", **options)
            self.speculative(code, runner)
            got = [runner.adaptive.num_speculative_tokens, runner.adaptive.is_adaptive]
            what = f"(num_speculative_tokens, is_adaptive) of the runner's `adaptive`, with {options},"
            equal(got, [number, is_adaptive], what)

    def test_eight_where_none_is_asked_for(self, code):
        runner = self.build(code, speculative="ngram")
        self.speculative(code, runner)
        got = runner.adaptive.num_speculative_tokens
        equal(got, 8, "num_speculative_tokens of the runner's `adaptive`, where the option is None,")

    def test_a_draft(self, code):
        for kind in ("auto", "int8"):
            runner = self.build(code, speculative=draft_folder().name, kv_cache_dtype=kind)
            proposer, where = self.speculative(code, runner, "DraftProposer"), f"with a draft and kv_cache_dtype {kind}"
            holds(
                proposer.cache is not runner.cache,
                f"Draft and target have the same cache, {where}; the draft needs its own.",
                actual="same",
            )
            equal(self.blocks(proposer.cache), "PagedKVCache", f"the class of the draft's cache, {where},")
            what = f"the shape (layers, blocks, slots, heads, head_dim) of the draft's cache, {where},"
            equal(tuple(proposer.cache.keys.shape), (3, 7, 4, 1, 6), what)
            got = proposer.cache.host_keys.shape[1]
            equal(got, 5, f"the number of the draft's blocks on the host, {where},")
            got = proposer.cache.keys.dtype
            equal(got, torch.float64, f"the dtype of the draft's cache, {where} and a target in float64,")
            expected = "Int8KVCache" if kind == "int8" else "PagedKVCache"
            equal(self.blocks(runner.cache), expected, f"the class of the target's cache, {where},")

    def test_the_draft_is_not_quantized(self, code):
        runner = self.build(code, speculative=draft_folder().name, quantization="int8")
        weight = self.speculative(code, runner, "DraftProposer").model.model.layers[0].mlp.up_proj.weight
        equal(weight.dtype, torch.float64, "the dtype of the draft's weights, with a target in int8,")
        what = "the class of the target's cache, where only the weights are quantized,"
        equal(self.blocks(runner.cache), "PagedKVCache", what)

    def test_the_draft_is_on_the_targets_device(self, code):
        """The meta device stands for a GPU: tensors there have shapes and no numbers."""
        runner = self.build(code, speculative=draft_folder().name, device="meta")
        weight = self.speculative(code, runner, "DraftProposer").model.model.norm.weight
        equal(weight.device.type, "meta", 'the device of the draft, with device="meta",')

    def test_the_draft_is_for_the_targets_texts(self, code):
        """Some rotary embeddings depend on the length of the longest text."""
        runner = self.build(code, speculative=draft_folder().name, max_model_len=20)
        got = self.speculative(code, runner, "DraftProposer").model.max_length
        sentence = f"With max_model_len=20, the draft's max_length is {got}; expected 20."
        holds(got == 20, sentence, actual=str(got))

    def test_the_draft_is_whole(self, code):
        runner = self.build(code, speculative=draft_folder().name, tensor_parallel=2)
        rows = len(self.speculative(code, runner, "DraftProposer").model.lm_head.weight)
        equal(rows, 30, "the number of rows in the draft's head, with a vocabulary of 30 and a target on two ranks,")

    def test_only_where_tokens_are_sampled(self, code):
        ranks = {
            "first stage": (range(0, 1), 0),
            "last stage, rank 0": (range(2), 0),
            "last stage, rank 1": (range(2), 1),
        }
        for speculative in ("ngram", draft_folder().name):
            got = {
                name: self.kind(code, self.build(code, layers, rank, speculative=speculative))
                for name, (layers, rank) in ranks.items()
            }
            expected = {**dict.fromkeys(ranks, "ModelRunner"), "last stage, rank 0": "SpeculativeRunner"}
            source = "n-grams" if speculative == "ngram" else "a draft model"
            for name in ranks:
                sentence = f"In the {name}, with {source}, the runner is a {got[name]}; expected a {expected[name]}."
                holds(got[name] == expected[name], sentence, actual=list(got.values()))

    def test_the_draft_is_loaded_only_where_it_proposes(self, code):
        nowhere = str(Path(draft_folder().name) / "not here")
        for name, layers, rank in (("first stage", range(0, 1), 0), ("last stage, rank 1", range(2), 1)):
            try:
                self.build(code, layers, rank, speculative=nowhere)
            except ValueError as error:
                sentence = f"In the {name} nothing is proposed, but build_runner loads the draft."
                holds(False, sentence, actual=type(error).__name__)

    def test_last_of_two_stages(self, code):
        runner = self.build(code, range(1, 2), speculative="ngram")
        self.speculative(code, runner)
        equal(runner.cache.layers, range(1, 2), "the layers of the last stage's cache, with n-grams,")


# --- A conversation ---------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
TALK = [
    {"role": "system", "content": "Tell a tale."},
    {"role": "user", "content": "Of an owl."},
    {"role": "assistant", "content": "It was old."},
    {"role": "user", "content": "What did it say?"},
]
WRITTEN = "<s>system: Tell a tale.\nuser: Of an owl.\nassistant: It was old.\nuser: What did it say?\nassistant:\n"


def storyteller(code, **settings):
    settings = {"dtype": torch.float64, "device": "cpu", "num_blocks": 24, **settings}
    return code.InferenceEngine("tales", **settings)


@exercise("8.12", points=1, seconds=60)
class TestChat:
    def asked(self, code, messages, params=None, template=TEMPLATE, **more):
        """The answer of an engine whose model has a template, and the engine."""
        with storyteller(code) as own:
            own.tokenizer.chat_template = template
            params, asked = params or code.SamplingParams(max_tokens=2), copy.deepcopy(messages)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                output = own.chat(asked, params, **more)
            equal(asked, messages, "the messages given to chat, which must not change them,")
            equal(printed.getvalue(), "", "what chat prints (it should show no progress bar)")
            holds(
                isinstance(output, code.RequestOutput),
                f"chat returned a {type(output).__name__}, expected a RequestOutput.",
                actual=type(output).__name__,
            )
            return output, own

    def test_one_beginning(self, code):
        output, _ = self.asked(code, TALK[1:2])
        what = "how often token 1, <s>, is in the prompt, where the template writes it once,"
        equal(list(output.prompt_token_ids).count(1), 1, what)

    def test_the_whole_conversation_as_one_text(self, code):
        output, own = self.asked(code, TALK)
        read = own.tokenizer.decode(list(output.prompt_token_ids), skip_special_tokens=False)
        equal(read, WRITTEN, "the prompt, decoded from its tokens,")
        expected = own.tokenizer.encode(WRITTEN, add_special_tokens=False)
        equal(list(output.prompt_token_ids), expected, f"prompt_token_ids of the prompt {WRITTEN!r}")

    def test_what_else_the_template_reads(self, code):
        template = TEMPLATE + "{{ mood }}"
        output, own = self.asked(code, TALK[1:2], template=template, chat_template_kwargs={"mood": "merry"})
        read = own.tokenizer.decode(list(output.prompt_token_ids), skip_special_tokens=False)
        equal(read.endswith("merry"), True, "whether the template's text ends with chat_template_kwargs['mood']")

    def test_the_answer(self, code):
        params = code.SamplingParams(max_tokens=5, temperature=0.8, seed=4, ignore_eos=True)
        output, own = self.asked(code, TALK[1:2], params)
        prompt = own.tokenizer.encode("<s>user: Of an owl.\nassistant:\n", add_special_tokens=False)
        expected = own.generate([prompt], params, progress=False)[0]
        what = "the tokens of the answer with temperature 0.8, seed 4 and max_tokens 5"
        equal(output.token_ids, expected.token_ids, what)
        equal(output.text, expected.text, "the text of the answer")

    def test_without_parameters(self, code):
        """Only the SamplingParams count here: the tokens are consecutive numbers, without a model."""
        from solutions.scheduler import ModelRunnerOutput

        with storyteller(code) as own:
            own.tokenizer.chat_template, asked = TEMPLATE, []

            def execute(plan, hidden=None):
                asked.append(dict(vars(plan.scheduled[0].params)))
                sampling = [each for each in plan.scheduled if each.sample_index is not None]
                sampled = {each.request_id: [300 + each.sample_index] for each in sampling}
                return ModelRunnerOutput(plan.step_id, sampled)

            own.executor.runner.execute = execute
            prompt = own.tokenizer.encode("<s>user: Of an owl.\nassistant:\n", add_special_tokens=False)
            expected = own.generate([prompt], progress=False)[0]
            with contextlib.redirect_stdout(io.StringIO()):
                output = own.chat(TALK[1:2])
            holds(isinstance(output, code.RequestOutput), "chat without parameters returned no RequestOutput.", "none")
            what = "an answer of chat without parameters, compared with `generate` without parameters"
            equal(len(output.token_ids), len(expected.token_ids), f"the number of tokens of {what},")
            equal(asked[-1], asked[0], f"the SamplingParams of {what},")


# --- Together ---------------------------------------------------------------------------------------------------------


@together(seconds=120)
class TestTogether:
    """Your whole file: the tokens are those without draft tokens, whatever proposes and whatever is quantized."""

    PROMPTS = ("The owl said", '"Is it you?" said Moss. "It is me," said Fern. "Is it you?" said Moss. "It is')

    def told(self, code, **settings) -> tuple[list[list[int]], int]:
        """The tokens of each answer, and how many draft tokens were made."""
        params = code.SamplingParams(max_tokens=12, ignore_eos=True)
        with storyteller(code, num_blocks=14, block_size=4, max_model_len=48, **settings) as own:
            outputs = own.generate(self.PROMPTS, params, progress=False)
            what = "the number of free blocks of 14 after all requests have finished"
            equal(own.manager.pool.num_free_blocks, 14, what)
            return [output.token_ids for output in outputs], own.metrics().num_draft_tokens

    def test_the_same_tokens(self, code):
        for settings in ({}, {"quantization": "int8", "kv_cache_dtype": "int8"}):
            expected, _ = self.told(code, **settings)
            for who in ("ngram", "tales-draft"):
                got, num_draft_tokens = self.told(code, speculative=who, adaptive_speculation=False, **settings)
                what = f"speculative={who!r}" + "".join(f", {name}={value!r}" for name, value in settings.items())
                equal(
                    got, expected, f"the tokens of two answers with {what}, compared with those without draft tokens,"
                )
                holds(num_draft_tokens > 0, f"No draft tokens were proposed with {what}.")
