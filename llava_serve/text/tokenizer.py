"""Text to token ids and back, without torch: sentencepiece by chunks, as in the original, or a `tokenizer.json`."""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from itertools import groupby

from tokenizers import Tokenizer as FastTokenizer

from llava_serve.checkpoints.files import read_json
from llava_serve.checkpoints.spec import TokenizerSpec
from llava_serve.checkpoints.tokenizer_files import load_fast, load_sentencepiece
from llava_serve.prompts.conversation import Control, ImageSlot, Span, Text, merge_text
from llava_serve.types import IMAGE_TOKEN_ID

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + at): byte for at, byte in enumerate(byte for byte in range(0x100) if byte not in _PRINTABLE)
}
"""Byte-level vocabularies write each byte as a character: a printable one as itself, the others from U+0100 on."""


_SHRINKING = 4
"""How far a normalizer may shorten a text before it is split into tokens."""


class Tokenizer(ABC):
    """The interface of a tokenizer. Build one with `load_tokenizer`."""

    size: int
    """Tokens in the vocabulary, added ones included."""

    longest: int
    """The most characters of a text in one token, so that a text's length is a lower bound of its tokens."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of a control token by its name; None where the vocabulary has none."""

    @abstractmethod
    def token_text(self, token_id: int) -> str:
        """A token by itself, as shown beside its log-probability; empty for an id outside the vocabulary."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """A token's text in UTF-8, which can be a part of a character. That of a control token is its name."""

    @abstractmethod
    def has_text(self, token_id: int) -> bool:
        """Whether a token is a part of the decoded text: it is in the vocabulary, and no control token."""

    @abstractmethod
    def stays_open(self, token_id: int) -> bool:
        """Whether later tokens may change the text up to this one: it is a byte (`<0x0A>`), and an invalid byte changes
        the whole run of bytes; or it has no text (a control token, an id outside the vocabulary) and ends no run."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens have none, an incomplete character is U+FFFD."""

    @abstractmethod
    def _encode(self, spans: Sequence[Span]) -> list[int]:
        """Ids of spans whose controls are all in the vocabulary."""

    def encode(self, spans: Sequence[Span]) -> list[int]:
        """Ids of a prompt, with one `IMAGE_TOKEN_ID` where each image goes.

        Only `Control` and `ImageSlot` spans become control tokens and image slots; a `Text` that spells one does not.
        """
        known = [
            Text(span.token) if isinstance(span, Control) and self.token_id(span.token) is None else span
            for span in spans
        ]
        return self._encode(merge_text(known))

    def encode_text(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a prompt that is one text. What the tokenizer begins a prompt with may be left out."""
        ids = self.encode([Text(text)])
        if add_special_tokens:
            return ids
        opening = self.encode([ImageSlot()])[:-1]
        return ids[len(opening) :] if ids[: len(opening)] == opening else ids


def load_tokenizer(spec: TokenizerSpec) -> Tokenizer:
    """Loads the tokenizer of a checkpoint.

    Raises:
        CheckpointError: a file is damaged.
    """
    return SentencePieceTokenizer(spec) if spec.kind == "sentencepiece" else JsonTokenizer(spec)


class SentencePieceTokenizer(Tokenizer):
    """`tokenizer.model`, by the original's rules: each chunk between images begins with a dummy space; text after a
    control token inside a chunk does so only if `tokenizer_config.json` sets `legacy`."""

    def __init__(self, spec: TokenizerSpec) -> None:
        config = read_json(spec.folder, "tokenizer_config.json", optional=True)
        self._pieces = load_sentencepiece(spec.folder)
        self._without_prefix = load_sentencepiece(spec.folder, dummy_prefix=False)
        self._add_bos = bool(config.get("add_bos_token", True)) and self._pieces.bos_id() >= 0
        self._legacy = bool(config.get("legacy", True))
        self._fast_decoding = spec.fast_decoding
        base = self._pieces.get_piece_size()
        self.size = base + len(spec.added_tokens)
        self._added = {token: base + i for i, token in enumerate(spec.added_tokens)}
        self.longest = max(len(self._pieces.id_to_piece(i)) for i in range(base)) * _SHRINKING
        self._silent = {i for i in range(base) if self._pieces.is_control(i) or self._pieces.is_unknown(i)}
        # A user-defined piece such as <|im_end|> matches inside any text, so a user's text is split inside its name.
        marks = [piece for piece in map(self._pieces.id_to_piece, range(base)) if re.fullmatch(r"<\|.+\|>", piece)]
        self._marks = re.compile("|".join(map(re.escape, marks))) if marks else None

    def token_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        found = int(self._pieces.piece_to_id(token))
        return None if found == self._pieces.unk_id() else found

    def token_text(self, token_id: int) -> str:
        if token_id >= self._pieces.get_piece_size():
            return next((token for token, added in self._added.items() if added == token_id), "")
        return str(self._pieces.id_to_piece(token_id)).replace("▁", " ")

    def token_bytes(self, token_id: int) -> bytes:
        text = self.token_text(token_id)
        byte = _BYTE.fullmatch(text)
        return bytes.fromhex(byte[1]) if byte else text.encode()

    def has_text(self, token_id: int) -> bool:
        return token_id < self._pieces.get_piece_size() and token_id not in self._silent

    def stays_open(self, token_id: int) -> bool:
        base = self._pieces.get_piece_size()
        return token_id >= base or token_id in self._silent or bool(self._pieces.is_byte(token_id))

    def decode(self, ids: Sequence[int]) -> str:
        base = self._pieces.get_piece_size()
        spoken = [int(i) for i in ids if i < base and i not in self._silent]
        return self._decode_runs(spoken) if self._fast_decoding else str(self._pieces.decode(spoken))

    def _decode_runs(self, ids: Sequence[int]) -> str:
        text = ""
        for is_byte, run in groupby(ids, self._pieces.is_byte):
            pieces = [str(self._pieces.id_to_piece(i)) for i in run]
            if is_byte:
                data = bytes(int(piece[3:5], 16) for piece in pieces)  # <0x0A>
                try:
                    text += data.decode()
                except UnicodeDecodeError:
                    text += "\ufffd" * len(data)
            else:
                text += "".join(pieces).replace("▁", " ")
        return text.removeprefix(" ")

    def _encode(self, spans: Sequence[Span]) -> list[int]:
        ids = [int(self._pieces.bos_id())] if self._add_bos else []
        starts_chunk = True
        if ids and spans and spans[0] == Control(self._pieces.id_to_piece(ids[0])):  # a chat template writes it
            spans = spans[1:]
        for span in spans:
            if isinstance(span, Text):
                ids += self._encode_text(span.text, dummy_prefix=starts_chunk or self._legacy)
            else:
                found = IMAGE_TOKEN_ID if isinstance(span, ImageSlot) else self.token_id(span.token)
                assert found is not None
                ids.append(found)
            starts_chunk = isinstance(span, ImageSlot)
        return ids

    def _encode_text(self, text: str, *, dummy_prefix: bool) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(_cut(self._marks, text)):
            pieces = self._pieces if i == 0 and dummy_prefix else self._without_prefix
            ids += pieces.encode(part)
        return ids


class JsonTokenizer(Tokenizer):
    """`tokenizer.json`. In transformers' layout the prompt is encoded as one string, in the original's by chunks."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self._tokenizer = load_fast(spec.folder)
        if spec.added_tokens:
            self._tokenizer.add_special_tokens(list(spec.added_tokens))
        self.size = self._tokenizer.get_vocab_size()
        self.longest = max(map(len, self._tokenizer.get_vocab())) * _SHRINKING
        self._image_token = spec.image_token
        self._image_id = None if spec.image_token is None else self._tokenizer.token_to_id(spec.image_token)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._byte_level = _is_byte_level(self._tokenizer)
        self._silent = {token_id for token_id, token in added.items() if token.special}
        marks = [token.content for token in added.values() if token.content.strip()]  # runs of spaces are text
        self._marks = re.compile("|".join(map(re.escape, marks))) if marks else None
        config = read_json(spec.folder, "tokenizer_config.json", optional=True)
        bos = config.get("bos_token")
        self._bos = bos["content"] if isinstance(bos, dict) else bos

    def token_id(self, token: str) -> int | None:
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)

    def token_text(self, token_id: int) -> str:
        piece = self._tokenizer.id_to_token(token_id)
        if piece is not None and _BYTE.fullmatch(piece):
            return str(piece)
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        piece = self._added.get(token_id) or self._tokenizer.id_to_token(token_id) or ""
        if token_id in self._added:
            return str(piece).encode()
        if self._byte_level:
            return bytes(_BYTE_OF[character] for character in piece)
        byte = _BYTE.fullmatch(piece)
        return bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode()

    def has_text(self, token_id: int) -> bool:
        return token_id not in self._silent and self._tokenizer.id_to_token(token_id) is not None

    def stays_open(self, token_id: int) -> bool:
        piece = self._tokenizer.id_to_token(token_id)
        return piece is None or token_id in self._silent or _BYTE.fullmatch(piece) is not None

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True))

    def _encode(self, spans: Sequence[Span]) -> list[int]:
        if self._image_token is None:
            return self._encode_chunks(spans)
        if self._spells_controls(spans):
            return self._encode_apart(spans)
        return self._encode_whole(spans)

    def _spells_controls(self, spans: Sequence[Span]) -> bool:
        """Whether a text spells the name of a control token."""
        return any(isinstance(span, Text) and self._marks and self._marks.search(span.text) for span in spans)

    def _encode_whole(self, spans: Sequence[Span], *, opening: bool = True) -> list[int]:
        """Encodes spans as one string, as transformers does."""
        text = "".join(self._spelling(span) for span in spans)
        starts_with_bos = bool(self._bos) and text.startswith(str(self._bos))
        ids = self._tokenizer.encode(text, add_special_tokens=opening and not starts_with_bos).ids
        return [IMAGE_TOKEN_ID if i == self._image_id else i for i in ids]

    def _encode_chunks(self, spans: Sequence[Span]) -> list[int]:
        encode = self._encode_apart if self._spells_controls(spans) else self._encode_whole
        ids = encode([]) if spans and isinstance(spans[0], ImageSlot) else []
        for is_image, group in groupby(spans, lambda span: isinstance(span, ImageSlot)):
            chunk = list(group)
            ids += [IMAGE_TOKEN_ID] * len(chunk) if is_image else encode(chunk, opening=not ids)
        return ids

    def _encode_apart(self, spans: Sequence[Span], *, opening: bool = True) -> list[int]:
        """Encodes span by span: a text that spells a control token is split inside its name, so that it stays text."""
        ids: list[int] = self._tokenizer.encode("").ids if opening else []
        for span in spans:
            if isinstance(span, Text):
                for part in _cut(self._marks, span.text):
                    ids += self._tokenizer.encode(part, add_special_tokens=False).ids
            elif isinstance(span, ImageSlot):
                ids.append(IMAGE_TOKEN_ID)
            elif not (ids and span.token == self._bos and len(ids) == 1 and ids[0] == self.token_id(span.token)):
                found = self.token_id(span.token)
                assert found is not None
                ids.append(found)
        return ids

    def _spelling(self, span: Span) -> str:
        if isinstance(span, Text):
            return span.text
        return span.token if isinstance(span, Control) else str(self._image_token)


def _is_byte_level(tokenizer: FastTokenizer) -> bool:
    """Whether the vocabulary is byte-level, by its decoder's own description."""
    described = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder else {}
    return any(each["type"] == "ByteLevel" for each in (described, *described.get("decoders", ())) if each)


def _cut(marks: re.Pattern[str] | None, text: str) -> Iterator[str]:
    """Splits a text after the first character of each mark in it, so that no part holds a whole mark."""
    start = 0
    for match in marks.finditer(text) if marks else ():
        yield text[start : match.start() + 1]
        start = match.start() + 1
    if start < len(text):
        yield text[start:]
