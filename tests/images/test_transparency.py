"""Transparent images lie over white, as a person sees them; `drop` shows what is hidden, as the original does."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from llava_serve.checkpoints import open_checkpoint
from llava_serve.checkpoints.spec import Layout
from llava_serve.config import ImageOptions
from llava_serve.images.decode import decode_image
from llava_serve.images.fetch import read_local_source
from llava_serve.processor import Processor
from llava_serve.types import PreparedPrompt
from support.odd_images import GREY, MARKED, SCENE, chunk, difference, encoded, hidden, png_of, tiff

WHITE, DROP = ImageOptions(), ImageOptions(transparency="drop")
RGBA = hidden()
BLACK = hidden("black")
INDEXED = SCENE.convert("RGB").quantize(4)
ALPHA = Image.fromarray(MARKED.astype(np.uint8) * 255)


def grey_with_alpha() -> Image.Image:
    hidden_grey = np.where(MARKED, np.asarray(GREY), 7).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(hidden_grey), ALPHA))


def indexed(clear: tuple[int, int, int] = (0, 255, 0)) -> tuple[Image.Image, int]:
    """The scene of 3 colours, of which the white one is transparent, and green where that is not looked at."""
    indices = np.zeros((SCENE.height, SCENE.width), np.uint8)
    pixels = np.asarray(SCENE)
    indices[(pixels == (220, 30, 40)).all(-1)] = 1
    indices[(pixels == (30, 60, 200)).all(-1)] = 2
    image = Image.fromarray(indices)
    image.putpalette([*clear, 220, 30, 40, 30, 60, 200])
    return image, 0


def keyed(depth: int, colour: bool) -> bytes:
    """The scene where white is black, and black is the transparent colour."""
    pixels = np.asarray(SCENE if colour else GREY).astype(np.uint16)
    most = 2**depth - 1
    samples = (pixels * most // 255) if depth < 16 else pixels * 257
    samples = np.where(MARKED if colour is False else MARKED[..., None], np.maximum(samples, 1), 0)
    key = chunk(b"tRNS", struct.pack(">3H", 0, 0, 0) if colour else struct.pack(">H", 0))
    return png_of(samples, depth, 2 if colour else 0, key)


def coarse(depth: int) -> Image.Image:
    most = 2**depth - 1
    shades = np.where(MARKED, np.maximum(np.asarray(GREY).astype(int) * most // 255, 1) * 255 // most, 255)
    return Image.fromarray(shades.astype(np.uint8))


def bmp_v4(image: Image.Image) -> bytes:
    """A bitmap whose header names a mask for alpha."""
    pixels = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM).tobytes()
    masks = struct.pack("<4I", 0xFF, 0xFF00, 0xFF0000, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 108, *image.size, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks
    header = header.ljust(108, b"\0")
    return b"BM" + struct.pack("<IHHI", 122 + len(pixels), 0, 0, 122) + header + pixels


TRANSPARENT: dict[str, tuple[Callable[[], bytes], Image.Image]] = {
    "PNG RGBA": (lambda: encoded(RGBA), SCENE),
    "PNG RGBA over black": (lambda: encoded(BLACK), SCENE),
    "PNG LA": (lambda: encoded(grey_with_alpha()), GREY),
    "PNG P": (lambda: encoded(indexed()[0], transparency=0), SCENE),
    "PNG P of bytes": (lambda: encoded(indexed()[0], transparency=b"\0\xff\xff"), SCENE),
    "PNG P of 8 bits": (lambda: encoded(indexed()[0], transparency=0, bits=8), SCENE),
    "PNG grey key, 8 bits": (lambda: keyed(8, False), GREY),
    "PNG grey key, 4 bits": (lambda: keyed(4, False), coarse(4)),
    "PNG grey key, 2 bits": (lambda: keyed(2, False), coarse(2)),
    "PNG grey key, 16 bits": (lambda: keyed(16, False), GREY),
    "PNG RGB key, 8 bits": (lambda: keyed(8, True), SCENE),
    "PNG RGB key, 16 bits": (lambda: keyed(16, True), SCENE),
    "PNG RGBA, 16 bits": (lambda: png_of(np.asarray(RGBA).astype(np.uint16) * 257, 16, 6), SCENE),
    "PNG LA, 16 bits": (lambda: png_of(np.asarray(grey_with_alpha()).astype(np.uint16) * 257, 16, 4), GREY),
    "WebP lossless": (lambda: encoded(RGBA, "WEBP", lossless=True, exact=True), SCENE),
    "WebP lossy": (lambda: encoded(BLACK, "WEBP", quality=95), SCENE),
    "GIF": (lambda: encoded(indexed()[0], "GIF", transparency=0), SCENE),
    "TIFF RGBA": (lambda: encoded(RGBA, "TIFF"), SCENE),
    "TIFF LA": (lambda: encoded(grey_with_alpha(), "TIFF"), GREY),
    "TIFF RGBA, 16 bits": (lambda: tiff(np.asarray(RGBA).astype(np.uint16) * 257), SCENE),
    "TIFF RGBA, 16 bits, planes": (lambda: tiff(np.asarray(RGBA).astype(np.uint16) * 257, planar=True), SCENE),
    "TIFF RGBA, float": (lambda: tiff(np.asarray(RGBA).astype(np.float32) / 255), SCENE),
    "TIFF LA, 16 bits": (lambda: tiff(np.asarray(grey_with_alpha()).astype(np.uint16) * 257), GREY),
    "AVIF": (lambda: encoded(BLACK, "AVIF", quality=95), SCENE),
    "BMP with alpha": (lambda: bmp_v4(RGBA), SCENE),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_what_is_hidden_is_not_seen(name: str) -> None:
    write, expected = TRANSPARENT[name]
    assert difference(decode_image(write(), WHITE), expected) < 1.5


@pytest.mark.parametrize("name", TRANSPARENT)
def test_drop_is_the_originals_way(name: str) -> None:
    """The original's `convert("RGB")`, but for 16-bit grey, which that saturates."""
    data = TRANSPARENT[name][0]()
    decoded = decode_image(data, DROP)
    assert difference(decoded, TRANSPARENT[name][1]) > 40
    if not name.startswith("TIFF") or name in ("TIFF RGBA", "TIFF LA"):
        with Image.open(io.BytesIO(data)) as image:
            if image.mode != "I;16":
                np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


