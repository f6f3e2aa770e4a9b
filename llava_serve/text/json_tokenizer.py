"""`tokenizer.json`, of either layout."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import groupby

from tokenizers import Tokenizer as FastTokenizer

from llava_serve.checkpoints.spec import TokenizerSpec
from llava_serve.checkpoints.tokenizer_files import is_word, load_fast, named_tokens
from llava_serve.prompts.conversation import Control, ImageSlot, Span, Text
from llava_serve.text.interface import SHRINKING, Tokenizer
from llava_serve.text.marks import cut_marks, find_marks, strip_beside
from llava_serve.types import IMAGE_TOKEN_ID

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + at): byte for at, byte in enumerate(byte for byte in range(0x100) if byte not in _PRINTABLE)
}
"""Byte-level vocabularies write each byte as a character: a printable one as itself, the others from U+0100 on."""


class JsonTokenizer(Tokenizer):
    """`tokenizer.json`. In transformers' layout the prompt is encoded as one string, in the original's by chunks."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self._tokenizer = load_fast(spec.folder)
        if spec.added_tokens:
            self._tokenizer.add_special_tokens(list(spec.added_tokens))
        self.size = self._tokenizer.get_vocab_size()
        self.longest = max(map(len, self._tokenizer.get_vocab())) * SHRINKING
        self._image_token = spec.image_token
        self._image_id = None if spec.image_token is None else self._tokenizer.token_to_id(spec.image_token)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._byte_level = _is_byte_level(self._tokenizer)
        self._silent = {token_id for token_id, token in added.items() if token.special}
        self._marks = find_marks(
            token.content
            for token in added.values()
            if token.content.strip() and not is_word(token.content, is_special=token.special)
        )
        self._strip_right = {token.content for token in added.values() if token.rstrip}
        self._strip_left = {token.content for token in added.values() if token.lstrip}
        self._bos = named_tokens(spec.folder).get("bos_token")

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
        for span in strip_beside(spans, self._strip_right, self._strip_left):
            if isinstance(span, Text):
                for part in cut_marks(self._marks, span.text):
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
