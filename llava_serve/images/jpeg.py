"""JPEG: only what makes the pixels goes to the decoder; one that lacks no more than its end is decoded.

The decoder fills up what is missing of a cut JPEG without a word. So what is cut is decoded twice, behind it an end and
behind it noise: where the two differ, pixels are missing. Source: ITU-T T.81.
"""

from __future__ import annotations

import io
import random
import re
import struct
from dataclasses import dataclass, field

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError
from llava_serve.images.exif import exif_orientation
from llava_serve.images.opened import Opened
from llava_serve.images.pixels import bands

MAX_SCANS = 100
"""Encoders write 1 to 12. Each goes over the whole image again: 100 take a quarter of a second for 4 megapixels."""
MAX_REDUCED_PIXELS = 200_000_000
"""Of a JPEG that is decoded at a smaller scale: the largest images of phones."""
_MAX_SEGMENTS = 10_000

_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_STARTS = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}  # baseline, extended, progressive; Huffman and arithmetic
_OTHER_STARTS = {0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF}
_PROGRESSIVE = {0xC2, 0xCA}
_TABLES = {0xC4, 0xCC, 0xDB, 0xDD}
_ALONE = {0x01, 0xD8}
_END, _SCAN = b"\xff\xd9", 0xDA
_ALL = (1 << 64) - 1


@dataclass(slots=True)
class _Jpeg:
    """The segments that matter, and what they say.

    Attributes:
        parts: joined, the image without its end.
        size: (width, height).
        sampling: per component its (horizontal, vertical) factor.
        done: per component a bit for each coefficient that the scans give in full.
        restart: units between two restart marks.
        scan: components of the last scan.
        restarts: marks in the last scan.
        whole: the end is there.
    """

    parts: list[bytes] = field(default_factory=lambda: [b"\xff\xd8"])
    size: tuple[int, int] = (0, 0)
    sampling: dict[int, tuple[int, int]] = field(default_factory=dict)
    done: dict[int, int] = field(default_factory=dict)
    progressive: bool = False
    scans: int = 0
    restart: int = 0
    scan: tuple[int, ...] = ()
    restarts: int = 0
    whole: bool = False
    orientation: int = 1


