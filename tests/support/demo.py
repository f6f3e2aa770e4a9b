"""The picture that ships with its question and answer, and how they stand in a request."""

from __future__ import annotations

import base64
from typing import Any

from support.paths import BUILTIN

DEMO_IMAGE = BUILTIN / "demo.png"
DEMO_QUESTION = "What colour is the circle?"
DEMO_ANSWER = "red"


def data_url(image: bytes, kind: str = "png") -> str:
    """A picture as it stands in a request."""
    return f"data:image/{kind};base64," + base64.b64encode(image).decode()


def question(text: str, *images: bytes) -> list[Any]:
    """OpenAI messages: the pictures, then the text."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
