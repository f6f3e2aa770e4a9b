"""Calls to other deployments that end with their caller, and fail with the library's own errors.

An error of the library is the result of a call, as an `errors.Failure`, and is raised at the caller: Serve logs what a
call raises as an error with its traceback, and a client's mistake is none.

The caller cancels its call. Serve sometimes loses a cancel that arrives before the call starts, so the caller aborts
the call by its id as well.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from cachetools import TTLCache
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from llava_serve.api.errors import wire_error
from llava_serve.deadline import deadline_scope
from llava_serve.errors import CapacityError, EngineDeadError, Failure, LlavaServeError

SERVE_LOGGER = "ray.serve"
"""Serve's own, which writes the replicas' logs."""

P = ParamSpec("P")
T = TypeVar("T")

ATTEMPTS = 2
"""Of a call whose replica is lost before its first result. Not more: the request itself may be what ends replicas."""

logger = logging.getLogger(SERVE_LOGGER)

GATHER_S = 0.02
TIMEOUT_S = 10.0
REMEMBERED_S = 60.0
"""How long an abort is remembered: a call that arrives within that time does not start."""

REMEMBERED_CALLS = 100_000
"""More than 1,600 disconnects per second for `REMEMBERED_S`. Beyond it the oldest abort is forgotten; its call has most
likely arrived already. If not, that call runs to its end or its deadline."""


def returns_failure(method: Callable[P, Awaitable[T]]) -> Callable[P, Awaitable[T | Failure]]:
    """A deployment's method that returns the library's errors. `result` raises them at the caller."""

    @wraps(method)
    async def returning(*args: P.args, **kwargs: P.kwargs) -> T | Failure:
        try:
            return await method(*args, **kwargs)
        except LlavaServeError as error:
            return _logged(error)

    return returning


def yields_failure(method: Callable[P, AsyncGenerator[T]]) -> Callable[P, AsyncGenerator[T | Failure]]:
    """The same for a method that streams: `stream` raises the error at the caller."""

    @wraps(method)
    async def yielding(*args: P.args, **kwargs: P.kwargs) -> AsyncGenerator[T | Failure]:
        try:
            async with aclosing(method(*args, **kwargs)) as items:
                async for item in items:
                    yield item
        except LlavaServeError as error:
            yield _logged(error)

    return yielding


def _logged(error: LlavaServeError) -> Failure:
    wire = wire_error(error)
    logger.log(wire.log_level, "Refused: %d %s.", wire.status, wire.code)  # Serve writes the request's id before it
    return Failure(error)


class ReplicaLostError(EngineDeadError):
    """The replica that worked on a call was lost; another one can do the work."""


async def result(method: DeploymentHandle, *args: object) -> Any:
    """The result of a call, which is made again if its replica is lost.

    Raises:
        LlavaServeError: the call failed with it, or its replica was lost `ATTEMPTS` times.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            async with call(method, *args) as response:
                returned = await response
            break
        except ReplicaLostError:
            if attempt == ATTEMPTS:
                raise
    if isinstance(returned, Failure):
        raise returned.error
    return returned


@asynccontextmanager
async def call(method: DeploymentHandle, *args: object) -> AsyncIterator[Any]:
    """Makes a call, and cancels it at the replica if the block ends with an exception.

    Serve's own cancellation of a request's calls loses some in a burst, so the caller cancels each call.
    """
    response = method.remote(*args)
    try:
        with library_errors():
            yield response
    except BaseException:
        with suppress(Exception):  # of a call that never reached a replica: its own error is raised below
            response.cancel()
        raise


async def stream(
    method: DeploymentHandle, aborts: AbortSender, call_id: str, deadline: float, *args: object
) -> AsyncGenerator[Any]:
    """Yields the items of a streaming call, which is made again if its replica is lost before the first of them.

    Closing the generator ends the work at the replica.

    Args:
        method: takes `args`, then `call_id` and `deadline`.
        aborts: to the same deployment.
        call_id: unique to this call.
        deadline: seconds since the epoch.
    """
    for attempt in range(1, ATTEMPTS + 1):
        begun = False
        try:
            async with aclosing(_stream_once(method, aborts, call_id, deadline, *args)) as items:
                async for item in items:
                    begun = True
                    yield item
            return
        except ReplicaLostError:
            if begun or attempt == ATTEMPTS:
                raise


async def _stream_once(
    method: DeploymentHandle, aborts: AbortSender, call_id: str, deadline: float, *args: object
) -> AsyncGenerator[Any]:
    ended = False
    try:
        async with call(method, *args, call_id, deadline) as response:
            while not ended:
                async with deadline_scope(deadline):
                    item = await anext(response, None)
                if isinstance(item, Failure):
                    raise item.error
                ended = item is None
                if not ended:
                    yield item
    except LlavaServeError:
        ended = True
        raise
    finally:
        if not ended:
            aborts.send(call_id)


@contextmanager
def library_errors() -> Iterator[None]:
    """Turns Ray's errors into the library's own, where there is one."""
    try:
        yield
    except BackPressureError:
        raise CapacityError("The server is at capacity; try again later.", reason="replica_queue") from None
    except RayActorError:
        raise ReplicaLostError("The replica that worked on the request was lost.") from None
    except DeploymentUnavailableError:
        raise EngineDeadError("No replica can work on the request.") from None
    except (TaskCancelledError, RequestCancelledError):
        raise EngineDeadError("The replica that worked on the request was stopped.") from None


class AbortSender:
    """Aborts calls on all replicas of a deployment, since the caller does not know which replica runs them.

    Args:
        deployment: handle to a deployment with an `abort`.
    """

    def __init__(self, deployment: DeploymentHandle) -> None:
        self._deployment = deployment
        self._disconnected: list[str] = []
        self._sending: set[asyncio.Task[None]] = set()

    def send(self, call_id: str) -> None:
        """Returns at once. The ids of a burst are sent together: a broadcast costs a message per replica."""
        self._disconnected.append(call_id)
        if len(self._disconnected) == 1:
            task = asyncio.create_task(self._send())
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)

    async def _send(self) -> None:
        try:
            await asyncio.sleep(GATHER_S)
        finally:  # clear the ids if the loop ends here: later ones would wait for this task
            disconnected, self._disconnected = self._disconnected, []
        with suppress(DeploymentUnavailableError, TimeoutError):  # a replica that is gone runs no call
            await self._deployment.broadcast("abort", disconnected).results_async(
                timeout_s=TIMEOUT_S, return_exceptions=True
            )


class AbortedCalls:
    """The ids of aborted calls, whether their abort arrives after or before the call."""

    def __init__(self) -> None:
        self._calls: TTLCache[str, None] = TTLCache(REMEMBERED_CALLS, REMEMBERED_S)

    def add(self, call_ids: Sequence[str]) -> None:
        """Remembers the calls for `REMEMBERED_S`."""
        self._calls.update(dict.fromkeys(call_ids))

    def __contains__(self, call_id: str) -> bool:
        return call_id in self._calls
