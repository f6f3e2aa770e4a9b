"""The second way to end an answer: Serve now and then loses a cancel that comes before its call has begun."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from cachetools import TTLCache
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

GATHER_S = 0.02
TIMEOUT_S = 10.0
REMEMBERED_S = 60.0
"""How long a call may be on its way after its abort: it is then not begun."""

REMEMBERED_CALLS = 100_000
"""More than 1,600 disconnects a second for `REMEMBERED_S`. Beyond it the oldest abort is forgotten, whose call has most
likely come already; if not, that call runs to its end or its deadline."""


class AbortSender:
    """Aborts calls on all replicas of a deployment; the caller does not know which replica has them.

    Args:
        deployment: handle to one that has an `abort`.
    """

    def __init__(self, deployment: DeploymentHandle) -> None:
        self._deployment = deployment
        self._disconnected: list[str] = []
        self._sending: set[asyncio.Task[None]] = set()

    def send(self, call_id: str) -> None:
        """Returns at once. The ids of a burst go together: a broadcast costs a message per replica."""
        self._disconnected.append(call_id)
        if len(self._disconnected) == 1:
            task = asyncio.create_task(self._send())
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _send(self) -> None:
        try:
            await asyncio.sleep(GATHER_S)
        finally:  # a loop that ends here must not leave ids behind: the next one would wait for this task
            disconnected, self._disconnected = self._disconnected, []
        with suppress(DeploymentUnavailableError, TimeoutError):  # a replica that is gone works for nobody
            await self._deployment.broadcast("abort", disconnected).results_async(
                timeout_s=TIMEOUT_S, return_exceptions=True
            )


class AbortedCalls:
    """The calls that a replica shall not work on, whether their abort came after them or before."""

    def __init__(self) -> None:
        self._calls: TTLCache[str, None] = TTLCache(REMEMBERED_CALLS, REMEMBERED_S)

    def add(self, call_ids: Sequence[str]) -> None:
        """Remembers the calls for `REMEMBERED_S`."""
        self._calls.update(dict.fromkeys(call_ids))

    def __contains__(self, call_id: str) -> bool:
        return call_id in self._calls
