"""The HTTP server of the web app in this process: uvicorn, with bounds on a request's head."""

from __future__ import annotations

import asyncio

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEAD_BYTES = 64 << 10
"""Of a request's line and headers."""
HEAD_TIMEOUT_S = 30.0
"""For a request's line and headers to arrive, from the connection's or the head's first byte."""


class BoundedH11Protocol(H11Protocol):
    """Closes a connection whose next request's head does not arrive whole in time; uvicorn bounds only its size.

    It parses by h11: uvicorn's other parser, httptools, drops the body of a request that offers `Upgrade: h2c`, which
    is to be answered as HTTP/1.1, and bounds no size.
    """

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def _watch_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:  # the head is complete
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def server_of(app: ASGIApp, *, graceful_timeout_s: int | None = None) -> uvicorn.Server:
    """A server that has not started; `graceful_timeout_s` bounds the wait for requests in flight at its end."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=BoundedH11Protocol,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
            log_level="warning",
            timeout_graceful_shutdown=graceful_timeout_s,
        )
    )
