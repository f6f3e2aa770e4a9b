"""Server-sent events over ASGI, and the notice of a client that disconnects.

Not sse-starlette: it sends status 200 at once; here the first chunk chooses it, unless a comment comes before that.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Send

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
KEEP_ALIVE_S = 15.0
"""Silence after which a comment is sent: proxies end connections that say nothing, often after 30 or 60 s."""

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
]


def event(data: bytes) -> bytes:
    """One event; `data` is JSON on one line."""
    return b"data: " + data + b"\n\n"


class EventSender:
    """Writes an event stream to a client, with comments where it falls silent.

    Attributes:
        started: the status is 200; before the first bytes another one may still be chosen.

    Args:
        send: of the ASGI request.
    """

    def __init__(self, send: Send) -> None:
        self.started = False
        self._send = send
        self._last = 0.0
        self._writing = asyncio.Lock()

    async def write(self, data: bytes) -> None:
        """Sends bytes that are one or more whole events, or a comment; the first ones settle the status."""
        async with self._writing:
            self._last = asyncio.get_running_loop().time()
            if not self.started:
                self.started = True
                await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """Nothing comes after it."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    @asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[None]:
        """Sends comments on silence while the block runs, before the first event too."""
        beat = asyncio.create_task(self._beat())
        try:
            yield
        finally:
            async with self._writing:  # no comment is cut in two
                beat.cancel()

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        self._last = loop.time()
        while True:
            await asyncio.sleep(self._last + KEEP_ALIVE_S - loop.time())
            if loop.time() - self._last >= KEEP_ALIVE_S:
                await self.write(KEEP_ALIVE)


@asynccontextmanager
async def cancel_on_disconnect(receive: Receive) -> AsyncIterator[None]:
    """Cancels what runs inside when the client disconnects, and raises `ClientDisconnect`. The body is read before.

    The work stays in the caller's task, as with `asyncio.timeout`: generators inside see one task from first to last.
    """
    task = asyncio.current_task()
    assert task is not None
    cancelling = task.cancelling()
    disconnected = False

    async def watch() -> None:
        nonlocal disconnected
        while (await receive())["type"] != "http.disconnect":
            pass
        disconnected = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if disconnected and task.uncancel() <= cancelling:
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()
