"""Who is let in now: a bounded house and a bounded body, both decided before any picture is touched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_serve.errors import BodyTooLargeError, CapacityError
from llava_serve.types import ImagePart
from llava_serve.types import Message as Turn


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


def demand_size(messages: Sequence[Turn], most: int) -> None:
    """Raises `BodyTooLargeError` if the pictures of a conversation have more than `most` bytes together."""
    parts = (part for message in messages for part in message.parts)
    size = sum(len(part.source) for part in parts if isinstance(part, ImagePart))
    _demand_fit(size, most)


def _demand_fit(size: int, most: int) -> None:
    if size > most:
        limit = most / (1 << 20)
        raise BodyTooLargeError(f"The request is larger than {limit:.3g} MiB, which is the most this server takes.")


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
            _demand_fit(received, self._max_body_bytes)
            return message

        with self._house.guest():
            declared = Headers(scope=scope).get("content-length", "")
            if declared.isdecimal():
                _demand_fit(int(declared), self._max_body_bytes)
            await self._app(scope, receive_counted, send)
