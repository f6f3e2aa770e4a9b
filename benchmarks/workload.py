"""The mixed load: each request its own picture and question, answers of 16 to 96 tokens."""

from __future__ import annotations

import base64
import io
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Job:
    """One request: a picture as a `data:` URL, a question, and the length of the answer."""

    picture: str
    question: str
    max_tokens: int


def make_picture(seed: int, size: tuple[int, int] = (640, 480)) -> str:
    """A JPEG of soft random shapes, of about the bytes that a photograph has."""
    coarse = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def make_jobs(count: int, *, seed: int = 0, same_picture: bool = False) -> list[Job]:
    """`count` requests; `same_picture` gives all the same picture, with different questions."""
    rng = random.Random(seed)
    shared = make_picture(seed)
    return [
        Job(
            picture=shared if same_picture else make_picture(seed * 100_003 + at),
            question=f"Question {at}: what is in the picture, and what is it for?",
            max_tokens=rng.randint(16, 96),
        )
        for at in range(count)
    ]
