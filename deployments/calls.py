"""Calls to other deployments that end with their owner, and fail with the library's own errors."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from deployments.aborts import AbortSender
from llava_serve.deadline import deadline_scope
from llava_serve.errors import CapacityError, EngineDeadError, LlavaServeError


@asynccontextmanager
async def call(method: DeploymentHandle, *args: object) -> AsyncIterator[Any]:
    """A call that its block reads to the end, or leaves by an exception: then nothing runs on at the replica.

    Serve's own cancelling of what a request started loses calls in a burst, so each call is cancelled by its owner.
    """
    response = method.remote(*args)
    try:
        with library_errors():
            yield response
    except BaseException:
        with suppress(Exception):  # of a call that never reached a replica: what it failed with is on its way already
            response.cancel()
        raise


async def stream(
    method: DeploymentHandle, aborts: AbortSender, call_id: str, deadline: float, *args: object
) -> AsyncGenerator[Any]:
    """What a streaming call yields. Closing the generator ends the work at the replica.

    Args:
        method: takes `args`, then `call_id` and `deadline`.
        aborts: to the same deployment.
        call_id: of this call alone.
        deadline: seconds since the epoch.
    """
    ended = False
    try:
        async with call(method, *args, call_id, deadline) as response:
            while not ended:
                async with deadline_scope(deadline):
                    item = await anext(response, None)
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
    """Turns what Ray raises into the library's own error, where there is one."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, LlavaServeError):
            raise error.cause from None
        raise
    except BackPressureError:
        raise CapacityError("The server is full; try again later.") from None
    except (RayActorError, DeploymentUnavailableError):
        raise EngineDeadError("The replica that worked on the request was lost.") from None
    except (TaskCancelledError, RequestCancelledError):
        raise EngineDeadError("The replica that worked on the request was stopped.") from None
