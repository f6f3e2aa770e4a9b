"""What stands before Serve looks at a request, and after it has answered: in its HTTP proxy, or where HAProxy is the
proxy, in the ingress replica.

Serve lets a client lift the server's time limit and switch off the notice of its own leaving by request headers. A
client shall not have that power here, so the headers are taken off. And Serve adds the request's id to answers that say
it already. Serve finds `middlewares` by the variable RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH in the process's
environment (`controller_options` of `serve_config.yaml` give it to the proxy).
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUEST_ID = b"x-request-id"
FORBIDDEN_HEADERS = frozenset(
    (
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve_multiplexed_model_id",
        b"serve-multiplexed-model-id",
    )
)


class HeaderFilterMiddleware:
    """Takes the headers off that steer Serve itself, and the second id off the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            kept = [(name, value) for name, value in scope["headers"] if name.lower() not in FORBIDDEN_HEADERS]
            await self._app({**scope, "headers": kept}, receive, one_id(send))
            return
        await self._app(scope, receive, send)


def one_id(send: Send) -> Send:
    """Lets the first `X-Request-ID` through, the application's own: what Serve adds comes after it."""

    async def send_with_one(message: Message) -> None:
        if message["type"] == "http.response.start":
            seen = False
            kept = []
            for name, value in message.get("headers", ()):
                is_id = name.lower() == REQUEST_ID
                if not (is_id and seen):
                    kept.append((name, value))
                seen |= is_id
            message = {**message, "headers": kept}
        await send(message)

    return send_with_one


def middlewares() -> list[Middleware]:
    """What Serve puts around its proxy."""
    return [Middleware(HeaderFilterMiddleware)]
