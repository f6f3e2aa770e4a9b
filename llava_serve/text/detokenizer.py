"""Token ids to text, as they are generated, with stop strings. Joined, the pieces are the stripped answer."""

from __future__ import annotations

from collections.abc import Sequence

from llava_serve.text.tokenizer import Tokenizer

_UNDECIDED = "\N{REPLACEMENT CHARACTER}"
_WINDOW = 12
"""Ids that are decoded again with each new one: enough for a character of several bytes and the spaces around it."""


class Detokenizer:
    """Text of one answer, piece by piece.

    An incomplete character, the beginning of a stop string and trailing white space are held back until the next ids
    decide them.

    Args:
        stop: strings that end the answer; the earliest counts, and is not part of the text. White space before it is.
        template_stop: those of the template, which end an answer as an end token does: white space before them is not
            part of the text.
        include_stop: a string of `stop` that ends the answer is a part of it.
        min_tokens: stop strings count in the text after this many ids.
        after: ids of the prompt, where the answer continues a text: white space at its start is then a part of it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        template_stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        after: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._template_stop = tuple(template_stop)
        self._include_stop = include_stop
        self._longest = max(map(len, (*stop, *template_stop)), default=0)
        self._unchecked = min_tokens  # ids that are left before stop strings count
        self._ids: list[int] = list(after[-_WINDOW:])  # the window
        self._decoded = tokenizer.decode(self._ids) if after else ""  # the part of the window's text that is decoded
        self._held = ""  # decoded, but not yet returned
        self._started = bool(after)
        self.stopped = False
        """A stop string was found: later text is not part of the answer."""

    def push(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The text that new ids decide; with `last`, all the rest. It is empty after a stop string."""
        if self.stopped:
            return ""
        self._held += self._decode(ids, last)
        self._unchecked -= len(ids)
        kept = self._cut() if self._unchecked < 0 else None
        if kept is not None:
            self.stopped = True
            self._held = kept
        if not self._started:
            self._held = self._held.lstrip()
            self._started = bool(self._held)
        if last or self.stopped:
            ready, self._held = self._held if self.stopped else self._held.rstrip(), ""
            return ready
        ready = self._held[: len(self._held) - self._open_stop()].rstrip()
        self._held = self._held[len(ready) :]
        return ready

    def _decode(self, ids: Sequence[int], last: bool) -> str:
        """New text; the window moves on once the text before it cannot change."""
        self._ids += ids
        text = self._tokenizer.decode(self._ids)
        count = len(self._ids) if last else self._decided_ids()
        decided = text if count == len(self._ids) else self._tokenizer.decode(self._ids[:count])
        if not last:
            decided = decided.rstrip(_UNDECIDED)
        new = decided[len(self._decoded) :]
        self._decoded = max(self._decoded, decided, key=len)
        if len(self._ids) > 2 * _WINDOW and self._decoded == text:
            tail = self._tokenizer.decode(self._ids[-_WINDOW:])
            if tail and text.endswith(tail):
                self._ids = self._ids[-_WINDOW:]
                self._decoded = tail
        return new

    def _decided_ids(self) -> int:
        """The number of ids whose text cannot change any more."""
        count = len(self._ids)
        while count and self._tokenizer.stays_open(self._ids[count - 1]):
            count -= 1
        return count

    def _cut(self) -> str | None:
        """What stays of the held text where a stop string is in it: the earliest counts."""
        found = [(at, stop) for stop in (*self._stop, *self._template_stop) if (at := self._held.find(stop)) >= 0]
        if not found:
            return None
        at, stop = min(found)
        if stop not in self._stop:
            return self._held[:at].rstrip()
        return self._held[: at + len(stop) if self._include_stop else at]

    def _open_stop(self) -> int:
        """The length of the longest end of the held text that may begin a stop string."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in (*self._stop, *self._template_stop)):
                return length
        return 0
