"""Middleware around the app: the request's id and errors, the API key, admission."""

from __future__ import annotations

import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_serve.api.errors import error_response, log_error, same
from llava_serve.api.keys import ApiKeys
from llava_serve.api.limiter import ConcurrencyLimiter
from llava_serve.api.notes import HEADER as NOTES
from llava_serve.api.notes import header_value
from llava_serve.api.page_files import PAGE_PATHS
from llava_serve.api.record import CLIENT_CLOSED_REQUEST, RequestRecord, recorded
from llava_serve.errors import AccessError, BodyTooLargeError
from llava_serve.metrics.requests import RequestMetrics
from llava_serve.types import Asked, image_bytes

REQUEST_ID = "x-request-id"

TRACE_RESPONSE = "traceresponse"
"""The header of the W3C that names the span of a request to its caller."""

OPEN_PATHS = PAGE_PATHS | {"/health", "/ping", "/openapi.json"}
"""Probes have no key, and the page is where users type theirs."""

_ACCEPTABLE_ID = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)


class RequestContextMiddleware:
    """Sets `state.request_id` and `state.arrived` (seconds since the epoch), and returns the id in `X-Request-ID`. What
    the app adds to the list `state.notes` goes into the header `x-llava-serve-notes`. `state.record` is the request's
    record, and `state.field_name` says what the request calls a field that an error names.

    Args:
        app: an error that it raises before its first byte is answered here.
        metrics: get what happens to each request.
    """

    def __init__(self, app: ASGIApp, metrics: RequestMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers.get(REQUEST_ID))
        with recorded(RequestRecord(self._metrics, request_id, scope["method"], _path(scope)), headers) as record:
            await self._answer(scope, receive, send, record)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        request_id, notes = record.request_id, list[str]()
        state = scope.setdefault("state", {})
        state |= {
            "request_id": request_id,
            "arrived": time.time(),
            "notes": notes,
            "record": record,
            "field_name": same,
        }
        if scope["method"] == "HEAD":  # the answer is that of GET; the HTTP server leaves its body out
            scope = {**scope, "method": "GET"}
        if len(path := _path(scope)) > 1 and path.endswith("/"):  # answered as without: a redirect could lose a body
            scope = {**scope, "path": scope["path"].rstrip("/")}
        # Below a route prefix the page's links need the slash at its end: they are relative.
        app = _add_slash if not _path(scope) and scope["method"] == "GET" else self._app
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                if record.trace.parent is not None:
                    headers[TRACE_RESPONSE] = record.trace.parent
                if notes:
                    headers[NOTES] = header_value(notes)
            await send(message)

        try:
            await app(scope, receive, send_with_id)
        except ClientDisconnect as error:
            record.failed(error)
            if not started:
                await Response(status_code=CLIENT_CLOSED_REQUEST)(scope, receive, send_with_id)
        except Exception as error:
            record.failed(error)
            log_error(error, request_id)
            if started:
                raise
            await error_response(error, request_id, state["field_name"])(scope, receive, send_with_id)
        finally:
            record.endpoint = getattr(scope.get("route"), "path", record.endpoint)


class APIKeyMiddleware:
    """Requires a bearer key for every path that is not in `OPEN_PATHS`, and sets `state.client` to the key's name.

    Args:
        app: the wrapped app.
        keys: accepted keys.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _path(scope) not in OPEN_PATHS:
            scope["state"]["client"] = self._client(Headers(scope=scope).get("authorization", ""))
        await self._app(scope, receive, send)

    def _client(self, authorization: str) -> str:
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise AccessError("API key required: send it as 'Authorization: Bearer KEY'.")
        name = self._keys.name_of(given.strip().encode("latin-1"))  # the bytes of the header
        if name is None:
            raise AccessError("This API key is not valid on this server.")
        return name


class AdmissionMiddleware:
    """Counts each request as in flight, from its arrival to the last byte of its answer, and limits its body. Both
    happen before any picture is read. `state.place` is the request's place in the limiter.

    Args:
        app: the wrapped app.
        limiter: raises `CapacityError` at capacity.
        max_body_bytes: of a request; more raises `BodyTooLargeError`, whatever its header declares.
    """

    def __init__(self, app: ASGIApp, limiter: ConcurrencyLimiter, max_body_bytes: int) -> None:
        self._app = RequestBodyLimitMiddleware(app, max_body_bytes)
        self._limiter = limiter
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def receive_counted() -> Message:
            message = await receive()
            place.hold(len(message.get("body", b"")))
            return message

        async def send_own_refusal(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] == 413:
                raise too_large(self._max_body_bytes)  # instead of Starlette's plain text
            await send(message)

        with self._limiter.request(works=scope["method"] == "POST") as place:
            scope["state"]["place"] = place
            await self._app(scope, receive_counted, send_own_refusal)


def check_image_bytes(asked: Asked, limit: int) -> int:
    """The bytes of all images of a request. Raises `BodyTooLargeError` if they are more than `limit`."""
    size = image_bytes(asked)
    if size > limit:
        raise too_large(limit)
    return size


def too_large(limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"The request is larger than this server's limit of {limit / (1 << 20):.3g} MiB.")


def _path(scope: Scope) -> str:
    """The path without the prefix that the app is mounted at."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


async def _add_slash(scope: Scope, receive: Receive, send: Send) -> None:
    """Redirects to the same address with a slash at its end, by its last segment: a proxy may have cut off others."""
    await RedirectResponse(f"{scope['path'].rpartition('/')[2]}/")(scope, receive, send)


def is_request_id(given: str) -> bool:
    """A client may choose this id: a short word of letters, digits and a few marks, so that no log is disturbed."""
    return _ACCEPTABLE_ID.fullmatch(given) is not None


def _request_id(given: str | None) -> str:
    return given if given is not None and is_request_id(given) else uuid.uuid4().hex
