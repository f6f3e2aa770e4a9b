"""TIFF: the first image of a file, of any usual depth, without its metadata.

Pillow reads the common kinds. It has no mode for the deep ones (10, 12, 14 bits, signed, float, planar) or reads them
wrongly: there libtiff, through Pillow, unpacks the bytes as if they were an 8-bit grey image, and numpy reads the
numbers. So every compression of libtiff works; tifffile would need imagecodecs, many times its size, for LZW and for
depths between 8 and 16 bits. Source: TIFF 6.0; Adobe's TIFF technical note 3 (floating point predictor).
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import TiffImageFile

from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError
from llava_serve.images.exif import ORIENTATION, Directory, append_directory, read_directory, valid_orientation
from llava_serve.images.jpeg import whole_size
from llava_serve.images.opened import Opened, loaded
from llava_serve.images.pixels import Samples, scale

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_STRIP_OFFSETS, _CHANNELS, _STRIP_HEIGHT, _STRIP_BYTES, _LEAST, _GREATEST = 273, 277, 278, 279, 280, 281
_PLANAR, _PREDICTOR, _EXTRA, _FORMAT, _LEAST_SAMPLE, _GREATEST_SAMPLE = 284, 317, 338, 339, 340, 341
_TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES = 322, 323, 324, 325
_KEPT = {
    *(_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _CHANNELS),
    *(_STRIP_OFFSETS, _STRIP_HEIGHT, _STRIP_BYTES),
    *(_PLANAR, 292, 293, _PREDICTOR, 320, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS, _TILE_BYTES, 332, _EXTRA, _FORMAT),
    *(347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530, 531, 532),  # of JPEG, and of YCbCr
}
"""Tags that make pixels; those without a name here are handed on."""
_NEEDED = {_BITS, _STRIP_BYTES, _TILE_BYTES, 320, 347}
"""Of these, those that the pixels cannot do without; 320 is the palette, 347 JPEG's tables."""
_READ_HERE = {ORIENTATION, _LEAST, _GREATEST, _LEAST_SAMPLE, _GREATEST_SAMPLE}

