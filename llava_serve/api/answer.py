"""The answer to one request over HTTP: wait for the first chunk, then answer, streamed or at once."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, nullcontext
from typing import Any, Protocol

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from llava_serve.api.backends import Backend
from llava_serve.api.errors import reported
from llava_serve.api.pipeline import Generation, GenerationRequest, generation
from llava_serve.api.record import server_timing
from llava_serve.api.streaming import EventSender, cancel_on_disconnect
from llava_serve.deadline import deadline_scope

SERVER_TIMING = "server-timing"


class AnswerForm(Protocol):
    """How an endpoint writes one answer."""

    @property
    def stream(self) -> bool:
        """The request asks for a stream."""
        ...

    def events(self, answer: Generation) -> AsyncGenerator[bytes]:
        """The whole stream, in pieces of whole events."""
        ...

    async def whole(self, answer: Generation) -> bytes:
        """The body of an unstreamed answer."""
        ...

    def failure(self, error: dict[str, Any]) -> bytes:
        """The end of a stream that fails: `error` is the error's body."""
        ...


class GeneratedAnswer(Response):
    """The response to one request: it does the work while it is sent, so that one task owns the work from start to end.

    Errors before the first byte are raised; later ones become an event of the stream. A stream starts with
    the first chunk, or with a comment after `KEEP_ALIVE_S` of silence.

    Args:
        backend: what prepares and generates.
        request: what is asked.
        form: writes the answer.
        log_id: names the request in the log and in internal errors.
    """

    def __init__(self, backend: Backend, request: GenerationRequest, form: AnswerForm, log_id: str) -> None:
        super().__init__()
        self._backend = backend
        self._request = request
        self._form = form
        self._log_id = log_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = EventSender(send)
        alive = sender.kept_alive() if self._form.stream else nullcontext()
        try:
            async with (
                cancel_on_disconnect(receive),
                deadline_scope(self._request.deadline),
                alive,
                generation(self._backend, self._request) as answer,
            ):
                if self._form.stream:
                    async with aclosing(self._form.events(answer)) as events:
                        async for piece in events:
                            if not sender.started:
                                sender.headers.update(self._timing())
                            await sender.write(piece)
                else:
                    body = await self._form.whole(answer)
                    sender.headers.update(self._timing())
        except ClientDisconnect:
            raise
        except Exception as error:
            if not sender.started:
                raise
            self._request.record.failed(error)
            await sender.write(self._form.failure(reported(error, self._log_id, scope["state"]["field_name"])))
        if sender.started:
            await sender.end()
        else:
            await Response(body, headers=sender.headers, media_type="application/json")(scope, receive, send)

    def _timing(self) -> dict[str, str]:
        """The header with the times so far, if the request asks for it."""
        return {SERVER_TIMING: server_timing(self._request.record.timings())} if self._request.return_timings else {}
