"""How long the fuzzing goes on: a bounded number of examples, or as many as fit into a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

EXAMPLES = 1000
"""In one round."""
SOON_S = 5.0
"""Of processor time, for one example."""


def fuzz(subject: Callable[[Any], None], inputs: SearchStrategy[Any], seconds: float = 0.0) -> int:
    """Calls the subject with examples, in rounds until the time is over, one round at least.

    Returns:
        How many examples there were.
    """
    end = time.monotonic() + seconds
    calls = rounds = 0

    def counted(example: Any) -> None:
        nonlocal calls
        calls += 1
        began = time.process_time()
        subject(example)
        assert time.process_time() - began < SOON_S

    while rounds == 0 or time.monotonic() < end:
        limits = settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        seed(rounds)(limits(given(inputs)(counted)))()
        rounds += 1
    return calls
