"""Middleware around Serve: in its HTTP proxy, or in the ingress replica if HAProxy is the proxy.

By request headers, Serve lets a client change the server's time limit, switch the detection of its disconnect off and
choose the replica. These headers are removed here, and so is a request id that the application would replace: Serve
fails on one that is not UTF-8. Serve also adds the request's id to responses that have it already; only the first one
is kept. Serve finds `middlewares` by the variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH in the process's
environment (`controller_options` of `serve_config.yaml` set it for the proxy).

A request with a body that offers to go on in HTTP/2 (`Upgrade: h2c`, as Java's client does) is refused: Serve's proxy
parses by httptools, which drops that body, and Ray has no setting for another parser. HAProxy removes the offer.
"""

from __future__ import annotations

from collections.abc import Mapping

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llava_serve.api.errors import error_response
from llava_serve.api.middleware import is_request_id
from llava_serve.errors import RequestError

from .lost_replica import LostReplicaMiddleware

REQUEST_ID = b"x-request-id"
FORBIDDEN_HEADERS = frozenset(
    (
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"x-session-id",
        b"serve_multiplexed_model_id",
        b"serve-multiplexed-model-id",
    )
)


BODY_LOST = RequestError("Send the request as plain HTTP/1.1: with the header 'Upgrade' its body is not read here.")


class HeaderFilterMiddleware:
    """Removes the request headers that control Serve itself or disturb it, and a second id from the response.

    It refuses a request whose body is lost.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if loses_body(dict(scope["headers"])):
                await error_response(BODY_LOST)(scope, receive, send)
                return
            kept = [(name, value) for name, value in scope["headers"] if is_allowed(name.lower(), value)]
            await self._app({**scope, "headers": kept}, receive, one_id(send))
            return
        await self._app(scope, receive, send)


def loses_body(headers: Mapping[bytes, bytes]) -> bool:
    """The request has a body, and the parser has dropped it."""
    has_body = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
    return b"upgrade" in headers and has_body


def is_allowed(name: bytes, value: bytes) -> bool:
    """The request header reaches Serve."""
    return name not in FORBIDDEN_HEADERS and (name != REQUEST_ID or is_request_id(value.decode("latin-1")))


def one_id(send: Send) -> Send:
    """Keeps the first `X-Request-ID`, the application's own; Serve adds a second one after it."""

    async def send_with_one(message: Message) -> None:
        if message["type"] == "http.response.start":
            has_id = False
            kept = []
            for name, value in message.get("headers", ()):
                is_id = name.lower() == REQUEST_ID
                if not (is_id and has_id):
                    kept.append((name, value))
                has_id |= is_id
            message = {**message, "headers": kept}
        await send(message)

    return send_with_one


def middlewares() -> list[Middleware]:
    """The middleware that Serve adds to its proxy."""
    return [Middleware(HeaderFilterMiddleware), Middleware(LostReplicaMiddleware)]
