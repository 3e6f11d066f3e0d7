"""Reads the files beside a tokenizer: added and special tokens, and what is put before and after a text.

They are in tokenizer_config.json or, in older checkpoints, in special_tokens_map.json and added_tokens.json. Where the
files differ, tokenizer_config.json is used, as in transformers. Checkpoints from before tokenizer.json have their
vocabulary in vocab.json and merges.txt; `vocabulary_from_merges` reads those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from common.checkpoints.folder import CheckpointError, read_json, read_text
from common.checkpoints.gguf_vocabulary import byte_level_tokenizer
from common.checkpoints.schema import LARGEST_ID, TokenId, check, refusal

Text = Annotated[str, Meta(min_length=1)]


class AddedToken(Struct, frozen=True, kw_only=True):
    """A token that is found in a text before anything else is done."""

    content: Text
    special: bool = False  # not part of the decoded text
    lstrip: bool = False  # includes the white space on its left
    rstrip: bool = False  # includes the white space on its right
    single_word: bool = False
    normalized: bool | None = None  # searched for in the normalized text; None: yes, unless it is special


class TokenizerSettings(Struct, frozen=True):
    """The keys of a tokenizer_config.json that are read, besides special tokens: the keys that end with `_token`."""

    tokenizer_class: str | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool | None = None
    added_tokens_decoder: dict[str, Any] | None = None
    additional_special_tokens: list[Any] | dict[str, Any] | None = None
    extra_special_tokens: list[Any] | dict[str, Any] | None = None
    chat_template: Any = None


class _Added(Struct):
    """An entry of a tokenizer.json's `added_tokens`."""

    id: TokenId
    content: Text
    special: bool = False


class _Model(Struct):
    vocab: dict[str, TokenId] | list[tuple[str, float]]
    merges: list[str | tuple[str, str]] = []


class TokenizerFile(Struct):
    """The parts of a tokenizer.json in which mistakes are likely; the `tokenizers` library checks all of it."""

    model: _Model
    added_tokens: list[_Added] = []


@dataclass
class SideFiles:
    """The content of the files beside a tokenizer.

    added: by id. special: by the name of its role, such as "eos_token". extra: special tokens without a role. num_rows:
    of the embedding, which is config.json's vocab_size.
    """

    settings: TokenizerSettings
    added: dict[int, AddedToken]
    special: dict[str, AddedToken]
    extra: list[AddedToken]
    num_rows: Any = None

    def without_id(self) -> list[AddedToken]:
        """The tokens for which these files may have no id."""
        return [*self.special.values(), *self.extra]

    def has_row(self, token_id: int) -> bool:
        """Whether the embedding has a row for this id. Yes if that is unknown: a folder may have no config.json."""
        return not isinstance(self.num_rows, int) or token_id < self.num_rows

    def special_tokens(self) -> dict[str, str]:
        """The texts of the special tokens by role, as chat templates get them."""
        return {name: token.content for name, token in self.special.items()}


def read_settings(file: Path) -> dict[str, Any]:
    """The content of a JSON file; {} if there is no such file."""
    return read_json(file) if file.is_file() else {}


def read_side_files(folder: Path) -> SideFiles:
    """Read the files beside a tokenizer. Raises CheckpointError, naming file and key, for a value of a wrong kind."""
    file, older = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    written, mapped = read_settings(file), read_settings(older)
    settings = check(TokenizerSettings, written, file)
    special: dict[str, AddedToken] = {}
    extra: list[AddedToken] = []
    for source, values in ((older, mapped), (file, written)):
        by_role = {key: value for key, value in values.items() if key.endswith("_token")}
        without_role = {}
        for key in ("additional_special_tokens", "extra_special_tokens"):
            several = values.get(key) or ()
            if not isinstance(several, (dict, list, tuple)):
                raise refusal(source, key, several, "a list of tokens was expected")
            if isinstance(several, dict):
                by_role |= several
            else:
                without_role |= {f"{key}[{i}]": value for i, value in enumerate(several)}
        special |= _special_tokens(by_role, source)
        extra += _special_tokens(without_role, source).values()
    names = {token.content for token in (*special.values(), *extra)}
    num_rows = read_settings(folder / "config.json").get("vocab_size")
    return SideFiles(settings, _added_tokens(folder, settings, names), special, extra, num_rows)


