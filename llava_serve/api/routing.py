"""A route whose request FastAPI describes at `/openapi.json` and our own function parses: see `parse_request`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from starlette.datastructures import Headers

from llava_serve.api.protocol import Answer, ErrorBody
from llava_serve.errors import UnsupportedMediaTypeError, shown
from llava_serve.wire import Wire

Body = TypeVar("Body", bound=Wire)

_BODY_ERRORS: dict[int | str, dict[str, Any]] = {
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
}
"""Of every route that reads a body."""
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorBody, "description": "An error; the message says which."}
}
"""Of every route; they replace FastAPI's own 422."""


def responses_of(answer: type[Answer], event: type[Answer] | None = None) -> dict[int | str, dict[str, Any]]:
    """The responses of a route that reads a body: its answer, and with `stream` the events."""
    whole: dict[str, Any] = {"model": answer, "description": "The answer."}
    if event is not None:
        kinds = [{"$ref": f"#/components/schemas/{kind.__name__}"} for kind in (event, ErrorBody)]
        value = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": kinds}}
        data = {"anyOf": [value, {"const": "[DONE]"}]}
        schema = {"type": "object", "properties": {"event": {"type": "string"}, "data": data}, "required": ["data"]}
        whole |= {
            "description": f"The answer; with `stream`, events whose data are a `{event.__name__}`.",
            "content": {"text/event-stream": {"schema": schema}},
        }
    return {200: whole, **_BODY_ERRORS}


def reading_route(
    kind: type[Body], read: Callable[[Request, type[Body]], Awaitable[Body]], event: type[Answer] | None = None
) -> type[APIRoute]:
    """Routes whose endpoint declares (request, body): FastAPI describes the body, and `read` alone parses it.

    Args:
        kind: of the body.
        read: parses it.
        event: of the stream, whose schema `responses_of` names.
    """

    class ReadingRoute(APIRoute):
        def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
            super().__init__(path, endpoint, **options)
            if event is not None:
                self.stream_item_type = event  # so that its schema is among the components

        def get_route_handler(self) -> Callable[[Request], Any]:
            async def handle(request: Request) -> Response:
                check_media_type(request.headers)
                body = await read(request, kind)
                request.state.field_name = body.field_name
                response: Response = await self.endpoint(request, body)
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
