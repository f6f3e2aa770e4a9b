"""What a request meets first: an id, a time of arrival, and an answer whatever goes wrong behind."""

from __future__ import annotations

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_serve.api.errors import INTERNAL, error_response, wire_error

logger = logging.getLogger(__name__)

REQUEST_ID = "x-request-id"
CLIENT_CLOSED_REQUEST = 499
"""Nobody reads it; access logs and metrics do."""

_ACCEPTABLE_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)


class FrontDoor:
    """Sets `state.request_id` and `state.arrived` (seconds since the epoch), and returns the id in `X-Request-ID`.

    Args:
        app: whatever it raises before its first byte is answered here.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get(REQUEST_ID))
        scope.setdefault("state", {}).update(request_id=request_id, arrived=time.time())
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            if not started:
                await Response(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, send_with_id)
        except Exception as error:
            log_if_internal(error, request_id)
            if started:
                raise
            await error_response(error, request_id)(scope, receive, send_with_id)


def log_if_internal(error: Exception, request_id: str) -> None:
    """Logs with its traceback what nobody foresaw; every other error is the client's to read."""
    if wire_error(error) is INTERNAL:
        logger.error("Request %s failed.", request_id, exc_info=error)


def _request_id(given: str | None) -> str:
    return given if given and _ACCEPTABLE_ID.fullmatch(given) else uuid.uuid4().hex
