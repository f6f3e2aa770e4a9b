"""OpenAI's form of a conversation, and its only reader: for HTTP, the library and Ray jobs. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from llava_serve.errors import InvalidImageError, RequestError, UnsupportedParameterError
from llava_serve.types import ImagePart, Message, Query, Role, TextPart
from llava_serve.wire import Wire, as_request_error, one_of, refuse_extras

MAX_MESSAGES = 4096
"""Of a conversation. A context of 32,000 tokens holds no more turns."""
MAX_PARTS = 4096
"""Of a message."""

ChatMessage = Message | Mapping[str, Any]
"""A `Message`, or OpenAI's dict; {"type": "image", "image": ...} holds a path, URL, bytes, PIL image or array."""

ReadSource = Callable[[Any], str | bytes]
"""Reads a source of an image into the source of an `ImagePart`."""


class ImageUrl(Wire):
    """Where a picture is.

    Attributes:
        url: a `data:` URL with the picture in base64; or a link, where `images.links` allows it.
        detail: OpenAI's hint at the resolution; accepted and ignored, as in vLLM, since a checkpoint processes every
            picture in the one way that it was trained on.
    """

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


def _as_image_url(given: Any) -> Any:
    return {"url": given} if isinstance(given, str) else given


class Part(Wire):
    """A piece of a message: text, or a picture where it stands.

    Attributes:
        type: which of the other fields is set.
        image_url: an object, or its `url` alone.
        image: a picture; over HTTP as `image_url`, in the library any source of one.
    """

    type: Literal["text", "image_url", "image"]
    text: str | None = None
    image_url: Annotated[
        ImageUrl | None, BeforeValidator(_as_image_url, json_schema_input_type=ImageUrl | str | None)
    ] = None
    image: Any = None


def _as_parts(content: Any) -> Any:
    """Plain text becomes one part, so that later code handles lists only. A library's user may pass a tuple."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return list(content) if isinstance(content, tuple) else content


class WireMessage(Wire):
    """One turn.

    Attributes:
        role: `developer` is OpenAI's newer name for `system`.
        content: a text, or parts in any order; pictures stand in the user's turns only.
        name: of the speaker; accepted and ignored, since no template has a place for it.
    """

    NEUTRAL = {"tool_calls": one_of([]), "annotations": one_of([])}  # noqa: RUF012 (declared as a ClassVar above)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)],
        BeforeValidator(_as_parts, json_schema_input_type=str | list[Part]),
    ]
    name: str | None = None


def from_wire(messages: Sequence[WireMessage]) -> tuple[Message, ...]:
    """The conversation of a request. Sources of pictures are passed on unread.

    Raises:
        RequestError: a part does not hold what its type says.
    """
    return tuple(_message(message, f"messages[{number}]", _passed_on) for number, message in enumerate(messages))


def read_messages(messages: Sequence[ChatMessage], read_source: ReadSource) -> tuple[Message, ...]:
    """The conversation of a library's user.

    Args:
        messages: a `Message` is returned unchanged.
        read_source: reads a picture in the user's process.

    Raises:
        RequestError: a role, a part or a field is unknown; a picture cannot be read.
    """
    return tuple(_read(message, f"messages[{number}]", read_source) for number, message in enumerate(messages))


def read_asked(
    asked: str | Sequence[ChatMessage], images: Sequence[Any], read_source: ReadSource
) -> Query | tuple[Message, ...]:
    """What a library's user asks: a query with its images, or a conversation, which holds its own.

    Raises:
        RequestError: as `read_messages`; images stand beside a conversation.
    """
    if isinstance(asked, str):
        return Query(asked, tuple(_read_image(image, f"images[{i}]", read_source) for i, image in enumerate(images)))
    if images:
        raise RequestError("The images of a conversation stand in its messages; leave images out.", "images")
    return read_messages(asked, read_source)


def _read(message: ChatMessage, path: str, read_source: ReadSource) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping):
        raise RequestError(f"'{path}' must be a Message or a dict with role and content.", path)
    try:
        wire = WireMessage.model_validate(dict(message))
    except ValidationError as error:
        raise as_request_error(error, path) from None
    refuse_extras(wire, f"{path}.")
    return _message(wire, path, read_source)


def _message(message: WireMessage, path: str, read_source: ReadSource) -> Message:
    role: Role = "system" if message.role == "developer" else message.role
    if role != "user" and any(part.type != "text" for part in message.content):
        raise UnsupportedParameterError(f"A picture can stand in a user message only, not in {path}.", path)
    parts = (_part(part, f"{path}.content[{number}]", read_source) for number, part in enumerate(message.content))
    return Message(role, tuple(parts))


def _part(part: Part, path: str, read_source: ReadSource) -> TextPart | ImagePart:
    given = {"text": part.text, "image_url": part.image_url, "image": part.image}
    if [name for name, value in given.items() if value is not None] != [part.type]:
        raise RequestError(f"{path} must hold '{part.type}', as its type says, and nothing else.", path)
    if part.text is not None:
        return TextPart(part.text)
    return _read_image(part.image if part.image_url is None else part.image_url.url, path, read_source)


def _read_image(source: Any, path: str, read_source: ReadSource) -> ImagePart:
    try:
        return ImagePart(read_source(source))
    except InvalidImageError as error:
        raise InvalidImageError(error.message, path) from error


def _passed_on(source: Any) -> str:
    if not isinstance(source, str):
        raise InvalidImageError("A picture in a request is a data: URL, as a string.")
    return source
