"""Converts the vocabulary in a GGUF file to tokenizer.json (byte-level BPE) or tokenizer.model (SentencePiece)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from common.checkpoints.folder import CheckpointError, write_json
from common.checkpoints.schema import TokenId, check

# How each family splits a text into words before BPE. GGUF stores only the rule's name, `tokenizer.ggml.pre`.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")  # each digit by itself
SPLITTING_RULES = {
    "gpt-2": [],  # ByteLevel's own rule is GPT-2's
    "smollm": ["digits"],
    "llama-bpe": [LLAMA3_WORDS],
    "llama3": [LLAMA3_WORDS],
    "qwen2": [QWEN2_WORDS],
    "deepseek-r1-qwen": [QWEN2_WORDS],
    # What llama.cpp does when the file does not say: punctuation, words, then digits by threes.
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"],
}

# The kinds of token, as GGUF and SentencePiece both number them.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

ROLES = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
"""The roles of special tokens as GGUF calls them, and as tokenizer_config.json and SentencePiece do."""

ENDS_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<EOT>", "_<EOT>")
"""Tokens that end an answer even where the file does not say so: llama.cpp found that many files do not."""


class Vocabulary(Struct, kw_only=True):
    """The `tokenizer.ggml` keys that are read. Ids are indices into `tokens`, which are all different."""

    model: str
    tokens: list[str]
    token_type: list[Annotated[int, Meta(ge=1, le=6)]] = []  # all NORMAL if there are none
    scores: list[float] = []
    merges: list[str] = []
    pre: str = "default"
    add_bos_token: bool | None = None
    add_eos_token: bool = False
    add_space_prefix: bool = True
    remove_extra_whitespaces: bool = False
    bos_token_id: TokenId | None = None
    eos_token_id: TokenId | None = None
    eot_token_id: TokenId | None = None
    eom_token_id: TokenId | None = None
    unknown_token_id: TokenId | None = None
    padding_token_id: TokenId | None = None
    chat_template: str | None = None

    def token_ids(self) -> dict[str, int]:
        """The special tokens that the file names: role -> id."""
        roles = ("bos", "eos", "eot", "eom", "unknown", "padding")
        named = {role: getattr(self, f"{role}_token_id") for role in roles}
        return {role: token_id for role, token_id in named.items() if token_id is not None}

    def end_ids(self) -> list[int]:
        """The ids that end an answer: those that the file names, and the end of a turn if it names none."""
        ids = self.token_ids()
        ends = {ids[role] for role in ("eos", "eot", "eom") if role in ids}
        turn = [self.tokens.index(token) for token in ENDS_OF_TURN if token in self.tokens]
        return sorted(ends if "eot" in ids else ends.union(turn[:1]))


def read_vocabulary(get: Callable, path: Path) -> Vocabulary:
    """Read and check the keys. get(key, default) returns a value of the file, or the default where it has none."""
    prefix = {"chat_template": "tokenizer."}
    names = {name: prefix.get(name, "tokenizer.ggml.") + name for name in Vocabulary.__struct_fields__}
    given = {name: value for name, key in names.items() if (value := get(key, None)) is not None}
    for name in ("tokens", "model"):
        given.setdefault(name, get(names[name]))
    vocabulary = check(Vocabulary, given, path, names)
    tokens, kinds = vocabulary.tokens, vocabulary.token_type or [NORMAL] * len(vocabulary.tokens)
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise CheckpointError(
            f"{path}: tokenizer.ggml.tokens are {len(tokens)} tokens ({len(set(tokens))} different ones), and "
            f"tokenizer.ggml.token_type are {len(kinds)} kinds."
        )
    for role, token_id in vocabulary.token_ids().items():
        if token_id >= len(tokens):
            raise CheckpointError(
                f"{path}: tokenizer.ggml.{role}_token_id is {token_id}; the last of the tokens is {len(tokens) - 1}."
            )
    # Some files store the end of a turn as an ordinary token, which a tokenizer would split into a dozen pieces.
    special = {tokens[token_id] for token_id in vocabulary.token_ids().values()}
    special = {token for token in special if re.fullmatch(r"_?<.+>|\[.+\]", token)}.union(ENDS_OF_TURN)
    vocabulary.token_type = [
        CONTROL if kind == NORMAL and token in special else kind for token, kind in zip(tokens, kinds)
    ]
    return vocabulary


def write_tokenizer(vocabulary: Vocabulary, path: Path, config: dict, folder: Path) -> None:
    """Write the tokenizer's files to `folder`. path: of the GGUF file. config: the content of config.json."""
    tokens, kinds, model, pre = vocabulary.tokens, vocabulary.token_type, vocabulary.model, vocabulary.pre
    if len(tokens) > config["vocab_size"]:
        raise CheckpointError(
            f"{path}: {len(tokens)} tokens do not fit tensor 'token_embd.weight' of {config['vocab_size']} rows."
        )
    add_bos = vocabulary.add_bos_token
    if add_bos is None:  # then llama.cpp decides it by the kind of vocabulary
        add_bos = model == "llama" or pre in ("llama-bpe", "llama3")
    settings = {
        "add_bos_token": add_bos,
        "add_eos_token": vocabulary.add_eos_token,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
    ids = vocabulary.token_ids()
    added_ids = [token_id for token_id, kind in enumerate(kinds) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    settings |= {f"{name}_token": tokens[ids[role]] for role, name in ROLES.items() if role in ids}
    if model == "gpt2":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        bos = settings.get("bos_token") if add_bos else None
        used = {token: token_id for token_id, (token, kind) in enumerate(zip(tokens, kinds)) if kind != UNUSED}
        added = {tokens[token_id]: kinds[token_id] != USER_DEFINED for token_id in added_ids}
        byte_level_tokenizer(path, used, added, vocabulary.merges, pre, bos).save(str(folder / "tokenizer.json"))
    elif model == "llama":
        settings["tokenizer_class"] = "LlamaTokenizer"
        settings["legacy"] = False
        settings["added_tokens_decoder"] = {
            str(token_id): {"content": tokens[token_id], "special": kinds[token_id] != USER_DEFINED,
                            "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
            for token_id in added_ids
        }  # fmt: skip
        _write_sentencepiece(vocabulary, path, folder)
    else:
        raise CheckpointError(
            f"{path}: the vocabulary is of kind {model!r:.80}; this course reads 'gpt2' (byte-level BPE) and "
            "'llama' (SentencePiece)."
        )
    if vocabulary.chat_template is not None:
        settings["chat_template"] = vocabulary.chat_template
    write_json(folder / "tokenizer_config.json", settings)
    keys = [key for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None]
    write_json(folder / "generation_config.json", {key: config[key] for key in keys})


def byte_level_tokenizer(
    path: Path, vocabulary: dict[str, int], added: dict[str, bool], merges: list[str], pre: str, bos: str | None
):
    """Returns a `tokenizers.Tokenizer`.

    path: named in errors. vocabulary: ids by token. added: tokens of it that are searched for before the text is split,
    and whether they are special. merges: as "a b", the most frequent first. pre: the name of the splitting rule. bos:
    put in front of each text. Raises CheckpointError for an unknown rule or an impossible merge.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    if pre not in SPLITTING_RULES:
        raise CheckpointError(
            f"{path}: its text is split into words by the rule {pre!r:.80}, and this course knows only "
            f"{', '.join(SPLITTING_RULES)}. With another rule the model would read other tokens than it was trained "
            "on. Take the model's own tokenizer.json and safetensors."
        )
    pairs = [tuple(merge.split(" ")) for merge in merges]
    for merge, pair in zip(merges, pairs):
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise CheckpointError(
                f"{path}: {merge!r:.80} is no merge of this vocabulary: two tokens with a space between them, which "
                "together are a token."
            )
    # Llama 3 uses a word that is a token as it is, even where its merges would not produce it.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre in ("llama-bpe", "llama3")))
    if SPLITTING_RULES[pre] == [QWEN2_WORDS]:
        tokenizer.normalizer = normalizers.NFC()
    steps = [
        pre_tokenizers.Digits(individual_digits=True)
        if rule == "digits"
        else pre_tokenizers.Split(Regex(rule), behavior="isolated")
        for rule in SPLITTING_RULES[pre]
    ]
    own_rule = pre in ("gpt-2", "smollm")
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=own_rule))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token, special in added.items()])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return tokenizer


def _write_sentencepiece(vocabulary: Vocabulary, path: Path, folder: Path) -> None:
    """Write tokenizer.model, a protocol buffer. Its pieces have scores: BPE merges the pair with the highest first."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    tokens, scores, kinds = vocabulary.tokens, vocabulary.scores, vocabulary.token_type
    if len(scores) != len(tokens):
        raise CheckpointError(f"{path}: {len(tokens)} tokens but {len(scores)} scores.")
    model = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(tokens, scores, kinds):
        model.pieces.add(piece=token, score=score, type=kind)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = BYTE in kinds
    for role, name in ROLES.items():
        token_id = vocabulary.token_ids().get(role)
        if name == "unk" and token_id is None and UNKNOWN in kinds:
            token_id = kinds.index(UNKNOWN)
        setattr(trainer, f"{name}_id", -1 if token_id is None else token_id)
        if token_id is not None:
            setattr(trainer, f"{name}_piece", tokens[token_id])
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = vocabulary.add_space_prefix
    normalizer.remove_extra_whitespaces = vocabulary.remove_extra_whitespaces
    normalizer.escape_whitespaces = True
    serialized = model.SerializeToString()
    try:
        sentencepiece.SentencePieceProcessor(model_proto=serialized)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: its vocabulary is no SentencePiece model: {error!s:.200}") from error
    (folder / "tokenizer.model").write_bytes(serialized)
