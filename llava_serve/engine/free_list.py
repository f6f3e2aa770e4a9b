"""The free runs of a line of blocks."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class FreeList:
    """Disjoint runs [start, start + size), sorted, neighbours always merged.

    Args:
        size: blocks of the whole line, all free at first.
    """

    def __init__(self, size: int) -> None:
        self._starts = [0]
        self._sizes = {0: size}
        self.total = size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yields (start, size) from left to right."""
        return ((start, self._sizes[start]) for start in self._starts)

    def add(self, start: int, size: int) -> None:
        """Frees a run of which no block is free."""
        self.total += size
        at = bisect_left(self._starts, start)
        if at < len(self._starts) and self._starts[at] == start + size:
            size += self._sizes.pop(self._starts.pop(at))
        if at > 0 and self._starts[at - 1] + self._sizes[self._starts[at - 1]] == start:
            self._sizes[self._starts[at - 1]] += size
            return
        self._starts.insert(at, start)
        self._sizes[start] = size

    def remove(self, start: int, size: int) -> None:
        """Takes a run of which every block is free."""
        self.total -= size
        at = bisect_right(self._starts, start) - 1
        hole = self._starts[at]
        left, right = start - hole, hole + self._sizes[hole] - (start + size)
        assert min(left, right) >= 0, "the run is not free"
        if right:
            self._starts.insert(at + 1, start + size)
            self._sizes[start + size] = right
        if left:
            self._sizes[hole] = left
        else:
            del self._sizes[hole], self._starts[at]
