"""Which images' vision tower features are cached. Bookkeeping only: the model runner holds the tensors.

Features are those before the projector, by the image's digest: an engine has one tower.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(slots=True)
class _CachedImage:
    """`keep`: its features stay in the cache when no request needs them."""

    tiles: int
    encoded: int = 0
    users: int = 0
    keep: bool = True


class EncoderCacheManager:
    """Progress, users and age of every image that has features, or waits for them.

    Args:
        capacity: tiles that are kept beyond those that running requests need.

    Attributes:
        num_queries, num_hits: images that were pinned, and those of them that were known already.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._images: dict[str, _CachedImage] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()  # without users, least recently used first
        self._idle_tiles = 0
        self._evicted: list[str] = []
        self.num_queries = self.num_hits = 0

    def pin(self, digest: str, tiles: int) -> None:
        """A request needs the image: its features are kept until `unpin`."""
        self.num_queries += 1
        self.num_hits += digest in self._images
        image = self._images.setdefault(digest, _CachedImage(tiles))
        image.users += 1
        if digest in self._idle:
            del self._idle[digest]
            self._idle_tiles -= image.encoded

    def unpin(self, digest: str) -> None:
        """The request needs the image no more. The least recently used images beyond the capacity are evicted."""
        image = self._images[digest]
        image.users -= 1
        if image.users:
            return
        self._idle[digest] = None
        self._idle_tiles += image.encoded
        if not image.keep:
            self._evict(digest)
        while self._idle_tiles > self._capacity:
            self._evict(next(iter(self._idle)))

    def discard(self, digest: str) -> None:
        """Evicts an image, now or when its last user unpins it. Unknown ones are ignored."""
        if digest in self._images:
            self._images[digest].keep = False
        if digest in self._idle:
            self._evict(digest)

    def missing(self, digest: str) -> int:
        """Tiles of a pinned image that are not encoded yet."""
        image = self._images[digest]
        return image.tiles - image.encoded

    def encode(self, digest: str, count: int) -> range:
        """Marks the next `count` missing tiles as encoded in this step, and returns their indices."""
        image = self._images[digest]
        tiles = range(image.encoded, image.encoded + count)
        image.encoded = tiles.stop
        return tiles

    def take_evicted(self) -> tuple[str, ...]:
        """Digests of the images whose features are to be dropped. Each is returned once."""
        evicted, self._evicted = tuple(self._evicted), []
        return evicted

    def _evict(self, digest: str) -> None:
        del self._idle[digest]
        self._idle_tiles -= self._images.pop(digest).encoded
        self._evicted.append(digest)
