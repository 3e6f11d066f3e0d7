"""What the files beside a tokenizer say: added and special tokens as transformers reads them, or a refusal by name."""

from __future__ import annotations

import json
import shutil

import pytest

from common.checkpoints import CheckpointError
from common.tests.test_tokenizer import (
    PLAIN_TEXTS,
    SPECIAL_TEXTS,
    make_byte_level,
    make_llama2_json,
    make_sentencepiece,
    write_json,
)
from common.tokenizer import load_tokenizer

TEXTS = ["a<tool>b <eot> c<x> d", "<|im_start|>user\nHi<|im_end|><tool><eot>", "<extra>  <mask>  y<x><y>"]


def decoder(*tokens: dict) -> dict:
    """added_tokens_decoder, with ids from N on, the first that is free; see `copy`."""
    return {"added_tokens_decoder": {f"N{i}": token for i, token in enumerate(tokens)}}


TOOL, EOT = {"content": "<tool>", "special": False}, {"content": "<eot>", "special": True}
MASK = {"content": "<mask>", "special": True, "lstrip": True, "rstrip": True}
TABLE = {
    "in the decoder": ({"tokenizer_config.json": decoder(TOOL, EOT, MASK)}, ["<tool>", "<eot>", "<mask>"]),
    "special because it ends": (
        {"tokenizer_config.json": {"eos_token": "<eot>", **decoder(TOOL, {**EOT, "special": False})}},
        ["<tool>", "<eot>"],
    ),
    "in added_tokens.json": ({"added_tokens.json": {"<tool>": "N0", "<eot>": "N1"}}, ["<tool>", "<eot>"]),
    "in added_tokens.json, and it ends": (
        {"added_tokens.json": {"<tool>": "N0", "<eot>": "N1"}, "tokenizer_config.json": {"eos_token": "<eot>"}},
        ["<tool>", "<eot>"],
    ),
    "only named": ({"tokenizer_config.json": {"eos_token": "<eot>"}}, ["<eot>"]),
    "only named, as an object": ({"tokenizer_config.json": {"eos_token": {"__type": "AddedToken", **EOT}}}, ["<eot>"]),
    "by another role": ({"tokenizer_config.json": {"extra_special_tokens": {"thing_token": "<tool>"}}}, ["<tool>"]),
    "extra": ({"tokenizer_config.json": {"extra_special_tokens": ["<tool>", "<eot>"]}}, ["<tool>", "<eot>"]),
    "in special_tokens_map.json": (
        {"tokenizer_config.json": {"eos_token": None}, "special_tokens_map.json": {"eos_token": EOT}}, ["<eot>"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {kind: tmp_path_factory.mktemp(kind) for kind in ("qwen2", "bpe", "llama2-json")}
    make_byte_level("qwen2", made["qwen2"])
    make_sentencepiece("bpe", made["bpe"])
    make_llama2_json(made["llama2-json"])
    for folder in made.values():  # so that only the tokenizer's own files say what ends a text
        (folder / "generation_config.json").unlink(missing_ok=True)
        write_json(folder / "config.json", {"model_type": "llama"})
    return made


def copy(folder, target, files: dict[str, dict]):
    """A copy of the folder with changes to its files; N0 stands for the first id that is free, N1 for the second."""
    if folder != target:
        shutil.copytree(folder, target, dirs_exist_ok=True)
    free = load_tokenizer(folder).vocab_size
    for file, changes in files.items():
        old = json.loads((target / file).read_text()) if (target / file).exists() else {}
        text = json.dumps({key: value for key, value in {**old, **changes}.items() if value is not None})
        for i in range(3):
            text = text.replace(f'"N{i}":', f'"{free + i}":').replace(f'"N{i}"', str(free + i))
        (target / file).write_text(text)
    return target


@pytest.mark.parametrize("kind", ["qwen2", "bpe", "llama2-json"])
@pytest.mark.parametrize("name", TABLE)
def test_tokens_that_only_a_side_file_names(folders, kind, name, tmp_path):
    files, tokens = TABLE[name]
    tokenizer = load_tokenizer(copy(folders[kind], tmp_path, files))
    for token in tokens:
        assert tokenizer.vocab_size - 4 < tokenizer.encode(token, add_special_tokens=False)[-1] < tokenizer.vocab_size
    if "eos_token" in str(files):
        assert tokenizer.eos_token_ids == {tokenizer.encode("<eot>", add_special_tokens=False)[-1]}
    if (kind, name) == ("bpe", "extra"):
        pytest.skip("transformers 5.23 then takes this model's own control tokens for plain text")
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.backend_tokenizer.no_truncation()
    for text in TEXTS:
        token_ids = theirs.encode(text)
        assert tokenizer.encode(text) == token_ids
        assert tokenizer.decode(token_ids) == theirs.decode(token_ids, skip_special_tokens=True)
    assert tokenizer.side_files.special_tokens() == theirs.special_tokens_map
    assert tokenizer.vocab_size == len(theirs)
    assert theirs.eos_token_id in tokenizer.eos_token_ids


@pytest.mark.parametrize("kind", ["qwen2", "bpe"])
def test_a_named_token_gets_an_id_only_where_the_embedding_has_a_row_for_it(folders, kind, tmp_path):
    size = load_tokenizer(folders[kind]).vocab_size
    changes = {"tokenizer_config.json": {"pad_token": "<pad>", "extra_special_tokens": ["<x>"]}}
    folder = copy(folders[kind], tmp_path, {**changes, "config.json": {"vocab_size": size + 1}})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.encode("<pad>", add_special_tokens=False) == [size]
    assert len(tokenizer.encode("<x>", add_special_tokens=False)) > 1
    copy(folder, folder, {"tokenizer_config.json": {"eos_token": "<eot>"}, "config.json": {"vocab_size": size}})
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: eos_token is '<eot>'; .*no text would end"):
        load_tokenizer(folder)


@pytest.mark.parametrize(("name", "model_type"), [("Qwen2Tokenizer", "qwen2"), ("GPT2Tokenizer", "llama")])
def test_vocab_json_and_merges_txt(folders, name, model_type, tmp_path):
    saved = json.loads((folders["qwen2"] / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = {token: token_id for token, token_id in saved["model"]["vocab"].items() if "think>" not in token}
    write_json(tmp_path / "vocab.json", {**vocabulary, "<|endoftext|>": len(vocabulary)})
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in saved["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": name})
    write_json(tmp_path / "config.json", {"model_type": model_type})
    tokenizer = load_tokenizer(copy(tmp_path, tmp_path, {"tokenizer_config.json": decoder(TOOL, EOT)}))
    end = tokenizer.encode("<|endoftext|>")
    assert len(end) == 1 and tokenizer.eos_token_ids == set(end)
    assert [len(tokenizer.encode(token)) for token in ("<tool>", "<eot>")] == [1, 1]
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in [*PLAIN_TEXTS, *SPECIAL_TEXTS, *TEXTS]:
        assert tokenizer.encode(text) == theirs.encode(text)
    assert tokenizer.side_files.special_tokens() == theirs.special_tokens_map
    assert tokenizer.vocab_size == len(theirs)
    copy(
        tmp_path, tmp_path, {"tokenizer_config.json": {"tokenizer_class": "X"}, "config.json": {"model_type": "llama"}}
    )
    with pytest.raises(CheckpointError, match=r"tokenizer_class is 'X'; .*Qwen2Tokenizer"):
        load_tokenizer(tmp_path)


CONFIG = "tokenizer_config.json"


@pytest.mark.parametrize("kind", ["qwen2", "bpe"])
@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        (CONFIG, {"bos_token": 5}, "bos_token is 5; a token is text"),
        (CONFIG, {"bos_token": ["<s>"]}, r"bos_token is \['<s>'\]; a token is text"),
        (CONFIG, {"eos_token": {"text": "</s>"}}, "eos_token: content is None .missing.; it has to be given"),
        (CONFIG, {"eos_token": {"content": 5}}, "eos_token: content is 5"),
        (CONFIG, {"eos_token": {"content": ""}}, "eos_token: content is ''"),
        (CONFIG, {"eos_token": {"content": "a", "lstrip": "no"}}, "eos_token: lstrip is 'no'"),
        (CONFIG, {"eos_token": "\ud83d"}, "half of a character"),
        (CONFIG, {"add_bos_token": "yes"}, "add_bos_token is 'yes'"),
        (CONFIG, {"legacy": 3}, "legacy is 3"),
        (CONFIG, {"tokenizer_class": 3}, "tokenizer_class is 3"),
        (CONFIG, {"chat_template": 3}, "chat_template is 3; a template is text"),
        (CONFIG, {"additional_special_tokens": "<x>"}, "additional_special_tokens is '<x>'"),
        (CONFIG, {"additional_special_tokens": [5]}, r"additional_special_tokens\[0\] is 5"),
        (CONFIG, {"added_tokens_decoder": [5]}, r"added_tokens_decoder is \[5\]"),
        (CONFIG, {"added_tokens_decoder": {"x": TOOL}}, "added_tokens_decoder.x is .* are token ids"),
        (CONFIG, {"added_tokens_decoder": {"-1": TOOL}}, "added_tokens_decoder.-1 is .* are token ids"),
        (CONFIG, {"added_tokens_decoder": {"99999999": TOOL}}, "added_tokens_decoder.99999999 is .* are token ids"),
        (CONFIG, {"added_tokens_decoder": {"5": 5}}, "added_tokens_decoder.5 is 5; a token is text"),
        (CONFIG, {"added_tokens_decoder": {"5": {"special": True}}}, "added_tokens_decoder.5: content is None"),
        (CONFIG, {"added_tokens_decoder": {"900": TOOL, "901": TOOL}}, "'<tool>' has two ids, 900 and 901"),
        ("added_tokens.json", {"<x>": "5"}, "<x> is '5'; a token id was expected"),
        ("added_tokens.json", {"<x>": -1}, "<x> is -1; a token id was expected"),
        ("added_tokens.json", {"<x>": 2**31}, "<x> is 2147483648; a token id was expected"),
        ("added_tokens.json", {"<x>": True}, "<x> is True; a token id was expected"),
        ("special_tokens_map.json", {"bos_token": 5}, r"special_tokens_map\.json: bos_token is 5"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(folders, kind, tmp_path, file, changes, says):
    folder = copy(folders[kind], tmp_path, {file: changes})
    with pytest.raises(CheckpointError, match=says) as refusal:
        load_tokenizer(folder)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda saved: saved["model"].update(merges=[5]), r"tokenizer\.json: model.merges.0 is 5"),
        (lambda saved: saved["model"].update(merges={"a": 5}), r"tokenizer\.json: model.merges is {'a': 5}"),
        (lambda saved: saved["model"]["vocab"].update(x="5"), r"tokenizer\.json: model.vocab.*expected `int`"),
        (lambda saved: saved["model"]["vocab"].update(x=-1), r"tokenizer\.json: model.vocab.*`int` >= 0"),
        (lambda saved: saved.update(model=None), r"tokenizer\.json: model is None"),
        (lambda saved: saved["added_tokens"].append({"id": "5"}), r"tokenizer\.json: added_tokens.*id is '5'"),
        (lambda saved: saved["added_tokens"].append({"id": 5}), r"tokenizer\.json: added_tokens.*content is None"),
        (lambda saved: saved["model"].update(merges=[["a", "no"]]), r"tokenizer\.json: not a tokenizer that"),
        (
            lambda saved: saved.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
            r"tokenizer\.json: not a tokenizer that `tokenizers` can read \(Precompiled",
        ),
        (
            lambda saved: saved.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<nope>", "type_id": 0}}],
                    "pair": [],
                    "special_tokens": {},
                }
            ),
            r"tokenizer\.json: not a tokenizer that `tokenizers` can read \(no entry found",
        ),
        (
            lambda saved: saved["added_tokens"][-1].update(id=saved["added_tokens"][-1]["id"] + 9),
            r"tokenizer\.json: the added token '.+' should have the id \d+, gets \d+",
        ),
        (lambda saved: saved["model"]["vocab"].update(x=2**30), r"tokenizer\.json: a token has the id 1073741824"),
    ],
)
def test_what_is_wrong_in_a_tokenizer_json_is_named(folders, tmp_path, change, says):
    shutil.copytree(folders["qwen2"], tmp_path, dirs_exist_ok=True)
    saved = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    change(saved)
    write_json(tmp_path / "tokenizer.json", saved)
    with pytest.raises(CheckpointError, match=says) as refusal:
        load_tokenizer(tmp_path)
    assert len(str(refusal.value)) < 500


