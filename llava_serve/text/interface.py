"""What every tokenizer does: text to token ids and back, without torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from llava_serve.prompts.conversation import Control, ImageSlot, Span, Text, merge_text

SHRINKING = 4
"""How far a normalizer may shorten a text before it is split into tokens."""


class Tokenizer(ABC):
    """The interface of a tokenizer. Build one with `text.tokenizer.load_tokenizer`."""

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
