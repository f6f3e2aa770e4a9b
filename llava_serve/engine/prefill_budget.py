"""How much prefill a step may take on, so that those who are talking do not stall."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

_STRETCH = 2.25
"""A step with prefill may take this many times as long as one without."""
_LEAST_TOKENS = 32
"""Prefill that every step may do: a prompt must end some day."""
_FIRST_TOKENS = 64
"""Prefill of a step while its cost is not known."""
_STEPS = 7
"""Decode steps of which the median is taken."""
_AGAIN = 32
"""Steps with prefill after which there is one without: under a steady load there would be none to compare with."""
_MEMORY = 0.75
"""What a measurement still counts for after the next one."""


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


class _Rate:
    """Seconds per unit, as seconds over units of the latest measurements: long ones count for more than short ones."""

    def __init__(self) -> None:
        self._seconds = self._units = 0.0

    def add(self, seconds: float, units: int) -> None:
        self._seconds = self._seconds * _MEMORY + seconds
        self._units = self._units * _MEMORY + units

    @property
    def value(self) -> float:
        """0 while nothing is known."""
        return max(0.0, self._seconds / self._units) if self._units else 0.0


class PrefillBudget:
    """Learns what a decode step, a position of prefill and a tile cost, and gives each step its budget.

    Args:
        max_tokens, max_tiles: limits of any step.
    """

    def __init__(self, max_tokens: int, max_tiles: int) -> None:
        self._max_tokens = max_tokens
        self._max_tiles = max_tiles
        self._token, self._tile = _Rate(), _Rate()
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._since = 0  # steps with prefill since one without

    def budget(self, decoding: int) -> Budget:
        """What fits into the next step, beside `decoding` rows that advance by one position each."""
        if not decoding:
            return Budget(self._max_tokens, self._max_tiles)
        if not self._steps or self._since >= _AGAIN:
            return Budget(decoding, 0)
        step, token, tile = self._step, self._token.value, self._tile.value
        room = max(_LEAST_TOKENS, int((_STRETCH - 1) * step / token)) if step and token else _FIRST_TOKENS
        tile_cost = int(tile / token) if tile and token else room
        return Budget(min(self._max_tokens, decoding + room), self._max_tiles, tile_cost)

    def observe(self, seconds: float, decoding: int, tokens: int, tiles: int) -> None:
        """Learns from a step that computed `tokens` positions of prompts and `tiles` beside its decoding rows."""
        self._since += 1
        rest = seconds - self._step if decoding else seconds
        if tiles:
            self._tile.add(rest - tokens * self._token.value, tiles)
        elif tokens:
            self._token.add(rest, tokens)
        elif decoding:
            self._steps.append(seconds)
            self._since = 0

    @property
    def _step(self) -> float:
        """Of a step that only decodes: the median, since a step that was held up must not make others longer."""
        return median(self._steps) if self._steps else 0.0
