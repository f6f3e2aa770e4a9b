"""How long a step of the engine may take before it counts as one that never ends. No tensors."""

from __future__ import annotations

from dataclasses import dataclass

_MIN_S, _MAX_S = 5.0, 300.0
"""Bounds. The lower one is for what a busy machine adds to a step of milliseconds; the upper one also holds while
nothing is known."""
_SLOWER = 30
"""A step may take so many times as long as the slowest one like it: other programs may come to share the cores, and
what is sampled and how far attention reaches differ from step to step."""
_DECAY = 0.99
"""Per step, of the slowest one: a slow step is forgotten after a few hundred."""


@dataclass(frozen=True, slots=True)
class _Step:
    """What a step took, and its decoding sequences, positions of prompts and tiles. Without seconds it is unknown."""

    seconds: float
    work: tuple[float, ...]

    def expected(self, work: tuple[float, ...]) -> float:
        """Seconds of other work: in proportion if it is more, and no less if it is less, since a part of the time is
        the same for any."""
        return self.seconds * max([1.0, *(now / then for now, then in zip(work, self.work, strict=True) if then)])

    @property
    def faded(self) -> _Step:
        """The same pace in less time, so that it is still known what more work takes."""
        return _Step(self.seconds * _DECAY, tuple(each * _DECAY for each in self.work))


class StepLimit:
    """Learns from the steps how long the next one may take.

    A step is compared with the slowest of its kind: those that have the same of decoding sequences, prompts and tiles.
    The first of a kind counts for nothing: in it, libraries compile and set up what they need.

    Attributes:
        seconds: for the step that runs; between two steps, what held for the last one.
    """

    def __init__(self) -> None:
        self.seconds = _MAX_S
        self._work: tuple[float, ...] = ()
        self._slowest: dict[tuple[bool, ...], _Step] = {}

    def lift(self) -> None:
        """What comes next is no step, and may take long."""
        self.seconds = _MAX_S

    def begin(self, decoding: int, prefill: int, tiles: int) -> None:
        """A step begins, with so many decoding sequences, positions of prompts, and tiles."""
        self._work = (decoding, prefill, tiles)
        slowest = self._slowest.get(self._kind)
        expected = slowest.expected(self._work) if slowest else 0.0
        self.seconds = min(max(_SLOWER * expected, _MIN_S), _MAX_S) if expected else _MAX_S

    def end(self, seconds: float) -> None:
        """The step has taken so long."""
        slowest = self._slowest.get(self._kind)
        if slowest is None:
            self._slowest[self._kind] = _Step(0.0, self._work)
        else:
            faded = slowest.faded
            self._slowest[self._kind] = _Step(seconds, self._work) if seconds >= faded.seconds else faded

    @property
    def _kind(self) -> tuple[bool, ...]:
        return tuple(map(bool, self._work))
