"""How many requests are in flight in this process, whichever way they came; and the end of that, a drain."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from llava_serve.errors import CapacityError


class ConcurrencyLimiter:
    """Counts the requests in flight, bounds them, and waits for their end.

    Ray Serve's own shutdown ends its HTTP proxy first, and with it every answer on its way: so it drains before that.

    Args:
        max_in_flight: requests that may be worked on at once.
    """

    def __init__(self, max_in_flight: int) -> None:
        self._max_in_flight = max_in_flight
        self._working = 0
        self._in_flight = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def request(self, *, works: bool = True) -> Iterator[None]:
        """A request, from its arrival to the end of its answer.

        Args:
            works: it costs work, so that it counts for the bound. A drain waits for others, too.

        Raises:
            CapacityError: at capacity, or draining.
        """
        if self._draining:
            raise CapacityError("The server is shutting down; try again later.")
        if works and self._working >= self._max_in_flight:
            raise CapacityError("The server is at capacity; try again later.")
        self._working += works
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._working -= works
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def drain(self) -> None:
        """Refuses new requests from now on, and returns when none is in flight."""
        self._draining = True
        await self._idle.wait()
