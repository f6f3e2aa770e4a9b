"""What each step computes: who is admitted, who goes on, who must give way. No tensors."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llava_serve.engine.encoder_cache import EncoderCacheManager
from llava_serve.engine.kv_cache import KVCache
from llava_serve.engine.prefill_budget import Budget
from llava_serve.engine.sequence import Copy, Group, Sequence


@dataclass(frozen=True, slots=True)
class Segment:
    """Positions [start, end) of a sequence, computed in this step.

    Attributes:
        draws: its next token is drawn from them.
        filled: blocks of the sequence that are full then, and are to enter the prefix cache.
    """

    sequence: Sequence
    start: int
    end: int
    draws: bool
    filled: range


@dataclass(frozen=True, slots=True)
class TileJob:
    """Tiles of a picture for the tower: uint8 [tiles, height, width, 3], beginning with the picture's tile `first`."""

    digest: str
    first: int
    total: int
    tiles: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Schedule:
    """One step's work, in the order in which it is done.

    Attributes:
        evicted: pictures whose features are dropped first.
        tile_jobs: one batch for the tower.
        copies: within the KV memory, before anything is written.
        segments: one forward pass over all of them.
    """

    evicted: tuple[str, ...]
    tile_jobs: tuple[TileJob, ...]
    copies: tuple[Copy, ...]
    segments: tuple[Segment, ...]

    @property
    def num_tokens(self) -> int:
        """Positions that are computed."""
        return sum(segment.end - segment.start for segment in self.segments)

    @property
    def num_tiles(self) -> int:
        """Tiles that go through the tower."""
        return sum(len(job.tiles) for job in self.tile_jobs)


