"""Completes the response of an ingress replica that was lost. It runs in Serve's proxy, which outlives that replica.

Serve's proxy ends such a response without a word: before the first byte its HTTP server sends 500 and a line of plain
text, and later it cuts the connection. Behind HAProxy there is no such place: `deployments.tools.haproxy` sets what it
answers before the first byte, and it cuts what has begun.
"""

from __future__ import annotations

import json

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_serve.api.errors import error_body, error_response
from llava_serve.api.streaming import DONE, event
from llava_serve.errors import EngineDeadError

LOST = EngineDeadError("The replica that worked on the request was lost.")


class LostReplicaMiddleware:
    """Answers 503 where nothing was sent, and ends an event stream with an error event; other bodies stay cut."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = events = ended = False

        async def watched(message: Message) -> None:
            nonlocal started, events, ended
            if message["type"] == "http.response.start":
                started, events = True, _is_event_stream(message)
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        await self._app(scope, receive, watched)
        if scope["type"] != "http":
            return
        if not started:
            await error_response(LOST)(scope, receive, send)
        elif events and not ended:
            last = event(json.dumps(error_body(LOST)).encode()) + DONE
            await send({"type": "http.response.body", "body": last})


def _is_event_stream(start: Message) -> bool:
    headers = {name.lower(): value for name, value in start.get("headers", ())}
    return bytes(headers.get(b"content-type", b"")).startswith(b"text/event-stream")
