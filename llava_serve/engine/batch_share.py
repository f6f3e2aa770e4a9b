"""How much batch work a step may do beside online requests: as much as hardly slows them. No tensors."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

from llava_serve.engine.prefill_budget import PrefillBudget, StepBudget

_MAX_SLOWDOWN = 1.25
"""Steps with batch work beside may take at most this many times as long as those without it."""
_PERIOD = 64
"""Steps. In one of them batch work gets its minimum, so that it never stands still; in another one it does the opposite
of the usual, so that both kinds of steps are measured. Together they are fewer than one in twenty."""
_WINDOW = 5
"""Steps of each kind of which the median is taken."""


@dataclass(frozen=True, slots=True)
class Running:
    """What is in the KV cache.

    Attributes:
        online: whether online requests are.
        online_decoding, batch_decoding: sequences of either class that have one position to compute.
    """

    online: bool
    online_decoding: int
    batch_decoding: int


class BatchShare:
    """Gives each step its budget, with the part of batch work.

    Without online requests batch work has all of it. Beside them it runs where that costs little, as on a GPU that
    reads the weights for one sequence as for many. Where it costs much, as on a CPU, it pauses until they have ended.

    Args:
        prefill: the budget of steps that have one class of work.
    """

    def __init__(self, prefill: PrefillBudget) -> None:
        self._prefill = prefill
        self._alone: deque[float] = deque(maxlen=_WINDOW)
        self._beside: deque[float] = deque(maxlen=_WINDOW)
        self._at = 0

    def step_budget(self, running: Running) -> StepBudget:
        """The budget of the next step."""
        if not running.online:
            return self._prefill.step_budget(running.batch_decoding)
        self._at = (self._at + 1) % _PERIOD
        minimum, measured = self._at == 0, self._at == _PERIOD // 2
        budget = self._prefill.step_budget(running.online_decoding)
        budget.batch = minimum or self._is_cheap != measured
        budget.batch_tile = minimum
        decoding = running.online_decoding + running.batch_decoding
        budget.batch_tokens = self._prefill.min_tokens if minimum else self._prefill.room(_MAX_SLOWDOWN, decoding) or 0
        if budget.batch:
            budget.tokens = min(self._prefill.max_tokens, budget.tokens + running.batch_decoding)
        return budget

    def observe(self, seconds: float, online: int, batch: int, prefill: int) -> None:
        """Learns from a step that computed positions of decoding sequences of both classes, and `prefill` more."""
        if online and not prefill:
            (self._beside if batch else self._alone).append(seconds)

    @property
    def _is_cheap(self) -> bool:
        """Unknown is not."""
        if not self._alone or not self._beside:
            return False
        return median(self._beside) <= _MAX_SLOWDOWN * median(self._alone)
