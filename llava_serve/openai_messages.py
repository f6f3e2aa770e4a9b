"""OpenAI's form of a message, as the library's own user writes it, read into a `Message`. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava_serve.config import ImageOptions
from llava_serve.errors import RequestError
from llava_serve.images.fetch import read_local_source
from llava_serve.types import ImagePart, Message, TextPart

ChatMessage = Message | Mapping[str, Any]
"""A `Message`, or OpenAI's dict; {"type": "image", "image": ...} holds a path, URL, bytes, PIL image or array."""


def as_message(message: ChatMessage, options: ImageOptions) -> Message:
    """Reads OpenAI's form of a message; pictures are read where they are.

    Raises:
        RequestError: a role or part is not known; a picture cannot be read.
    """
    if isinstance(message, Message):
        return message
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant"):
        raise RequestError(f"A message's role is system, user or assistant; got {role}.", "messages")
    if isinstance(content, str):
        return Message(role, (TextPart(content),))
    if not isinstance(content, Sequence):
        raise RequestError("A message's content is a text or a list of parts.", "messages")
    return Message(role, tuple(_part(part, options) for part in content))


def _part(part: Mapping[str, Any], options: ImageOptions) -> TextPart | ImagePart:
    match part:
        case {"type": "text", "text": str(text)}:
            return TextPart(text)
        case {"type": "image_url", "image_url": {"url": source}} | {"type": "image_url", "image_url": source}:
            return ImagePart(read_local_source(source, options))
        case {"type": "image", "image": source}:
            return ImagePart(read_local_source(source, options))
    raise RequestError("A part of a message is a text, an image_url or an image.", "messages")
