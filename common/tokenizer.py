"""Converts text to token ids and back, with one interface for SentencePiece and byte-level BPE.

A model never sees text. A *tokenizer* splits text into pieces of a fixed vocabulary and gives each piece a number,
its token id. Llama and Qwen checkpoints have one of two kinds of file. Both represent text as UTF-8 bytes in the end:

`tokenizer.model` (Llama 1 and 2, Mistral, this course's `tales`): a SentencePiece model. A space is written as U+2581,
    which looks like a low line, so that a piece can mark the start of a word. A space is also put in front of the
    text, so that the first word is marked, too. A character that is not in the vocabulary becomes the tokens of its
    UTF-8 bytes, `<0xE2>` and so on; so no text is unknown.

`tokenizer.json` (Llama 3, Qwen, SmolLM2): the format of the `tokenizers` library, usually byte-level BPE. The text's
    UTF-8 bytes are first written in an alphabet of 256 printable characters (a space becomes U+0120, a G with a dot),
    then a regular expression splits them into words, then BPE merges within each word. Llama 2 has such a file too, of
    the SentencePiece kind.

Beside ordinary tokens there are *added* tokens, which are searched for before the text is split: `<|im_end|>` is one
id, not ten letters. Most are *special*: they control the model and are not part of its text, so `decode` omits them and
their `token_bytes` are empty.

The libraries `sentencepiece` and `tokenizers` do the work.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.chat_templates import ChatTemplateError, check_messages, choose_template, find_chat_templates, render_chat
from common.checkpoints import CheckpointError, read_json
from common.checkpoints.folder import LARGEST_JSON, check_size
from common.checkpoints.schema import LARGEST_ID, SpecialIds, check, refusal
from common.checkpoints.vocabulary import (
    AddedToken,
    SideFiles,
    TokenizerFile,
    read_settings,
    read_side_files,
    vocabulary_from_merges,
)

TOO_LARGE = "; no vocabulary is so large"
SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


class Tokenizer:
    """The interface of every tokenizer. `load_tokenizer(folder)` makes one.

    vocab_size: every token id is below it. The model's embedding may have more rows: some are padding.
    bos_token_id: the id that begins a sequence, or None.
    eos_token_ids: the ids that end an answer. Chat models often have two: end of turn and end of text.
    chat_template: the checkpoint's own Jinja template, which writes a conversation as one text, or None.
    """

    vocab_size: int
    adds_space: bool  # whether `encode` puts a space in front of the text, which `decode` removes
    side_files: SideFiles
    added: Mapping[int, Any]  # added tokens by id; each has `content` and `special`
    writes_added: bool = True  # whether an added token's bytes are its content; otherwise they are its piece's

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.chat_templates = find_chat_templates(folder, self.side_files.settings.chat_template)
        self.bos_token_id = self._named_id("bos_token", "bos_token_id")
        self.eos_token_ids = self._find_eos()

    @property
    def chat_template(self) -> str | None:
        return self.chat_templates.get("default")

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self.chat_templates = {} if template is None else {"default": template}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the token ids of `text`. Added tokens that are written in it become their ids, as with transformers.

        add_special_tokens: whether to add what the checkpoint puts around a text: a BOS in front (Llama), or nothing
        (Qwen, SmolLM2). A chat template writes its own, so encode its result with `add_special_tokens=False`. Raises
        ValueError for a text with half a character.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds a lone surrogate, {text[error.start]!r}, at character {error.start}: it is half of a "
                "character and has no UTF-8 bytes. Was a file read with errors='surrogateescape'? Clean it with "
                "text.encode('utf-8', 'replace').decode('utf-8')."
            ) from None
        return self._encode(text, add_special_tokens)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Returns the text of these tokens. Bytes that are not valid UTF-8, such as half a character, become U+FFFD.

        The text is made from `token_bytes`, and so equals streamed text. (The `tokenizers` library replaces a whole run
        of byte tokens if one character in it is incomplete.) One leading space is removed if SentencePiece put one in
        front of the text. So the `decode` of a single token loses the space before its word: to print tokens one by
        one, join their `token_bytes`.
        """
        pieces = []
        for token_id in token_ids:
            is_written = not skip_special_tokens and token_id in self.added
            pieces.append(self.added[token_id].content.encode() if is_written else self.token_bytes(token_id))
        text = b"".join(pieces).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.adds_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """Returns the bytes that this token adds to the text; b"" for special tokens and for ids without a token.

        The joined bytes of all tokens, decoded as UTF-8, are the text that `decode` returns, except for the leading
        space that SentencePiece adds. A character may be split over several tokens, so the bytes of a single token need
        not be valid UTF-8.
        """
        token = self.added.get(token_id)
        if token is not None and (token.special or self.writes_added):
            return b"" if token.special else token.content.encode()
        return self._piece_bytes(token_id)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        add_generation_prompt: bool | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **values: Any,
    ) -> str:
        """Returns a conversation as the text that the model was trained on.

        messages: [{"role": "system" | "user" | "assistant" | "tool", "content": str}, ...]; content may have parts.
        add_generation_prompt: end with the opening of the assistant's turn, so that the model answers; the default,
        unless `continue_final_message` is set. tools: the functions that the model may call, as JSON objects.
        chat_template: the name of one, if the checkpoint has several. The other values are those of `render_chat`:
        `documents`, `continue_final_message`, and variables of the template, such as `enable_thinking`. Raises
        ChatTemplateError.
        """
        check_messages(messages)
        if not self.chat_templates:
            raise ChatTemplateError(
                f"{self.folder} has no chat template (neither in tokenizer_config.json nor in chat_template.jinja): it "
                "is a base model, which continues a text and does not converse. Give it a plain prompt instead."
            )
        template = choose_template(self.chat_templates, chat_template, tools is not None)
        own = {"tools": tools, "add_generation_prompt": add_generation_prompt}
        return render_chat(template, messages, **{**self.side_files.special_tokens(), **values, **own})

    # Defined by the subclasses, one for each kind of file.

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        raise NotImplementedError

    def _piece_bytes(self, token_id: int) -> bytes:
        raise NotImplementedError

    def _token_id(self, token: str) -> int | None:
        raise NotImplementedError

    # Special tokens, from tokenizer_config.json, generation_config.json and config.json.

    def _named_id(self, token_name: str, id_name: str) -> int | None:
        text = self.side_files.special_tokens().get(token_name)
        if text is not None:
            return self._token_id(text)
        config = self.folder / "config.json"
        value = getattr(check(SpecialIds, read_settings(config), config), id_name)
        return next(iter(value), None) if isinstance(value, list) else value

    def _find_eos(self) -> frozenset[int]:
        for file in ("generation_config.json", "config.json"):
            ids = check(SpecialIds, read_settings(self.folder / file), self.folder / file).eos_token_id
            if ids is not None:
                ids = ids if isinstance(ids, list) else [ids]
                if not self.side_files.has_row(max(ids, default=0)):
                    problem = f"the vocabulary ends at {self.side_files.num_rows - 1}"
                    raise refusal(self.folder / file, "eos_token_id", ids, problem)
                return frozenset(ids)
        eos, named = self._named_id("eos_token", "eos_token_id"), self.side_files.special_tokens().get("eos_token")
        if eos is None and named is not None:
            problem = "the vocabulary has no such token, so that no text would end"
            raise refusal(self.folder / "tokenizer_config.json", "eos_token", named, problem)
        return frozenset() if eos is None else frozenset([eos])


class SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model`, read by the `sentencepiece` library.

    Plain text gets the library's own ids. This class adds what the library does not know: added tokens in the text, the
    BOS, and which tokens are special.
    """

    def __init__(self, folder: Path) -> None:
        import sentencepiece
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2

        path = folder / "tokenizer.model"
        check_size(path, LARGEST_JSON, TOO_LARGE)
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            # The same model without the space in front, for text that follows an added token.
            description = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
            self.adds_space = description.normalizer_spec.add_dummy_prefix
            description.normalizer_spec.add_dummy_prefix = False
            self.continuing = sentencepiece.SentencePieceProcessor(model_proto=description.SerializeToString())
            pieces = self.model.id_to_piece(list(range(self.model.get_piece_size())))  # some may not be valid text
        except (RuntimeError, OSError, ValueError, DecodeError) as error:
            raise CheckpointError(
                f"{path}: not a SentencePiece model ({error}). Download it again; if this is Llama 3's "
                "tokenizer.model, which is another format, take the tokenizer.json that belongs to it."
            ) from error
        self.side_files = read_side_files(folder)
        control = [i for i in range(len(pieces)) if self.model.is_control(i) or self.model.is_unknown(i)]
        for i in sorted(self.side_files.added.keys() & set(range(len(pieces))).difference(control)):
            token, is_free = self.side_files.added[i], self.model.is_unused(i)
            if token.content.replace(" ", SPACE) != pieces[i] and not is_free:
                # Texts would still be encoded as this piece, and decoded as this token.
                raise CheckpointError(
                    f"{folder}: the added token {token.content!r:.80} should have the id {i}, which {path.name} has "
                    f"for {pieces[i]!r:.80}. The files are of different checkpoints."
                )
        self.added = {i: AddedToken(content=pieces[i], special=True) for i in control}
        self.added |= self.side_files.added
        for role, token_id in (("bos_token", self.model.bos_id()), ("eos_token", self.model.eos_id())):
            if token_id >= 0:
                piece = AddedToken(content=self.model.id_to_piece(token_id), special=True)
                self.side_files.special.setdefault(role, piece)
        self._add_special_tokens()
        self.added_ids = {token.content: token_id for token_id, token in self.added.items()}
        super().__init__(folder)
        self.splitter = _splitter(self.added.values())
        self.settings = self.side_files.settings
        self.adds_space = self.adds_space and self.settings.add_prefix_space is not False

    def _add_special_tokens(self) -> None:
        """Give ids to special tokens without one: a piece's id, or the next one if the embedding has a row for it."""
        known = {token.content for token in self.added.values()}
        self.vocab_size = max(self.model.get_piece_size(), *(token_id + 1 for token_id in self.added))
        for token in self.side_files.without_id():
            token_id = self.model.piece_to_id(token.content)
            is_piece = self.model.id_to_piece(token_id) == token.content
            if token.content not in known and (is_piece or self.side_files.has_row(self.vocab_size)):
                self.added[token_id if is_piece else self.vocab_size] = token
                self.vocab_size += not is_piece
                known.add(token.content)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        token_ids = []
        if add_special_tokens and self.settings.add_bos_token is not False and self.bos_token_id is not None:
            token_ids.append(self.bos_token_id)
        # re.split with one group gives text, added token, text, added token, ..., text.
        for position, part in enumerate(self.splitter.split(text) if self.splitter else [text]):
            if position % 2 == 1:
                # The match may include white space (`lstrip`, `rstrip`).
                token_ids.append(self.added_ids[part if part in self.added_ids else part.strip()])
            elif part:
                # 'Legacy' tokenizers put a space in front of every stretch of text, newer ones only at the start.
                starts = position == 0 or self.settings.legacy
                token_ids.extend((self.model if starts and self.adds_space else self.continuing).encode(part))
        if add_special_tokens and self.settings.add_eos_token:
            token_ids.extend(sorted(self.eos_token_ids)[:1])
        return token_ids

    def _piece_bytes(self, token_id: int) -> bytes:
        is_piece = 0 <= token_id < self.model.get_piece_size()
        return sentencepiece_bytes(self.model.id_to_piece(token_id)) if is_piece else b""

    def _token_id(self, token: str) -> int | None:
        if token in self.added_ids:
            return self.added_ids[token]
        token_id = self.model.piece_to_id(token)
        return token_id if self.model.id_to_piece(token_id) == token else None


class JsonTokenizer(Tokenizer):
    """A `tokenizer.json`, read by the `tokenizers` library: byte-level BPE, or the SentencePiece kind of Llama 2.

    The file describes all of the encoding, including the BOS, so the library's ids are used unchanged.
    """

    def __init__(self, folder: Path) -> None:
        self.side_files = read_side_files(folder)
        path = folder / "tokenizer.json"
        if path.is_file():
            self.model = _read_tokenizer(path)
        else:
            self.model, path = vocabulary_from_merges(folder, self.side_files), folder / "vocab.json"
        # Some files still have the settings of their training, which would truncate or pad every text.
        self.model.no_truncation()
        self.model.no_padding()
        decoder = repr(self.model.decoder)
        self.writes_added = "ByteLevel" in decoder  # in the others the text of an added token may be normalized
        if not self.writes_added and "ByteFallback" not in decoder and "Metaspace" not in decoder:
            raise CheckpointError(
                f"{path}: its decoder is {decoder[:80]}; this course reads byte-level tokenizers and those of the "
                "SentencePiece kind (ByteFallback or Metaspace)."
            )
        self.adds_space = self.model.decoder.decode([SPACE + "a"]) == "a"
        _add_tokens(self.model, self.side_files, path)
        self.added = self.model.get_added_tokens_decoder()  # id -> tokenizers.AddedToken
        self.vocab_size = 1 + max(self.model.get_vocab(with_added_tokens=True).values(), default=-1)
        if self.vocab_size > LARGEST_ID:
            raise CheckpointError(f"{path}: a token has the id {self.vocab_size - 1}; no vocabulary is so large.")
        super().__init__(folder)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.model.encode(text, add_special_tokens=add_special_tokens).ids

    def _piece_bytes(self, token_id: int) -> bytes:
        piece = self.model.id_to_token(token_id) if token_id >= 0 else None
        if piece is None:
            return b""
        if not self.writes_added:
            return sentencepiece_bytes(piece)
        if not all(character in BYTE_OF_CHARACTER for character in piece):
            return piece.encode()  # it is not written in the byte alphabet
        return bytes(BYTE_OF_CHARACTER[character] for character in piece)

    def _token_id(self, token: str) -> int | None:
        return self.model.token_to_id(token)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Returns the tokenizer of a checkpoint folder, made from tokenizer.json if there are several kinds of file.

    Raises CheckpointError, naming the file, if there is none, or if it is damaged.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return JsonTokenizer(folder)
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return JsonTokenizer(folder)
    raise CheckpointError(
        f"{folder} holds neither tokenizer.json nor tokenizer.model, nor vocab.json with merges.txt, so no text can "
        "be read. Copy the one that belongs to this checkpoint into it."
    )


# Bytes


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: a printable character for each of the 256 bytes, so that BPE can work on text.

    A printable Latin-1 character stands for its own byte. The other bytes (control characters, the space, 0xAD) get the
    characters from U+0100 on, in order. So the space, 0x20, which is the 33rd of them, is U+0120.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(0x100 + position): byte for position, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()


def sentencepiece_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece piece: `<0xE2>` is one byte, and U+2581 a space."""
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()


# Reading


def _read_tokenizer(path: Path):
    """Read a tokenizer.json with the library. If that fails, `check` finds the reason: the library gives none."""
    import tokenizers

    check_size(path, LARGEST_JSON, TOO_LARGE)
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.encode("a")  # some mistakes are noticed only here
        return tokenizer
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exception, or, when it panics, a BaseException
        check(TokenizerFile, read_json(path), path)
        problem = f"not a tokenizer that `tokenizers` can read ({error!s:.200})"
        raise CheckpointError(f"{path}: {problem}.") from error


def _add_tokens(model, side: SideFiles, path: Path) -> None:
    """Add to a `tokenizers.Tokenizer` the tokens of the files beside it: in the order of ids, then those without."""
    import tokenizers

    def add(token: AddedToken) -> None:
        normalized = not token.special if token.normalized is None else token.normalized
        flags = dict(special=token.special, lstrip=token.lstrip, rstrip=token.rstrip, single_word=token.single_word)
        model.add_tokens([tokenizers.AddedToken(token.content, normalized=normalized, **flags)])

    # The library numbers added tokens in the order of the file, from the first free id on; it ignores stated ids.
    written = read_json(path) if path.name == "tokenizer.json" else {}
    ids = {token["content"]: token["id"] for token in written.get("added_tokens", [])}
    for token_id, token in sorted(side.added.items()):
        add(token)
        ids[token.content] = token_id
    for content, stated in ids.items():
        if (found := model.token_to_id(content)) != stated:
            raise CheckpointError(f"{path}: the added token {content!r:.80} should have the id {stated}, gets {found}.")
    known = {token.content for token in model.get_added_tokens_decoder().values()}
    for token in side.without_id():
        is_piece = model.token_to_id(token.content) is not None
        if token.content not in known and (is_piece or side.has_row(model.get_vocab_size(with_added_tokens=True))):
            add(token)


# Added tokens beside a tokenizer.model


def _splitter(tokens) -> re.Pattern | None:
    """A pattern that finds added tokens, the longest first, and the white space that belongs to them."""
    patterns = [
        (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
        for token in sorted(tokens, key=lambda token: -len(token.content))
    ]
    return re.compile("(" + "|".join(patterns) + ")") if patterns else None
