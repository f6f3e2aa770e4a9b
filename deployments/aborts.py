"""The second way to end an answer: Serve now and then loses a cancel that comes before its call has begun."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

GATHER_S = 0.02
TIMEOUT_S = 10.0
REMEMBERED_S = 60.0
"""How long a call may be on its way after its end was told: it is then not begun."""


class AbortSender:
    """Tells all replicas of a deployment which calls were left; the caller does not know which replica has them.

    Args:
        deployment: handle to one that has an `abort`.
    """

    def __init__(self, deployment: DeploymentHandle) -> None:
        self._deployment = deployment
        self._left: list[str] = []
        self._sending: set[asyncio.Task[None]] = set()

    def send(self, call_id: str) -> None:
        """Returns at once. The ids of a burst go together: a broadcast costs a message per replica."""
        self._left.append(call_id)
        if len(self._left) == 1:
            task = asyncio.create_task(self._send())
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _send(self) -> None:
        try:
            await asyncio.sleep(GATHER_S)
        finally:  # a loop that ends here must not leave ids behind: the next one would wait for this task
            left, self._left = self._left, []
        with suppress(DeploymentUnavailableError, TimeoutError):  # a replica that is gone works for nobody
            await self._deployment.broadcast("abort", left).results_async(timeout_s=TIMEOUT_S, return_exceptions=True)


class AbortedCalls:
    """The calls that a replica shall not work on, whether their abort came after them or before."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def add(self, call_ids: Sequence[str]) -> None:
        """Remembers the calls for a while."""
        now = time.monotonic()
        for call_id, until in list(self._until.items()):  # in order of time
            if until > now:
                break
            del self._until[call_id]
        self._until.update(dict.fromkeys(call_ids, now + REMEMBERED_S))

    def __contains__(self, call_id: str) -> bool:
        return call_id in self._until
