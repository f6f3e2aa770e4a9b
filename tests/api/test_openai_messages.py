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
        ({"role": "robot", "content": "x"}, RequestError),
        ({"content": "x"}, RequestError),
        ({"role": "user", "content": 5}, RequestError),
        (user({"type": "audio"}), RequestError),
        (user({"type": "image", "image": Path("nowhere.png")}), InvalidImageError),
    ],
)
def test_what_is_no_message_is_refused(message: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        read(message)


@pytest.mark.parametrize("content", [None, [], (), {}, ""], ids=repr)
@pytest.mark.parametrize("role", ["system", "assistant", "user", "tool"])
def test_any_role_may_have_no_content(role: str, content: Any) -> None:
    if content == {}:
        with pytest.raises(RequestError, match="must be a text or a list of parts"):
            read({"role": role, "content": content})
        return
    texts = [part for part in read({"role": role, "content": content}).parts if isinstance(part, TextPart)]
    assert "".join(part.text for part in texts) == ("Tool result:" if role == "tool" else "")
    assert read({"role": role}) == read({"role": role, "content": None})


def test_the_texts_of_the_responses_api_are_texts() -> None:
    parts = [{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b", "annotations": []}]
    assert read({"role": "assistant", "content": parts}).parts == (TextPart("a"), TextPart("b"))


def test_a_history_of_tools_is_text() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "count", "arguments": '{"of": "stars"}'}}
    messages: list[ChatMessage] = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "7"},
        {"role": "assistant", "content": "Seven.", "function_call": {"name": "stop", "arguments": None}},
        {"role": "function", "name": "stop", "content": [{"type": "text", "text": "done"}]},
    ]
    assert read_messages(messages, lambda source: source) == (
        Message("assistant", (TextPart('Tool call: count({"of": "stars"})'),)),
        Message("user", (TextPart("Tool result:"), TextPart("7"))),
        Message("assistant", (TextPart("Seven."), TextPart("Tool call: stop()"))),
        Message("user", (TextPart("Result of stop:"), TextPart("done"))),
    )


def test_a_picture_of_a_tool_goes_to_the_users_next_turn() -> None:
    result = {"role": "tool", "content": [{"type": "image", "image": PNG}, {"type": "text", "text": "a plot"}]}
    asked = {"role": "user", "content": "What is it?"}
    found = read_messages([asked, result, asked], lambda source: source)
    label = TextPart("Tool result:")
    assert found[1:] == (
        Message("user", (label, TextPart("a plot"))),
        Message("user", (ImagePart(PNG), TextPart("What is it?"))),
    )
    last = read_messages([asked, result], lambda source: source)[1]
    assert last.parts == (label, ImagePart(PNG), TextPart("a plot"))
