"""An image whose header was read and whose pixels were not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True, slots=True)
class Opened:
    """What a format's reader gives.

    Attributes:
        size: (width, height) in pixels as they will be decoded, not turned yet.
        load: decodes the pixels, to 8 bits.
        orientation: as EXIF numbers it.
    """

    size: tuple[int, int]
    load: Callable[[], Image.Image]
    orientation: int = 1


def loaded(image: Image.Image) -> Callable[[], Image.Image]:
    """Decodes what Pillow has opened."""

    def load() -> Image.Image:
        image.load()
        return image

    return load
