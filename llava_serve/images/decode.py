"""Encoded bytes to an RGB picture, within limits."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from llava_serve.config import ImageOptions
from llava_serve.errors import InvalidImageError

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def decode_image(data: bytes, options: ImageOptions, *, over_white: bool = False) -> Image.Image:
    """Decodes a picture: first frame, EXIF orientation applied.

    Args:
        data: an encoded picture.
        options: limits, checked before any pixel is decoded.
        over_white: transparent pictures are laid over white, as transformers does; else their alpha is dropped, as the
            original does.

    Returns:
        A picture in mode RGB.

    Raises:
        InvalidImageError: not a picture, damaged, or over a limit.
    """
    if not data:
        raise InvalidImageError("The picture is empty.")
    if len(data) > options.max_bytes:
        raise InvalidImageError(f"The picture takes {len(data):,} bytes; at most {options.max_bytes:,} are accepted.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own limit is above ours, and its warnings are not for the caller
        try:
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        except Image.DecompressionBombError as error:
            raise InvalidImageError(f"The picture has more than {options.max_pixels:,} pixels.") from error
        except Exception as error:
            raise InvalidImageError(
                "The data is not a picture in a supported format: PNG, JPEG, WebP, GIF, BMP, TIFF or PPM."
            ) from error
        if image.width * image.height > options.max_pixels:
            raise InvalidImageError(
                f"The picture has {image.width} x {image.height} pixels; at most {options.max_pixels:,} are accepted."
            )
        try:
            return _to_rgb(image, over_white=over_white)
        except Exception as error:  # Pillow raises a dozen kinds for damaged files
            raise InvalidImageError("The picture is damaged or cut off.") from error


def _to_rgb(image: Image.Image, *, over_white: bool) -> Image.Image:
    """Converts a picture to RGB as `convert("RGB")` does, except that 16-bit pictures are scaled, not clipped, and the
    EXIF orientation is applied. An upright RGB picture is not copied: a copy costs an eighth of the decoding."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":
        image = _scale_to_8_bits(image)
    if over_white and ("A" in image.getbands() or image.info.get("transparency") is not None):
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        highest = 1.0 if values.max(initial=0) <= 1 else 255.0
    else:
        highest = 65535.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 255.0
    return Image.fromarray(np.clip(values * (255 / highest), 0, 255).round().astype(np.uint8))
