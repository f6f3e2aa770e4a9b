"""The way of one chat request: prepare, wait for the first chunk, then answer, streamed or whole."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing, nullcontext

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llava_serve.api.backend import Backend
from llava_serve.api.completion import StreamEvents, Tally, WholeAnswer, new_completion_id
from llava_serve.api.errors import error_body
from llava_serve.api.front import log_if_internal
from llava_serve.api.leaving import before, while_client_waits
from llava_serve.api.messages import messages_of, sampling_of
from llava_serve.api.schema import ChatRequest
from llava_serve.api.sse import DONE, EventSender, event
from llava_serve.errors import EngineDeadError
from llava_serve.types import Chunk

_CUT_SHORT = "The model ended the request before its answer was complete."


class ChatAnswer(Response):
    """The response to one request: it does the work when it is sent, so that one task owns the work from end to end.

    Errors before the first byte are raised; later ones become an event of the stream. The first byte of a stream is the
    model's, or after `KEEP_ALIVE_S` of silence a comment's.

    Args:
        backend: what prepares and generates.
        request: checked; its messages and sampling are read here.
        request_id: for the log and for internal errors.
        deadline: seconds since the epoch.
    """

    def __init__(self, backend: Backend, request: ChatRequest, request_id: str, deadline: float) -> None:
        super().__init__()
        self._backend = backend
        self._request = request
        self._messages = messages_of(request)
        self._sampling = sampling_of(request)
        self._request_id = request_id
        self._deadline = deadline
        self._id = new_completion_id()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = EventSender(send)
        alive = events.kept_alive() if self._request.stream else nullcontext()
        try:
            async with while_client_waits(receive), before(self._deadline), alive:
                prepared = await self._backend.prepare(
                    self._messages, conv_mode=self._request.conv_mode, deadline=self._deadline
                )
                generated = self._backend.generate(
                    prepared, self._sampling, request_id=self._id, deadline=self._deadline
                )
                async with aclosing(generated) as chunks:
                    first = await anext(chunks, None)
                    if first is None:
                        raise EngineDeadError(_CUT_SHORT)
                    tally = Tally(prepared, self._sampling.n)
                    if self._request.stream:
                        await self._stream(events, first, chunks, tally)
                    else:
                        body = await self._whole(first, chunks, tally)
        except ClientDisconnect:
            raise
        except Exception as error:
            if not events.started:
                raise
            log_if_internal(error, self._request_id)
            await events.write(event(json.dumps(error_body(error, self._request_id)).encode()))
        if events.started:
            await events.end()
        else:
            await Response(body, media_type="application/json")(scope, receive, send)

    async def _stream(self, sender: EventSender, first: Chunk, rest: AsyncGenerator[Chunk], tally: Tally) -> None:
        options = self._request.stream_options
        events = StreamEvents(
            self._id, self._backend.model_name, tell_usage=bool(options is not None and options.include_usage)
        )

        async def tell(chunk: Chunk) -> None:
            tally.add(chunk)
            if (said := events.event(chunk)) is not None:
                await sender.write(event(said.json_bytes()))

        await tell(first)
        async for chunk in rest:
            await tell(chunk)
        demand_complete(tally)
        if (last := events.last(tally)) is not None:
            await sender.write(event(last.json_bytes()))
        await sender.write(DONE)

    async def _whole(self, first: Chunk, rest: AsyncGenerator[Chunk], tally: Tally) -> bytes:
        answer = WholeAnswer()
        tally.add(first)
        answer.add(first)
        async for chunk in rest:
            tally.add(chunk)
            answer.add(chunk)
        demand_complete(tally)
        return answer.completion(self._id, self._backend.model_name, tally).json_bytes()


def demand_complete(tally: Tally) -> None:
    """A stream that just ends was aborted behind: half an answer is not passed off as a whole one.

    Raises:
        EngineDeadError: a choice has not told why it ended.
    """
    if not tally.complete:
        raise EngineDeadError(_CUT_SHORT)
