"""Pixels of any kind to 8-bit RGB, a band of rows at a time: no second copy of a large image is made on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llava_serve.config import Transparency

_BAND = 1 << 20
"""Pixels that are worked on at once."""

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def bands(size: tuple[int, int]) -> Iterator[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) that cover an image of (width, height), each some whole rows."""
    width, height = size
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def to_rgb(image: Image.Image, transparency: Transparency) -> Image.Image:
    """Brings an 8-bit image to RGB as `convert("RGB")` does; `white` lays it over white first, where it is transparent.

    An image that is RGB already is not copied: a copy costs as much as an eighth of its decoding.
    """
    if transparency == "white" and image.has_transparency_data and not _is_opaque(image):
        return _over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_opaque(image: Image.Image) -> bool:
    """Whether an alpha band hides nothing, as in most screenshots: to find that out is a tenth of the laying."""
    return image.mode in ("LA", "RGBA") and image.getchannel("A").getextrema() == (255, 255)


def _over_white(image: Image.Image) -> Image.Image:
    laid = Image.new("RGB", image.size)
    for box in bands(image.size):
        band = image.crop(box).convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        laid.paste(Image.alpha_composite(white, band).convert("RGB"), box)
    return laid


def add_key(image: Image.Image, key: tuple[int, ...]) -> Image.Image:
    """Gives an image of mode L, RGB or I;16 an alpha band, 0 where its colour is the key. I;16 is scaled to L."""
    alpha = Image.new("L", image.size)
    for box in bands(image.size):
        band = np.asarray(image.crop(box))
        differs = (band.reshape(*band.shape[:2], -1) != np.array(key).astype(band.dtype)).any(axis=-1)
        alpha.paste(Image.fromarray(differs.astype(np.uint8) * 255), box)
    image = to_8_bits(image)
    image.putalpha(alpha)
    return image


@dataclass(frozen=True, slots=True)
class Samples:
    """What numbers an image holds, where they are more than 8 bits.

    Attributes:
        kind: unsigned, signed, or float.
        bits: of a number.
        declared: the least and the greatest value, where the file names them.
        inverted: the least value is white.
    """

    kind: Literal["u", "i", "f"]
    bits: int
    declared: tuple[float, float] | None = None
    inverted: bool = False

    def range_of(self, lowest: float, highest: float) -> tuple[float, float]:
        """The values of black and white: the usual range that all values lie in, else from 0, or the lowest one below
        it, to the highest one."""
        usual: tuple[tuple[float, float], ...] = ((0, 255), (0, 65535))
        if self.kind == "f":
            usual = ((0, 1), (0, 255))
        elif self.bits <= 16:
            usual = ((0, 2**self.bits - 1),) if self.kind == "u" else ()
        if self.declared is not None:
            usual = (self.declared, *usual)
        return next((pair for pair in usual if pair[0] <= lowest and highest <= pair[1]), (min(0, lowest), highest))


def to_8_bits(image: Image.Image) -> Image.Image:
    """Scales the modes I, I;16 and F to L; other images stay as they are."""
    if image.mode == "F":
        samples = Samples("f", 32)
    elif image.mode.startswith("I;16"):
        samples = Samples("u", 16)
    elif image.mode == "I":
        samples = Samples("i", 32)
    else:
        return image
    return scale(lambda box: np.asarray(image.crop(box))[..., None], image.size, samples)


def scale(
    read: Callable[[tuple[int, int, int, int]], NDArray[Any]], size: tuple[int, int], samples: Samples
) -> Image.Image:
    """An 8-bit image of deep samples. NaN is black, and counts for nothing.

    Args:
        read: a band, [rows, width, channels], of 1 to 4 channels: grey or colour, with alpha or without.
        size: (width, height).
        samples: what they are.
    """
    lowest, highest = np.inf, -np.inf
    for box in bands(size):
        finite = band[np.isfinite(band)] if (band := read(box)).dtype.kind == "f" else band
        if finite.size:
            lowest, highest = min(lowest, float(finite.min())), max(highest, float(finite.max()))
    black, white = samples.range_of(lowest, highest) if lowest <= highest else (0.0, 1.0)
    factor = 255 / (white - black) if white > black else 0.0
    scaled: Image.Image | None = None
    for box in bands(size):
        values = read(box).astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            values = np.clip((values - black) * factor, 0, 255)
        if samples.inverted:
            values[..., 0] = 255 - values[..., 0]
        shades = np.nan_to_num(values, copy=False, nan=0).round().astype(np.uint8)
        scaled = scaled or Image.new(_MODES[shades.shape[-1]], size)
        scaled.paste(Image.fromarray(shades.squeeze(-1) if shades.shape[-1] == 1 else shades), box)
    assert scaled is not None
    return scaled
