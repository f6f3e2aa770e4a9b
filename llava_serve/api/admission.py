"""Who is let in now: a bounded house and a bounded body, both decided before any picture is touched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_serve.errors import BodyTooLargeError, CapacityError


class House:
    """Counts the requests that are worked on in this process, by whichever door they came.

    Args:
        max_queue: requests in the house.
    """

    def __init__(self, max_queue: int) -> None:
        self._max_queue = max_queue
        self._inside = 0

    @contextmanager
    def guest(self) -> Iterator[None]:
        """A request, from its arrival to the end of its answer; `CapacityError` if the house is full."""
        if self._inside >= self._max_queue:
            raise CapacityError("The server is full; try again later.")
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1


class Admission:
    """Lets the requests with a body into the house, from arrival to the last byte of the answer.

    Args:
        app: what lies behind.
        house: one request too many raises `CapacityError`.
        max_body_bytes: of a request; more raises `BodyTooLargeError`, whatever its header had declared.
    """

    def __init__(self, app: ASGIApp, house: House, max_body_bytes: int) -> None:
        self._app = app
        self._house = house
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            self._demand_fit(received)
            return message

        with self._house.guest():
            declared = Headers(scope=scope).get("content-length", "")
            if declared.isdecimal():
                self._demand_fit(int(declared))
            await self._app(scope, receive_counted, send)

    def _demand_fit(self, size: int) -> None:
        if size > self._max_body_bytes:
            limit = self._max_body_bytes / (1 << 20)
            raise BodyTooLargeError(f"The request is larger than {limit:.3g} MiB, which is the most this server takes.")
