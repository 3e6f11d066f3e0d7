"""What the files beside a tokenizer say: added and special tokens, and how a text begins and ends.

tokenizer_config.json says it in newer checkpoints, special_tokens_map.json and added_tokens.json in older ones. Where
they repeat each other, tokenizer_config.json counts, as with transformers. Checkpoints from before tokenizer.json have
their vocabulary in vocab.json and merges.txt; `vocabulary_from_merges` reads those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct

from common.checkpoints.folder import CheckpointError, read_json
from common.checkpoints.gguf_vocabulary import NORMAL, UNUSED, byte_level_tokenizer
from common.checkpoints.schema import LARGEST_ID, TokenId, check, refusal

Text = Annotated[str, Meta(min_length=1)]


class AddedToken(Struct, frozen=True, kw_only=True):
    """A token that is found in a text before anything else is done."""

    content: Text
    special: bool = False  # no part of what the model says
    lstrip: bool = False  # swallows the white space on its left, on its right
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None  # looked for in the normalized text; None: unless it is special


class TokenizerSettings(Struct, frozen=True):
    """What is read of a tokenizer_config.json, besides special tokens: those are the keys that end with `_token`."""

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
    """added: by id. special: by the name of its role, such as "eos_token". extra: special tokens without a role."""

    settings: TokenizerSettings
    added: dict[int, AddedToken]
    special: dict[str, AddedToken]
    extra: list[AddedToken]
    num_rows: Any = None
    """What config.json says of the embedding: its vocab_size."""

    def without_id(self) -> list[AddedToken]:
        """The tokens of which the files beside the tokenizer may say no id."""
        return [*self.special.values(), *self.extra]

    def has_row(self, token_id: int) -> bool:
        """Whether the embedding has a row for another token, or may have one: a folder may have no config.json."""
        return not isinstance(self.num_rows, int) or token_id < self.num_rows

    def special_tokens(self) -> dict[str, str]:
        """The special tokens as chat templates know them: role -> text."""
        return {name: token.content for name, token in self.special.items()}


def read_settings(file: Path) -> dict[str, Any]:
    """A JSON file of the folder, or nothing where it has none."""
    return read_json(file) if file.is_file() else {}


def read_side_files(folder: Path) -> SideFiles:
    """Read them all. Raises CheckpointError, naming file and key, for what is none of the kind that it should be."""
    file, older = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    written, mapped = read_settings(file), read_settings(older)
    settings = check(TokenizerSettings, written, file)
    special: dict[str, AddedToken] = {}
    extra: list[AddedToken] = []
    for source, values in ((older, mapped), (file, written)):
        extras = {}
        for key in ("additional_special_tokens", "extra_special_tokens"):
            several = values.get(key) or ()
            if not isinstance(several, (dict, list, tuple)):
                raise refusal(source, key, several, "a list of tokens was expected")
            extras |= several if isinstance(several, Mapping) else {(key, i): each for i, each in enumerate(several)}
        roles = {key: value for key, value in values.items() if key.endswith("_token")}
        for key, value in {**roles, **extras}.items():
            if isinstance(value, bool) or value is None or value == "":  # add_bos_token is no token
                continue
            name = key if isinstance(key, str) else f"{key[0]}[{key[1]}]"
            token = _token({"special": True, **_described(value, source, name)}, source, name)
            if isinstance(key, str):
                special[key] = token
            else:
                extra.append(token)
    names = {token.content for token in (*special.values(), *extra)}
    num_rows = read_settings(folder / "config.json").get("vocab_size")
    return SideFiles(settings, _added_tokens(folder, settings, names), special, extra, num_rows)


def _described(value: object, file: Path, key: str) -> dict[str, Any]:
    """A token as an object: some files write only its text."""
    if not isinstance(value, (str, Mapping)):
        raise refusal(file, key, value, 'a token is text, or an object with a "content"')
    return {"content": value} if isinstance(value, str) else dict(value)


def _token(value: Mapping, file: Path, key: str) -> AddedToken:
    return check(AddedToken, value, f"{file}: {key}")


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
        added[token_id] = _token({"content": content, "special": content in special}, older, str(token_id))
    for key, value in (settings.added_tokens_decoder or {}).items():
        name = f"added_tokens_decoder.{key}"
        if not (key.isascii() and key.isdigit() and len(key) < 9 and int(key) < LARGEST_ID):
            raise refusal(file, name, value, "the keys of added_tokens_decoder are token ids")
        token = _token(_described(value, file, name), file, name)
        added[int(key)] = AddedToken(**{**_fields(token), "special": token.special or token.content in special})
    ids: dict[str, int] = {}
    for token_id, token in sorted(added.items()):
        if ids.setdefault(token.content, token_id) != token_id:
            raise CheckpointError(
                f"{folder}: the added token {token.content!r:.80} has two ids, {ids[token.content]} and {token_id}."
            )
    return added


def _fields(token: AddedToken) -> dict[str, Any]:
    return {name: getattr(token, name) for name in token.__struct_fields__}


# --- vocab.json and merges.txt ----------------------------------------------------------------------------------------

LARGEST_MERGES = 8 << 20  # bytes; the 280,000 merges of Llama 3 would have 4 MB
MOST_UNUSED = 1 << 16  # ids between and after those of vocab.json
RULES = {
    "Qwen2Tokenizer": "qwen2",
    "Qwen2TokenizerFast": "qwen2",
    "GPT2Tokenizer": "gpt-2",
    "GPT2TokenizerFast": "gpt-2",
}
"""How the tokenizers that have such files split a text into words, by their names in transformers."""
CLASSES = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}
"""Families that have always the same one, whatever their tokenizer_config.json says."""


def vocabulary_from_merges(folder: Path, side: SideFiles):
    """A `tokenizers.Tokenizer` from vocab.json and merges.txt, and the tokens that end a text by default."""
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
    tokens = [f"unused {token_id}" for token_id in range(1 + max(vocabulary.values(), default=-1))]
    kinds = [UNUSED] * len(tokens)
    for token, token_id in vocabulary.items():
        tokens[token_id], kinds[token_id] = token, NORMAL
    if kinds.count(NORMAL) != len(vocabulary):
        raise CheckpointError(f"{file}: some tokens have the same id.")
    try:
        if (size := (folder / "merges.txt").stat().st_size) > LARGEST_MERGES:
            raise CheckpointError(f"{folder / 'merges.txt'}: has {size:,} bytes; no vocabulary has so many merges.")
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / 'merges.txt'}: cannot be read as text ({error!s:.200}).") from error
    merges = [line for line in lines if line and not line.startswith("#version")]
    default = AddedToken(content="<|endoftext|>", special=True)
    if default.content in vocabulary:
        for role in ("eos_token", "unk_token", "bos_token" if RULES[name] == "gpt-2" else "pad_token"):
            side.special.setdefault(role, default)
    bos = side.special.get("bos_token") if side.settings.add_bos_token else None
    return byte_level_tokenizer(folder / "merges.txt", tokens, kinds, merges, RULES[name], bos and bos.content)
