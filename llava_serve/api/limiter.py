"""Limits the requests in flight in this process, over HTTP and over Ray handles, and drains them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llava_serve.errors import CapacityError


class ConcurrencyLimiter:
    """Counts the requests in flight, limits them, and waits until they end.

    Ray Serve's own shutdown ends its HTTP proxy first, and with it every request in flight: so the drain comes before.

    Args:
        max_in_flight: the most requests at once.
        max_in_flight_bytes: the most bytes of all their bodies.
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
        """Counts a request from its arrival to the end of its answer.

        Args:
            works: it counts for `max_in_flight`. A drain waits for the others, too.

        Yields:
            A function that adds bytes to those that the request holds; it raises `CapacityError`, too.

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
        """Refuses new requests from now on, and returns once none is in flight."""
        self._draining = True
        await self._idle.wait()
