"""Who holds which part of the KV memory, and what of it can be reused. Bookkeeping only: no tensors.

The memory is a line of blocks. A sequence holds one extent of neighbouring blocks, because attention reads a sequence's
keys and values as one piece; a block may also be held by the prefix cache, under the hash of all that led to it. A
block's count is the number of its holders. A prefix hit grows in place where the blocks behind it are free, and is a
copy elsewhere.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable

import numpy as np

from llava_serve.engine.free_list import FreeList
from llava_serve.engine.sequence import Copy, Extent, Sequence


class KVCache:
    """The blocks, their counts and the prefix cache.

    Args:
        num_blocks, block_size: of the memory; a block is `block_size` positions.
        prefix_caching: keep what was computed until its memory is needed.
        salt: what keys and values depend on beside token ids and pictures (weights, adapter, dtype).
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True, salt: bytes = b"") -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.counts = [0] * num_blocks
        self._caching = prefix_caching
        self._salt = salt
        self._holes = FreeList(num_blocks)
        self._index: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()  # held by the prefix cache alone, least recent first
        self._claims: dict[int, int] = {}  # end of a sequence's extent -> blocks that it may still grow by
        self._copies: list[Copy] = []

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return self._holes.total

    @property
    def num_available(self) -> int:
        """Blocks that no sequence holds: free, or held by the prefix cache alone."""
        return self._holes.total + len(self._unused)

    @property
    def cached_blocks(self) -> Iterable[int]:
        """Blocks that the prefix cache holds."""
        return self._hash_of.keys()

    def admit(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence room for all its tokens, and what the prefix cache has of them.

        Returns:
            False, and nothing has changed but the prefix cache, if there is no room.
        """
        need, most = self._blocks(len(sequence.token_ids)), self._blocks(sequence.max_length)
        hits = self._match(sequence)
        start = self._enter(hits, need, most)
        if start is None and hits:  # the hits themselves may be in the way
            hits = []
            start = self._enter(hits, need, most)
        if start is None:
            return False
        sequence.extent = Extent(start, need)
        self._claim(sequence)
        sequence.num_computed = sequence.num_committed = len(hits) * self.block_size
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
        return True

    def grow(self, sequence: Sequence) -> bool:
        """Makes the extent cover all tokens, moving it if its neighbour is in the way. False if there is no room."""
        extent = sequence.extent
        assert extent is not None, "only a running sequence grows"
        need = self._blocks(len(sequence.token_ids))
        extra = need - extent.size
        if extra <= 0:
            return True
        end = extent.start + extent.size
        if self._take(end, extra):
            del self._claims[end]
            sequence.extent = Extent(extent.start, need)
        else:
            start = self._place(need, self._blocks(sequence.max_length))
            if start is None:
                return False
            self._hold(start, need)
            self._copies.append(Copy(extent.start * self.block_size, start * self.block_size, sequence.num_computed))
            self._drop(extent.start, extent.size)
            del self._claims[end]
            sequence.extent = Extent(start, need)
        self._claim(sequence)
        return True

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Makes a beam's row hold what another of its group holds. Only what differs is copied."""
        assert parent.extent is not None, "only running rows fork"
        assert child.extent is not None, "only running rows fork"
        assert child.extent.size >= parent.extent.size, "rows of a group are as long as each other"
        same = min(child.num_computed, child.num_prompt)
        while same < child.num_computed and parent.token_ids[same] == child.token_ids[same]:
            same += 1
        if parent.num_computed > same:
            source, target = parent.extent.start * self.block_size, child.extent.start * self.block_size
            self._copies.append(Copy(source + same, target + same, parent.num_computed - same))
        child.token_ids[:] = parent.token_ids
        child.num_computed, child.num_committed = parent.num_computed, parent.num_committed

    def filled(self, sequence: Sequence, end: int) -> range:
        """Blocks of a sequence, counted from its first, that `commit` will enter once `end` positions are computed."""
        first = full = sequence.num_committed // self.block_size
        if self._caching and end - sequence.num_committed >= self.block_size:
            full = max(first, min(end, sequence.num_fixed) // self.block_size)
        return range(first, full)

    def commit(self, sequence: Sequence) -> None:
        """Enters the full blocks that have been computed since the last time into the prefix cache."""
        blocks = self.filled(sequence, sequence.num_computed)
        for at in blocks:
            assert sequence.extent is not None, "only a running sequence computes"
            key, block = self._hash(sequence, at), sequence.extent.start + at
            if key not in self._index:
                self._index[key] = block
                self._hash_of[block] = key
                self.counts[block] += 1
        sequence.num_committed = blocks.stop * self.block_size

    def release(self, sequence: Sequence) -> None:
        """Takes the extent back; the prefix cache keeps what it holds of it. The sequence is as if never computed."""
        if sequence.extent is None:
            return
        del self._claims[sequence.extent.start + sequence.extent.size]
        self._drop(sequence.extent.start, sequence.extent.size)
        sequence.extent = None
        sequence.num_computed = sequence.num_committed = 0

    def clear(self) -> None:
        """Frees all that only the prefix cache holds."""
        while self._unused:
            self._evict(next(iter(self._unused)))

    def next_missing(self, sequence: Sequence) -> bytes | None:
        """Key of the first full block of the prompt that the prefix cache has not; None if it has them all."""
        if not self._caching:
            return None
        for at in range(self._reusable(sequence)):
            if (key := self._hash(sequence, at)) not in self._index:
                return key
        return None

    def pending_keys(self, sequence: Sequence) -> Iterable[bytes]:
        """Keys of the full blocks that a running sequence has yet to compute."""
        if not self._caching:
            return ()
        first = sequence.num_committed // self.block_size
        return [self._hash(sequence, at) for at in range(first, sequence.num_fixed // self.block_size)]

    def take_copies(self) -> tuple[Copy, ...]:
        """The copies that must be made before the next write, in order; they are handed out once."""
        copies, self._copies = tuple(self._copies), []
        return copies

    def _blocks(self, positions: int) -> int:
        return -(-positions // self.block_size)

    def _claim(self, sequence: Sequence) -> None:
        assert sequence.extent is not None
        end = sequence.extent.start + sequence.extent.size
        self._claims[end] = max(0, self._blocks(sequence.max_length) - sequence.extent.size)

    def _reusable(self, sequence: Sequence) -> int:
        """Blocks that a prefix hit may give; one position at least is left to compute."""
        return min(sequence.num_fixed, len(sequence.token_ids) - 1) // self.block_size

    def _match(self, sequence: Sequence) -> list[int]:
        """Blocks of the cache with the sequence's prefix."""
        hits: list[int] = []
        if self._caching:
            for at in range(self._reusable(sequence)):
                block = self._index.get(self._hash(sequence, at))
                if block is None:
                    break
                hits.append(block)
        return hits

    def _hash(self, sequence: Sequence, at: int) -> bytes:
        """Key of full block `at`: over the key before it, its ids, and the pictures whose positions it holds."""
        known = sequence.block_hashes
        prompt = sequence.request.prompt
        while len(known) <= at:
            start = len(known) * self.block_size
            end = start + self.block_size
            digest = hashlib.blake2b(known[-1] if known else self._salt, digest_size=16)
            digest.update(np.asarray(sequence.token_ids[start:end], dtype=np.int64).tobytes())
            for (first, last), picture in zip(prompt.image_spans, prompt.digests, strict=True):
                if first < end and last > start:
                    digest.update(f"{first}:{picture};".encode())
            known.append(digest.digest())
        return known[at]

    def _enter(self, hits: list[int], need: int, most: int) -> int | None:
        """Holds `need` blocks that begin with the content of the hits, where they are or as copies of them."""
        for block in hits:
            self._hold(block, 1)  # making room does not evict them
        start = self._follow(hits, need) if hits else None
        if start is not None:
            return start
        start = self._place(need, most)
        if start is not None:
            self._hold(start, need)
            self._copy_blocks(hits, start)
        for block in reversed(hits):
            self._drop(block, 1)
        return start

    def _follow(self, hits: list[int], need: int) -> int | None:
        """Takes the free blocks right behind the hits, if the hits are neighbours that no other sequence holds."""
        start, extra = hits[0], need - len(hits)
        if hits != list(range(start, start + len(hits))) or any(self.counts[block] != 2 for block in hits):
            return None
        behind = range(start + len(hits), start + need)
        if behind.stop > self.num_blocks or any(self.counts[block] for block in behind):
            return None
        self._hold(behind.start, extra)
        return start

    def _take(self, start: int, size: int) -> bool:
        """Holds exactly these blocks if no sequence does; what the prefix cache had in them is forgotten."""
        if start + size > self.num_blocks:
            return False
        blocks = range(start, start + size)
        if any(self.counts[block] and block not in self._unused for block in blocks):
            return False
        for block in blocks:
            if block in self._unused:
                self._evict(block)
        self._hold(start, size)
        return True

    def _place(self, need: int, most: int) -> int | None:
        """Finds `need` free neighbours, evicting the least recently used; best with room to grow to `most`."""
        while True:
            roomy = [
                (size - claim, start + claim)
                for start, size in self._holes
                if size - (claim := min(size, self._claims.get(start, 0))) >= need
            ]
            enough = [hole for hole in roomy if hole[0] >= most]
            if enough:
                return min(enough)[1]
            if roomy:
                return max(roomy)[1]
            if not self._unused:
                break
            self._evict(next(iter(self._unused)))
        # nothing else is left: take the end of a hole into which its left neighbour wanted to grow
        tight = [(size, start) for start, size in self._holes if size >= need]
        return sum(max(tight)) - need if tight else None

    def _copy_blocks(self, hits: list[int], start: int) -> None:
        """Orders copies of the hit blocks to the blocks from `start`; runs of neighbours go as one."""
        run = 0
        for at in range(1, len(hits) + 1):
            if at == len(hits) or hits[at] != hits[at - 1] + 1:
                size = self.block_size
                self._copies.append(Copy(hits[run] * size, (start + run) * size, (at - run) * size))
                run = at

    def _evict(self, block: int) -> None:
        del self._unused[block]
        del self._index[self._hash_of.pop(block)]
        self.counts[block] = 0
        self._holes.add(block, 1)

    def _hold(self, start: int, size: int) -> None:
        if self.counts[start] == 0:
            self._holes.remove(start, size)
        for block in range(start, start + size):
            self._unused.pop(block, None)
            self.counts[block] += 1

    def _drop(self, start: int, size: int) -> None:
        for block in reversed(
            range(start, start + size)
        ):  # a prefix is of use only from its beginning: its end goes first
            self.counts[block] -= 1
            if self.counts[block] == 0:
                self._holes.add(block, 1)
            elif self.counts[block] == 1 and block in self._hash_of:
                self._unused[block] = None
