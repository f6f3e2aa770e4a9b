"""Which sequences hold which blocks of the KV cache, and the prefix cache. Bookkeeping only: no tensors.

A sequence holds one extent of contiguous blocks, because attention reads its keys and values as one piece. The prefix
cache may also hold a block, under a hash of all tokens and images up to its end. A block's reference count is the
number of its holders. A prefix hit is extended in place where the blocks behind it are free, and copied elsewhere.
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
        num_blocks, block_size: of the cache; a block is `block_size` positions.
        prefix_caching: keep computed blocks until their memory is needed.
        salt: what keys and values depend on beside token ids and images (weights, adapter, dtype).
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True, salt: bytes = b"") -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.ref_counts = [0] * num_blocks
        self._caching = prefix_caching
        self._salt = salt
        self._free_list = FreeList(num_blocks)
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._evictable: OrderedDict[int, None] = OrderedDict()  # only the prefix cache holds them; in LRU order
        self._claims: dict[int, int] = {}  # end of a sequence's extent -> blocks by which it probably grows
        self._copies: list[Copy] = []

    @property
    def num_free(self) -> int:
        """Blocks without a holder."""
        return self._free_list.total

    @property
    def num_available(self) -> int:
        """Blocks that no sequence holds: free, or held by the prefix cache alone."""
        return self._free_list.total + len(self._evictable)

    @property
    def cached_blocks(self) -> Iterable[int]:
        """Blocks that the prefix cache holds."""
        return self._hash_of.keys()

    def admit(self, sequence: Sequence) -> bool:
        """Allocates blocks for all tokens of a waiting sequence, with its prefix-cache hits.

        Returns:
            False if there is no room; then nothing has changed but the prefix cache.
        """
        need, most = self._blocks(len(sequence.token_ids)), self._blocks(sequence.expected_length)
        hits = self._match(sequence)
        start = self._allocate(hits, need, most)
        if start is None and hits:  # the blocks of the hits themselves may be needed
            hits = []
            start = self._allocate(hits, need, most)
        if start is None:
            return False
        sequence.extent = Extent(start, need)
        self._claim(sequence)
        sequence.num_computed = sequence.num_committed = len(hits) * self.block_size
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
        return True

    def grow(self, sequence: Sequence, *, move: bool = True) -> bool:
        """Extends the blocks to all tokens; `move`s them if the next ones are held. False if there is no room."""
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
            start = self._find_free_run(need, self._blocks(sequence.expected_length)) if move else None
            if start is None:
                return False
            self._add_refs(start, need)
            self._copies.append(Copy(extent.start * self.block_size, start * self.block_size, sequence.num_computed))
            self._drop_refs(extent.start, extent.size)
            del self._claims[end]
            sequence.extent = Extent(start, need)
        self._claim(sequence)
        return True

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Gives a beam the contents of another beam of its group. Only what differs is copied."""
        assert parent.extent is not None, "only running sequences fork"
        assert child.extent is not None, "only running sequences fork"
        assert child.extent.size >= parent.extent.size, "sequences of a group have the same length"
        same = min(child.num_computed, child.num_prompt)
        while same < child.num_computed and parent.token_ids[same] == child.token_ids[same]:
            same += 1
        if parent.num_computed > same:
            source, target = parent.extent.start * self.block_size, child.extent.start * self.block_size
            self._copies.append(Copy(source + same, target + same, parent.num_computed - same))
        child.token_ids[:] = parent.token_ids
        child.num_computed, child.num_committed = parent.num_computed, parent.num_committed

    def new_full_blocks(self, sequence: Sequence, end: int) -> range:
        """Indices of a sequence's blocks that `commit` adds to the prefix cache once `end` positions are computed."""
        first = full = sequence.num_committed // self.block_size
        if self._caching and end - sequence.num_committed >= self.block_size:
            full = max(first, min(end, sequence.num_fixed) // self.block_size)
        return range(first, full)

    def commit(self, sequence: Sequence) -> None:
        """Adds the full blocks that were computed since the last call to the prefix cache."""
        blocks = self.new_full_blocks(sequence, sequence.num_computed)
        for at in blocks:
            assert sequence.extent is not None, "only a running sequence computes"
            key, block = self._hash(sequence, at), sequence.extent.start + at
            if key not in self._block_of:
                self._block_of[key] = block
                self._hash_of[block] = key
                self.ref_counts[block] += 1
        sequence.num_committed = blocks.stop * self.block_size

    def release(self, sequence: Sequence) -> None:
        """Frees the blocks, but for those that the prefix cache holds. The sequence is as if never computed."""
        if sequence.extent is None:
            return
        del self._claims[sequence.extent.start + sequence.extent.size]
        self._drop_refs(sequence.extent.start, sequence.extent.size)
        sequence.extent = None
        sequence.num_computed = sequence.num_committed = 0

    def clear(self) -> None:
        """Evicts all blocks that only the prefix cache holds."""
        while self._evictable:
            self._evict(next(iter(self._evictable)))

    def next_missing(self, sequence: Sequence) -> bytes | None:
        """Key of the first full block of a sequence that the prefix cache lacks; None if it has them all."""
        if not self._caching:
            return None
        for at in range(self._reusable(sequence)):
            if (key := self._hash(sequence, at)) not in self._block_of:
                return key
        return None

    def pending_keys(self, sequence: Sequence) -> Iterable[bytes]:
        """Keys of the full blocks that a running sequence has not computed yet."""
        if not self._caching:
            return ()
        first = sequence.num_committed // self.block_size
        return [self._hash(sequence, at) for at in range(first, sequence.num_fixed // self.block_size)]

    def take_copies(self) -> tuple[Copy, ...]:
        """The copies to make before the next write, in order. Each is returned once."""
        copies, self._copies = tuple(self._copies), []
        return copies

    def _blocks(self, positions: int) -> int:
        return -(-positions // self.block_size)

    def _claim(self, sequence: Sequence) -> None:
        assert sequence.extent is not None
        end = sequence.extent.start + sequence.extent.size
        self._claims[end] = max(0, self._blocks(sequence.expected_length) - sequence.extent.size)

    def _reusable(self, sequence: Sequence) -> int:
        """Blocks that may be prefix hits."""
        return sequence.num_reusable // self.block_size

    def _match(self, sequence: Sequence) -> list[int]:
        """Blocks of the prefix cache that match the sequence."""
        hits: list[int] = []
        if self._caching:
            for at in range(self._reusable(sequence)):
                block = self._block_of.get(self._hash(sequence, at))
                if block is None:
                    break
                hits.append(block)
        return hits

    def _hash(self, sequence: Sequence, at: int) -> bytes:
        """Key of full block `at`: over the key before it (at first the salts), its token ids, and its images."""
        hashes = sequence.block_hashes
        prompt = sequence.request.prompt
        while len(hashes) <= at:
            start = len(hashes) * self.block_size
            end = start + self.block_size
            previous = hashes[-1] if hashes else self._salt + prompt.cache_salt.encode()
            digest = hashlib.blake2b(previous, digest_size=16)
            digest.update(np.asarray(sequence.token_ids[start:end], dtype=np.int64).tobytes())
            for (first, last), image in zip(prompt.image_spans, prompt.digests, strict=True):
                if first < end and last > start:
                    digest.update(f"{first}:{image};".encode())
            hashes.append(digest.digest())
        return hashes[at]

    def _allocate(self, hits: list[int], need: int, most: int) -> int | None:
        """Allocates `need` blocks that begin with the hits: extended in place, or copied."""
        for block in hits:
            self._add_refs(block, 1)  # so that making room does not evict them
        start = self._extend_hits(hits, need) if hits else None
        if start is not None:
            return start
        start = self._find_free_run(need, most)
        if start is not None:
            self._add_refs(start, need)
            self._copy_blocks(hits, start)
        for block in reversed(hits):
            self._drop_refs(block, 1)
        return start

    def _extend_hits(self, hits: list[int], need: int) -> int | None:
        """Allocates the blocks right behind the hits, if the hits are contiguous and no other sequence holds them."""
        start, extra = hits[0], need - len(hits)
        if hits != list(range(start, start + len(hits))) or any(self.ref_counts[block] != 2 for block in hits):
            return None
        behind = range(start + len(hits), start + need)
        if behind.stop > self.num_blocks or any(self.ref_counts[block] for block in behind):
            return None
        self._add_refs(behind.start, extra)
        return start

    def _take(self, start: int, size: int) -> bool:
        """Allocates exactly these blocks if no sequence holds one; evicts them from the prefix cache."""
        if start + size > self.num_blocks:
            return False
        blocks = range(start, start + size)
        if any(self.ref_counts[block] and block not in self._evictable for block in blocks):
            return False
        for block in blocks:
            if block in self._evictable:
                self._evict(block)
        self._add_refs(start, size)
        return True

    def _find_free_run(self, need: int, most: int) -> int | None:
        """Finds `need` contiguous free blocks, if possible with room to grow to `most`. Evicts blocks in LRU order."""
        while True:
            unclaimed = [
                (size - claim, start + claim)
                for start, size in self._free_list
                if size - (claim := min(size, self._claims.get(start, 0))) >= need
            ]
            growable = [free_run for free_run in unclaimed if free_run[0] >= most]
            if growable:
                return min(growable)[1]
            if unclaimed:
                return max(unclaimed)[1]
            if not self._evictable:
                break
            self._evict(next(iter(self._evictable)))
        # nothing else is left: take the end of a free run into which the sequence before it may want to grow
        claimed = [(size, start) for start, size in self._free_list if size >= need]
        return sum(max(claimed)) - need if claimed else None

    def _copy_blocks(self, hits: list[int], start: int) -> None:
        """Queues copies of the hits to the blocks from `start`; contiguous hits are copied as one."""
        first = 0
        for at in range(1, len(hits) + 1):
            if at == len(hits) or hits[at] != hits[at - 1] + 1:
                size = self.block_size
                self._copies.append(Copy(hits[first] * size, (start + first) * size, (at - first) * size))
                first = at

    def _evict(self, block: int) -> None:
        del self._evictable[block]
        del self._block_of[self._hash_of.pop(block)]
        self.ref_counts[block] = 0
        self._free_list.add(block, 1)

    def _add_refs(self, start: int, size: int) -> None:
        if self.ref_counts[start] == 0:
            self._free_list.remove(start, size)
        for block in range(start, start + size):
            self._evictable.pop(block, None)
            self.ref_counts[block] += 1

    def _drop_refs(self, start: int, size: int) -> None:
        # from the end: a prefix is of use only from its beginning, so its last block is evicted first
        for block in reversed(range(start, start + size)):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self._free_list.add(block, 1)
            elif self.ref_counts[block] == 1 and block in self._hash_of:
                self._evictable[block] = None