def test_half_transparent() -> None:
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert decode_image(encoded(half), WHITE).getpixel((4, 4)) == (127, 127, 127)
    assert decode_image(encoded(half), DROP).getpixel((4, 4)) == (0, 0, 0)


def test_a_bitmap_whose_alpha_is_zero_all_over_has_none() -> None:
    clear = SCENE.convert("RGBA")
    clear.putalpha(0)
    assert difference(decode_image(bmp_v4(clear), WHITE), SCENE) == 0


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_both_layouts_see_the_same(layout: Layout) -> None:
    spec = open_checkpoint("builtin")
    spec = replace(spec, image=replace(spec.image, layout=layout))

    def digests(options: ImageOptions, image: Image.Image) -> tuple[str, ...]:
        prepared: PreparedPrompt = Processor(spec, options).prepare_query("What is it?", [encoded(image)])
        return prepared.digests

    assert digests(WHITE, RGBA) == digests(WHITE, BLACK) == digests(WHITE, SCENE) == digests(DROP, SCENE)
    assert digests(DROP, RGBA) != digests(WHITE, RGBA)


PIL_IMAGES = {
    "RGBA": RGBA,
    "LA": grey_with_alpha(),
    "P": indexed()[0],
    "PA": indexed()[0].convert("PA"),
    "CMYK": SCENE.convert("CMYK"),
    "YCbCr": SCENE.convert("YCbCr"),
    "1": GREY.convert("1"),
    "L": GREY,
    "HSV": SCENE.convert("HSV"),
}


@pytest.mark.parametrize("options", [WHITE, DROP], ids=["white", "drop"])
@pytest.mark.parametrize("name", PIL_IMAGES)
def test_a_pil_image_of_every_mode(name: str, options: ImageOptions) -> None:
    image = PIL_IMAGES[name].copy()
    if name == "P":
        image.info["transparency"] = 0
    given = decode_image(read_local_source(image, options), options)
    if options is WHITE and image.has_transparency_data:
        expected = Image.new("RGBA", image.size, "white")
        expected.alpha_composite(image.convert("RGBA"))
    else:
        expected = image
    assert difference(given, expected.convert("RGB")) == 0


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("options", [WHITE, DROP], ids=["white", "drop"])
@pytest.mark.parametrize("name", [name for name in TRANSPARENT if "float" not in name and "TIFF LA, 16" not in name])
def test_an_opened_file_comes_out_as_its_path_does(name: str, options: ImageOptions, is_loaded: bool) -> None:
    data = TRANSPARENT[name][0]()
    if is_loaded and "planes" in name:
        pytest.skip("Pillow itself reads planes of 16 bits wrongly")
    if is_loaded and name == "PNG grey key, 4 bits":
        pytest.skip("Pillow does not tell the depth of a loaded image")
    with Image.open(io.BytesIO(data)) as image:
        if is_loaded:
            image.load()
        given = decode_image(read_local_source(image, options), options)
    assert difference(given, decode_image(data, options)) == 0
