"""Broken images: each is answered by an image or refused by a sentence, which tells nothing of this machine."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from PIL import Image

from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError
from llava_serve.images.decode import decode_image
from support.broken_images import FILES, broken

OPTIONS = ImageOptions(max_pixels=1_000_000)
LEAKS = re.compile(
    r"/|\\|0x|Error|Exception|Traceback|PIL|Pillow|lib|numpy|struct|<|\bNone\b|\.py|buffer|codec|truncated"
)


def outcome(data: bytes) -> str:
    """`read`, or `refused` by a sentence; all else is an error of the test."""
    try:
        image = decode_image(data, OPTIONS)
    except InvalidImageError as error:
        sentence = error.message
    else:
        assert image.mode == "RGB"
        assert image.width * image.height <= OPTIONS.max_pixels
        return "read"
    assert not LEAKS.search(sentence), sentence
    assert sentence.endswith(".")
    assert len(sentence) < 250
    return "refused"


@pytest.mark.parametrize("name", FILES)
def test_broken_files(name: str) -> None:
    found = Counter(outcome(data) for data in broken(FILES[name], 60, seed=len(name)))
    assert found["refused"] >= 10


@pytest.mark.parametrize("name", [name for name in FILES if name not in ("mpo", "webp animated")])
@pytest.mark.parametrize("percent", [3, 10, 25, 40, 55, 70])
def test_what_lacks_pixels_is_refused(name: str, percent: int) -> None:
    data = FILES[name]
    assert outcome(data[: len(data) * percent // 100]) == "refused"


@pytest.mark.extended
@pytest.mark.parametrize("name", FILES)
def test_many_broken_files(name: str) -> None:
    found = Counter(outcome(data) for data in broken(FILES[name], 3000, seed=1))
    assert found["refused"] >= 500


def test_a_good_image_is_read_after_all_of_them() -> None:
    assert {name: outcome(data) for name, data in FILES.items()} == dict.fromkeys(FILES, "read")
    assert isinstance(decode_image(FILES["png"], OPTIONS), Image.Image)
