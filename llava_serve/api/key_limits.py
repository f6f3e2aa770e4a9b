"""Limits of each API key: its requests in flight, and its requests per minute."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from llava_serve.errors import RateLimitError

MINUTE_S = 60.0


class KeyLimits:
    """Counts the requests of each client in this process.

    It holds a few numbers for each name in the keys' file, so nothing is ever forgotten but a count of 0.

    Args:
        max_in_flight: of one client; None sets no limit.
        requests_per_minute: of one client; None sets no limit.
        clock: seconds.
    """

    def __init__(
        self,
        max_in_flight: int | None,
        requests_per_minute: int | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.change(max_in_flight, requests_per_minute)
        self._clock = clock
        self._in_flight: Counter[str] = Counter()
        self._buckets: dict[str, tuple[float, float]] = {}

    def change(self, max_in_flight: int | None, requests_per_minute: int | None) -> None:
        """Sets other limits. What was counted stays."""
        self._max_in_flight = max_in_flight
        self._per_minute = requests_per_minute

    @contextmanager
    def request(self, client: str) -> Iterator[None]:
        """Counts a request while the block runs. A refused one counts for nothing.

        Raises:
            RateLimitError: beyond a limit; it says when to try again.
        """
        if self._max_in_flight is not None and self._in_flight[client] >= self._max_in_flight:
            raise RateLimitError(
                f"This API key has {self._max_in_flight} requests in flight, and may not have more.",
                reason="key_in_flight",
            )
        if self._per_minute is not None:
            self._take(client, self._per_minute)
        self._in_flight[client] += 1
        try:
            yield
        finally:
            self._in_flight[client] -= 1

    def _take(self, client: str, per_minute: int) -> None:
        """Takes one request out of the client's bucket, which holds a minute's and fills evenly."""
        # Ten lines instead of the package `limits`: that brings three more, and starts a thread to forget old requests.
        now = self._clock()
        left, since = self._buckets.get(client, (per_minute, now))
        left = min(float(per_minute), left + (now - since) * per_minute / MINUTE_S)
        self._buckets[client] = left, now
        if left < 1:
            wait_s = math.ceil((1 - left) * MINUTE_S / per_minute)
            raise RateLimitError(f"This API key has used its {per_minute} requests per minute.", wait_s, "key_rate")
        self._buckets[client] = left - 1, now


class KeyLimitMiddleware:
    """Applies the limits of each API key to POST requests, by `state.client`.

    Args:
        app: the wrapped app.
        limits: count the requests.
    """

    def __init__(self, app: ASGIApp, limits: KeyLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope.get("state", {}).get("client")
        if client is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        with self._limits.request(client):
            await self._app(scope, receive, send)
