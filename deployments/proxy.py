"""What stands in Serve's HTTP proxy, before Serve looks at a request.

Serve lets a client lift the server's time limit and switch off the notice of its own leaving by request headers. A
client shall not have that power here, so the headers are taken off. Serve finds `middlewares` by the variable
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH in the proxy's environment (`controller_options` of `serve_config.yaml`).
"""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

FORBIDDEN_HEADERS = frozenset(
    (
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve_multiplexed_model_id",
        b"serve-multiplexed-model-id",
    )
)


class HeaderGuard:
    """Takes the headers off that steer Serve itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            kept = [(name, value) for name, value in scope["headers"] if name.lower() not in FORBIDDEN_HEADERS]
            scope = {**scope, "headers": kept}
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve puts around its proxy."""
    return [Middleware(HeaderGuard)]
