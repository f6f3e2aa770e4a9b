"""Deadlines: seconds since the epoch (`time.time()`), the same on all machines. Each stage checks before it works."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from llava_serve.errors import DeadlineExceededError

_SENTENCE = "The request's time was up before its answer was complete."


def check_deadline(deadline: float | None) -> None:
    """Raises `DeadlineExceededError` if the time is up; None is no deadline."""
    if deadline is not None and time.time() >= deadline:
        raise DeadlineExceededError(_SENTENCE, "timeout")


@asynccontextmanager
async def deadline_scope(deadline: float | None) -> AsyncIterator[None]:
    """Cancels the block at the deadline, and raises `DeadlineExceededError`.

    Every stage checks the deadline by itself. This is for a stage that hangs, and for a call that waits for a tier
    without replicas.
    """
    try:
        async with asyncio.timeout(None if deadline is None else deadline - time.time()):
            yield
    except DeadlineExceededError:  # raised in the block: its own sentence is kept
        raise
    except TimeoutError:
        raise DeadlineExceededError(_SENTENCE, "timeout") from None


def deadline_in(timeout: float | None) -> float | None:
    """The deadline `timeout` seconds from now; None is no deadline."""
    return None if timeout is None else time.time() + timeout
