"""Limits: judged from the header, large JPEGs at a smaller scale, totals of a request, and who is told what."""

from __future__ import annotations

import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from llava_serve.checkpoints import open_checkpoint
from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError
from llava_serve.images.decode import MAX_SIDE, decode_image
from llava_serve.images.tiles import make_tiles
from llava_serve.processor import Processor
from llava_serve.types import ImagePart, Message, TextPart
from support.odd_images import HEIGHT, SCENE, WIDTH, chunk, difference, encoded, exif_block, png_of, tiff

OPTIONS = ImageOptions()


def test_sizes_are_judged_from_the_header() -> None:
    tracemalloc.start()
    for size, why in (
        ((10_000, 10_000), "has 10000 x 10000 pixels; at most 64,000,000 are accepted"),
        ((300_000, 300_000), "has 300000 x 300000 pixels; at most 64,000,000 are accepted"),
        ((1, 60_000_000), "has 1 x 60000000 pixels; no side may be longer than 65,535 pixels"),
    ):
        header = struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0)
        png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
        with pytest.raises(InvalidImageError, match=why):
            decode_image(png, OPTIONS)
    wide = tiff(np.zeros((1, 1, 1), np.float64), extra=dict.fromkeys((256, 257, 278), (4, (8000,))))  # one strip
    with pytest.raises(InvalidImageError, match="8000 x 8000 pixels of 64 bits; at most 256,000,000 bytes"):
        decode_image(wide, OPTIONS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert MAX_SIDE == 65_535


def photo(width: int, height: int) -> Image.Image:
    """Soft shapes and grain, as a photo has them."""
    small = np.random.default_rng(1).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = np.random.default_rng(2).integers(-12, 13, soft.shape)
    return Image.fromarray(np.clip(soft + grain, 0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))


@pytest.mark.parametrize(("scale", "limit"), [(2, 1_100_000), (4, 280_000), (8, 70_000)])
def test_a_large_jpeg_is_decoded_at_a_smaller_scale(scale: int, limit: int) -> None:
    """The tiles differ by less than two shades in the mean from those of the full size."""
    data = encoded(photo(2401, 1799), "JPEG", quality=92)
    full, reduced = (decode_image(data, options) for options in (OPTIONS, ImageOptions(max_pixels=limit)))
    assert full.size == (2401, 1799)
    assert reduced.size == (-(-2401 // scale), -(-1799 // scale))
    processing = open_checkpoint("builtin").image
    tiles = [make_tiles(image, processing).astype(float) for image in (full, reduced)]
    assert np.abs(tiles[0] - tiles[1]).mean() < 2


def test_which_jpegs_are_not_decoded_at_a_smaller_scale() -> None:
    limit = ImageOptions(max_pixels=300_000)
    image = photo(1200, 900)
    for data in (encoded(image, "JPEG", progressive=True), encoded(image), encoded(image, "WEBP")):
        with pytest.raises(InvalidImageError, match="1200 x 900 pixels; at most 300,000"):
            decode_image(data, limit)
    with pytest.raises(InvalidImageError, match="1200 x 900 pixels; at most 10,000"):
        decode_image(encoded(image, "JPEG"), ImageOptions(max_pixels=10_000))
    turned = decode_image(encoded(image, "JPEG", exif=exif_block(6)), limit)
    assert turned.size == (450, 600)
    with pytest.raises(InvalidImageError, match="damaged or cut off"):
        decode_image(encoded(image, "JPEG")[:-5000], limit)


@pytest.mark.extended
@pytest.mark.parametrize(("size", "reduced"), [((12000, 9000), (6000, 4500)), ((16320, 12240), (8160, 6120))])
def test_the_largest_images_of_phones(size: tuple[int, int], reduced: tuple[int, int]) -> None:
    data = encoded(SCENE.resize(size), "JPEG", quality=60)
    decoded = decode_image(data, OPTIONS)
    assert decoded.size == reduced
    assert difference(decoded.resize(SCENE.size, Image.Resampling.BOX), SCENE) < 2


def test_an_error_names_the_image() -> None:
    subject = Processor(open_checkpoint("builtin"), OPTIONS)
    good, bad = ImagePart(encoded(SCENE)), ImagePart(encoded(SCENE)[:300])
    first = Message("user", (TextPart("Look."), good, good))
    turns = [first, Message("assistant", (TextPart("Yes."),)), Message("user", (bad, TextPart("And this?")))]
    with pytest.raises(InvalidImageError, match=r"^Image 3 of 3: The PNG image is damaged or cut off") as caught:
        subject.prepare(turns)
    assert caught.value.param == "messages[2].content[0]"
    with pytest.raises(InvalidImageError, match=r"^The PNG image is damaged or cut off") as caught:
        subject.prepare_query("What?", [bad.source])
    assert caught.value.param == "images[0]"


def test_totals_of_a_request_are_bounded() -> None:
    data = encoded(SCENE)
    parts = (*(ImagePart(data),) * 3, TextPart("What?"))

    def prepare(**limits: Any) -> object:
        return Processor(open_checkpoint("builtin"), ImageOptions(**limits)).prepare([Message("user", parts)])

    assert prepare(max_total_pixels=3 * WIDTH * HEIGHT, max_total_bytes=3 * len(data))
    with pytest.raises(InvalidImageError, match="more than 129,599 pixels in all") as caught:
        prepare(max_total_pixels=3 * WIDTH * HEIGHT - 1)
    assert caught.value.param == "messages[0].content[2]"
    with pytest.raises(InvalidImageError, match=f"images take {3 * len(data):,} bytes; at most"):
        prepare(max_total_bytes=3 * len(data) - 1)


LARGE: dict[str, Callable[[], bytes]] = {
    "16-bit PNG": lambda: png_of(np.tile(np.arange(8000, dtype=np.uint16), (8000, 1)), 16, 0),
    "PNG with a key": lambda: png_of(np.zeros((8000, 8000, 3), np.uint8), 8, 2, chunk(b"tRNS", bytes(6))),
    "PNG RGBA": lambda: encoded(Image.new("RGBA", (8000, 8000), (1, 2, 3, 100))),
    "JPEG CMYK": lambda: encoded(Image.new("CMYK", (8000, 8000)), "JPEG"),
    "JPEG on its side": lambda: encoded(Image.new("RGB", (8000, 8000)), "JPEG", exif=exif_block(6)),
    "float TIFF": lambda: encoded(Image.new("F", (8000, 8000), 3.0), "TIFF", compression="tiff_adobe_deflate"),
    "int32 TIFF": lambda: encoded(Image.new("I", (8000, 8000), 70000), "TIFF", compression="tiff_adobe_deflate"),
}
MEASURE = """
import re, sys
from pathlib import Path
from llava_serve.config import ImageOptions
from llava_serve.images.decode import decode_image

def peak():  # getrusage would count what the parent held at the fork
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

data = Path(sys.argv[1]).read_bytes()
before = peak()
decode_image(data, ImageOptions())
print((peak() - before) >> 10)
"""


@pytest.mark.extended
@pytest.mark.parametrize("name", LARGE)
def test_no_conversion_takes_more_than_about_twice_the_image(name: str, tmp_path: Path) -> None:
    """64 megapixels, 244 MiB of them as Pillow holds them: with what the decoder takes, at most two such images."""
    path = tmp_path / "image"
    path.write_bytes(LARGE[name]())
    measured = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    assert 244 // 4 < int(measured.stdout) < 2.2 * 244
