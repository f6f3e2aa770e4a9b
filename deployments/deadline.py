"""Deadlines: seconds since the epoch, so that they cross machines. Each stage looks before it works."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from llava_serve.errors import DeadlineExceededError

SENTENCE = "The request's time was up before its answer was complete."


def check_deadline(deadline: float) -> None:
    """Raises `DeadlineExceededError` if the time is up."""
    if time.time() >= deadline:
        raise DeadlineExceededError(SENTENCE)


@asynccontextmanager
async def until(deadline: float) -> AsyncIterator[None]:
    """Bounds what is awaited inside: a call to a tier whose replicas are all gone would wait for ever."""
    try:
        async with asyncio.timeout(deadline - time.time()):
            yield
    except TimeoutError:
        raise DeadlineExceededError(SENTENCE) from None
