"""Text to token ids and back: SentencePiece and byte-level BPE behind one face.

A model never sees text. A *tokenizer* cuts text into pieces of a fixed vocabulary and gives each piece a number,
its token id. Llama and Qwen checkpoints bring one of two kinds of file, and both end at the same place, bytes:

`tokenizer.model` (Llama 1 and 2, Mistral, this course's `tales`): a SentencePiece model. A space is written as
    U+2581, which looks like a low line, so that a piece can say 'a word starts here'. A space is also put in front
    of the text, because the first word is a word too. A character that the vocabulary lacks falls back to the
    tokens of its UTF-8 bytes, `<0xE2>` and so on; so nothing is unknown.

`tokenizer.json` (Llama 3, Qwen, SmolLM2): the format of the `tokenizers` library, most often byte-level BPE. The
    text's UTF-8 bytes are first written in an alphabet of 256 printable characters (a space becomes U+0120, a G
    with a dot), then a regular expression splits them into words, then BPE merges within each word. Llama 2 has
    such a file too, of the SentencePiece kind.

Beside ordinary tokens there are *added* tokens, found in the text before anything else is done: `<|im_end|>` is one
id, not the ten letters. Most are *special*: they steer the model and are no part of what it says, so `decode` leaves
them out and `token_bytes` gives nothing for them.

This module knows no model and no tensors. The work is done by the libraries `sentencepiece` and `tokenizers`.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path

from common.checkpoints import CheckpointError, read_json
from common.checkpoints.schema import SpecialIds, check, refusal

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
LONGEST_CHAT = 10_000_000  # characters; a chat template that writes more is stopped


class ChatTemplateError(ValueError):
    """A chat cannot be written as a prompt: there is no template, it failed, or the messages do not fit it."""


class Tokenizer:
    """What every tokenizer can do, whichever file it came from. Make one with `load_tokenizer(folder)`.

    vocab_size: every token id is below it. The model's embedding may have more rows: some are padded.
    bos_token_id: the id that begins a sequence, or None.
    eos_token_ids: the ids that end an answer. Chat models often have two: end of turn and end of text.
    chat_template: the checkpoint's own Jinja template, which writes a conversation as one text, or None.
    """

    vocab_size: int
    adds_space: bool  # whether `encode` puts a space in front of the text, which `decode` takes off

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.settings = _settings(folder, "tokenizer_config.json")
        self.chat_template = _find_chat_template(folder, self.settings)
        self.bos_token_id = self._named_id("bos_token", "bos_token_id")
        self.eos_token_ids = self._find_eos()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Added tokens written out in the text become their ids, as with transformers.

        `add_special_tokens` asks for what the checkpoint puts around a text: a BOS in front (Llama), or nothing
        (Qwen, SmolLM2). A chat template writes its own, so encode its result with `add_special_tokens=False`.
        """
        _refuse_surrogates(text)
        return self._encode(text, add_special_tokens)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of these tokens; bytes that are not valid UTF-8, such as half a character, become U+FFFD.

        It is made from `token_bytes`, as streamed text is, so both are the same. (The `tokenizers` library replaces a
        whole run of byte tokens if one character in it is unfinished.) SentencePiece put a space in front of the text,
        so one leading space is taken off again. That makes a single token's `decode` lose the space of its word: to
        print tokens as they come, join their `token_bytes`.
        """
        pieces = []
        for token_id in token_ids:
            added = None if skip_special_tokens else self._added_text(token_id)
            pieces.append(self.token_bytes(token_id) if added is None else added.encode())
        text = b"".join(pieces).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.adds_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that this token adds to the text; b"" for special tokens and for ids that name no token.

        Joined over tokens, and decoded as UTF-8, these are `decode`'s text (but for the leading space that
        SentencePiece adds). One character may be spread over several tokens, so a single token's bytes need not be
        valid UTF-8.
        """
        raise NotImplementedError

    def apply_chat_template(self, messages: list[dict], add_generation_prompt: bool = True, **values) -> str:
        """Write a conversation as the text that the model was trained on.

        messages: [{"role": "system" | "user" | "assistant" | "tool", "content": str}, ...].
        add_generation_prompt: end with the opening of the assistant's turn, so that the model answers.
        values: what else this checkpoint's template knows, such as tools.
        """
        _check_messages(messages)
        if self.chat_template is None:
            raise ChatTemplateError(
                f"{self.folder} has no chat template (neither in tokenizer_config.json nor in chat_template.jinja): it "
                "is a base model, which continues a text and does not converse. Give it a plain prompt instead."
            )
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        tokens = {name: text for name in names if (text := self._token_text(name)) is not None}
        values = {**tokens, **values, "messages": messages, "add_generation_prompt": add_generation_prompt}
        return render_chat(self.chat_template, **values)

    # What the two kinds of file answer, each in its way.

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        raise NotImplementedError

    def _token_id(self, token: str) -> int | None:
        raise NotImplementedError

    def _added_text(self, token_id: int) -> str | None:
        raise NotImplementedError

    # What tokenizer_config.json, generation_config.json and config.json say about special tokens.

    def _token_text(self, name: str) -> str | None:
        value = self.settings.get(name)
        return value.get("content") if isinstance(value, dict) else value

    def _named_id(self, token_name: str, id_name: str) -> int | None:
        text = self._token_text(token_name)
        if text is not None:
            return self._token_id(text)
        value = getattr(check(SpecialIds, _settings(self.folder, "config.json"), self.folder / "config.json"), id_name)
        return value[0] if isinstance(value, list) and value else value if isinstance(value, int) else None

    def _find_eos(self) -> frozenset[int]:
        vocab_size = _settings(self.folder, "config.json").get("vocab_size")
        for file in ("generation_config.json", "config.json"):
            ids = check(SpecialIds, _settings(self.folder, file), self.folder / file).eos_token_id
            if ids is not None:
                ids = ids if isinstance(ids, list) else [ids]
                if isinstance(vocab_size, int) and max(ids, default=0) >= vocab_size:
                    raise refusal(self.folder / file, "eos_token_id", ids, f"the vocabulary ends at {vocab_size - 1}")
                return frozenset(ids)
        eos = self._named_id("eos_token", "eos_token_id")
        return frozenset() if eos is None else frozenset([eos])


