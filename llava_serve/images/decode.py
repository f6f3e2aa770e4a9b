"""Encoded bytes to an RGB image, within limits. What is no pixel never decides."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from PIL import Image

from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError
from llava_serve.images import containers
from llava_serve.images.exif import turn_upright
from llava_serve.images.formats import identify
from llava_serve.images.jpeg import open_jpeg
from llava_serve.images.opened import Opened
from llava_serve.images.pixels import to_rgb
from llava_serve.images.png import open_png
from llava_serve.images.tiff import open_tiff

MAX_SIDE = 65_535
"""Pixels along a side: more than most formats can hold, and a strip of that length still fits the memory."""

_READERS: dict[str, Callable[[bytes, ImageOptions], Opened]] = {
    "PNG": lambda data, _: open_png(data),
    "JPEG": open_jpeg,
    "TIFF": open_tiff,
    "WebP": lambda data, _: containers.open_webp(data),
    "GIF": lambda data, _: containers.open_gif(data),
    "BMP": lambda data, _: containers.open_bmp(data),
    "PPM": lambda data, _: containers.open_ppm(data),
    "AVIF": lambda data, _: containers.open_avif(data),
    "HEIC": lambda data, _: containers.open_heic(data),
}


def decode_image(data: bytes, options: ImageOptions, pixels: int | None = None) -> Image.Image:
    """Decodes an image: first frame, turned as EXIF says, deep pixels scaled to 8 bits.

    Args:
        data: an encoded image.
        options: limits, looked at before any pixel is decoded, and what becomes of transparency.
        pixels: what is left of `max_total_pixels`, the limit on all images of a request; None is no such limit.

    Returns:
        An image in mode RGB.

    Raises:
        InvalidImageError: not an image, a kind that is not read, damaged, or over a limit.
    """
    if not data:
        raise InvalidImageError("The image is empty.")
    if len(data) > options.max_bytes:
        raise InvalidImageError(f"The image takes {len(data):,} bytes; at most {options.max_bytes:,} are accepted.")
    kind = identify(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks are not for the caller
        try:
            opened = _READERS[kind](data, options)
            _check_size(opened.size, options, pixels)
            image = to_rgb(opened.load(), options.transparency)
        except (InvalidImageError, MemoryError):
            raise
        except Exception as error:  # Pillow raises a dozen kinds for damaged files
            raise InvalidImageError(f"The {kind} image is damaged or cut off.") from error
    return turn_upright(image, opened.orientation)


def check_total(size: int, left: int | None, options: ImageOptions) -> None:
    """Raises `InvalidImageError` for an image of more pixels than its request has left."""
    if left is not None and size > left:
        raise InvalidImageError(f"The request's images have more than {options.max_total_pixels:,} pixels in all.")


def _check_size(size: tuple[int, int], options: ImageOptions, pixels: int | None) -> None:
    width, height = size
    if width * height > options.max_pixels:
        raise InvalidImageError(
            f"The image has {width} x {height} pixels; at most {options.max_pixels:,} are accepted."
        )
    check_total(width * height, pixels, options)
    if max(size) > MAX_SIDE:
        raise InvalidImageError(
            f"The image has {width} x {height} pixels; no side may be longer than {MAX_SIDE:,} pixels."
        )
