"""The tokenizers, against the libraries' own and transformers', on text that people really type."""

from __future__ import annotations

import json
import os
import random
import unicodedata

import pytest
import sentencepiece
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from common.chat_templates import ChatTemplateError
from common.checkpoints import MODELS, CheckpointError, cached, find_checkpoint
from common.checkpoints.gguf_vocabulary import byte_level_tokenizer
from common.tokenizer import load_tokenizer
from solutions.llama_pytorch import TextStream

TEXTS = [
    "",
    "Hello, world! I'm here; you'RE not, they'll see.",
    "  leading,  inner   and trailing spaces   ",
    "\n\n\tdef f(x):\n\t\treturn x**2  # squared\r\n\r\n",
    "Zażółć gęślą jaźń. Ærøskøbing, naïve café, e\u0301 is not é.",
    "Привет, мир! Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم.",
    "नमस्ते दुनिया। สวัสดีชาวโลก 你好，世界。こんにちは世界。안녕하세요.",
    "1 12 123 1234567 3.14159 ½ ² ٣٤٥ 1,000,000",
    "👋🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ❤️",
    "a\u00a0b\u2003c\u200bd\ufeffe\u3000f",
    "\x01\x02\x1b[31m\x7f\u0085\u2028",
    '{"a": [1, 2, {"b": null}]} <div class=\'x\'>&amp;</div>',
    "$\\frac{1}{2}$ ~~~ --- === ... !!! ???",
    "<notspecial> <|not|> < s> [INST]",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff \ufffd",
]
SPECIAL_TEXTS = [
    "<|im_start|>user\nHi there<|im_end|>\n",
    "one<|im_end|><|im_end|> two <|im_start|>",
    "<think>some thought</think> done",
    "<|im_start|",
]
STORIES = [
    "Once upon a time there was a cat who liked to count: 1, 2, 3, 10, 100 and 2024.",
    "the then there other  mother\tand father.  They said: \"I'm here\"; they'll see.",
] * 10
CORPUS = [*TEXTS, *STORIES] * 2
SPECIAL = ["<|im_end|>", "<|im_start|>"]

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)],
    "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)],
    "smollm": [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)],
    "gpt-2": [pre_tokenizers.ByteLevel(False)],
}


def random_text(seed: int) -> str:
    """Characters from everywhere in Unicode but the surrogates, which are no characters."""
    source = random.Random(seed)
    points = [source.choice([source.randrange(1, 0x250), source.randrange(1, 0x110000)]) for _ in range(40)]
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


PLAIN_TEXTS = [*TEXTS, *map(random_text, range(20))]


def write_json(path, value) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


# Folders with small tokenizers of each kind


def make_sentencepiece(kind, folder):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(STORIES), model_prefix=str(folder / "tokenizer"), model_type=kind,
        vocab_size=400, hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, control_symbols=["<|im_start|>", "<|im_end|>"], minloglevel=2,
    )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", config | {"add_bos_token": True, "legacy": False})
    write_json(folder / "config.json", {"model_type": "llama", "eos_token_id": 2})
    return folder


def make_byte_level(rule, folder):
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=rule == "llama-bpe"))
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(BYTE_LEVEL[rule])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    if rule == "llama-bpe":
        bos = SPECIAL[1]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    tokenizer.enable_truncation(8)  # as some published files still have; it must not cut our text
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[1], "eos_token": SPECIAL[0]}
    write_json(folder / "tokenizer_config.json", config | {"clean_up_tokenization_spaces": False})
    write_json(folder / "config.json", {"model_type": "llama"})
    write_json(folder / "generation_config.json", {"eos_token_id": [0, 1]})
    return folder


def make_llama2_json(folder):
    """A tokenizer.json of the SentencePiece kind, laid out as Llama 2's own is."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=tokens, limit_alphabet=60, show_progress=False)
    tokenizer.train_from_iterator([word for text in CORPUS for word in text.split()], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = saved["added_tokens"][:3]
    write_json(folder / "tokenizer.json", saved)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(folder / "tokenizer_config.json", config | {"clean_up_tokenization_spaces": False})
    return folder


KINDS = ["bpe", "unigram", "llama2-json", *BYTE_LEVEL]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a small trained tokenizer of each kind."""
    made = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in made.items():
        if kind in BYTE_LEVEL:
            make_byte_level(kind, folder)
        elif kind == "llama2-json":
            make_llama2_json(folder)
        else:
            make_sentencepiece(kind, folder)
    return made


