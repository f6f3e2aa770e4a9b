"""When a request came to its stages in the engine."""

from __future__ import annotations

import time
from dataclasses import dataclass

from llava_serve.types import StageTimes


@dataclass(slots=True)
class Timeline:
    """Of one sequence group. Times are seconds of `time.perf_counter()`.

    Attributes:
        arrived: at the engine's loop.
        admitted: to the KV cache for the first time; None while it waits.
        vision_s: time in the vision tower of the steps that encoded images which the group needed.
    """

    arrived: float
    admitted: float | None = None
    vision_s: float = 0.0

    def admit(self) -> None:
        """The group has a place in the KV cache."""
        if self.admitted is None:
            self.admitted = time.perf_counter()

    def stages(self) -> StageTimes:
        """The stages up to the first token, which is there now. Their sum is the time since the arrival. A group that
        is preempted, and a beam search, whose answer comes as a whole, have all of it in `prefill`."""
        assert self.admitted is not None, "only an admitted group has a token"
        rest = time.perf_counter() - self.admitted - self.vision_s
        return (("engine_queue", self.admitted - self.arrived), ("vision", self.vision_s), ("prefill", rest))
