"""Broken images: each is answered by an image or refused by a sentence, which tells nothing of this machine."""

from __future__ import annotations

import re
import struct
from collections import Counter
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError
from llava_serve.images.decode import decode_image
from support.broken_images import FILES, broken
from support.odd_images import GREY, SCENE, encoded, tiff

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


@pytest.mark.parametrize("options", [{}, {"tile": 32}, {"planar": True}, {"order": ">"}], ids=str)
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_a_tiff_that_names_too_few_of_its_parts_is_refused(dtype: str, options: dict[str, Any]) -> None:
    """Pillow leaves what it does not find black."""
    whole = tiff(np.asarray(SCENE).astype(dtype), **options)
    assert outcome(whole) == "read"
    order = options.get("order", "<")
    (at,) = struct.unpack_from(order + "I", whole, 4)
    (count,) = struct.unpack_from(order + "H", whole, at)
    short, changed = bytearray(whole), 0
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        if struct.unpack_from(order + "H", whole, entry)[0] in (273, 324):  # offsets of strips, of tiles
            (offsets,) = struct.unpack_from(order + "I", whole, entry + 4)
            struct.pack_into(order + "I", short, entry + 4, offsets - 1)
            changed += 1
    assert changed == 1
    assert outcome(bytes(short)) == "refused"


@pytest.mark.parametrize("fault", ["height", "width", "end"])
@pytest.mark.parametrize("mode", ["RGB", "L", "YCbCr"])
def test_a_jpeg_in_a_tiff_that_lacks_pixels_of_its_strip_is_refused(mode: str, fault: str) -> None:
    """libtiff leaves the rest black, and libjpeg makes it grey."""
    whole = encoded(SCENE.convert(mode), "TIFF", compression="jpeg", tiffinfo={278: 16})
    assert outcome(whole) == "read"
    starts = [found.start() for found in re.finditer(rb"\xff\xc0\x00", whole)]
    assert len(starts) == -(-SCENE.height // 16)
    for start in starts:
        short = bytearray(whole)
        if fault == "end":
            end = whole.index(b"\xff\xd9", start)
            short[end : end + 2] = b"\0\0"
        else:
            at = start + {"height": 5, "width": 7}[fault]
            short[at : at + 2] = (int.from_bytes(short[at : at + 2]) - 1).to_bytes(2)
        assert outcome(bytes(short)) == "refused"


@pytest.mark.parametrize("compression", ["raw", "zstd", "lzma", "group4"])
def test_a_tiff_whose_directory_is_cut_is_damaged_and_no_strange_kind(compression: str) -> None:
    data = encoded(GREY.convert("1") if compression == "group4" else SCENE, "TIFF", compression=compression)
    refusals = set()
    for kept in range(len(data) // 2, len(data) - 20, max(7, len(data) // 400)):
        try:
            decode_image(data[:kept], OPTIONS)  # what is cut may be metadata
        except InvalidImageError as error:
            refusals.add(error.message)
    assert refusals == {"The TIFF image is damaged or cut off."}


@pytest.mark.extended
@pytest.mark.parametrize("name", FILES)
def test_many_broken_files(name: str) -> None:
    found = Counter(outcome(data) for data in broken(FILES[name], 3000, seed=1))
    assert found["refused"] >= 500


def test_a_good_image_is_read_after_all_of_them() -> None:
    assert {name: outcome(data) for name, data in FILES.items()} == dict.fromkeys(FILES, "read")
    assert isinstance(decode_image(FILES["png"], OPTIONS), Image.Image)
