"""The free runs among numbered blocks."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator


class FreeList:
    """Disjoint runs [start, start + size), sorted; adjacent ones are always merged.

    Args:
        size: number of blocks, all free at first.
    """

    def __init__(self, size: int) -> None:
        self._starts = [0]
        self._sizes = {0: size}
        self.total = size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yields (start, size) in rising order."""
        return ((start, self._sizes[start]) for start in self._starts)

    def add(self, start: int, size: int) -> None:
        """Frees a run; none of its blocks may be free."""
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
        """Allocates a run; all of its blocks must be free."""
        self.total -= size
        at = bisect_right(self._starts, start) - 1
        first = self._starts[at]
        preceding, after = start - first, first + self._sizes[first] - (start + size)
        assert min(preceding, after) >= 0, "the run is not free"
        if after:
            self._starts.insert(at + 1, start + size)
            self._sizes[start + size] = after
        if preceding:
            self._sizes[first] = preceding
        else:
            del self._sizes[first], self._starts[at]