def open_jpeg(data: bytes, options: ImageOptions) -> Opened:
    """Reads the header. One over `max_pixels` is opened at 1/2, 1/4 or 1/8 of its size, where that is within.

    Raises:
        InvalidImageError: a kind that cannot be read; too many scans.
        ValueError, OSError, SyntaxError: damaged.
    """
    jpeg = _split(data)
    body = b"".join(jpeg.parts)
    scale = _scale(jpeg, options.max_pixels)
    size = -(-jpeg.size[0] // scale), -(-jpeg.size[1] // scale)

    def decode(end: bytes) -> Image.Image:
        image = JpegImageFile(io.BytesIO(body + end))
        if scale > 1:
            image.draft(image.mode, (jpeg.size[0] // scale, jpeg.size[1] // scale))
        image.load()
        return image

    def load() -> Image.Image:
        image = decode(_END)
        if not jpeg.whole and _lacks_pixels(jpeg, image, decode(_noise() + _END), scale):
            raise ValueError("rows are missing")
        return image

    return Opened(size, load, jpeg.orientation)


def whole_size(data: bytes) -> tuple[int, int]:
    """(width, height) of a JPEG of which nothing is missing, and (0, 0) of any other; tables may lie elsewhere."""
    jpeg = _split(data)
    return jpeg.size if jpeg.whole else (0, 0)


def _scale(jpeg: _Jpeg, max_pixels: int) -> int:
    pixels = jpeg.size[0] * jpeg.size[1]
    if jpeg.scans > 1 or jpeg.progressive or pixels > MAX_REDUCED_PIXELS:
        return 1  # several scans are decoded in full size whatever is asked for
    return next((scale for scale in (1, 2, 4, 8) if pixels <= max_pixels * scale * scale), 1)


def _split(data: bytes) -> _Jpeg:
    jpeg, at = _Jpeg(), 2
    for _ in range(_MAX_SEGMENTS):
        found = _MARKER.search(data, at)
        if found is None:
            break
        marker, at = data[found.end() - 1], found.end()
        if marker == 0xD9:
            jpeg.whole = True
            break
        if marker in _ALONE:
            continue
        length = int.from_bytes(data[at : at + 2])
        segment = data[at + 2 : at + length]
        if length < 2 or len(segment) != length - 2:
            break
        at += length
        _read(jpeg, marker, segment)
        if marker == _SCAN:
            found = _MARKER.search(data, at)
            scanned = data[at : found.start() if found else len(data)]
            jpeg.restarts = len(_RESTART.findall(scanned)) if jpeg.restart else 0
            jpeg.parts.append(scanned.rstrip(b"\xff"))
            at += len(scanned)
    else:
        raise InvalidImageError(f"The JPEG has more than {_MAX_SEGMENTS:,} segments.")
    if not jpeg.scans or 0 in jpeg.size:
        raise ValueError("no pixels")
    return jpeg


def _read(jpeg: _Jpeg, marker: int, segment: bytes) -> None:
    """Keeps a segment that makes pixels, and notes what it says."""
    if marker in _OTHER_STARTS or marker == 0xF7:
        raise InvalidImageError("The image is a lossless or hierarchical JPEG; send it as PNG, or as usual JPEG.")
    if marker in _STARTS:
        _read_start(jpeg, marker, segment)
    elif marker == _SCAN:
        _read_scan(jpeg, segment)
    elif marker == 0xE0 and segment.startswith(b"JFIF\0"):
        segment = b"JFIF\0\1\1\0\0\1\0\1\0\0"  # that it is JFIF decides on the colours, and nothing else in it
    elif marker == 0xEE and segment.startswith(b"Adobe") and len(segment) >= 12:
        segment = segment[:12]  # its last byte decides on the colours
    elif marker == 0xE1 and segment.startswith(b"Exif"):
        if jpeg.orientation == 1:
            jpeg.orientation = exif_orientation(segment)
        return
    elif marker == 0xDD and len(segment) >= 2:
        jpeg.restart = int.from_bytes(segment[:2])
    elif marker not in _TABLES:
        return
    jpeg.parts.append(b"\xff" + bytes([marker]) + (len(segment) + 2).to_bytes(2) + segment)


def _read_start(jpeg: _Jpeg, marker: int, segment: bytes) -> None:
    precision, height, width, count = struct.unpack_from(">BHHB", segment)
    if precision != 8:
        raise InvalidImageError(f"The image is a JPEG of {precision} bits; JPEGs of 8 bits are read.")
    jpeg.size, jpeg.progressive = (width, height), marker in _PROGRESSIVE
    for i in range(6, 6 + 3 * count, 3):
        factors = segment[i + 1]
        jpeg.sampling[segment[i]] = (factors >> 4, factors & 15)


def _read_scan(jpeg: _Jpeg, segment: bytes) -> None:
    jpeg.scans += 1
    if jpeg.scans > MAX_SCANS:
        raise InvalidImageError(f"The JPEG has more than {MAX_SCANS} scans.")
    count = segment[0]
    jpeg.scan = tuple(segment[1 : 1 + 2 * count : 2])
    first, last, precision = segment[1 + 2 * count : 4 + 2 * count]
    if not jpeg.progressive:
        given = _ALL
    elif precision & 15:
        given = 0  # a later scan gives the lower bits
    else:
        given = (1 << min(last, 63) + 1) - (1 << min(first, 63))
    for component in jpeg.scan:
        jpeg.done[component] = jpeg.done.get(component, 0) | given


def _lacks_pixels(jpeg: _Jpeg, image: Image.Image, other: Image.Image, scale: int) -> bool:
    """Whether a cut JPEG lacks more than half of its last row of blocks.

    Args:
        image: decoded with an end.
        other: decoded with noise before the end.
        scale: of both.
    """
    if any(jpeg.done.get(component, 0) != _ALL for component in jpeg.sampling):
        return True
    if jpeg.restart and jpeg.restarts < (_units(jpeg) - 1) // jpeg.restart:
        return True
    width, height = image.size
    block = 8 * max(vertical for _, vertical in jpeg.sampling.values()) // scale
    top = max(0, (height - 1) // block * block - 1)  # the row above shares its colours
    for box in (*bands((width, top)), (0, top, width // 2, height)):
        if box[1] < box[3] and not np.array_equal(np.asarray(image.crop(box)), np.asarray(other.crop(box))):
            return True
    return False


def _units(jpeg: _Jpeg) -> int:
    """Units of the last scan, between which restart marks are counted."""
    widest = max(horizontal for horizontal, _ in jpeg.sampling.values())
    highest = max(vertical for _, vertical in jpeg.sampling.values())
    horizontal, vertical = widest, highest
    if len(jpeg.scan) == 1:  # a single component counts its own blocks
        own = jpeg.sampling[jpeg.scan[0]]
        horizontal, vertical = widest // own[0], highest // own[1]
    if len(jpeg.scan) > 1 or len(jpeg.sampling) > 1:
        return -(-jpeg.size[0] // (8 * horizontal)) * -(-jpeg.size[1] // (8 * vertical))
    return -(-jpeg.size[0] // 8) * -(-jpeg.size[1] // 8)


def _noise() -> bytes:
    """Bits that decode to anything, and hold no marker; more than half a row of blocks takes."""
    return random.Random(0).randbytes(1 << 18).replace(b"\xff", b"\x55")
