"""`tokenizer.model`, by chunks as in the original."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from llava_serve.checkpoints.files import read_json
from llava_serve.checkpoints.spec import TokenizerSpec
from llava_serve.checkpoints.tokenizer_files import is_word, load_sentencepiece, markup
from llava_serve.prompts.conversation import Control, ImageSlot, Span, Text
from llava_serve.text.interface import SHRINKING, Tokenizer
from llava_serve.text.marks import cut_marks, find_marks, strip_beside
from llava_serve.types import IMAGE_TOKEN_ID

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


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
        self._shown = {self._added[token]: token for token in spec.shown_tokens}
        words = [re.escape(token) for token in spec.shown_tokens if is_word(token, is_special=False)]
        self._words = re.compile(f"({'|'.join(sorted(words, key=len, reverse=True))})") if words else None
        self.longest = max(len(self._pieces.id_to_piece(i)) for i in range(base)) * SHRINKING
        self._silent = {i for i in range(base) if self._pieces.is_control(i) or self._pieces.is_unknown(i)}
        # A user-defined piece such as <|im_end|> matches inside any text, so a user's text is split inside its name.
        self._marks = find_marks(markup(self._pieces))
        added = config.get("added_tokens_decoder", {}).values()
        self._strip_right = {token["content"] for token in added if token.get("rstrip")}
        self._strip_left = {token["content"] for token in added if token.get("lstrip")}

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
        is_piece = token_id < self._pieces.get_piece_size()
        return token_id in self._shown or (is_piece and token_id not in self._silent)

    def stays_open(self, token_id: int) -> bool:
        if token_id in self._shown:
            return False
        base = self._pieces.get_piece_size()
        return token_id >= base or token_id in self._silent or bool(self._pieces.is_byte(token_id))

    def decode(self, ids: Sequence[int]) -> str:
        spoken = [int(i) for i in ids if self.has_text(i)]
        if self._fast_decoding:
            return self._decode_runs(spoken)
        texts: list[str] = []  # the original puts a space beside each added token
        for is_shown, group in groupby(spoken, self._shown.__contains__):
            run = list(group)
            texts += [self._shown[i] for i in run] if is_shown else [str(self._pieces.decode(run))]
        return " ".join(texts)

    def _decode_runs(self, ids: Sequence[int]) -> str:
        text = ""
        for is_byte, run in groupby(ids, lambda i: i not in self._shown and self._pieces.is_byte(i)):
            pieces = [self._shown.get(i) or str(self._pieces.id_to_piece(i)) for i in run]
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
        spans = strip_beside(self._with_words(spans), self._strip_right, self._strip_left)
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

    def _with_words(self, spans: Sequence[Span]) -> Sequence[Span]:
        """The spans, with each added word in a text as a token of its own."""
        if self._words is None:
            return spans
        found: list[Span] = []
        for span in spans:
            if isinstance(span, Text):
                parts = self._words.split(span.text)
                found += [Control(part) if i % 2 else Text(part) for i, part in enumerate(parts) if part]
            else:
                found.append(span)
        return found

    def _encode_text(self, text: str, *, dummy_prefix: bool) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(cut_marks(self._marks, text)):
            pieces = self._pieces if i == 0 and dummy_prefix else self._without_prefix
            ids += pieces.encode(part)
        return ids