@pytest.fixture(params=KINDS)
def folder(request, folders):
    return folders[request.param]


@pytest.mark.parametrize("cut", range(1, 12))
def test_text_that_is_cut_within_a_character_is_decoded_as_it_was_streamed(folder, cut):
    """An x and two characters of four bytes, which byte fallback writes as a token for each byte."""
    tokenizer = load_tokenizer(folder)
    token_ids = tokenizer.encode("x\U0001f642\U0001f680", add_special_tokens=False)[:cut]
    stream = TextStream(tokenizer)
    streamed = "".join(map(stream.push, token_ids)) + stream.flush()
    assert tokenizer.decode(token_ids) == streamed.removeprefix(" ")


@pytest.fixture(params=["bpe", "unigram"])
def sentencepiece_folder(request, folders):
    return folders[request.param]


@pytest.fixture
def byte_level_folder(folders):
    return folders["smollm"]


def as_encoded(folder, text):
    """Qwen's tokenizers compose accents first; all others take the text as it is."""
    return unicodedata.normalize("NFC", text) if folder.name.startswith("qwen2") else text


# Equal to the libraries


def test_plain_text_gives_sentencepiece_s_own_ids(sentencepiece_folder):
    tokenizer = load_tokenizer(sentencepiece_folder)
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_folder / "tokenizer.model"))
    for text in PLAIN_TEXTS:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        assert token_ids == library.encode(text)
        assert tokenizer.encode(text) == [library.bos_id(), *token_ids]
        assert tokenizer.decode(token_ids) == library.decode(token_ids) == text


@pytest.mark.parametrize("kind", ["llama2-json", *BYTE_LEVEL])
def test_tokenizer_json_gives_the_tokenizers_library_s_own_ids(folders, kind):
    tokenizer = load_tokenizer(folders[kind])
    library = tokenizers.Tokenizer.from_file(str(folders[kind] / "tokenizer.json"))
    library.no_truncation()
    for text in [*PLAIN_TEXTS, *SPECIAL_TEXTS]:
        assert tokenizer.encode(text) == library.encode(text).ids
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        assert token_ids == library.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(token_ids, skip_special_tokens=False) == as_encoded(folders[kind], text)


# transformers' LlamaTokenizer reads every tokenizer.model as BPE, so the unigram one is compared above only.
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unigram"])
def test_equals_transformers(folders, kind):
    transformers = pytest.importorskip("transformers")
    ours, theirs = load_tokenizer(folders[kind]), transformers.AutoTokenizer.from_pretrained(folders[kind])
    theirs.backend_tokenizer.no_truncation()
    for text in [*PLAIN_TEXTS, *SPECIAL_TEXTS]:
        # In front of a text that begins with a space, SentencePiece still puts its own; transformers 5 does not.
        text = text.lstrip(" ")
        for special in (True, False):
            assert ours.encode(text, add_special_tokens=special) == theirs.encode(text, add_special_tokens=special)
        token_ids = ours.encode(text)
        for skip in (True, False):
            expected = theirs.decode(token_ids, skip_special_tokens=skip)
            assert ours.decode(token_ids, skip_special_tokens=skip) == expected
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.vocab_size == len(theirs)


# Bytes


def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(folder):
    tokenizer = load_tokenizer(folder)
    for text in PLAIN_TEXTS:
        token_ids = tokenizer.encode(text)
        joined = b"".join(map(tokenizer.token_bytes, token_ids)).decode("utf-8")
        space = " " if text and folder.name.startswith(("bpe", "unigram", "llama2")) else ""
        assert joined == space + as_encoded(folder, text)
        assert tokenizer.decode(token_ids) == as_encoded(folder, text)