def _special_tokens(values: Mapping[str, Any], file: Path) -> dict[str, AddedToken]:
    """The special tokens by key, without those that are not set and without settings such as `add_bos_token`."""
    given = {key: value for key, value in values.items() if value not in (None, "") and not isinstance(value, bool)}
    return {key: _token(value, file, key, special=True) for key, value in given.items()}


def _token(value: object, file: Path, key: str, special: bool = False) -> AddedToken:
    """A token that a file has as its text or as an object. special: what it is if the object does not say it."""
    if not isinstance(value, (str, Mapping)):
        raise refusal(file, key, value, 'a token is text, or an object with a "content"')
    fields = {"content": value} if isinstance(value, str) else value
    return check(AddedToken, {"special": special, **fields}, f"{file}: {key}")


def _read_ids(file: Path) -> dict[str, int]:
    """A JSON file of tokens and their ids."""
    ids = read_json(file)
    for token, token_id in ids.items():
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < LARGEST_ID:
            raise refusal(file, token, token_id, "a token id was expected")
    return ids


def _added_tokens(folder: Path, settings: TokenizerSettings, special: set[str]) -> dict[int, AddedToken]:
    file, older = folder / "tokenizer_config.json", folder / "added_tokens.json"
    added: dict[int, AddedToken] = {}
    for content, token_id in (_read_ids(older) if older.is_file() else {}).items():
        added[token_id] = _token(content, older, str(token_id), content in special)
    for key, value in (settings.added_tokens_decoder or {}).items():
        name = f"added_tokens_decoder.{key}"
        if not (key.isascii() and key.isdigit() and len(key) < 9 and int(key) < LARGEST_ID):
            raise refusal(file, name, value, "the keys of added_tokens_decoder are token ids")
        token = _token(value, file, name)
        added[int(key)] = msgspec.structs.replace(token, special=token.special or token.content in special)
    ids: dict[str, int] = {}
    for token_id, token in sorted(added.items()):
        if ids.setdefault(token.content, token_id) != token_id:
            raise CheckpointError(
                f"{folder}: the added token {token.content!r:.80} has two ids, {ids[token.content]} and {token_id}."
            )
    return added


# --- vocab.json and merges.txt ----------------------------------------------------------------------------------------

LARGEST_MERGES = 8 << 20  # bytes; the 280,000 merges of Llama 3 would have 4 MB
MOST_UNUSED = 1 << 16  # ids between and after those of vocab.json
RULES = {
    "Qwen2Tokenizer": "qwen2",
    "Qwen2TokenizerFast": "qwen2",
    "GPT2Tokenizer": "gpt-2",
    "GPT2TokenizerFast": "gpt-2",
}
"""The splitting rules of tokenizers with such files, by their names in transformers."""
CLASSES = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}
"""The tokenizer of families that always have the same one, whatever their tokenizer_config.json says."""


def vocabulary_from_merges(folder: Path, side: SideFiles):
    """Returns a `tokenizers.Tokenizer` made from vocab.json and merges.txt; adds default special tokens to `side`."""
    file, config = folder / "vocab.json", read_settings(folder / "config.json")
    name = CLASSES.get(str(config.get("model_type"))) or side.settings.tokenizer_class
    if name not in RULES:
        raise refusal(
            folder / "tokenizer_config.json", "tokenizer_class", name,
            f"beside vocab.json and merges.txt it has to be one of {', '.join(RULES)}; take a tokenizer.json instead",
        )  # fmt: skip
    vocabulary = _read_ids(file)
    last = max(vocabulary, key=vocabulary.get, default="")
    if vocabulary.get(last, 0) > len(vocabulary) + MOST_UNUSED:
        problem = f"there are {len(vocabulary):,} tokens, so ids end at {len(vocabulary) + MOST_UNUSED:,} at the latest"
        raise refusal(file, last, vocabulary[last], problem)
    if len(set(vocabulary.values())) != len(vocabulary):
        raise CheckpointError(f"{file}: some tokens have the same id.")
    lines = read_text(folder / "merges.txt", LARGEST_MERGES, "; no vocabulary has so many merges").splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    default = AddedToken(content="<|endoftext|>", special=True)
    if default.content in vocabulary:
        for role in ("eos_token", "unk_token", "bos_token" if RULES[name] == "gpt-2" else "pad_token"):
            side.special.setdefault(role, default)
    bos = side.special.get("bos_token") if side.settings.add_bos_token else None
    return byte_level_tokenizer(folder / "merges.txt", vocabulary, {}, merges, RULES[name], bos and bos.content)