class SentencePieceTokenizer(Tokenizer):
    """`tokenizer.model`, through the `sentencepiece` library.

    Plain text gives the library's own ids. What the library does not know is done here: added tokens in the text,
    the BOS, and which tokens are special.
    """

    def __init__(self, folder: Path) -> None:
        import sentencepiece
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2

        path = folder / "tokenizer.model"
        try:
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
            # The same model without the space in front: for text that follows an added token.
            description = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
            self.adds_space = description.normalizer_spec.add_dummy_prefix
            description.normalizer_spec.add_dummy_prefix = False
            self.continuing = sentencepiece.SentencePieceProcessor(model_proto=description.SerializeToString())
        except (RuntimeError, OSError, ValueError, DecodeError) as error:
            raise CheckpointError(
                f"{path}: not a SentencePiece model ({error}). Download it again; if this is Llama 3's "
                "tokenizer.model, which is another format, take the tokenizer.json that belongs to it."
            ) from error
        self.added = _added_tokens(folder, self.model)  # id -> {"content", "special", "lstrip", "rstrip"}
        self.added_ids = {token["content"]: token_id for token_id, token in self.added.items()}
        self.vocab_size = max([self.model.get_piece_size(), *(token_id + 1 for token_id in self.added)])
        super().__init__(folder)
        if self.bos_token_id is None and self.model.bos_id() >= 0:
            self.bos_token_id = self.model.bos_id()
        if not self.eos_token_ids and self.model.eos_id() >= 0:
            self.eos_token_ids = frozenset([self.model.eos_id()])
        self.splitter = _splitter(self.added.values())
        self.adds_space = self.adds_space and self.settings.get("add_prefix_space") is not False

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        token_ids = []
        if add_special_tokens and self.settings.get("add_bos_token", True) and self.bos_token_id is not None:
            token_ids.append(self.bos_token_id)
        # re.split with one group gives text, added token, text, added token, ..., text.
        for position, part in enumerate(self.splitter.split(text) if self.splitter else [text]):
            if position % 2 == 1:
                # The match may hold white space that the token swallows (`lstrip`, `rstrip`).
                token_ids.append(self.added_ids[part if part in self.added_ids else part.strip()])
            elif part:
                # 'Legacy' tokenizers put a space in front of every stretch of text, newer ones only at the start.
                starts = position == 0 or self.settings.get("legacy", False)
                token_ids.extend((self.model if starts and self.adds_space else self.continuing).encode(part))
        if add_special_tokens and self.settings.get("add_eos_token", False):
            token_ids.extend(sorted(self.eos_token_ids)[:1])
        return token_ids

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self.added:
            token = self.added[token_id]
            return b"" if token["special"] else token["content"].encode()
        if not 0 <= token_id < self.model.get_piece_size():
            return b""
        return _piece_bytes(self.model.id_to_piece(token_id))

    def _token_id(self, token: str) -> int | None:
        if token in self.added_ids:
            return self.added_ids[token]
        token_id = self.model.piece_to_id(token)
        return token_id if self.model.id_to_piece(token_id) == token else None

    def _added_text(self, token_id: int) -> str | None:
        return self.added[token_id]["content"] if token_id in self.added else None