def test_every_byte_has_a_token_and_special_tokens_have_no_bytes(folder):
    tokenizer = load_tokenizer(folder)
    held = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
    assert {bytes([byte]) for byte in range(256)} <= set(held)
    assert tokenizer.token_bytes(tokenizer.bos_token_id) == b""
    assert all(tokenizer.token_bytes(token_id) == b"" for token_id in tokenizer.eos_token_ids)
    # A model whose embedding was padded may name tokens that are none.
    assert tokenizer.token_bytes(tokenizer.vocab_size) == tokenizer.token_bytes(-1) == b""
    assert tokenizer.decode([tokenizer.vocab_size]) == ""


def test_added_tokens_that_are_not_special_are_text(byte_level_folder):
    tokenizer = load_tokenizer(byte_level_folder)
    token_ids = tokenizer.encode("<think>hm</think><|im_end|>")
    assert tokenizer.decode(token_ids) == "<think>hm</think>"
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == b"<think>hm</think>"


def test_half_a_character_decodes_to_a_replacement_character(folder):
    tokenizer = load_tokenizer(folder)
    held = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]
    euro = [held.index(bytes([byte])) for byte in "€".encode()]
    assert tokenizer.decode(euro) == "€"
    # How many U+FFFD the two bytes give is each library's own affair.
    letter = max(token_id for token_id, held_bytes in enumerate(held) if held_bytes == b"a")  # and not <0x61>
    assert set(tokenizer.decode([*euro[:2], letter])) == {"\ufffd", "a"}


def test_a_lone_surrogate_is_refused_with_its_place(folder):
    with pytest.raises(ValueError, match=r"lone surrogate, '\\ud83d', at character 3"):
        load_tokenizer(folder).encode("abc\ud83d def")


# Special tokens


def test_special_tokens_in_the_text_are_found_first(sentencepiece_folder):
    tokenizer = load_tokenizer(sentencepiece_folder)
    start, end = tokenizer.encode("<|im_start|><|im_end|>", add_special_tokens=False)
    assert {start, end} == {3, 4}
    token_ids = tokenizer.encode("<|im_start|>the<|im_end|> the")
    assert token_ids[:2] == [tokenizer.bos_token_id, start]
    assert tokenizer.decode(token_ids) == "the the"
    assert tokenizer.decode(token_ids, skip_special_tokens=False) == "<s><|im_start|>the<|im_end|> the"
    # Only the start of the whole text is given a space; after a special token the text is taken as it is.
    assert tokenizer.token_bytes(token_ids[2])[:1] != b" "


def copy_with(folder, target, **settings):
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    written = json.loads((target / "tokenizer_config.json").read_text())
    write_json(target / "tokenizer_config.json", written | settings)
    return target


def test_legacy_puts_a_space_after_each_special_token(sentencepiece_folder, tmp_path):
    tokenizer = load_tokenizer(copy_with(sentencepiece_folder, tmp_path, legacy=True))
    token_ids = tokenizer.encode("<|im_start|>the")
    assert b"".join(map(tokenizer.token_bytes, token_ids)) == b" the"


def test_bos_and_eos_are_added_as_the_settings_say(sentencepiece_folder, tmp_path):
    tokenizer = load_tokenizer(copy_with(sentencepiece_folder, tmp_path, add_bos_token=False, add_eos_token=True))
    assert tokenizer.encode("the") == [*tokenizer.encode("the", add_special_tokens=False), 2]


def test_added_tokens_of_the_settings_and_of_added_tokens_json(sentencepiece_folder, tmp_path):
    decoder = {
        "1000": {"content": "<tool>", "special": False},
        "1001": {"content": "<mask>", "special": True, "lstrip": True},
    }
    folder = copy_with(sentencepiece_folder, tmp_path, added_tokens_decoder=decoder, pad_token="<pad>")
    write_json(folder / "added_tokens.json", {"<pad>": 1002, "<loud>": 1003})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == 1004
    token_ids = tokenizer.encode("a<tool>b  <mask>c<pad><loud>")
    assert [token_id for token_id in token_ids if token_id >= 1000] == [1000, 1001, 1002, 1003]
    assert tokenizer.decode(token_ids) == "a<tool>bc<loud>"  # <mask> swallowed the spaces before it
    assert tokenizer.token_bytes(1000) == b"<tool>" and tokenizer.token_bytes(1001) == b""


