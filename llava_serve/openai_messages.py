"""OpenAI's form of a conversation, and its only reader: for HTTP, the library and Ray jobs. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from llava_serve.errors import InvalidImageError, RequestError, UnsupportedParameterError
from llava_serve.faults import as_request_error
from llava_serve.types import Conversation, ImagePart, Message, Query, Role, TextPart
from llava_serve.wire import Wire, anything, one_of, refuse_extras

MAX_MESSAGES = 4096
"""Of a conversation. A context of 32,000 tokens holds no more turns."""
MAX_PARTS = 4096
"""Of a message."""

ChatMessage = Message | Mapping[str, Any]
"""A `Message`, or OpenAI's dict; {"type": "image", "image": ...} holds a path, URL, bytes, PIL image or array."""

ReadSource = Callable[[Any], str | bytes]
"""Reads a source of an image into the source of an `ImagePart`."""


HINT = dict.fromkeys(("annotations", "cache_control", "format", "modalities", "uuid"), anything)
"""Of a part: fields that change no answer."""

_TEXTS = ("text", "input_text", "output_text")
_IMAGES = ("image_url", "input_image", "image")


class ImageUrl(Wire):
    """Where a picture is.

    Attributes:
        url: a `data:` URL with the picture in base64; or a link, where `images.links` allows it.
        detail: OpenAI's hint at the resolution; accepted and ignored, as in vLLM, since a checkpoint processes every
            picture in the one way that it was trained on.
    """

    NEUTRAL = HINT

    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None


def _as_image_url(given: Any) -> Any:
    return {"url": given} if isinstance(given, str) else given


class Part(Wire):
    """A piece of a message: text, or a picture where it stands.

    Attributes:
        type: which of the other fields is set; `input_text`, `output_text` and `input_image` are names of the Responses
            API.
        text: of a text part.
        refusal: the text of a `refusal`, in an answer of the assistant.
        image_url: an object, or its `url` alone.
        image: a picture; over HTTP as `image_url`, in the library any source of one.
    """

    NEUTRAL = HINT | {"detail": anything}

    type: Literal["text", "input_text", "output_text", "refusal", "image_url", "input_image", "image"]
    text: str | None = None
    refusal: str | None = None
    image_url: Annotated[
        ImageUrl | None, BeforeValidator(_as_image_url, json_schema_input_type=ImageUrl | str | None)
    ] = None
    image: Any = None


def _as_parts(content: Any) -> Any:
    """Plain text becomes one part, and nothing no part, so that later code handles lists only. In a list a text may
    stand as it is, as in vLLM. A library's user may pass a tuple."""
    if content is None:
        return []
    if isinstance(content, str):
        content = [content]
    if not isinstance(content, list | tuple):
        raise ValueError("must be a text or a list of parts")
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]


class Call(Wire):
    """A call of a function, in the history.

    Attributes:
        name: of the function.
        arguments: in JSON.
    """

    name: str
    arguments: str | None = None


class ToolCall(Wire):
    """A call of a tool, in the history."""

    NEUTRAL = {"id": anything, "index": anything, "type": one_of("function")}  # noqa: RUF012 (a ClassVar of the base)

    function: Call


class WireMessage(Wire):
    """One turn.

    Attributes:
        role: `developer` is OpenAI's newer name for `system`, `tool` that for `function`.
        content: a text, or parts in any order, or nothing; pictures stand in the turns of the user and of tools.
        name: of the speaker; accepted and ignored, since no template has a place for it.
        tool_calls, function_call: what the assistant called, shown to the model as text.
        refusal: the assistant's text where it refused.
    """

    NEUTRAL = {  # noqa: RUF012 (a ClassVar of the base)
        "id": anything,
        "annotations": anything,
        "cache_control": anything,
        "prefix": one_of(True, False),
        "tool_call_id": anything,
    }

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)],
        BeforeValidator(_as_parts, json_schema_input_type=str | list[Part] | None),
    ] = Field(default_factory=list)
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None
    function_call: Call | None = None
    refusal: str | None = None


def from_wire(
    messages: Sequence[WireMessage], field: str = "messages", first: int = 0
) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The conversation of a request, and notes on what stands elsewhere than it was sent. Sources of pictures are
    passed on unread.

    Args:
        field: of the request, for errors.
        first: the place in the field that the first message has.

    Raises:
        RequestError: a part does not hold what its type says, or a picture stands in a turn that can have none.
    """
    return _normalized([(f"{field}[{number}]", message) for number, message in enumerate(messages, first)], _passed_on)


def read_messages(messages: Sequence[ChatMessage], read_source: ReadSource) -> tuple[Message, ...]:
    """The conversation of a library's user.

    Args:
        messages: a `Message` is returned unchanged.
        read_source: reads a picture in the user's process.

    Raises:
        RequestError: a role, a part or a field is unknown; a picture cannot be read.
    """
    read = [(f"messages[{number}]", _read(message, f"messages[{number}]")) for number, message in enumerate(messages)]
    return _normalized(read, read_source)[0]


def read_asked(
    asked: str | Sequence[ChatMessage], images: Sequence[Any], read_source: ReadSource
) -> Query | Sequence[Message]:
    """What a library's user asks: a query with its images, or a conversation, which holds its own.

    Raises:
        RequestError: as `read_messages`; images stand beside a conversation.
    """
    if isinstance(asked, str):
        return Query(asked, tuple(_read_image(image, f"images[{i}]", read_source) for i, image in enumerate(images)))
    if images:
        raise RequestError("The images of a conversation stand in its messages; leave images out.", "images")
    messages = read_messages(asked, read_source)
    return replace(asked, messages=messages) if isinstance(asked, Conversation) else messages


def _read(message: ChatMessage, path: str) -> Message | WireMessage:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping):
        raise RequestError(f"'{path}' must be a Message or a dict with role and content.", path)
    try:
        wire = WireMessage.model_validate(dict(message))
    except ValidationError as error:
        raise as_request_error(error, path) from None
    refuse_extras(wire, f"{path}.")
    return wire


def _normalized(
    messages: Sequence[tuple[str, Message | WireMessage]], read_source: ReadSource
) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """A conversation in the project's form: a `Message` each. Turns of tools become the user's; a picture in one goes
    to the user's next turn, or stays where none follows.

    Returns:
        The messages, and notes on pictures that were moved.
    """
    found: list[Message] = []
    notes: list[str] = []
    moved: tuple[ImagePart, ...] = ()
    users = [number for number, (_, message) in enumerate(messages) if message.role == "user"]
    for number, (path, given) in enumerate(messages):
        message = given if isinstance(given, Message) else _message(given, path, read_source)
        if given.role == "user" and moved:
            message = Message("user", (*moved, *message.parts))
            moved = ()
        elif given.role in _TOOLS and users and number < users[-1]:
            images = tuple(part for part in message.parts if isinstance(part, ImagePart))
            if images:
                notes.append(f"{path}: pictures of a tool are shown in the next message of the user")
            moved += images
            message = Message("user", tuple(part for part in message.parts if isinstance(part, TextPart)))
        found.append(message)
    return tuple(found), tuple(notes)


_TOOLS = ("tool", "function")
_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "user",
    "function": "user",
}
"""What a template shows."""


def _message(message: WireMessage, path: str, read_source: ReadSource) -> Message:
    if message.role not in ("user", *_TOOLS) and any(part.type in _IMAGES for part in message.content):
        raise UnsupportedParameterError(
            f"A picture cannot stand in {path}, which is a message of the {message.role}: send it in a user message.",
            path,
        )
    parts = [_part(part, f"{path}.content[{number}]", read_source) for number, part in enumerate(message.content)]
    if message.role in _TOOLS:
        label = f"Result of {message.name}:" if message.name else "Tool result:"
        parts = [TextPart(label), *parts]
    calls = [each.function for each in message.tool_calls or ()]
    calls += [message.function_call] if message.function_call is not None else []
    extra = [message.refusal] if message.refusal else []
    extra += [f"Tool call: {call.name}({call.arguments or ''})" for call in calls]
    return Message(_ROLES[message.role], (*parts, *map(TextPart, extra)))


def _part(part: Part, path: str, read_source: ReadSource) -> TextPart | ImagePart:
    given = {"text": part.text, "refusal": part.refusal, "image_url": part.image_url, "image": part.image}
    wanted = {**dict.fromkeys(_TEXTS, "text"), "input_image": "image_url"}.get(part.type, part.type)
    others = [value for name, value in given.items() if name != wanted]
    if given[wanted] is None or any(value not in (None, "") for value in others):
        raise RequestError(f"{path} must hold '{wanted}', as its type says, and nothing else.", path)
    if (text := part.text if part.refusal is None else part.refusal) is not None:
        return TextPart(text)
    return _read_image(part.image if part.image_url is None else part.image_url.url, path, read_source)


def _read_image(source: Any, path: str, read_source: ReadSource) -> ImagePart:
    try:
        return ImagePart(read_source(source))
    except InvalidImageError as error:
        raise InvalidImageError(error.message, path) from error


def _passed_on(source: Any) -> str:
    if not isinstance(source, str):
        raise InvalidImageError("A picture in a request is a data: URL, as a string.")
    return source.strip()
