"""How many requests are in flight in this process, whichever way they came; and the end of that, a drain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llava_serve.errors import CapacityError


class ConcurrencyLimiter:
    """Counts the requests in flight, bounds them, and waits for their end.

    Ray Serve's own shutdown ends its HTTP proxy first, and with it every answer on its way: so it drains before that.

    Args:
        max_in_flight: requests that may be worked on at once.
        max_in_flight_bytes: of the bodies of all of them.
    """

    def __init__(self, max_in_flight: int, max_in_flight_bytes: int) -> None:
        self._max_in_flight = max_in_flight
        self._max_bytes = max_in_flight_bytes
        self._bytes = 0
        self._working = 0
        self._in_flight = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def request(self, *, works: bool = True) -> Iterator[Callable[[int], None]]:
        """A request, from its arrival to the end of its answer.

        Args:
            works: it costs work, so that it counts for the bound. A drain waits for others, too.

        Yields:
            What is to be told each number of bytes that the request holds from now on; it raises `CapacityError` too.

        Raises:
            CapacityError: at capacity, or draining.
        """
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            if self._bytes + size > self._max_bytes:
                raise CapacityError("The server is at capacity; try again later.")
            self._bytes += size
            held += size

        if self._draining:
            raise CapacityError("The server is shutting down; try again later.")
        if works and self._working >= self._max_in_flight:
            raise CapacityError("The server is at capacity; try again later.")
        self._working += works
        self._in_flight += 1
        self._idle.clear()
        try:
            yield hold
        finally:
            self._bytes -= held
            self._working -= works
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def drain(self) -> None:
        """Refuses new requests from now on, and returns when none is in flight."""
        self._draining = True
        await self._idle.wait()