def test_the_longest_added_token_is_found(sentencepiece_folder, tmp_path):
    decoder = {"1000": {"content": "<a>", "special": True}, "1001": {"content": "<a><b>", "special": True}}
    tokenizer = load_tokenizer(copy_with(sentencepiece_folder, tmp_path, added_tokens_decoder=decoder))
    assert tokenizer.encode("<a><b><a>", add_special_tokens=False) == [1001, 1000]


def test_eos_comes_from_generation_config_then_config_then_the_tokenizer(byte_level_folder, tmp_path):
    folder = copy_with(byte_level_folder, tmp_path)
    write_json(folder / "config.json", {"eos_token_id": 6})
    assert load_tokenizer(folder).eos_token_ids == {0, 1}
    write_json(folder / "generation_config.json", {"eos_token_id": 5})
    assert load_tokenizer(folder).eos_token_ids == {5}
    write_json(folder / "generation_config.json", {})
    write_json(folder / "config.json", {"eos_token_id": [7]})
    assert load_tokenizer(folder).eos_token_ids == {7}
    write_json(folder / "config.json", {})
    assert load_tokenizer(folder).eos_token_ids == {0}
    write_json(folder / "generation_config.json", {"eos_token_id": "</s>"})
    with pytest.raises(CheckpointError, match="generation_config.json.*eos_token_id"):
        load_tokenizer(folder)


# A vocabulary out of a GGUF file


def ids_of(tokens: list[str]) -> dict[str, int]:
    return {token: token_id for token_id, token in enumerate(tokens)}


@pytest.mark.parametrize("rule", sorted(BYTE_LEVEL))
def test_a_byte_level_vocabulary_is_rebuilt_from_its_tokens_and_merges(rule, tmp_path):
    folder = make_byte_level(rule, tmp_path)
    trained = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    trained.no_truncation()
    saved = json.loads(trained.to_str())
    tokens = [trained.id_to_token(token_id) for token_id in range(trained.get_vocab_size())]
    added = {token: token in SPECIAL for token in tokens if token in SPECIAL or "think>" in token}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in saved["model"]["merges"]]
    bos = SPECIAL[1] if rule == "llama-bpe" else None
    rebuilt = byte_level_tokenizer(tmp_path / "x.gguf", ids_of(tokens), added, merges, rule, bos)
    for text in [*PLAIN_TEXTS, *SPECIAL_TEXTS]:
        assert rebuilt.encode(text).ids == trained.encode(text).ids
        assert rebuilt.decode(rebuilt.encode(text).ids) == trained.decode(trained.encode(text).ids)


def test_the_splitting_rules_differ_where_they_should():
    def words(rule):
        tokenizer = byte_level_tokenizer("x.gguf", {"a": 0}, {}, [], rule, None)
        return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str("12345 I'M")]

    assert words("llama-bpe") == ["123", "45", "ĠI", "'M"]
    assert words("qwen2") == ["1", "2", "3", "4", "5", "ĠI", "'M"]
    assert words("smollm") == ["1", "2", "3", "4", "5", "ĠI", "'", "M"]
    assert words("gpt-2") == ["12345", "ĠI", "'", "M"]
    assert words("default") == ["123", "45", "ĠI", "'", "M"]
    # Llama 3 takes a word that is a token whole, even where no merges lead to it.
    ids = ids_of(["a", "b", "ab"])
    assert byte_level_tokenizer("x.gguf", ids, {}, [], "llama-bpe", None).encode("ab").ids == [2]
    assert byte_level_tokenizer("x.gguf", ids, {}, [], "qwen2", None).encode("ab").ids == [0, 1]
    with pytest.raises(CheckpointError, match="x.gguf.*'dbrx'.*llama-bpe"):
        byte_level_tokenizer("x.gguf", {"a": 0}, {}, [], "dbrx", None)


# Folders that are not right


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(tmp_path)


