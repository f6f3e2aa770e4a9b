"""Which pictures' tower features are kept. Bookkeeping only: the runner holds the tensors.

Features are those before the projector, under the picture's digest: the tower is the same for the engine's life.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass


@dataclass(slots=True)
class _Picture:
    """`kept`: its features stay when nobody needs them."""

    tiles: int
    encoded: int = 0
    users: int = 0
    kept: bool = True


class EncoderCacheManager:
    """Progress, users and age of every picture that has features, or is waiting for them.

    Args:
        capacity: tiles that are kept beyond what the running requests need.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._pictures: dict[str, _Picture] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()  # without users, least recently used first
        self._idle_tiles = 0
        self._evicted: list[str] = []

    def pin(self, digest: str, tiles: int) -> None:
        """A request needs the picture: its features are kept until `unpin`."""
        picture = self._pictures.setdefault(digest, _Picture(tiles))
        picture.users += 1
        if digest in self._idle:
            del self._idle[digest]
            self._idle_tiles -= picture.encoded

    def unpin(self, digest: str) -> None:
        """The request needs it no more. The least recently used pictures beyond the capacity are forgotten."""
        picture = self._pictures[digest]
        picture.users -= 1
        if picture.users:
            return
        self._idle[digest] = None
        self._idle_tiles += picture.encoded
        if not picture.kept:
            self._evict(digest)
        while self._idle_tiles > self._capacity:
            self._evict(next(iter(self._idle)))

    def discard(self, digest: str) -> None:
        """Forgets a picture, now or when its last user needs it no more. Unknown ones are ignored."""
        if digest in self._pictures:
            self._pictures[digest].kept = False
        if digest in self._idle:
            self._evict(digest)

    def missing(self, digest: str) -> int:
        """Tiles of a pinned picture that are not encoded yet."""
        picture = self._pictures[digest]
        return picture.tiles - picture.encoded

    def encode(self, digest: str, count: int) -> range:
        """Marks the next `count` missing tiles as encoded in this step, and returns which they are."""
        picture = self._pictures[digest]
        tiles = range(picture.encoded, picture.encoded + count)
        picture.encoded = tiles.stop
        return tiles

    def take_evicted(self) -> tuple[str, ...]:
        """Pictures whose features are to be dropped; they are handed out once."""
        evicted, self._evicted = tuple(self._evicted), []
        return evicted

    def _evict(self, digest: str) -> None:
        del self._idle[digest]
        self._idle_tiles -= self._pictures.pop(digest).encoded
        self._evicted.append(digest)
