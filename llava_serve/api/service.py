"""What the endpoints that read a body share: reading it, and what becomes of it for the pipeline."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from fastapi import Request

from llava_serve.api.backends import Backend
from llava_serve.api.cache_scope import cache_salt
from llava_serve.api.models import ServedModel
from llava_serve.api.notes import IgnoredFields
from llava_serve.api.parse_process import Offload
from llava_serve.api.pipeline import GenerationRequest
from llava_serve.api.protocol import ChatRequest, GenerationFields
from llava_serve.api.record import RequestRecord
from llava_serve.api.validation import check_priority, conversation_of, parse_request, read_chat, sampling_of
from llava_serve.config import ApiOptions
from llava_serve.errors import DeadlineExceededError
from llava_serve.metrics.requests import RequestMetrics
from llava_serve.types import Asked, Message
from llava_serve.wire import Wire, unsupported_fields

LARGE_BODY_BYTES = 64 << 10
"""Takes about a millisecond to parse."""

Body = TypeVar("Body", bound=Wire)
T = TypeVar("T")


class Service:
    """The endpoints' view of the server.

    Attributes:
        backend: what prepares prompts and generates chunks.
        options: access and limits.
        model: that is served.
        metrics: get what happens to requests.

    Args:
        offload: parses large bodies, so that the streams of other requests go on.
    """

    def __init__(self, backend: Backend, options: ApiOptions, offload: Offload) -> None:
        self.backend = backend
        self.options = options
        self._offload = offload
        self.model = ServedModel(backend, options)
        self.metrics = RequestMetrics(backend.exporter)
        self._ignored = IgnoredFields()

    async def read(self, request: Request, kind: type[Body]) -> Body:
        """Reads and parses a body.

        Raises:
            RequestError: as `parse_request`.
            DeadlineExceededError: it did not arrive in time.
        """
        body = await _body(request, self.options.default_timeout_s)
        wire = await self._parsed(body, partial(parse_request, body, kind, ignore_unknown=self._ignores_unknown))
        request.state.notes += self._ignored.notes(tuple(unsupported_fields(wire)) if self._ignores_unknown else ())
        return wire

    async def read_chat(self, request: Request, kind: type[ChatRequest]) -> ChatRequest:
        """As `read`, with all work that grows with the body: the conversation is then `request.state.conversation`."""
        body = await _body(request, self.options.default_timeout_s)
        order = self.options.image_order
        read = partial(read_chat, body, ignore_unknown=self._ignores_unknown, image_order=order)
        parsed = await self._parsed(body, read)
        request.state.notes += [*self._ignored.notes(parsed.ignored), *parsed.notes]
        request.state.conversation = parsed.conversation
        return parsed.wire

    @property
    def _ignores_unknown(self) -> bool:
        return self.options.unknown_fields == "ignore"

    async def _parsed(self, body: bytes, parse: Callable[[], T]) -> T:
        return parse() if len(body) < LARGE_BODY_BYTES else await self._offload(parse, len(body))

    def deadline(self, request: Request, timeout: float | None = None) -> float:
        """When the answer must be complete, in seconds since the epoch."""
        seconds = min(timeout or self.options.default_timeout_s, self.options.max_timeout_s)
        arrived: float = request.state.arrived
        return arrived + seconds

    def conversation(
        self, request: Request, wire: ChatRequest, field: str = "messages", first: int = 0
    ) -> Sequence[Message]:
        """The conversation of a request; its notes go into the response's header. Arguments are those of
        `conversation_of`.

        Raises:
            RequestError: a message cannot be used.
        """
        asked, notes = conversation_of(wire, self.options.image_order, field, first)
        request.state.notes += notes
        return asked

    def generation_request(
        self,
        request: Request,
        wire: GenerationFields,
        asked: Asked,
        *,
        default_max_tokens: int | None = None,
        conv_mode: str | None = None,
    ) -> GenerationRequest:
        """A request for the pipeline.

        Args:
            default_max_tokens: of the endpoint; the server's own bounds it.

        Raises:
            RequestError: a field is outside its range, or the model is another one.
            CapacityError: it is batch work, and there is no room for such.
        """
        work = self.work(
            wire,
            asked,
            self.deadline(request, wire.timeout),
            request.state.record,
            default_max_tokens=default_max_tokens,
            conv_mode=conv_mode,
            client=getattr(request.state, "client", None),
        )
        request.state.place.classify(work.priority)
        return work

    def work(
        self,
        wire: GenerationFields,
        asked: Asked,
        deadline: float,
        record: RequestRecord,
        *,
        default_max_tokens: int | None = None,
        conv_mode: str | None = None,
        client: str | None = None,
    ) -> GenerationRequest:
        """As `generation_request`, for a request that does not come over HTTP.

        Args:
            deadline: seconds since the epoch.
            record: of the request.
            client: the name of its API key.
        """
        self.model.check(wire.model)
        priority = wire.priority or 0
        check_priority(priority, self.options.priority_range)
        defaults = [each for each in (default_max_tokens, self.options.default_max_tokens) if each is not None]
        return GenerationRequest(
            asked=asked,
            sampling=sampling_of(wire, min(defaults, default=None)),
            request_id=uuid.uuid4().hex,
            deadline=deadline,
            record=record,
            conv_mode=conv_mode,
            priority=priority,
            cache_salt=cache_salt(self.options.cache_scope, client, wire.cache_salt),
            return_timings=bool(wire.return_timings),
        )


async def _body(request: Request, timeout_s: float) -> bytes:
    """Reads the body within a time limit: a slow client must not stay in flight for ever."""
    try:
        async with asyncio.timeout(timeout_s):
            return await request.body()
    except TimeoutError:
        raise DeadlineExceededError("The request's body did not arrive in time.") from None
