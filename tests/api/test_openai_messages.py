"""OpenAI's form of a message as the library's user writes it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError, RequestError
from llava_serve.images.fetch import read_local_source
from llava_serve.openai_messages import ChatMessage, read_messages
from llava_serve.types import ImagePart, Message, TextPart
from support.demo import DEMO_IMAGE, data_url

OPTIONS = ImageOptions()
PNG = DEMO_IMAGE.read_bytes()


def read(message: ChatMessage) -> Message:
    """One message of a library's user."""
    [found] = read_messages([message], lambda source: read_local_source(source, OPTIONS))
    return found


def user(part: Any) -> dict[str, Any]:
    return {"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": data_url(PNG)}},
        {"type": "image_url", "image_url": str(DEMO_IMAGE)},
        {"type": "image", "image": DEMO_IMAGE},
        {"type": "image", "image": PNG},
    ],
    ids=["data URL", "path in image_url", "path", "bytes"],
)
def test_a_picture_is_read_where_it_is(part: dict[str, Any]) -> None:
    assert read(user(part)) == Message("user", (ImagePart(PNG), TextPart("What is it?")))


@pytest.mark.parametrize("source", [lambda image: image, lambda image: np.asarray(image.convert("RGB"))])
def test_a_picture_in_memory_keeps_every_pixel(source: Any) -> None:
    with Image.open(DEMO_IMAGE) as image:
        message = read(user({"type": "image", "image": source(image)}))
    part = message.parts[0]
    assert isinstance(part, ImagePart)
    assert isinstance(part.source, bytes)
    with Image.open(io.BytesIO(part.source)) as sent, Image.open(DEMO_IMAGE) as original:
        assert sent.convert("RGB").tobytes() == original.convert("RGB").tobytes()


def test_a_text_and_a_message_are_kept() -> None:
    message = Message("assistant", (TextPart("Red."),))
    assert read(message) is message
    assert read({"role": "assistant", "content": "Red."}) == message


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"role": "tool", "content": "x"}, RequestError),
        ({"role": "user"}, RequestError),
        ({"role": "user", "content": 5}, RequestError),
        (user({"type": "audio"}), RequestError),
        (user("plain text"), RequestError),
        (user({"type": "image", "image": Path("nowhere.png")}), InvalidImageError),
    ],
)
def test_what_is_no_message_is_refused(message: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        read(message)
