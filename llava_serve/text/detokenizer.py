"""Ids to text as they come, with stop strings. Joined, the pieces are the stripped answer."""

from __future__ import annotations

from collections.abc import Sequence

from llava_serve.text.tokenizer import Tokenizer

_UNDECIDED = "\N{REPLACEMENT CHARACTER}"
_WINDOW = 12
"""Ids that are decoded again with each new one: enough for a character of several bytes and the spaces about it."""


class Detokenizer:
    """Text of one answer, piece by piece.

    A character whose bytes are not all there, the beginning of a stop string, and trailing white space are held back
    until they are decided.

    Args:
        stop: strings that end the answer; the earliest counts, and is not part of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._longest = max(map(len, self._stop), default=0)
        self._ids: list[int] = []  # the window
        self._decoded = ""  # what of the window's text has been taken
        self._held = ""  # taken, but not yet given out
        self._started = False
        self.stopped = False
        """A stop string was met: what follows is not part of the answer."""

    def push(self, ids: Sequence[int], *, last: bool = False) -> str:
        """The text that new ids decide; with `last`, all that is left. Nothing comes after a stop string."""
        if self.stopped:
            return ""
        self._held += self._decode(ids, last)
        cut = self._find_stop()
        if cut is not None:
            self.stopped = True
            self._held = self._held[:cut]
        if not self._started:
            self._held = self._held.lstrip()
            self._started = bool(self._held)
        if last or self.stopped:
            ready, self._held = self._held.rstrip(), ""
            return ready
        ready = self._held[: len(self._held) - self._open_stop()].rstrip()
        self._held = self._held[len(ready) :]
        return ready

    def _decode(self, ids: Sequence[int], last: bool) -> str:
        """New text; the window moves on once what is behind it cannot change."""
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
        """Ids before those at the end whose text may still change."""
        count = len(self._ids)
        while count and self._tokenizer.stays_open(self._ids[count - 1]):
            count -= 1
        return count

    def _find_stop(self) -> int | None:
        """Where the earliest stop string begins in what is held back."""
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        return min(found, default=None)

    def _open_stop(self) -> int:
        """Length of the longest end of what is held that could become a stop string."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0
