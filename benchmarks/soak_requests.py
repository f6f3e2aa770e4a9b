"""The requests of `benchmarks.soak`: their kinds, how each must end, and pictures whose answers are known."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from llava_serve import LLM, SamplingParams

COLOURS = ("red", "blue", "green", "yellow")
QUESTION = "What colour is the circle?"
SIDES = (600, 1200, 2000, 3000, 3600)
MAX_TOKENS = 30


@dataclass(frozen=True)
class Scene:
    """A picture, and what the library answers about it."""

    image: Image.Image
    answer: str


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of request.

    Attributes:
        weight: how often it is sent, relative to the others.
        expected: its outcomes.
        body: what it has beside the picture and the question, or instead of them.
    """

    weight: int
    expected: frozenset[str]
    body: Callable[[random.Random], dict[str, Any]]


BAD: tuple[dict[str, Any], ...] = (
    {"temperature": -1},
    {"max_tokens": "many"},
    {"model": "another"},
    {"messages": []},
    {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}
        ]
    },
    {"messages": [{"role": "user", "content": "word " * 20_000}]},
)

KINDS = {
    "good": Kind(55, frozenset({"right"}), lambda _: {}),
    "bad": Kind(20, frozenset({"400", "404"}), lambda rng: rng.choice(BAD)),
    "cancelled": Kind(10, frozenset({"disconnected", "200"}), lambda _: {"max_tokens": 1000, "ignore_eos": True}),
    "expired": Kind(
        8, frozenset({"504"}), lambda rng: {"timeout": rng.uniform(0.01, 0.3), "max_tokens": 1500, "ignore_eos": True}
    ),
    "text": Kind(
        7,
        frozenset({"200"}),
        lambda _: {"messages": [{"role": "user", "content": "Hello"}], "n": 3, "logprobs": True, "temperature": 1},
    ),
}


def scenes(count: int) -> list[Scene]:
    """Different ones, small to 13 megapixels."""
    rng = random.Random(7)
    images = [_image(rng, SIDES[number % len(SIDES)]) for number in range(count)]
    conversations: Any = [_messages(_url(image)) for image in images]
    answers = LLM("builtin", device="cpu").chat(conversations, SamplingParams(temperature=0, max_new_tokens=MAX_TOKENS))
    return [Scene(image, answer.text) for image, answer in zip(images, answers, strict=True)]


def request_of(kind: str, known: list[Scene], rng: random.Random) -> tuple[dict[str, Any], str]:
    """A request's body, and the right answer if it is good. The picture is a new one by one pixel."""
    scene = rng.choice(known)
    image = scene.image.copy()
    image.putpixel((rng.randrange(image.width), 0), tuple(rng.randrange(248, 256) for _ in range(3)))
    messages = _messages(_url(image))
    body = {"model": "builtin", "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
    return body | KINDS[kind].body(rng), scene.answer


def _image(rng: random.Random, side: int) -> Image.Image:
    """A circle left of a square on white."""
    circle, square = rng.sample(COLOURS, 2)
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((side * 0.1, side * 0.3, side * 0.45, side * 0.65), fill=circle)
    draw.rectangle((side * 0.6, side * 0.3, side * 0.9, side * 0.6), fill=square)
    return image


def _messages(url: str) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": parts}]


def _url(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()
