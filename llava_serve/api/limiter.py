"""Limits the requests in flight in this process, over HTTP and over Ray handles, and drains them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llava_serve.config import BATCH_SHARE, ApiOptions, is_batch
from llava_serve.errors import CapacityError, DrainingError
from llava_serve.metrics.definitions import IN_FLIGHT
from llava_serve.metrics.exporter import Exporter, Series, Several

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Load:
    """What some requests take together."""

    places: int = 0
    bytes: int = 0

    def add(self, places: int, size: int) -> None:
        self.places += places
        self.bytes += size


class ConcurrencyLimiter:
    """Counts the requests in flight, limits them, and waits until they end.

    Batch work takes nothing from online requests: they are admitted as if there were none. Batch work is admitted while
    requests of both classes take less than `BATCH_SHARE` of the places and of the bytes.

    Ray Serve's own shutdown ends its HTTP proxy first, and with it every request in flight: so the drain comes before.

    Args:
        max_in_flight: the most requests at once.
        max_in_flight_bytes: the most bytes of all their bodies.
        gauge: of the requests in flight.
    """

    def __init__(self, max_in_flight: int, max_in_flight_bytes: int, gauge: Series | None = None) -> None:
        self._gauge = gauge or Several()
        self.change(max_in_flight, max_in_flight_bytes)
        self._online, self._batch = _Load(), _Load()
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    def change(self, max_in_flight: int, max_in_flight_bytes: int) -> None:
        """Sets other limits. Requests in flight stay, even where they are more."""
        self._most = _Load(max_in_flight, max_in_flight_bytes)

    @property
    def drained(self) -> bool:
        """New requests are refused, and none is in flight."""
        return self.draining and not self._in_flight

    @contextmanager
    def request(self, *, works: bool = True) -> Iterator[Place]:
        """Counts a request from its arrival to the end of its answer.

        Args:
            works: it counts for `max_in_flight`. A drain waits for the others, too.

        Raises:
            CapacityError: at capacity.
            DrainingError: draining.
        """
        if self.draining:
            raise DrainingError("The server is shutting down; try again later.", reason="draining")
        place = Place(self, int(works))
        self._in_flight += 1
        self._gauge.set(self._in_flight)
        self._idle.clear()
        try:
            yield place
        finally:
            place.leave()
            self._in_flight -= 1
            self._gauge.set(self._in_flight)
            if not self._in_flight:
                self._idle.set()

    def add_online(self, places: int, size: int) -> _Load:
        """Adds to what online requests take. Raises `CapacityError` at capacity."""
        over_bytes = self._online.bytes + size > self._most.bytes
        if over_bytes or (places and self._online.places >= self._most.places):
            reason = "bytes" if over_bytes else "in_flight"
            raise CapacityError("The server is at capacity; try again later.", reason=reason)
        self._online.add(places, size)
        return self._online

    def as_batch(self, places: int, size: int) -> _Load:
        """Moves this from what online requests take to what batch work takes. Raises `CapacityError` at capacity."""
        others = self._online.places + self._batch.places - places
        held = self._online.bytes + self._batch.bytes - size
        if max(others / self._most.places, held / self._most.bytes) >= BATCH_SHARE:
            raise CapacityError("The server has no room for batch work; try again later.", reason="batch")
        self._online.add(-places, -size)
        self._batch.add(places, size)
        return self._batch

    async def drain(self) -> None:
        """Refuses new requests from now on, and returns once none is in flight."""
        self.begin_drain()
        await self._idle.wait()

    def begin_drain(self) -> None:
        """Refuses new requests from now on."""
        self.draining = True
        logger.info("Draining: new requests are refused; %d in flight are finished.", self._in_flight)


def limiter_of(options: ApiOptions, exporter: Exporter) -> ConcurrencyLimiter:
    """The limiter of a web app."""
    return ConcurrencyLimiter(options.max_in_flight, options.max_in_flight_bytes, exporter.series(IN_FLIGHT))


class Place:
    """The place of one request in flight. It counts as online until `classify` says otherwise.

    Args:
        limiter: counts it.
        places: that it takes of `max_in_flight`.

    Raises:
        CapacityError: at capacity.
    """

    def __init__(self, limiter: ConcurrencyLimiter, places: int) -> None:
        self._limiter = limiter
        self._places = places
        self._bytes = 0
        self._load = limiter.add_online(places, 0)

    def hold(self, size: int) -> None:
        """Adds bytes to those that the request holds. All of them come before `classify`.

        Raises:
            CapacityError: at capacity.
        """
        self._limiter.add_online(0, size)
        self._bytes += size

    def classify(self, priority: int) -> None:
        """Says of which class the request is, as soon as its priority is known.

        Raises:
            CapacityError: it is batch work, and there is no room for such.
        """
        if is_batch(priority):
            self._load = self._limiter.as_batch(self._places, self._bytes)

    def leave(self) -> None:
        """Ends the request."""
        self._load.add(-self._places, -self._bytes)
