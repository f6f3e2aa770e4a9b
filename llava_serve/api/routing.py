"""A route whose request FastAPI describes at `/openapi.json` and our own function parses: see `parse_request`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers

from llava_serve.api.protocol import ChatCompletion, ChatCompletionChunk, ChatRequest, ErrorBody
from llava_serve.errors import UnsupportedMediaTypeError, shown

_STREAM = {"text/event-stream": {"schema": {"$ref": "#/components/schemas/ChatCompletionChunk"}}}

CHAT_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ChatCompletion,
        "description": "The answer; with `stream`, events of `ChatCompletionChunk` and then `[DONE]`.",
        "content": _STREAM,
    },
    **{
        status: {"model": ErrorBody, "description": description}
        for status, description in {
            400: "A field, an image or the prompt's length is invalid; the message says which.",
            401: "The API key is missing or invalid.",
            404: "The model does not exist.",
            413: "The body is too large.",
            415: "The body is not sent as JSON.",
            429: "The server is at capacity; `Retry-After` says when to try again.",
            500: "The server failed on this request.",
            503: "The model is not available.",
            504: "The request's deadline has passed.",
        }.items()
    },
}
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorBody, "description": "An error; the message says which."}
}
"""Of every route; they replace FastAPI's own 422."""


def route_reading_by(read: Callable[[Request], Awaitable[ChatRequest]]) -> type[APIRoute]:
    """Routes whose endpoint declares (request, body): FastAPI describes the body, and `read` alone parses it."""

    class ReadingRoute(APIRoute):
        def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
            super().__init__(path, endpoint, **options)
            self.stream_item_type = ChatCompletionChunk  # so that its schema is among the components

        def get_route_handler(self) -> Callable[[Request], Any]:
            async def handle(request: Request) -> Response:
                check_media_type(request.headers)
                response: Response = await self.endpoint(request, await read(request))
                return response

            return handle

    return ReadingRoute


def check_media_type(headers: Headers) -> None:
    """Refuses a body that is not declared as plain JSON. A page of another origin cannot declare that without the
    browser asking the server first, so no page can use a local server behind its user's back.

    Raises:
        UnsupportedMediaTypeError: another type or a compressed body; no type in a request of a browser, which sends
            `Origin`: its pages can leave the type out.
    """
    given = headers.get("content-type")
    kind = (given or "").partition(";")[0].strip().lower()
    if not (kind == "application/json" or kind.endswith("+json") or (given is None and "origin" not in headers)):
        raise UnsupportedMediaTypeError(
            f"Send the body as JSON, with the header 'Content-Type: application/json'; got {shown(kind) or 'none'!r}."
        )
    encoding = headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise UnsupportedMediaTypeError(f"Send the body without Content-Encoding; got {shown(encoding)!r}.")
