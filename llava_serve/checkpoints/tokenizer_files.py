"""The tokenizer's description: which file it is, and which tokens follow its vocabulary."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer as FastTokenizer

from llava_serve.checkpoints.bounds import check_size
from llava_serve.checkpoints.files import read_json
from llava_serve.checkpoints.spec import TokenizerSpec
from llava_serve.errors import CheckpointError

_MARKUP = re.compile(r"<\S+>|\[\S+\]")
_LLAVAS_OWN = ("<im_patch>", "<im_start>", "<im_end>")


def read_tokenizer(folder: Path, extra: list[str], image_token: str | None = None) -> TokenizerSpec:
    """Describes the tokenizer of a folder.

    Args:
        folder: that holds `tokenizer.model` or `tokenizer.json`.
        extra: tokens that are appended in this order, if the vocabulary lacks them.
        image_token: as `TokenizerSpec` has it; with one, `tokenizer.json` comes first.
    """
    prefer_json = image_token is not None and (folder / "tokenizer.json").is_file()
    if (folder / "tokenizer.model").is_file() and not prefer_json:
        known = _behind_vocabulary(folder)
        shown = tuple(token for token, is_special in known.items() if not is_special)
        names = (*known, *(token for token in extra if token not in known))
        return TokenizerSpec(folder, "sentencepiece", names, shown, image_token)
    have = load_fast(folder)
    missing = tuple(token for token in extra if have.token_to_id(token) is None)
    return TokenizerSpec(folder, "tokenizers", missing, image_token=image_token)


def load_sentencepiece(folder: Path, *, dummy_prefix: bool = True) -> sentencepiece.SentencePieceProcessor:
    """Loads `tokenizer.model`.

    Args:
        folder: that holds it.
        dummy_prefix: put a space before the text, as at the start of a sentence.

    Raises:
        CheckpointError: damaged, or too large.
    """
    check_size(folder / "tokenizer.model")
    try:
        model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
        model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.add_dummy_prefix and dummy_prefix
        return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    except (DecodeError, RuntimeError, OSError) as error:
        raise CheckpointError(f"tokenizer.model in {folder} is damaged; download it again.") from error


def load_fast(folder: Path) -> FastTokenizer:
    """Loads `tokenizer.json`, without what it says of cutting and filling up texts: that was for training.

    Raises:
        CheckpointError: damaged, or too large.
    """
    check_size(folder / "tokenizer.json")
    try:
        tokenizer = FastTokenizer.from_buffer((folder / "tokenizer.json").read_bytes().removeprefix(BOM_UTF8))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"tokenizer.json in {folder} is damaged; download it again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def has_token(spec: TokenizerSpec, token: str) -> bool:
    """Whether a name is one token."""
    if token in spec.added_tokens:
        return True
    if spec.kind == "tokenizers":
        return load_fast(spec.folder).token_to_id(token) is not None
    processor = load_sentencepiece(spec.folder)
    return bool(processor.piece_to_id(token) != processor.unk_id())


def control_tokens(spec: TokenizerSpec) -> tuple[str, ...]:
    """The names of the tokens that are found in a text as a whole: those that were added to the vocabulary, and in
    `tokenizer.model` also its control pieces and its markup. Added words and runs of white space are text."""
    if spec.kind == "tokenizers":
        added = load_fast(spec.folder).get_added_tokens_decoder().values()
        names = [token.content for token in added if not is_word(token.content, is_special=token.special)]
    else:
        pieces = load_sentencepiece(spec.folder)
        ids = range(pieces.get_piece_size())
        names = [str(pieces.id_to_piece(i)) for i in ids if pieces.is_control(i)] + markup(pieces)
    words = [name for name in spec.shown_tokens if is_word(name, is_special=False)]
    return tuple(name for name in (*names, *spec.added_tokens) if name.strip() and name not in words)


def is_word(name: str, *, is_special: bool) -> bool:
    """Whether an added token is a word, which any text may hold: it is not special, and has no brackets."""
    return not is_special and not _MARKUP.fullmatch(name)


def markup(pieces: sentencepiece.SentencePieceProcessor) -> list[str]:
    """The pieces of `tokenizer.model` that sentencepiece finds in any text and that are names of tokens, such as
    `<|im_start|>`, `<start_of_turn>` and `[INST]`. Other user-defined pieces, without brackets, are text."""
    proto = ModelProto.FromString(pieces.serialized_model_proto())
    user_defined = ModelProto.SentencePiece.USER_DEFINED
    return [each.piece for each in proto.pieces if each.type == user_defined and _MARKUP.fullmatch(each.piece)]


def _behind_vocabulary(folder: Path) -> dict[str, bool]:
    """The tokens behind the vocabulary of `tokenizer.model`, in order of their ids, and whether each is special."""
    pieces = load_sentencepiece(folder)
    size = pieces.get_piece_size()
    added: dict[str, int] = read_json(folder, "added_tokens.json", optional=True)
    config = read_json(folder, "tokenizer_config.json", optional=True)
    special = {*_LLAVAS_OWN, *_special_names(read_json(folder, "special_tokens_map.json", optional=True) | config)}
    for token_id, token in config.get("added_tokens_decoder", {}).items():
        added[token["content"]] = int(token_id)
        if token.get("special"):
            special.add(token["content"])
    for token, token_id in added.items():
        if type(token_id) is not int:
            raise CheckpointError(
                f"added_tokens.json in {folder} has {token[:100]!r} as {token_id!r}, which is no token."
            )
        if 0 <= token_id < size and pieces.id_to_piece(token_id) != token:
            raise CheckpointError(
                f"added_tokens.json or tokenizer_config.json in {folder} has {token[:100]!r} as token {token_id}, and "
                f"tokenizer.model {pieces.id_to_piece(token_id)!r}: use tokenizer files of one checkpoint."
            )
    behind = sorted((token_id, token) for token, token_id in added.items() if token_id >= size)
    if [token_id for token_id, _ in behind] != list(range(size, size + len(behind))):
        raise CheckpointError(
            f"added_tokens.json or tokenizer_config.json in {folder} leaves gaps after the vocabulary of {size}; "
            "use tokenizer files of one checkpoint."
        )
    return {token: token in special for _, token in behind}


def named_tokens(folder: Path) -> dict[str, str]:
    """The tokens that transformers knows by name, and gives a chat template: those of every tokenizer, such as
    `bos_token`, and a model's own, such as `image_token`."""
    config = read_json(folder, "tokenizer_config.json", optional=True)
    if "added_tokens_decoder" not in config:  # beside which transformers does not read the older file
        config |= read_json(folder, "special_tokens_map.json", optional=True)
    named = {name: value for name, value in config.items() if name.endswith("_token")}
    for key in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(config.get(key), dict):
            named |= config[key]
    contents = {name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()}
    return {name: content for name, content in contents.items() if isinstance(content, str)}


def _special_names(config: dict[str, Any]) -> Iterator[str]:
    """The tokens that a tokenizer's files name by their roles, such as `eos_token`."""
    for role, value in config.items():
        if role.endswith("_token") or role == "additional_special_tokens":
            for each in value if isinstance(value, list) else [value]:
                yield str(each.get("content") if isinstance(each, dict) else each)
