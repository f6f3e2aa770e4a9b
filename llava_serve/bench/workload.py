"""What is sent: conversations about made-up images, the same for the same seed."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Workload:
    """The conversations of a run.

    Attributes:
        requests: of all conversations together; each turn is a request.
        turns: of a conversation; the last conversation may have fewer.
        images: in the first turn; 0 sends text alone.
        image_sizes: (width, height), chosen at random for each new image.
        repeated_images: share of images that have been sent in an earlier conversation, from 0 to 1.
        output_tokens: shortest and longest `max_tokens`, chosen at random for each turn.
        seed: of all of that.
    """

    requests: int = 64
    turns: int = 1
    images: int = 1
    image_sizes: Sequence[tuple[int, int]] = ((640, 480),)
    repeated_images: float = 0.0
    output_tokens: tuple[int, int] = (16, 96)
    seed: int = 0


@dataclass(frozen=True)
class Turn:
    """A question, and the most tokens of its answer."""

    question: str
    max_tokens: int


@dataclass(frozen=True)
class Conversation:
    """Images as `data:` URLs, which stand in the first turn, and the turns."""

    images: tuple[str, ...]
    turns: tuple[Turn, ...]


def make_conversations(workload: Workload) -> list[Conversation]:
    """All conversations of a workload, made beforehand, so that their making is not measured."""
    rng = random.Random(workload.seed)
    images: list[str] = []
    conversations = []
    for start in range(0, workload.requests, workload.turns):
        chosen = tuple(_image(images, workload, rng) for _ in range(workload.images))
        turns = tuple(
            Turn(
                f"Question {number}: what is in the picture, and what is it for?", rng.randint(*workload.output_tokens)
            )
            for number in range(start, min(start + workload.turns, workload.requests))
        )
        conversations.append(Conversation(chosen, turns))
    return conversations


def _image(images: list[str], workload: Workload, rng: random.Random) -> str:
    """One of those made so far, or a new one, which joins them."""
    if images and rng.random() < workload.repeated_images:
        return rng.choice(images)
    images.append(make_image(workload.seed * 100_003 + len(images), rng.choice(workload.image_sizes)))
    return images[-1]


def make_image(seed: int, size: tuple[int, int] = (640, 480)) -> str:
    """A JPEG of soft random shapes, of about the bytes that a photograph has, as a `data:` URL."""
    coarse = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()
