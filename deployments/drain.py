"""Lets the requests in the house finish, and no new one in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from llava_serve.api.errors import error_response
from llava_serve.errors import CapacityError

SENTENCE = "The server is shutting down; try again later."


class DrainGate:
    """Stands before the web app and counts who is inside, by this door or another.

    Serve's own shutdown ends its HTTP proxy first, and with it every answer on its way; so the house is emptied before.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._inside = 0
        self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if self._closed:
            await error_response(CapacityError(SENTENCE))(scope, receive, send)
            return
        with self.guest():
            await self._app(scope, receive, send)

    @contextmanager
    def guest(self) -> Iterator[None]:
        """A request that a drain waits for; `CapacityError` if one has begun."""
        if self._closed:
            raise CapacityError(SENTENCE)
        self._inside += 1
        self._empty.clear()
        try:
            yield
        finally:
            self._inside -= 1
            if not self._inside:
                self._empty.set()

    async def drain(self) -> None:
        """Refuses from now on, and returns when nobody is inside."""
        self._closed = True
        await self._empty.wait()