class JsonTokenizer(Tokenizer):
    """`tokenizer.json`, through the `tokenizers` library: byte-level BPE, or the SentencePiece kind of Llama 2.

    The file says everything about encoding, the BOS included, so the library's ids are taken as they are.
    """

    def __init__(self, folder: Path) -> None:
        import tokenizers

        path = folder / "tokenizer.json"
        try:
            self.model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{path}: not a tokenizer that `tokenizers` can read ({error}).") from error
        # Some files still carry their training's settings, which would cut or lengthen every text.
        self.model.no_truncation()
        self.model.no_padding()
        decoder = repr(self.model.decoder)
        self.byte_level = "ByteLevel" in decoder
        if not self.byte_level and "ByteFallback" not in decoder and "Metaspace" not in decoder:
            raise CheckpointError(
                f"{path}: its decoder is {decoder[:80]}; this course reads byte-level tokenizers and those of the "
                "SentencePiece kind (ByteFallback or Metaspace)."
            )
        self.adds_space = self.model.decoder.decode([SPACE + "a"]) == "a"
        self.added = self.model.get_added_tokens_decoder()  # id -> tokenizers.AddedToken
        self.vocab_size = 1 + max(self.model.get_vocab(with_added_tokens=True).values(), default=-1)
        super().__init__(folder)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self.model.encode(text, add_special_tokens=add_special_tokens).ids

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self.added:
            token = self.added[token_id]
            return b"" if token.special else token.content.encode()
        piece = self.model.id_to_token(token_id) if token_id >= 0 else None
        if piece is None:
            return b""
        if not self.byte_level:
            return _piece_bytes(piece)
        if not all(character in BYTE_OF_CHARACTER for character in piece):
            return piece.encode()  # not written in the alphabet, so it stands for itself
        return bytes(BYTE_OF_CHARACTER[character] for character in piece)

    def _token_id(self, token: str) -> int | None:
        return self.model.token_to_id(token)

    def _added_text(self, token_id: int) -> str | None:
        return self.added[token_id].content if token_id in self.added else None


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder. Where both kinds of file are there, tokenizer.json counts."""
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        return JsonTokenizer(folder)
    if (folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(folder)
    raise CheckpointError(
        f"{folder} holds neither tokenizer.json nor tokenizer.model, so its text cannot be read. Copy the one that "
        "belongs to this checkpoint into it."
    )


# Bytes


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: one printable character for each of the 256 bytes, so that BPE can work on text.

    A byte that is a printable Latin-1 character stands for itself; the others (control characters, the space, 0xAD)
    are given the characters from U+0100 up, in order. So a space, 0x20, is the 33rd of those: U+0120.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(0x100 + position): byte for position, byte in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()


def _piece_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece piece: `<0xE2>` is one byte, U+2581 is a space, all else stands for itself."""
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()