_UNPACKED = {1: "no", 5: "LZW", 8: "deflate", 32946: "deflate", 32773: "PackBits", 34925: "LZMA", 50000: "Zstandard"}
_KINDS = {1: "u", 2: "i", 3: "f"}
_KIND_NAMES = {1: "unsigned", 2: "signed", 3: "float"}
_INVERTED, _BLACK_IS_ZERO, _RGB, _YCBCR = 0, 1, 2, 6
_SHORT, _LONG = 3, 4
_OLD_JPEG, _JPEG = 6, 7
"""The pixels of the old one may lie in one stream that no strip names."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """How the numbers of a deep image lie in its file.

    Attributes:
        size: (width, height).
        bits: of a number.
        channels: grey or colour, with alpha or without.
        planes: images of one channel each in which they lie; 1 where they lie together.
        samples: what the numbers are.
        predictor: 1 none, 2 differences, 3 differences of the bytes of floats.
        order: of bytes.
        run: pixels of a row that were coded together: of a tile, or the whole row.
    """

    size: tuple[int, int]
    bits: int
    channels: int
    planes: int
    samples: Samples
    predictor: int
    order: str
    run: int

    @property
    def row_bytes(self) -> int:
        """Of one row of one plane, up to whole tiles."""
        pixels = -(-self.size[0] // self.run) * self.run
        return -(-pixels * self.bits * (self.channels // self.planes) // 8)


def open_tiff(data: bytes, options: ImageOptions) -> Opened:
    """Reads the header.

    Raises:
        InvalidImageError: a kind that cannot be read; the message names it.
        ValueError, OSError, SyntaxError: damaged.
    """
    found = read_directory(data, _KEPT | _READ_HERE)
    width, height = found.number(_WIDTH, 0), found.number(_HEIGHT, 0)
    if width < 1 or height < 1 or found.cut & _NEEDED or _lacks_strips(found, width, height):
        raise ValueError("cut off")
    if found.number(_COMPRESSION, 1) == _JPEG and _lacks_pixels(data, found, width, height):
        raise ValueError("rows are missing")
    kept = replace(found, entries={tag: entry for tag, entry in found.entries.items() if tag in _KEPT})
    orientation = valid_orientation(found)
    if found.number(_TILE_WIDTH, 1) * found.number(_TILE_HEIGHT, 1) > options.max_pixels:
        raise InvalidImageError("The TIFF's tiles are larger than an image may be.")
    if not _is_deep(found):
        try:
            image = TiffImageFile(io.BytesIO(append_directory(data, kept)))
        except SyntaxError as error:
            raise _unreadable(found) from error
        return Opened((width, height), loaded(image), orientation)
    layout = _deep_layout(found)
    if layout.row_bytes * layout.planes * height > 4 * options.max_pixels:
        raise InvalidImageError(
            f"The image has {width} x {height} pixels of {layout.channels * layout.bits} bits; "
            f"at most {4 * options.max_pixels:,} bytes are accepted."
        )
    return Opened((width, height), lambda: _load_deep(data, kept, layout), orientation)


def _lacks_strips(directory: Directory, width: int, height: int) -> bool:
    """Whether the file names fewer strips or tiles than cover the image. What is missing would be black."""
    number = directory.number
    if _TILE_OFFSETS in directory.entries:
        across, down = -(-width // max(1, number(_TILE_WIDTH, 0))), -(-height // max(1, number(_TILE_HEIGHT, 0)))
        needed, tag = across * down, _TILE_OFFSETS
    else:
        needed, tag = -(-height // (number(_STRIP_HEIGHT, 0) or height)), _STRIP_OFFSETS
    planes = number(_CHANNELS, 1) if number(_PLANAR, 1) == 2 else 1
    _, named, _ = directory.entries.get(tag, (0, 0, b""))
    return named < needed * planes and number(_COMPRESSION, 1) != _OLD_JPEG


def _lacks_pixels(data: bytes, directory: Directory, width: int, height: int) -> bool:
    """Whether a JPEG in the file is cut, or smaller than its strip or tile. What is missing would be grey or black."""
    if tiled := _TILE_OFFSETS in directory.entries:
        size = directory.number(_TILE_WIDTH, 0), max(1, directory.number(_TILE_HEIGHT, 0))
    else:
        size = width, min(max(1, directory.number(_STRIP_HEIGHT, height)), height)
    # The planes of colour differences may be smaller than that of brightness.
    reduced = directory.number(_PLANAR, 1) == 2 and directory.number(_PHOTOMETRIC, 0) == _YCBCR
    offsets, lengths = (
        directory.numbers(tag, most=len(data))
        for tag in ((_TILE_OFFSETS, _TILE_BYTES) if tiled else (_STRIP_OFFSETS, _STRIP_BYTES))
    )
    if sum(lengths) > 4 * len(data):
        return True  # parts that overlap, so that there is more to read than was sent
    last_height = height % size[1] or size[1]
    for index, (offset, length) in enumerate(zip(offsets, lengths, strict=False)):
        found = whole_size(data[int(offset) : int(offset + length)])
        last = not tiled and (index + 1) % -(-height // size[1]) == 0
        needed = (1, 1) if reduced else (size[0], last_height if last else size[1])
        if found[0] < needed[0] or found[1] < needed[1]:
            return True
    return False


def _bits(directory: Directory) -> tuple[int, ...]:
    return tuple(int(bits) for bits in directory.numbers(_BITS)) or (1,)


def _is_deep(directory: Directory) -> bool:
    """Whether Pillow has no mode for it, or a wrong one. Its own are unsigned to 8 bits, and 16-bit colour."""
    bits, channels = set(_bits(directory)), directory.number(_CHANNELS, 1)
    unsigned = directory.number(_FORMAT, 1) not in (2, 3)
    planar = directory.number(_PLANAR, 1) == 2
    usual = bits <= {1, 2, 4, 8} or (bits == {16} and channels >= 3 and not planar)
    return not (unsigned and usual)


def _unreadable(directory: Directory) -> InvalidImageError:
    bits, channels = _bits(directory), directory.number(_CHANNELS, 1)
    kind = _KIND_NAMES.get(directory.number(_FORMAT, 1), "unusual")
    coding = _UNPACKED.get(directory.number(_COMPRESSION, 1), "another")
    return InvalidImageError(
        f"The image is a TIFF of {min(channels, 999)} {'channel' if channels == 1 else 'channels'} of {bits[0]} bits "
        f"({kind}, {coding} compression), a kind that is not read; send it as PNG."
    )


def _deep_layout(directory: Directory) -> _Layout:
    bits, channels, number = set(_bits(directory)), directory.number(_CHANNELS, 1), directory.number
    kind, photometric, extra = number(_FORMAT, 1), number(_PHOTOMETRIC, _BLACK_IS_ZERO), number(_EXTRA, 0)
    sizes = {1: {*range(9, 17), 32, 64}, 2: {8, 16, 32, 64}, 3: {16, 32, 64}}.get(kind, set())
    colours = 3 if photometric == _RGB else 1
    if (
        len(bits) != 1
        or not bits <= sizes
        or photometric > _RGB
        or not colours <= channels <= colours + 1
        or (channels > colours and extra != 2)  # alpha that the colours were not multiplied by
        or number(_COMPRESSION, 1) not in _UNPACKED
    ):
        raise _unreadable(directory)
    size = number(_WIDTH, 0), number(_HEIGHT, 0)
    depth = bits.pop()
    return _Layout(
        size=size,
        bits=depth,
        channels=channels,
        planes=channels if number(_PLANAR, 1) == 2 else 1,
        samples=Samples(_KINDS[kind], depth, _declared(directory), photometric == _INVERTED),  # type: ignore[arg-type]
        predictor=number(_PREDICTOR, 1),
        order=directory.order,
        run=max(1, number(_TILE_WIDTH, size[0])),
    )


def _declared(directory: Directory) -> tuple[float, float] | None:
    """The least and the greatest value that the file names, where it names a greatest one."""
    for least, greatest in ((_LEAST_SAMPLE, _GREATEST_SAMPLE), (_LEAST, _GREATEST)):
        highest = directory.numbers(greatest)
        if highest:
            lowest = directory.numbers(least) or (0,)
            return (lowest[0], highest[0]) if lowest[0] < highest[0] else None
    return None


def _load_deep(data: bytes, directory: Directory, layout: _Layout) -> Image.Image:
    planes = [_unpack(data, directory, layout, plane) for plane in range(layout.planes)]

    def read(box: tuple[int, int, int, int]) -> NDArray[Any]:
        _, top, _, bottom = box
        rows = (np.asarray(plane.crop((0, top, layout.row_bytes, bottom))) for plane in planes)
        return np.concatenate([_numbers(band, layout) for band in rows], axis=-1)

    return scale(read, layout.size, layout.samples)


def _unpack(data: bytes, directory: Directory, layout: _Layout, plane: int) -> Image.Image:
    """The bytes of a plane, unpacked, as a grey image."""

    def numbers(*values: int) -> tuple[int, int, bytes]:
        return _LONG, len(values), b"".join(value.to_bytes(4, order) for value in values)

    order: Any = "little" if layout.order == "<" else "big"
    entries = dict(directory.entries)
    for tag in (_PREDICTOR, _EXTRA, _FORMAT, _PLANAR):
        entries.pop(tag, None)
    for tag in (_STRIP_OFFSETS, _STRIP_BYTES, _TILE_OFFSETS, _TILE_BYTES):
        if tag in entries:
            kind, count, value = entries[tag]
            step = len(value) // layout.planes
            entries[tag] = kind, count // layout.planes, value[plane * step : (plane + 1) * step]
    entries |= {
        _WIDTH: numbers(layout.row_bytes),
        _BITS: (_SHORT, 1, (8).to_bytes(2, order)),
        _CHANNELS: (_SHORT, 1, (1).to_bytes(2, order)),
        _PHOTOMETRIC: (_SHORT, 1, _BLACK_IS_ZERO.to_bytes(2, order)),
    }
    if _TILE_WIDTH in entries:
        entries[_TILE_WIDTH] = numbers(layout.run * layout.bits * (layout.channels // layout.planes) // 8)
    image = TiffImageFile(io.BytesIO(append_directory(data, replace(directory, entries=entries))))
    image.im = Image.new("L", image.size).im  # else Pillow bounds the bytes as if they were pixels
    image.load()
    return image


def _numbers(band: NDArray[np.uint8], layout: _Layout) -> NDArray[Any]:
    """The numbers of some rows of a plane.

    Args:
        band: uint8 [rows, row_bytes].
        layout: of the image.

    Returns:
        [rows, width, channels of the plane].
    """
    rows, channels = len(band), layout.channels // layout.planes
    width, kind = layout.size[0], layout.samples.kind
    if layout.bits % 8 or layout.bits == 8:
        if layout.bits == 8:
            numbers: NDArray[Any] = band.view(np.int8)
        else:
            count = band.shape[1] * 8 // layout.bits
            bits = np.unpackbits(band, axis=1, count=count * layout.bits).reshape(rows, count, layout.bits)
            padded = np.zeros((rows, count, 16), np.uint8)
            padded[..., 16 - layout.bits :] = bits
            numbers = np.packbits(padded, axis=-1).view(">u2")[..., 0]
        return numbers[:, : width * channels].reshape(rows, width, channels)
    size = layout.bits // 8
    runs = band.reshape(rows, -1, min(layout.run * size * channels, band.shape[1]))
    if layout.predictor == 3:  # of each run first all the upper bytes, as differences, then the next ones
        steps = runs.reshape(rows, runs.shape[1], -1, channels)
        steps = np.cumsum(steps, axis=2, dtype=np.uint8)
        runs = np.ascontiguousarray(steps.reshape(rows, runs.shape[1], size, -1).swapaxes(2, 3))
        numbers = runs.reshape(rows, -1).view(f">{kind}{size}")
    else:
        numbers = np.ascontiguousarray(runs).view(f"{layout.order}{kind}{size}")
        if layout.predictor == 2:
            whole = numbers.view(f"{layout.order}u{size}").reshape(rows, runs.shape[1], -1, channels)
            whole = np.cumsum(whole, axis=2, dtype=f"u{size}")
            numbers = whole.reshape(rows, -1).view(f"{kind}{size}")
        numbers = numbers.reshape(rows, -1)
    return numbers[:, : width * channels].reshape(rows, width, channels)
