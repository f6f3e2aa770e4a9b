"""What replicas measure of their work, and report to the autoscaler as `autoscaling.Figures`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llava_serve.types import Asked, PreparedPrompt, image_bytes

from .autoscaling import Figures

if TYPE_CHECKING:
    from llava_serve.engine.stats import EngineStats

TEXT_MEGAPIXELS = 0.1
"""That a prompt counts for beside its pictures: reading, tokenizing and the calls take about as long as so much of a
photograph."""

USUAL_MEGAPIXELS_PER_BYTE = 4e-6
"""Of a JPEG, until pictures are measured."""

WORK_STAGES = {"decode", "tile", "tokenize"}
"""Of `PreparedPrompt.stages`: those in which a core is busy."""

DECAY = 0.98
"""The weight of a measurement after the next one: the last fifty or so count."""


class RecentRatio:
    """The ratio of two sums in which recent terms weigh more."""

    def __init__(self) -> None:
        self._amount = self._units = 0.0

    def add(self, amount: float, units: float) -> None:
        """An amount that belongs to so many units. Without units it says nothing, and nothing fades."""
        if not units:
            return
        self._amount = self._amount * DECAY + amount
        self._units = self._units * DECAY + units

    @property
    def value(self) -> float:
        """Amount per unit; 0 while nothing is measured."""
        return self._amount / self._units if self._units else 0.0


class BusyShare:
    """The share of the time between two reports in which something was busy."""

    def __init__(self) -> None:
        self._reported = time.monotonic()
        self._busy_s = 0.0

    def since_last(self, busy_s: float) -> float:
        """The share since the last call.

        Args:
            busy_s: seconds since the start.
        """
        now = time.monotonic()
        passed, busy = now - self._reported, busy_s - self._busy_s
        self._reported, self._busy_s = now, busy_s
        return busy / passed if passed > 0 else 0.0


class ImageWork:
    """The work of a replica of the picture tier, in megapixels. For one event loop.

    How large a picture is stands in its header, which only the process that decodes it reads. One that waits counts by
    its bytes, as the last pictures had megapixels per byte.

    Args:
        num_threads: prompts that are prepared at once.
    """

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._requests = self._bytes = 0
        self._busy_s = 0.0
        self._per_second, self._per_request, self._per_byte = RecentRatio(), RecentRatio(), RecentRatio()
        self._busy = BusyShare()

    @contextmanager
    def queued(self, asked: Asked) -> Iterator[int]:
        """A prompt waits or is prepared while the block runs. Gives the bytes of its pictures, for `done`."""
        size = image_bytes(asked)
        self._requests += 1
        self._bytes += size
        try:
            yield size
        finally:
            self._requests -= 1
            self._bytes -= size

    def done(self, size: int, prepared: PreparedPrompt) -> None:
        """A prompt is prepared. A link's address is counted as its bytes: next to nothing."""
        seconds = sum(taken for stage, taken in prepared.stages if stage in WORK_STAGES)
        megapixels = sum(width * height for width, height in prepared.image_sizes) / 1e6
        self._busy_s += seconds
        self._per_second.add(TEXT_MEGAPIXELS + megapixels, seconds)
        self._per_request.add(TEXT_MEGAPIXELS + megapixels, 1)
        self._per_byte.add(megapixels, size)

    def figures(self) -> Figures:
        """As of now; `use` is that since the last call."""
        per_byte = self._per_byte.value or USUAL_MEGAPIXELS_PER_BYTE
        return Figures(
            queued_work=self._requests * TEXT_MEGAPIXELS + self._bytes * per_byte,
            work_per_s=self._per_second.value * self._num_threads,
            work_per_request=self._per_request.value,
            use=self._busy.since_last(self._busy_s / self._num_threads),
            requests=self._requests,
        )


class ModelWork:
    """The work of a model replica, in positions of prompts. For one event loop."""

    def __init__(self) -> None:
        self._per_request = RecentRatio()
        self._room_per_sequence = RecentRatio()
        self._prefill = BusyShare()

    def arrived(self, prepared: PreparedPrompt) -> None:
        """A prompt for the engine."""
        self._per_request.add(prepared.num_tokens, 1)

    def figures(self, stats: EngineStats) -> Figures:
        """As of the engine's statistics; the share of time that goes into prefill is that since the last call."""
        online = stats.online
        self._room_per_sequence.add(online.room, online.sequences)
        return Figures(
            queued_work=online.waiting_tokens,
            work_per_s=stats.prefill_tokens_per_s,
            work_per_request=self._per_request.value,
            use=max(online.room, self._prefill.since_last(stats.prefill_seconds)),
            use_per_request=self._room_per_sequence.value,
            requests=stats.running + stats.waiting,
        )