def _refuse_surrogates(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text holds a lone surrogate, {text[error.start]!r}, at character {error.start}: it is half of a "
            "character and has no UTF-8 bytes. Was a file read with errors='surrogateescape'? Clean it with "
            "text.encode('utf-8', 'replace').decode('utf-8')."
        ) from None


# Added tokens beside a tokenizer.model


def _added_tokens(folder: Path, model) -> dict[int, dict]:
    """The tokens that are found in the text first: the model's control pieces, and what the folder's JSON files add."""
    control = [i for i in range(model.get_piece_size()) if model.is_control(i) or model.is_unknown(i)]
    added = {i: {"content": model.id_to_piece(i), "special": True} for i in control}
    settings = _settings(folder, "tokenizer_config.json")
    named = [value for key, value in settings.items() if key.endswith("_token")]
    named += settings.get("additional_special_tokens") or []
    special = {value["content"] if isinstance(value, dict) else value for value in named if value}
    for content, token_id in _settings(folder, "added_tokens.json").items():
        added[int(token_id)] = {"content": content, "special": content in special}
    for token_id, token in (settings.get("added_tokens_decoder") or {}).items():
        added[int(token_id)] = {"special": False, **token}
    return added


def _splitter(tokens) -> re.Pattern | None:
    """A pattern that finds added tokens, the longest first, with the white space that they swallow."""
    patterns = [
        (r"\s*" if token.get("lstrip") else "") + re.escape(token["content"]) + (r"\s*" if token.get("rstrip") else "")
        for token in sorted(tokens, key=lambda token: -len(token["content"]))
    ]
    return re.compile("(" + "|".join(patterns) + ")") if patterns else None


# Chat templates


def _settings(folder: Path, file: str) -> dict:
    """A JSON file of the folder, or nothing where it has none."""
    return read_json(folder / file) if (folder / file).is_file() else {}


def _find_chat_template(folder: Path, settings: dict) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name: [{"name": "default", "template": ...}, ...]
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _check_messages(messages: list[dict]) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ChatTemplateError('a chat is a list of messages, such as [{"role": "user", "content": "Hello"}].')
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ChatTemplateError(f'message {position} is {message!r}; it needs a "role" and a "content", both text.')
        if message.get("role") not in ("system", "user", "assistant", "tool"):
            raise ChatTemplateError(
                f"message {position} has the role {message.get('role')!r}; the roles are system, user, assistant, tool."
            )


def render_chat(template: str, **values) -> str:
    """Run a chat template, which is a program that came with the checkpoint, written by a stranger.

    So it runs in Jinja's sandbox: no attribute that starts with an underscore, nothing that changes its inputs, no
    range above 100,000; and what it may write is bounded. The rest of the environment is as transformers makes it.
    One thing it can still do is waste time: loops within loops that write nothing. Ctrl-C ends that.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        # Jinja's own filter escapes < and > for web pages.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    pieces, length = [], 0
    try:
        for piece in environment.from_string(template).generate(**values):
            pieces.append(piece)
            length += len(piece)
            if length > LONGEST_CHAT:
                raise jinja2.TemplateError(f"it wrote more than {LONGEST_CHAT:,} characters")
    except jinja2.TemplateSyntaxError as error:
        raise ChatTemplateError(f"the chat template is not valid Jinja: line {error.lineno}: {error}") from error
    except jinja2.sandbox.SecurityError as error:
        raise ChatTemplateError(
            f"the chat template tried something that the sandbox forbids: {error} Do not trust this checkpoint."
        ) from error
    except Exception as error:  # a stranger's program may raise anything
        raise ChatTemplateError(f"the chat template refused these messages or failed: {error}") from error
    return "".join(pieces)
