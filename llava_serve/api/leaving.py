"""Ends a request's work when its client leaves, or its time is up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from llava_serve.errors import DeadlineExceededError


@asynccontextmanager
async def while_client_waits(receive: Receive) -> AsyncIterator[None]:
    """Cancels what runs inside when the client leaves, and raises `ClientDisconnect`. The body must have been read.

    The work stays in the caller's task, as with `asyncio.timeout`: generators inside see one task from first to last.
    """
    task = asyncio.current_task()
    assert task is not None
    cancelling = task.cancelling()
    left = False

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if left and task.uncancel() <= cancelling:
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()


@asynccontextmanager
async def before(deadline: float) -> AsyncIterator[None]:
    """Cancels what runs inside at the deadline (seconds since the epoch), and raises `DeadlineExceededError`.

    Every stage behind looks at the deadline itself; this holds the promise if one of them hangs.
    """
    try:
        async with asyncio.timeout(deadline - time.time()):
            yield
    except TimeoutError:
        raise DeadlineExceededError("The request's time was up before its answer was complete.", "timeout") from None
