"""How much prefill a step may take on, so that those who are talking do not stall."""

from __future__ import annotations

from dataclasses import dataclass

_STRETCH = 2.5
"""A step with prefill may take this many times as long as one without."""
_LEAST_TOKENS = 32
"""Prefill that every step may do: a prompt must end some day."""
_WEIGHT = 0.25
"""Of the newest measurement."""


@dataclass(slots=True)
class Budget:
    """What a step may still take on. A tile costs as much time as `tile_cost` positions."""

    tokens: int
    tiles: int
    tile_cost: int = 0
    fresh: bool = True

    def take_tiles(self, wanted: int) -> int:
        """Takes as many tiles as there is room for; one at least where nothing but decoding is in the step yet."""
        affordable = self.tokens // self.tile_cost if self.tile_cost else wanted
        taken = min(wanted, self.tiles, max(affordable, int(self.fresh)))
        self.tiles -= taken
        self.tokens -= taken * self.tile_cost
        self.fresh = self.fresh and not taken
        return taken

    def take_tokens(self, taken: int) -> None:
        """Takes positions of a prompt."""
        self.tokens -= taken
        self.fresh = False


class Pacer:
    """Learns what a decode step, a position of prefill and a tile cost, in seconds, and gives each step its budget.

    Args:
        max_tokens, max_tiles: limits of any step.
    """

    def __init__(self, max_tokens: int, max_tiles: int) -> None:
        self._max_tokens = max_tokens
        self._max_tiles = max_tiles
        self._decode: float | None = None
        self._token: float | None = None
        self._tile: float | None = None

    def budget(self, decoding: int) -> Budget:
        """What fits into the next step, beside `decoding` rows that advance by one position each."""
        if not decoding or self._decode is None or self._token is None:
            return Budget(self._max_tokens, self._max_tiles)
        room = max(_LEAST_TOKENS, int((_STRETCH - 1) * self._decode / self._token))
        tile_cost = 0 if self._tile is None else int(self._tile / self._token)
        return Budget(min(self._max_tokens, decoding + room), self._max_tiles, tile_cost)

    def observe(self, seconds: float, decoding: int, tokens: int, tiles: int) -> None:
        """Learns from a step that computed `tokens` positions of prompts and `tiles` beside its decoding rows."""
        rest = seconds - (self._decode or 0.0) if decoding else seconds
        if tiles:
            self._tile = _blend(self._tile, (rest - tokens * (self._token or 0.0)) / tiles)
        elif tokens:
            self._token = _blend(self._token, rest / tokens)
        elif decoding:
            self._decode = _blend(self._decode, seconds)


def _blend(before: float | None, now: float) -> float:
    now = max(now, 1e-9)
    return now if before is None else before + _WEIGHT * (now - before)
