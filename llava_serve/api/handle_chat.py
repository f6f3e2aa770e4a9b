"""Chat completions as calls, not over HTTP: an OpenAI request in, an OpenAI answer out. A busy server is waited for."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from pydantic import BaseModel

from llava_serve.api.completion import ChatShape, CompletionForm
from llava_serve.api.limiter import ConcurrencyLimiter
from llava_serve.api.middleware import too_large
from llava_serve.api.pipeline import GenerationRequest, generation
from llava_serve.api.record import RequestRecord
from llava_serve.api.service import Service
from llava_serve.api.validation import ParsedChat, completion_id, read_chat
from llava_serve.config import BATCH_SHARE
from llava_serve.deadline import deadline_scope
from llava_serve.errors import (
    CapacityError,
    DeadlineExceededError,
    EngineDeadError,
    RequestError,
    UnsupportedParameterError,
)

RETRY_S = 1
"""After the loss of a replica; another one may answer at once."""

_IGNORED = "idx_in_batch"
"""A field that Ray Data adds to each request: the row's place in its batch."""


class ChatCalls:
    """Answers chat completions.

    Args:
        service: of the same server over HTTP.
        limiter: shared with it.
    """

    def __init__(self, service: Service, limiter: ConcurrencyLimiter) -> None:
        self._service = service
        self._limiter = limiter
        self._waiting = 0
        self._most_waiting = max(1, int(service.options.max_in_flight * BATCH_SHARE))

    async def answer(self, request: Mapping[str, Any] | BaseModel, record: RequestRecord) -> dict[str, Any]:
        """The completion. While the server is busy, or a replica is being replaced, the call waits and tries again.

        Args:
            request: the body of a chat completion, as a dict or a pydantic model. Arrays in it count as lists.
                Without `timeout` it has the longest timeout of the server.
            record: of this call.

        Raises:
            RequestError: the request is not valid.
            CapacityError: the server is shutting down, or too many calls wait already.
            DeadlineExceededError: the answer was not complete in time.
            NumericalError: as over HTTP.
        """
        arrived = time.time()
        body = _body(request)
        options = self._service.options
        if len(body) > options.max_body_bytes:
            raise too_large(options.max_body_bytes)
        ignore = options.unknown_fields == "ignore"
        parsed = await asyncio.to_thread(
            partial(read_chat, body, ignore_unknown=ignore, image_order=options.image_order)
        )
        if parsed.wire.stream:
            raise UnsupportedParameterError("The answer comes as a whole; leave stream out.", "stream")
        deadline = arrived + min(parsed.wire.timeout or options.max_timeout_s, options.max_timeout_s)
        work = self._service.work(parsed.wire, parsed.conversation, deadline, record, conv_mode=parsed.wire.conv_mode)
        while True:
            try:
                return await self._completed(work, parsed, len(body))
            except CapacityError as busy:
                await self._wait(busy.retry_after_s, busy, deadline)
            except EngineDeadError as lost:
                await self._wait(RETRY_S, lost, deadline)

    async def _completed(self, work: GenerationRequest, parsed: ParsedChat, size: int) -> dict[str, Any]:
        answer_id = completion_id(parsed.wire, "chatcmpl-", work.request_id)
        form = CompletionForm(ChatShape(), parsed.wire, answer_id, self._service.model.name)
        with self._limiter.request() as place:
            place.hold(size)
            place.classify(work.priority)
            async with deadline_scope(work.deadline), generation(self._service.backend, work) as answer:
                completion: dict[str, Any] = json.loads(await form.whole(answer))
                return completion

    async def _wait(self, seconds: float, error: CapacityError | EngineDeadError, deadline: float) -> None:
        """Waits before the next try; raises where there is none."""
        if self._limiter.draining:
            raise error
        seconds *= random.uniform(1, 2)  # those that were refused together do not come back together
        if time.time() + seconds >= deadline:
            raise DeadlineExceededError(f"{error.message} The request's time is up.", "timeout") from None
        if self._waiting >= self._most_waiting:
            raise CapacityError(
                f"{self._waiting} calls wait at this server already: send fewer at once.", reason="calls_waiting"
            )
        self._waiting += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            self._waiting -= 1


def _body(request: Mapping[str, Any] | BaseModel) -> bytes:
    """The request as it would come over HTTP: so it is held to the same rules."""
    given = request.model_dump(exclude_unset=True) if isinstance(request, BaseModel) else request
    if not isinstance(given, Mapping):
        raise RequestError("The request must be a dict.")
    fields = {name: value for name, value in given.items() if name != _IGNORED}
    try:
        return json.dumps(fields, default=_plain, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError):
        raise RequestError("The request has a value that JSON has no form for; a picture is a data: URL.") from None


def _plain(value: object) -> Any:
    """A value of an array's row as JSON has it."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError
