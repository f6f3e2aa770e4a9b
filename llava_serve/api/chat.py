"""The answer to one chat request over HTTP: wait for the first chunk, then answer, streamed or at once."""

from __future__ import annotations

import json
from contextlib import nullcontext

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llava_serve.api.backends import Backend
from llava_serve.api.completion import CompletionBuilder, StreamEvents
from llava_serve.api.errors import reported
from llava_serve.api.pipeline import Generation, GenerationRequest, generation
from llava_serve.api.protocol import ChatRequest
from llava_serve.api.streaming import DONE, EventSender, cancel_on_disconnect, event
from llava_serve.deadline import deadline_scope


class ChatAnswer(Response):
    """The response to one request: it does the work while it is sent, so that one task owns the work from start to end.

    Errors before the first byte are raised; later ones become an event of the stream. A stream starts with
    the first chunk, or with a comment after `KEEP_ALIVE_S` of silence.

    Args:
        backend: what prepares and generates.
        wire: the request as it was sent.
        request: the same in the library's form.
        log_id: names the request in the log and in internal errors.
        completion_id: of the answer.
    """

    def __init__(
        self, backend: Backend, wire: ChatRequest, request: GenerationRequest, log_id: str, completion_id: str
    ) -> None:
        super().__init__()
        self._backend = backend
        self._wire = wire
        self._request = request
        self._log_id = log_id
        self._completion_id = completion_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        events = EventSender(send)
        alive = events.kept_alive() if self._wire.stream else nullcontext()
        try:
            async with (
                cancel_on_disconnect(receive),
                deadline_scope(self._request.deadline),
                alive,
                generation(self._backend, self._request) as answer,
            ):
                if self._wire.stream:
                    await self._stream(events, answer)
                else:
                    body = await self._whole(answer)
        except ClientDisconnect:
            raise
        except Exception as error:
            if not events.started:
                raise
            await events.write(event(json.dumps(reported(error, self._log_id)).encode()) + DONE)
        if events.started:
            await events.end()
        else:
            await Response(body, media_type="application/json")(scope, receive, send)

    async def _stream(self, sender: EventSender, answer: Generation) -> None:
        name = self._backend.model_name
        events = StreamEvents(self._completion_id, name, self._wire, answer.prepared, answer.counter)
        async for group in answer:
            lines = [event(each.json_bytes()) for chunk in group if (each := events.event(chunk)) is not None]
            if lines:
                await sender.write(b"".join(lines))
        if (last := events.last()) is not None:
            await sender.write(event(last.json_bytes()))
        await sender.write(DONE)

    async def _whole(self, answer: Generation) -> bytes:
        builder = CompletionBuilder(self._wire, answer.prepared)
        async for group in answer:
            for chunk in group:
                builder.add(chunk)
        return builder.completion(self._completion_id, self._backend.model_name, answer.counter).json_bytes()
