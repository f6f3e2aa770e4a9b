"""What was made of the pictures seen last: a conversation sends all its pictures again with every turn."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Seen:
    """A picture as model input.

    Attributes:
        size: (width, height) in pixels, before tiling.
        count: positions that it takes.
        tiles: uint8 [tiles, height, width, 3]; shared, so never written to.
        digest: names the tiles.
    """

    size: tuple[int, int]
    count: int
    tiles: NDArray[np.uint8]
    digest: str


class SeenPictures:
    """The least recently used goes first. For several threads.

    Args:
        max_bytes: of all tiles that are kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self._room = max_bytes
        self._pictures: OrderedDict[bytes, Seen] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Seen | None:
        with self._lock:
            if key in self._pictures:
                self._pictures.move_to_end(key)
            return self._pictures.get(key)

    def put(self, key: bytes, picture: Seen) -> None:
        """Keeps a picture, if it fits."""
        with self._lock:
            if key in self._pictures:  # two threads have made it at once
                return
            self._pictures[key] = picture
            self._room -= picture.tiles.nbytes
            while self._room < 0:
                self._room += self._pictures.popitem(last=False)[1].tiles.nbytes