def test_ids_that_the_vocabulary_has_for_other_tokens(folders, tmp_path):
    folder = copy(folders["qwen2"], tmp_path, {CONFIG: {"added_tokens_decoder": {"9": TOOL}}})
    with pytest.raises(CheckpointError, match="the added token '<tool>' should have the id 9"):
        load_tokenizer(folder)
    folder = copy(folders["bpe"], tmp_path / "bpe", {CONFIG: {"added_tokens_decoder": {"9": TOOL}}})
    with pytest.raises(CheckpointError, match="should have the id 9, which tokenizer.model has for '<0x"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_vocabulary_of_absurd_size_is_not_read(tmp_path, name):
    with (tmp_path / name).open("wb") as file:
        file.truncate(1 << 40)  # no byte of it takes room on the disk
    with pytest.raises(CheckpointError, match=rf"{name}: has 1,099,511,627,776 bytes"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "vocab.json",
            '{"a": 0, "z": 16777215}',
            "vocab.json: z is 16777215; there are 2 tokens, so ids end at 65,538",
        ),
        ("merges.txt", "a b\n" * 2_200_000, "merges.txt: has 8,800,000 bytes; no vocabulary has so many merges"),
    ],
)
def test_vocab_json_and_merges_txt_that_are_too_large(tmp_path, name, content, says):
    """They would take minutes and gigabytes before the embedding is found to have fewer rows."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 1, "ab": 2}')
    (tmp_path / "merges.txt").write_text("a b\n")
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=says):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
@pytest.mark.parametrize("content", ['{"a": "5"}', '{"a": 1, "b": 1}', '{"a": 16777216}', "\udcff", "x", "a b c"])
def test_vocab_json_and_merges_txt_that_are_none(tmp_path, name, content):
    write_json(tmp_path / "config.json", {"model_type": "qwen2"})
    write_json(tmp_path / "vocab.json", {"a": 0, "b": 1, "ab": 2})
    (tmp_path / "merges.txt").write_text("a b\n")
    load_tokenizer(tmp_path)
    (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(CheckpointError, match="vocab.json|merges.txt"):
        load_tokenizer(tmp_path)
