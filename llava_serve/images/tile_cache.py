"""A cache of the tiles of recent images: a conversation sends all its images again with every turn."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class CachedTiles:
    """An image as model input.

    Attributes:
        size: (width, height) in pixels, before tiling.
        count: positions that it takes in the prompt.
        tiles: uint8 [tiles, height, width, 3]; shared, so never modified.
        digest: identifies the tiles.
        decode_s, tile_s: seconds that its decoding and its tiling took; 0 from the cache.
    """

    size: tuple[int, int]
    count: int
    tiles: NDArray[np.uint8]
    digest: str
    decode_s: float = field(default=0.0, compare=False)
    tile_s: float = field(default=0.0, compare=False)


class TileCache:
    """Evicts the least recently used images. Safe for several threads.

    Args:
        max_bytes: of all cached tiles.
    """

    def __init__(self, max_bytes: int) -> None:
        self._images: LRUCache[bytes, CachedTiles] = LRUCache(max_bytes, getsizeof=lambda image: image.tiles.nbytes)
        self._lock = threading.Lock()

    def get(self, key: bytes) -> CachedTiles | None:
        with self._lock:
            return self._images.get(key)

    def put(self, key: bytes, image: CachedTiles) -> None:
        """Caches an image, if it fits; an entry that another thread has made is kept."""
        if image.tiles.nbytes <= self._images.maxsize:
            with self._lock:
                self._images.setdefault(key, image)
