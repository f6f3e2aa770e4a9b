"""Server-sent events over ASGI, and how a disconnect is noticed.

Not sse-starlette: it sends status 200 at once; here the first chunk decides the status, unless a comment comes first.
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
"""Silence after which a comment is sent: proxies close idle connections, often after 30 or 60 s."""

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store, no-transform"),  # a proxy that compresses would hold events back
    (b"x-accel-buffering", b"no"),  # nginx would buffer events
]


def event(data: bytes, name: str = "") -> bytes:
    """One event; `data` is JSON on one line."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + data + b"\n\n"


class EventSender:
    """Writes an event stream to a client, with comments in pauses.

    Attributes:
        started: the status 200 is sent; before that, an error may still choose another one.
        headers: more of them, for when it starts.

    Args:
        send: of the ASGI request.
    """

    def __init__(self, send: Send) -> None:
        self.started = False
        self.headers: dict[str, str] = {}
        self._send = send
        self._last = 0.0
        self._writing = asyncio.Lock()

    async def write(self, data: bytes) -> None:
        """Sends one or more whole events, or a comment; the first call sends the status."""
        async with self._writing:
            self._last = asyncio.get_running_loop().time()
            if not self.started:
                self.started = True
                more = [(name.encode(), value.encode()) for name, value in self.headers.items()]
                await self._send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *more]})
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """Ends the stream."""
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    @asynccontextmanager
    async def kept_alive(self) -> AsyncIterator[None]:
        """Sends comments in pauses while the block runs, before the first event too."""
        beat = asyncio.create_task(self._beat())
        try:
            yield
        finally:
            async with self._writing:  # a comment is sent whole
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
    """Cancels the block when the client disconnects, and raises `ClientDisconnect`. The body must be read before.

    The work stays in the caller's task, as with `asyncio.timeout`: generators inside run in one task.
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
