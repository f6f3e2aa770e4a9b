"""The HTTP server of the web app in this process: uvicorn, with bounds on a request's head."""

from __future__ import annotations

import asyncio
import re
from types import FrameType

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from llava_serve.api.limiter import ConcurrencyLimiter

MAX_HEAD_BYTES = 64 << 10
"""Of a request's line and headers, with the empty line at their end."""
HEAD_TIMEOUT_S = 30.0
"""For a request's line and headers to arrive, from the connection's or the head's first byte."""


_END_OF_HEAD = re.compile(rb"\n\r?\n")
"""Where h11 sees it."""


class StrictConnection(h11.Connection):
    """h11 with an exact bound on a head: its own holds only while a head is incomplete. And of two lengths of a body
    it follows one, where a proxy in front may follow the other (request smuggling)."""

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Raises `h11.RemoteProtocolError` for a head that is too large, or has both lengths; uvicorn answers 400."""
        if self.their_state is h11.IDLE:
            received, _ = self.trailing_data
            if len(received) > MAX_HEAD_BYTES and not _END_OF_HEAD.search(received, 0, MAX_HEAD_BYTES):
                raise h11.RemoteProtocolError("The request's head is too large.")
        event = super().next_event()
        if isinstance(event, h11.Request) and {b"content-length", b"transfer-encoding"} <= dict(event.headers).keys():
            raise h11.RemoteProtocolError("The request has Content-Length and Transfer-Encoding.")
        return event


class BoundedH11Protocol(H11Protocol):
    """Closes a connection whose next request's head does not arrive whole in time; uvicorn bounds only its size.

    It parses by h11: uvicorn's other parser, httptools, drops the body of a request that offers `Upgrade: h2c`, which
    is to be answered as HTTP/1.1, and bounds no size.
    """

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self.conn = StrictConnection(h11.SERVER, MAX_HEAD_BYTES)
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


class DrainingServer(uvicorn.Server):
    """At the first signal it drains: it still accepts connections, so that `/health` answers 503 and a balancer sends
    new requests elsewhere. It ends when no request is in flight; at a second signal, at once.

    Args:
        config: of uvicorn.
        limiter: of the app.
    """

    def __init__(self, config: uvicorn.Config, limiter: ConcurrencyLimiter) -> None:
        super().__init__(config)
        self._limiter = limiter
        self._signalled = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled:
            self.should_exit = self.force_exit = True
        self._signalled = True

    async def on_tick(self, counter: int) -> bool:
        """uvicorn asks ten times a second whether to end."""
        if self._signalled and not self._limiter.draining:
            self._limiter.begin_drain()  # not in the handler of the signal, which may interrupt a line of the log
        return await super().on_tick(counter) or self._limiter.drained


def server_of(
    app: ASGIApp, *, graceful_timeout_s: int | None = None, limiter: ConcurrencyLimiter | None = None
) -> uvicorn.Server:
    """A server that has not started.

    Args:
        graceful_timeout_s: bounds the wait for requests in flight at its end.
        limiter: of the app; with it the server is a `DrainingServer`.
    """
    config = uvicorn.Config(
        app, http=BoundedH11Protocol, log_level="warning", timeout_graceful_shutdown=graceful_timeout_s
    )
    return uvicorn.Server(config) if limiter is None else DrainingServer(config, limiter)