class Scheduler:
    """First come, first served among equals of priority; every live sequence advances before any prompt does.

    Args:
        max_num_seqs: rows that are in the cache together.
    """

    def __init__(self, kv: KVCache, features: EncoderCacheManager, max_num_seqs: int) -> None:
        self._kv = kv
        self._features = features
        self._max_num_seqs = max_num_seqs
        self.waiting: list[Group] = []
        self.running: list[Group] = []

    @property
    def num_decoding(self) -> int:
        """Rows that have one position to compute."""
        return sum(row.num_pending == 1 for group in self.running for row in group.active)

    @property
    def num_running(self) -> int:
        """Rows in the cache."""
        return sum(len(group.rows) for group in self.running)

    def add(self, group: Group) -> None:
        """Queues a group, behind those of its rank."""
        insort(self.waiting, group, key=lambda other: other.rank)

    def remove(self, group: Group) -> None:
        """Ends a group wherever it is, and gives back what it holds."""
        (self.running if group in self.running else self.waiting).remove(group)
        self._release(group)

    def schedule(self, budget: Budget) -> Schedule:
        """Plans a step within the budget and moves groups between waiting and running accordingly.

        Decoding rows come first in the segments; each row's extent covers all its tokens.
        """
        jobs: list[TileJob] = []
        segments, preempted = self._advance(budget)
        for group in self.running:
            if group.pins or any(row.num_pending > 1 for row in group.active):
                segments += self._prefill(group, budget, jobs)
        if not preempted:
            segments += self._admit(budget, jobs)
        return Schedule(self._features.take_evicted(), tuple(jobs), self._kv.take_copies(), tuple(segments))

    def prefilled(self, group: Group) -> None:
        """Tells that a group has passed its prompt: its pictures are needed no more."""
        for digest in group.pins:
            self._features.unpin(digest)
        group.pins = ()

    def discard_pictures(self, group: Group) -> None:
        """Lets the features of a group's pictures go as soon as nobody needs them: they may not be finite."""
        for digest in group.request.prompt.digests:
            self._features.discard(digest)

    def _advance(self, budget: Budget) -> tuple[list[Segment], bool]:
        """One position for every row that has just one to compute. Whoever ranks last gives way where room is short."""
        segments: list[Segment] = []
        preempted = False
        for group in list(self.running):
            if preempted and group not in self.running:
                continue
            if any(row.num_pending != 1 for row in group.active) or (group.pins and not group.prompted):
                continue
            rows = group.active
            while rows and not all(self._kv.grow(row) for row in rows):
                preempted = True
                victim = self.running[-1]
                self._preempt(victim)
                if victim is group:
                    rows = []
            if rows:
                segments += [self._segment(row, len(row.token_ids)) for row in rows]
                budget.tokens -= len(rows)
        return segments, preempted

    def _prefill(self, group: Group, budget: Budget, jobs: list[TileJob]) -> list[Segment]:
        """The next chunk of every row, as far as its pictures are encoded.

        Rows that advance together leave their last position to `_advance`, so that all draw in the same step.
        """
        segments: list[Segment] = []
        for row in group.active:
            limit = self._encode(row, budget, jobs)
            last = len(row.token_ids) - (len(group.active) > 1)
            end = min(limit, last, row.num_computed + budget.tokens)
            if end > row.num_computed:
                segments.append(self._segment(row, end))
                budget.take_tokens(end - row.num_computed)
        return segments

    def _segment(self, row: Sequence, end: int) -> Segment:
        return Segment(row, row.num_computed, end, end == len(row.token_ids), self._kv.filled(row, end))

    def _encode(self, row: Sequence, budget: Budget, jobs: list[TileJob]) -> int:
        """Sends the row's pictures to the tower, in order, within the budget. Returns how far it can be computed."""
        prompt = row.request.prompt
        for at, (start, end) in enumerate(prompt.image_spans):
            if end <= row.num_computed:
                continue
            if start >= row.num_computed + budget.tokens:
                return start
            digest, tiles = prompt.digests[at], prompt.tiles[at]
            if count := budget.take_tiles(self._features.missing(digest)):
                chosen = self._features.encode(digest, count)
                jobs.append(TileJob(digest, chosen.start, len(tiles), tiles[chosen.start : chosen.stop]))
            if self._features.missing(digest):
                return start
        return len(row.token_ids)

    def _admit(self, budget: Budget, jobs: list[TileJob]) -> list[Segment]:
        """Takes in waiting groups while there are rows, positions and memory.

        A prompt whose beginning another is just computing waits for that: it will find it in the prefix cache.
        """
        segments: list[Segment] = []
        if not self.waiting:
            return segments
        rows = self._max_num_seqs - self.num_running
        computing = {
            key
            for group in self.running
            for row in group.active
            if row.num_pending > 1
            for key in self._kv.pending_keys(row)
        }
        for group in list(self.waiting):
            if budget.tokens <= 0 or len(group.rows) > rows:
                break
            if computing and self._kv.next_missing(group.rows[0]) in computing:
                continue
            entered = self._enter(group)
            if not entered and not self.running:
                self._kv.clear()  # what the prefix cache keeps may lie in the way of rows that only just fit
                entered = self._enter(group)
            if not entered:
                break
            rows -= len(group.rows)
            computing.update(key for row in group.active for key in self._kv.pending_keys(row))
            segments += self._prefill(group, budget, jobs)
        return segments

    def _enter(self, group: Group) -> bool:
        """Moves a waiting group into the cache, all its rows or none."""
        for row in group.rows:
            if not self._kv.admit(row):
                for admitted in group.rows:
                    self._kv.release(admitted)
                return False
        first = min(row.num_computed for row in group.active)
        prompt = group.request.prompt
        needed = [at for at, (_, end) in enumerate(prompt.image_spans) if end > first]
        for at in needed:
            self._features.pin(prompt.digests[at], len(prompt.tiles[at]))
        group.pins = tuple(prompt.digests[at] for at in needed)
        self.waiting.remove(group)
        insort(self.running, group, key=lambda other: other.rank)
        return True

    def _preempt(self, group: Group) -> None:
        """Sends a running group back to wait; it will be computed again from its tokens."""
        self.running.remove(group)
        self._release(group)
        self.add(group)

    def _release(self, group: Group) -> None:
        for row in group.rows:
            self._kv.release(row)
        self.prefilled(group)