def test_broken_files_are_named(tmp_path, byte_level_folder):
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")  # as Llama 3's file of that name begins
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path)
    pieces = (MODELS / "tales" / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(pieces.replace(b"the", b"\xffhe", 1))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: not a SentencePiece model \('utf-8' codec"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not valid JSON"):
        load_tokenizer(tmp_path)
    saved = json.loads((byte_level_folder / "tokenizer.json").read_text(encoding="utf-8"))
    write_json(tmp_path / "tokenizer.json", saved | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: its decoder is WordPiece"):
        load_tokenizer(tmp_path)
    write_json(tmp_path / "tokenizer.json", saved)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not valid JSON"):
        load_tokenizer(tmp_path)


# Chat templates

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<b>Hi</b> 'there'"}]


def test_a_chat_is_written_as_the_template_says(byte_level_folder, tmp_path):
    tokenizer = load_tokenizer(copy_with(byte_level_folder, tmp_path, chat_template=CHATML))
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<b>Hi</b> 'there'<|im_end|>\n"
    assert tokenizer.apply_chat_template(CHAT, add_generation_prompt=False) == expected
    assert tokenizer.apply_chat_template(CHAT) == expected + "<|im_start|>assistant\n"


def test_the_template_may_be_a_file_or_one_of_several(byte_level_folder, tmp_path):
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ bos_token }}yes"}]
    folder = copy_with(byte_level_folder, tmp_path, chat_template=several)
    assert load_tokenizer(folder).apply_chat_template(CHAT) == "<|im_start|>yes"
    (folder / "chat_template.jinja").write_text("from the file, {{ messages | length }}", encoding="utf-8")
    assert load_tokenizer(folder).apply_chat_template(CHAT) == "from the file, 2"


def test_what_templates_use_is_what_transformers_gives_them(byte_level_folder, tmp_path):
    template = """{%- set ns = namespace(n=0) -%}
        {% for message in messages %}
        {% if loop.index0 > 5 %}{% break %}{% endif %}
            {% set ns.n = ns.n + 1 %}
        {{ message | tojson }}
        {{ message | tojson(indent=2) }}
        {% endfor %}
    {{ ns.n }} {{ strftime_now("%Y") | length }} {{ missing is defined }} {{ eos_token }}
    """
    folder = copy_with(byte_level_folder, tmp_path, chat_template=template)
    ours = load_tokenizer(folder).apply_chat_template(CHAT)
    assert '{"role": "user", "content": "<b>Hi</b> \'there\'"}' in ours and "2 4 False <|im_end|>" in ours
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert ours == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)


def test_a_base_model_has_no_template(byte_level_folder):
    with pytest.raises(ChatTemplateError, match="no chat template.*base model"):
        load_tokenizer(byte_level_folder).apply_chat_template(CHAT)


# The real one


@pytest.fixture(scope="module")
def smollm2():
    if cached("smollm2-135m") is None and os.environ.get("COURSE_REAL_MODEL") != "1":
        pytest.skip("smollm2-135m is not on this machine; `make run` or COURSE_REAL_MODEL=1 fetches it")
    return find_checkpoint("smollm2-135m")


def test_smollm2_s_tokens(smollm2):
    tokenizer = load_tokenizer(smollm2)
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (49152, 1, {2})
    assert tokenizer.encode("<|im_start|>user\n") == [1, 4093, 198]  # and no BOS is added
    for text in TEXTS:
        token_ids = tokenizer.encode(text)
        assert tokenizer.decode(token_ids) == b"".join(map(tokenizer.token_bytes, token_ids)).decode() == text


def test_smollm2_s_chat_has_a_system_turn_of_its_own(smollm2):
    written = load_tokenizer(smollm2).apply_chat_template([{"role": "user", "content": "Hi"}])
    assert written.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert written.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_smollm2_s_tokenizer_equals_transformers(smollm2):
    transformers = pytest.importorskip("transformers")
    ours, theirs = load_tokenizer(smollm2), transformers.AutoTokenizer.from_pretrained(smollm2)
    for text in [*PLAIN_TEXTS, *SPECIAL_TEXTS]:
        token_ids = theirs.encode(text)
        assert ours.encode(text) == token_ids
        assert ours.decode(token_ids, False) == theirs.decode(token_ids)
    theirs_written = theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert ours.apply_chat_template(CHAT) == theirs_written
