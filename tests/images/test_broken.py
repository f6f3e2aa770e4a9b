"""Broken images: each is answered by an image or refused by a sentence, which tells nothing of this machine."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError
from llava_serve.images.decode import decode_image
from support.odd_images import GREY, SCENE, encoded, exif_block, hidden, png_of, tiff

OPTIONS = ImageOptions(max_pixels=1_000_000)
SMALL = SCENE.resize((80, 60))
DEEP = np.asarray(SMALL).astype(np.uint16) * 257
FILES = {
    "png": encoded(SMALL),
    "png palette": encoded(SMALL.quantize(8)),
    "png rgba": encoded(hidden().resize((80, 60))),
    "png 16": png_of(DEEP, 16, 2),
    "jpeg": encoded(SMALL, "JPEG", exif=exif_block(6)),
    "jpeg progressive": encoded(SMALL, "JPEG", progressive=True),
    "jpeg cmyk": encoded(SMALL.convert("CMYK"), "JPEG"),
    "jpeg restarts": encoded(SMALL, "JPEG", restart_marker_rows=1),
    "mpo": encoded(SMALL, "MPO", save_all=True, append_images=[SMALL]),
    "webp": encoded(SMALL, "WEBP", exif=exif_block(3)),
    "webp lossless": encoded(SMALL, "WEBP", lossless=True),
    "webp animated": encoded(SMALL, "WEBP", save_all=True, append_images=[GREY.resize((80, 60))]),
    "gif": encoded(SMALL.quantize(8), "GIF", comment=b"a" * 600),
    "bmp": encoded(SMALL, "BMP"),
    "ppm": encoded(SMALL, "PPM"),
    "avif": encoded(SMALL, "AVIF", exif=exif_block(1)),
    "tiff": encoded(SMALL, "TIFF"),
    "tiff lzw": encoded(SMALL, "TIFF", compression="tiff_lzw"),
    "tiff jpeg": encoded(SMALL, "TIFF", compression="jpeg"),
    "tiff group 4": encoded(SMALL.convert("1"), "TIFF", compression="group4"),
    "tiff deep": tiff(DEEP, planar=True, compress=True),
    "tiff float": tiff(DEEP.astype(np.float32), compress=True, predictor=3, tile=32),
    "tiff 12": tiff(DEEP[..., :1] >> 4, bits=12),
    "bigtiff": tiff(DEEP, big=True),
}
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


def broken(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Cut, with other bytes, with bytes less or more."""
    rng = random.Random(seed)
    for i in range(count):
        at = rng.randrange(len(data) if i % 2 else min(len(data), 400))  # half of them in the header
        match i % 5:
            case 0:
                yield data[:at]
            case 1:
                yield data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
            case 2:
                yield data[:at] + rng.randbytes(4) + data[at + 4 :]
            case 3:
                yield data[:at] + data[at + rng.randrange(1, 9) :]
            case _:
                yield data[:at] + rng.choice([b"\xff" * 4, b"\0" * 8, rng.randbytes(20)]) + data[at:]


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
