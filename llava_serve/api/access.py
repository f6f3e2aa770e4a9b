"""Who may come in: bearer keys, compared in constant time."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from llava_serve.errors import AccessError

OPEN_PATHS = frozenset({"/", "/health", "/openapi.json"})
"""Probes have no key, and the page has to be there before a key can be typed into it."""


class AccessGate:
    """Demands a key for everything that is not in `OPEN_PATHS`.

    Args:
        app: what lies behind.
        keys: accepted keys, one or more.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _path(scope) not in OPEN_PATHS:
            self._demand_key(Headers(scope=scope).get("authorization", ""))
        await self._app(scope, receive, send)

    def _demand_key(self, authorization: str) -> None:
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() != "bearer" or not given.strip():
            raise AccessError("This server wants a key: send it as 'Authorization: Bearer KEY'.")
        sent = given.strip().encode("latin-1")  # the bytes as they came
        # All keys are compared, whichever fits: the time tells nothing.
        fits = [hmac.compare_digest(sent, key) for key in self._keys]
        if not any(fits):
            raise AccessError("The key is not one that this server accepts.")


def _path(scope: Scope) -> str:
    """Below the prefix that the app is mounted at."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
