"""A reverse proxy that serves another server below a path."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route


def below(prefix: str, target: str) -> Starlette:
    """An app that passes requests at `prefix` on to the server at the URL `target`, and streams the answers."""
    client = httpx.AsyncClient(base_url=target, timeout=60)

    async def forward(request: Request) -> Response:
        path = "/" + request.path_params["path"]
        sent = client.build_request(request.method, path, headers=request.headers.raw, content=await request.body())
        answer = await client.send(sent, stream=True)
        return StreamingResponse(
            answer.aiter_raw(), answer.status_code, answer.headers, background=BackgroundTask(answer.aclose)
        )

    @asynccontextmanager
    async def closing(_: Starlette) -> AsyncIterator[None]:
        async with client:
            yield

    return Starlette(lifespan=closing, routes=[Route(f"{prefix}/{{path:path}}", forward, methods=["GET", "POST"])])
