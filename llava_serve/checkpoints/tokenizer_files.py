"""The tokenizer's description: which file it is, and which tokens follow its vocabulary."""

from __future__ import annotations

import re
from codecs import BOM_UTF8
from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer as FastTokenizer

from llava_serve.checkpoints.bounds import check_size
from llava_serve.checkpoints.files import read_json
from llava_serve.checkpoints.spec import TokenizerSpec
from llava_serve.errors import CheckpointError

_MARKUP = re.compile(r"<\S+>|\[\S+\]")


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
        known += [token for token in extra if token not in known]
        return TokenizerSpec(folder, "sentencepiece", tuple(known), image_token)
    have = load_fast(folder)
    return TokenizerSpec(
        folder, "tokenizers", tuple(token for token in extra if have.token_to_id(token) is None), image_token
    )


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
    """Loads `tokenizer.json`.

    Raises:
        CheckpointError: damaged, or too large.
    """
    check_size(folder / "tokenizer.json")
    try:
        return FastTokenizer.from_buffer((folder / "tokenizer.json").read_bytes().removeprefix(BOM_UTF8))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"tokenizer.json in {folder} is damaged; download it again.") from error


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
    `tokenizer.model` also its control pieces and its markup. Runs of white space are text."""
    if spec.kind == "tokenizers":
        names = [token.content for token in load_fast(spec.folder).get_added_tokens_decoder().values()]
    else:
        pieces = load_sentencepiece(spec.folder)
        ids = range(pieces.get_piece_size())
        names = [str(pieces.id_to_piece(i)) for i in ids if pieces.is_control(i)] + markup(pieces)
    return tuple(name for name in (*names, *spec.added_tokens) if name.strip())


def markup(pieces: sentencepiece.SentencePieceProcessor) -> list[str]:
    """The pieces of `tokenizer.model` that sentencepiece finds in any text and that are names of tokens, such as
    `<|im_start|>`, `<start_of_turn>` and `[INST]`. Other user-defined pieces, without brackets, are text."""
    proto = ModelProto.FromString(pieces.serialized_model_proto())
    user_defined = ModelProto.SentencePiece.USER_DEFINED
    return [each.piece for each in proto.pieces if each.type == user_defined and _MARKUP.fullmatch(each.piece)]


def _behind_vocabulary(folder: Path) -> list[str]:
    size = load_sentencepiece(folder).get_piece_size()
    added: dict[str, int] = read_json(folder, "added_tokens.json", optional=True)
    for token_id, token in (
        read_json(folder, "tokenizer_config.json", optional=True).get("added_tokens_decoder", {}).items()
    ):
        added[token["content"]] = int(token_id)
    behind = sorted((token_id, token) for token, token_id in added.items() if token_id >= size)
    if [token_id for token_id, _ in behind] != list(range(size, size + len(behind))):
        raise CheckpointError(
            f"added_tokens.json or tokenizer_config.json in {folder} leaves gaps after the vocabulary of {size}; "
            "use tokenizer files of one checkpoint."
        )
    return [token for _, token in behind]
