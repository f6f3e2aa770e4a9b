"""How much prefill a step may do, so that decoding sequences do not stall."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

_MAX_SLOWDOWN = 3.0
"""A step with prefill may take at most this many times as long as a step that only decodes. With much less, many
sequences wait for their prefill, few decode, and a step of few is short: so prompts advance still more slowly."""
MIN_TOKENS = 32
"""Prefill that every step may do on a CPU."""
CUDA_MIN_TOKENS = 256
"""The same on CUDA, where so few positions cost little more than none: the weights are read, and kernels launched, once
for all."""
_INITIAL_TOKENS = 64
"""Prefill of a step while its cost is unknown."""
_WINDOW = 7
"""Decode-only steps of about as many sequences of which the median is taken: online requests are often few, and batch
work beside them or in their place many."""
_DIFFERENT = 1.5
"""So many times as many positions are clearly more: the slope between such measurements counts."""
_REMEASURE_AFTER = 32
"""Steps with prefill after which one only decodes: under a steady load none would otherwise be measured."""
_DECAY = 0.75
"""The weight of a measurement after the next one."""


@dataclass(slots=True)
class StepBudget:
    """What a step may still compute. A tile costs as much time as `tile_cost` positions.

    Attributes:
        batch: batch work takes part.
        batch_tokens: the most prefill of batch work; None is no limit of its own.
        batch_tile: batch work may encode one tile, whatever it costs.
    """

    tokens: int
    tiles: int
    tile_cost: int = 0
    decode_only: bool = True
    batch: bool = True
    batch_tokens: int | None = None
    batch_tile: bool = True

    def limit_to_batch(self) -> None:
        """What is left is for the prefill of batch work. Where tiles have no price, as beside online prompts alone, it
        encodes none but the one that it may always."""
        if self.batch_tokens is None:
            return
        self.tokens = min(self.tokens, self.batch_tokens)
        self.decode_only = self.decode_only and self.batch_tile
        if not self.tile_cost:
            self.tiles = min(self.tiles, int(self.decode_only))

    def take_tiles(self, wanted: int) -> int:
        """Takes as many tiles as the budget allows; at least one while the step only decodes."""
        affordable = self.tokens // self.tile_cost if self.tile_cost else wanted
        taken = min(wanted, self.tiles, max(affordable, int(self.decode_only)))
        self.tiles -= taken
        self.tokens -= taken * self.tile_cost
        self.decode_only = self.decode_only and not taken
        return taken

    def take_tokens(self, taken: int) -> None:
        """Takes positions of a prompt."""
        self.tokens -= taken
        self.decode_only = False


class _Rate:
    """Seconds per unit: a decaying sum of seconds over one of units, so that long measurements weigh more."""

    def __init__(self) -> None:
        self._seconds = self._units = 0.0

    def add(self, seconds: float, units: int) -> None:
        self._seconds = self._seconds * _DECAY + seconds
        self._units = self._units * _DECAY + units

    @property
    def value(self) -> float:
        """0 while nothing is measured."""
        return max(0.0, self._seconds / self._units) if self._units else 0.0


class _Line:
    """Seconds of so many units as a constant and a slope.

    The slope is the median of those between the last measurements of clearly different sizes, so that a few slow steps
    do not matter (Theil and Sen). Where there are none, or it is not positive, all time is blamed on the units.
    """

    def __init__(self) -> None:
        self.constant = self.slope = 0.0
        self._rate = _Rate()
        self._measured: deque[tuple[int, float]] = deque(maxlen=_WINDOW)

    def add(self, seconds: float, units: int, *, fit: bool) -> None:
        """A measurement; without `fit` it counts for the rate alone."""
        self._rate.add(seconds, units)
        if fit:
            self._measured.append((units, seconds))
        self.constant, self.slope = 0.0, self._rate.value
        slopes = [
            (more - less) / (large - small)
            for small, less in self._measured
            for large, more in self._measured
            if large >= _DIFFERENT * small
        ]
        if slopes and (slope := median(slopes)) > 0:
            constant = median(seconds - slope * units for units, seconds in self._measured)
            if constant > 0:
                self.constant, self.slope = constant, slope

    def seconds(self, units: int) -> float:
        """Those of so many units; 0 of none."""
        return self.constant + self.slope * units if units else 0.0

    def units(self, seconds: float) -> int:
        """As many as take these seconds, by the line at most twice as many as were measured; `slope` is not 0."""
        by_line = (seconds - self.constant) / self.slope
        if self.constant:
            measured, rate = 2 * max(units for units, _ in self._measured), self._rate.value
            by_line = min(by_line, max(measured, seconds / rate if rate else 0))
        return max(0, int(by_line))


class PrefillBudget:
    """Learns what a decode step, a position of prefill and a tile cost, and gives each step its budget.

    Prefill adds a + b * positions seconds to a decode step. On a GPU a is large: decode steps are launched as graphs,
    and those with prefill kernel by kernel. Without a, the positions would be blamed for it, and prompts be cut into
    ever smaller pieces, each of which takes about as long as the whole.

    Args:
        max_tokens, max_tiles: limits of any step.
        min_tokens: prefill that every step may do: every prompt makes progress.
        padded: the number of positions to which a step is padded: what is padded costs as much as prefill.

    Attributes:
        prefill_seconds: by which prefill and the tower have made steps longer, since the start.
    """

    def __init__(
        self, max_tokens: int, max_tiles: int, min_tokens: int = MIN_TOKENS, padded: Callable[[int], int] = int
    ) -> None:
        self.max_tokens, self._padded = max_tokens, padded
        self.min_tokens = min_tokens
        self._max_tiles = max_tiles
        self._token, self._tile = _Line(), _Rate()
        self._steps: dict[int, deque[float]] = {}  # by the bit length of the number of their sequences
        self._since = 0  # steps with prefill since the last one that only decoded
        self._with_prefill = _Rate()
        self.prefill_seconds = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Positions of prompts computed in a second of steps with prefill, the tower's time included; 0 while nothing
        is measured."""
        return 1 / taken if (taken := self._with_prefill.value) else 0.0

    def step_budget(self, decoding: int) -> StepBudget:
        """The budget of the next step, in which `decoding` sequences advance by one position each."""
        if not decoding:
            return StepBudget(self.max_tokens, self._max_tiles)
        if not self._steps or self._since >= _REMEASURE_AFTER:
            return StepBudget(decoding, 0)
        token, tile = self._token.slope, self._tile.value
        room = self.room(_MAX_SLOWDOWN, decoding)
        room = max(self.min_tokens, _INITIAL_TOKENS if room is None else room)
        tile_cost = int(tile / token) if tile and token else room
        return StepBudget(min(self.max_tokens, self._padded(decoding + room)), self._max_tiles, tile_cost)

    def room(self, slowdown: float, decoding: int) -> int | None:
        """Positions of prefill with which a step of so many decoding sequences takes `slowdown` times as long; None
        while that is unknown."""
        step = self._step(decoding)
        return self._token.units((slowdown - 1) * step) if step and self._token.slope else None

    def observe(self, seconds: float, decoding: int, tokens: int, tiles: int) -> None:
        """Learns from a step that computed `tokens` prompt positions and `tiles` beside its decoding sequences."""
        self._since += 1
        rest = seconds - self._step(decoding) if decoding else seconds
        if tokens or (tiles and self._with_prefill.value):  # the first tile is the warm-up's
            self._with_prefill.add(seconds, tokens)
            self.prefill_seconds += max(0.0, rest)
        if tiles:
            self._tile.add(rest - self._token.seconds(tokens), tiles)
        elif tokens:
            self._token.add(rest, tokens, fit=decoding > 0)
        elif decoding:
            self._steps.setdefault(decoding.bit_length(), deque(maxlen=_WINDOW)).append(seconds)
            self._since = 0

    def _step(self, decoding: int) -> float:
        """Seconds of a step that only decodes about so many sequences: the median, so that one slow step does not raise
        the budget. Where none was measured, that of the nearest number; 0 if there is none at all."""
        nearest = min(self._steps, key=lambda size: abs(size - decoding.bit_length()), default=None)
        return 0.0 if nearest is None else median(self._steps[nearest])
