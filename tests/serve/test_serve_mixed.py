"""Many different requests at once over the real application: each gets the answer that the library gives it alone."""

from __future__ import annotations

import asyncio
import io
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from openai import AsyncOpenAI
from PIL import Image, ImageDraw

from llava_serve import LLM, SamplingParams
from support.demo import data_url

MOST = 40
"""Tokens of an answer."""
SHAPES = ("circle", "square")
COLOURS = ("red", "blue", "green", "yellow")
QUESTIONS = (
    "What colour is the circle?",
    "How many shapes are there?",
    "Describe the picture.",
    "Is there a star?",
    "What shape is the red one?",
)


def picture(circle: str, square: str, side: int, kind: str) -> str:
    """A circle left of a square, as it stands in a request."""
    image = Image.new("RGB", (side + side // 3, side), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((side * 0.1, side * 0.3, side * 0.5, side * 0.7), fill=circle)
    draw.rectangle((side * 0.75, side * 0.3, side * 1.15, side * 0.7), fill=square)
    out = io.BytesIO()
    image.save(out, kind)
    return data_url(out.getvalue(), kind.lower())


def conversations(count: int) -> list[list[dict[str, Any]]]:
    """Different ones: the picture before or after the text, a second turn, two pictures, none, a system message."""
    draw = random.Random(5)
    pairs = list(itertools.permutations(COLOURS, 2))
    pictures = [picture(*pair, draw.choice([64, 224, 480]), draw.choice(["PNG", "JPEG"])) for pair in pairs]

    def image() -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": draw.choice(pictures)}}

    def text() -> dict[str, Any]:
        return {"type": "text", "text": draw.choice(QUESTIONS)}

    def user(*parts: dict[str, Any]) -> dict[str, Any]:
        return {"role": "user", "content": list(parts)}

    def second_turn() -> list[dict[str, Any]]:
        said = {"role": "assistant", "content": "There are two shapes in the picture."}
        return [user(image(), {"type": "text", "text": QUESTIONS[1]}), said, user(text())]

    forms: list[Callable[[], list[dict[str, Any]]]] = [
        lambda: [user(image(), text())],
        lambda: [user(text(), image())],
        second_turn,
        lambda: [user(image(), {"type": "text", "text": "and"}, image(), text())],
        lambda: [user(text())],
        lambda: [{"role": "system", "content": "Answer in a sentence."}, user(image(), text())],
    ]
    return [forms[number % len(forms)]() for number in range(count)]


async def ask(client: AsyncOpenAI, messages: list[Any], *, stream: bool) -> tuple[str, str | None]:
    """The answer, and why it ended."""
    fields: dict[str, Any] = {"model": "builtin", "messages": messages, "temperature": 0, "max_tokens": MOST}
    fields["extra_body"] = {"timeout": 600}  # a slow machine is no wrong answer
    if not stream:
        [choice] = (await client.chat.completions.create(**fields)).choices
        return choice.message.content or "", choice.finish_reason
    text, reason = "", None
    async for chunk in await client.chat.completions.create(**fields, stream=True):
        text += chunk.choices[0].delta.content or ""
        reason = chunk.choices[0].finish_reason
    return text, reason


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.extended)])
async def test_mixed_requests_at_once_each_get_the_right_answer(served: Any, count: int) -> None:
    asked = conversations(count)
    # The engine takes 160 at once: the others get 429, and the official client retries.
    async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=600, timeout=600) as client:
        answers = await asyncio.gather(
            *(ask(client, messages, stream=number % 2 == 0) for number, messages in enumerate(asked))
        )
    results = LLM("builtin", device="cpu").chat(asked, SamplingParams(temperature=0, max_new_tokens=MOST))
    assert answers == [(result.text, result.finish_reason) for result in results]
    assert len(set(answers)) > 10
