"""What callers do while the model tier has no replica: with `min_replicas: 0` it sleeps until somebody asks."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import TypeVar

from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatus

from llava_serve.errors import ModelStartingError

from .handle_calls import result

T = TypeVar("T")

PATIENCE_S = 1.0
"""An answer that begins within this time needs no question about replicas, and one question serves all requests for as
long."""

REPLY_S = 0.5
"""Where there are no replicas, the handle itself says so, at once."""

NO_MODEL = ""
"""A key that no prompt has, for calls whose result does not matter."""


class ModelTier:
    """Notices that the tier has no replica, wakes it, and measures how long that takes. For one event loop.

    Args:
        model: handle to `LlavaModel`.

    Attributes:
        start_s: seconds that the last start took, as a caller has seen it; None while none was seen.
    """

    def __init__(self, model: DeploymentHandle) -> None:
        self._model = model
        self._takes = model.options(method_name="takes")
        self.start_s: float | None = None
        self._began = 0.0
        self._starting: asyncio.Task[None] | None = None
        self._found = -math.inf

    async def state(self) -> str | None:
        """Why there is no replica: `sleeping` or `starting`, which a request ends; None where there is one, or where
        one should be."""
        return None if await self._has_replicas() else await asyncio.to_thread(self._state_of_deployment)

    async def answer(self, items: AsyncGenerator[T], deadline: float) -> AsyncGenerator[T]:
        """The items of a streaming call to the tier. Closing it closes them.

        Args:
            deadline: seconds since the epoch.

        Raises:
            ModelStartingError: the tier has no replica, and will have none before the deadline.
        """
        async with aclosing(items):
            first = asyncio.ensure_future(anext(items))
            try:
                if not (await asyncio.wait((first,), timeout=PATIENCE_S))[0]:
                    await self._check(deadline)
                item = await first
            except StopAsyncIteration:
                return
            finally:
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)
            yield item
            async for item in items:
                yield item

    async def _check(self, deadline: float) -> None:
        """Raises `ModelStartingError` if no replica will be there before the deadline; wakes the tier in any case."""
        if time.monotonic() - self._found < PATIENCE_S:
            return
        if await self._has_replicas():
            self._found = time.monotonic()
            return
        if self._starting is None:
            self._began = time.monotonic() - PATIENCE_S
            self._starting = asyncio.create_task(self._start())
        if self.start_s is None:
            return
        left = max(1, math.ceil(self._began + self.start_s - time.monotonic()))
        if time.time() + left > deadline:
            message = f"The model is starting, about {left} s; try again then."
            raise ModelStartingError(message, left, "model_starting")

    async def _start(self) -> None:
        """Waits for a replica. Serve starts one while a call waits for it: the requests themselves may all give up."""
        try:
            with suppress(Exception):  # the next request tries again
                await result(self._takes, NO_MODEL)
                self.start_s = time.monotonic() - self._began
        finally:
            self._starting = None

    async def _has_replicas(self) -> bool:
        try:
            await self._model.broadcast("takes", NO_MODEL).results_async(timeout_s=REPLY_S, return_exceptions=True)
        except DeploymentUnavailableError:
            return False
        except TimeoutError:  # they are busy
            pass
        return True

    def _state_of_deployment(self) -> str | None:
        """As Serve's controller has it."""
        application = serve.status().applications.get(self._model.app_name)
        deployment = application and application.deployments.get(self._model.deployment_name)
        if not deployment or deployment.replica_states.get("RUNNING"):
            return None
        if deployment.status == DeploymentStatus.UPSCALING:
            return "starting"
        idle = (DeploymentStatus.HEALTHY, DeploymentStatus.DOWNSCALING)
        return "sleeping" if deployment.status in idle else None
