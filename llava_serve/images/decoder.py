"""Encoded bytes to an image's tiles: the one step of preparing a prompt that works on a stranger's file."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from llava_serve.checkpoints.spec import ImageProcessing
from llava_serve.config import ImageOptions
from llava_serve.images.decode import decode_image
from llava_serve.images.tile_cache import CachedTiles
from llava_serve.images.tiles import digest, make_tiles, num_features

Check = Callable[[], None]
"""Raises, once the work is no longer wanted."""


class Decoder(Protocol):
    """Decodes images. For several threads."""

    def tiles_of(
        self, data: bytes, room: int, check: Check | None = None, pixels: int | None = None, num_images: int = 1
    ) -> CachedTiles:
        """An image as model input. Of its times it knows `tile_s`.

        Args:
            data: an encoded image.
            room: positions that are left in the prompt; an image that takes as many gets neither tiles nor digest.
            check: where decoding can be ended, what this raises ends it.
            pixels: how many the image may have of those of its request; None leaves the limit of each image.
            num_images: of the request; some models process each of several images otherwise than a single one.

        Raises:
            InvalidImageError: not an image, damaged, or over a limit.
        """

    def close(self) -> None:
        """Ends what it has started."""


class InProcessDecoder:
    """Decodes in the caller's thread, which nothing can end."""

    def __init__(self, options: ImageOptions, processing: ImageProcessing) -> None:
        self._options = options
        self._processing = processing

    def tiles_of(
        self, data: bytes, room: int, check: Check | None = None, pixels: int | None = None, num_images: int = 1
    ) -> CachedTiles:
        """As `Decoder` says. The decoded image lives only in here: a large one takes hundreds of megabytes."""
        processing = self._processing.for_images(num_images)
        image = decode_image(data, self._options, pixels)
        count = num_features(image.size, processing)
        if count >= room:
            return CachedTiles(image.size, count, np.empty(0, np.uint8), "")
        decoded = time.perf_counter()
        tiles = make_tiles(image, processing)
        name = digest(tiles, image.size, processing)
        tile_s = time.perf_counter() - decoded
        return CachedTiles(image.size, count, tiles, name, tile_s=tile_s)

    def close(self) -> None:
        """Nothing was started."""
