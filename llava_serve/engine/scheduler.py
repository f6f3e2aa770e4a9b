"""What each step computes: which groups are admitted, advanced and preempted. No tensors."""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llava_serve.config import is_batch
from llava_serve.engine.batch_share import Running
from llava_serve.engine.encoder_cache import EncoderCacheManager
from llava_serve.engine.kv_cache import KVCache
from llava_serve.engine.prefill_budget import StepBudget
from llava_serve.engine.sequence import Copy, Sequence, SequenceGroup


@dataclass(frozen=True, slots=True)
class Segment:
    """Positions [start, end) of a sequence, computed in this step.

    Attributes:
        needs_sampling: the sequence's next token is sampled from them.
        new_full_blocks: indices of the sequence's blocks that the step fills, for the prefix cache.
    """

    sequence: Sequence
    start: int
    end: int
    needs_sampling: bool
    new_full_blocks: range


@dataclass(frozen=True, slots=True)
class TileJob:
    """Tiles of an image for the tower: uint8 [tiles, height, width, 3], the image's tiles from `first`."""

    digest: str
    first: int
    total: int
    tiles: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Schedule:
    """The work of one step, in the order in which it is done.

    Attributes:
        evicted: digests of the images whose features are dropped first.
        tile_jobs: one batch for the tower.
        copies: within the KV cache, before anything is written.
        segments: one forward pass over all of them.
        num_decoding, num_batch_decoding: segments that decode, in all and of batch work.
    """

    evicted: tuple[str, ...]
    tile_jobs: tuple[TileJob, ...]
    copies: tuple[Copy, ...]
    segments: tuple[Segment, ...]
    num_decoding: int
    num_batch_decoding: int

    @property
    def num_tokens(self) -> int:
        """Positions that are computed."""
        return sum(segment.end - segment.start for segment in self.segments)

    @property
    def work(self) -> tuple[int, int, int]:
        """Decoding sequences, positions of prompts, and tiles that go through the tower."""
        tiles = sum(len(job.tiles) for job in self.tile_jobs)
        return self.num_decoding, self.num_tokens - self.num_decoding, tiles


class Scheduler:
    """First come, first served within a priority. Decoding sequences advance before any prompt does. Online groups are
    computed before batch work, and preempt it where they lack room.

    Args:
        max_num_seqs: the most sequences in the KV cache.
    """

    def __init__(self, kv: KVCache, encoder_cache: EncoderCacheManager, max_num_seqs: int) -> None:
        self._kv = kv
        self._encoder_cache = encoder_cache
        self.max_num_seqs = max_num_seqs
        self.waiting, self.running = list[SequenceGroup](), list[SequenceGroup]()
        self.preemptions = 0  # since the start

    @property
    def load(self) -> Running:
        """What is in the KV cache."""
        decoding = Counter(
            group.batch for group in self.running for sequence in group.active if sequence.num_pending == 1
        )
        return Running(any(not group.batch for group in self.running), decoding[False], decoding[True])

    @property
    def num_running(self) -> int:
        """Sequences in the KV cache."""
        return _num_sequences(self.running)

    def add(self, group: SequenceGroup) -> None:
        """Queues a group by its rank."""
        insort(self.waiting, group, key=lambda other: other.rank)

    def remove(self, group: SequenceGroup) -> None:
        """Removes a running or waiting group and frees what it holds."""
        (self.running if group in self.running else self.waiting).remove(group)
        self._release(group)

    def schedule(self, budget: StepBudget) -> Schedule:
        """Plans a step within the budget, and admits and preempts groups accordingly.

        Decoding sequences come first in the segments. The extent of each sequence covers all its tokens.
        """
        jobs: list[TileJob] = []
        segments, preempted = self._schedule_decode(budget)
        decoding, of_batch = len(segments), sum(is_batch(each.sequence.request.priority) for each in segments)
        for batch in (False, True) if budget.batch else (False,):
            if batch:
                budget.limit_to_batch()
            for group in self.running:
                if group.batch == batch and (group.pins or any(each.num_pending > 1 for each in group.active)):
                    segments += self._schedule_prefill(group, budget, jobs)
            if not any(group.batch <= batch for group in preempted):
                segments += self._admit_waiting(budget, jobs, batch)
        evicted, copies = self._encoder_cache.take_evicted(), self._kv.take_copies()
        return Schedule(evicted, tuple(jobs), copies, tuple(segments), decoding, of_batch)

    def make_room(self, tokens: int) -> None:
        """Admits online groups that wait, if all that they lack is what batch work holds: that is preempted, the last
        first. It ends once the online prompts take a step: those behind them could not be computed in it.

        It comes before `schedule`, whose budget depends on what runs.

        Args:
            tokens: positions that a step computes.
        """
        while self.waiting and not self.waiting[0].batch and self.running and self.running[-1].batch:
            group, online = self.waiting[0], [each for each in self.running if not each.batch]
            ahead = sum(each.num_pending for other in online for each in other.active if each.num_pending > 1)
            too_many = _num_sequences(online) + len(group.sequences) > self.max_num_seqs
            if too_many or ahead >= tokens or self._kv.next_missing(group.sequences[0]) in self._pending_keys(online):
                return
            while self.num_running + len(group.sequences) > self.max_num_seqs or not self._admit(group):
                if not self.running or not self.running[-1].batch:
                    return
                self._preempt(self.running[-1])

    def unpin_images(self, group: SequenceGroup) -> None:
        """Lets the features of a group's images be evicted: its prefill does not need them any more."""
        for digest in group.pins:
            self._encoder_cache.unpin(digest)
        group.pins = ()

    def discard_images(self, group: SequenceGroup) -> None:
        """Discards the features of a group's images, which may not be finite, as soon as no group has pinned them."""
        for digest in group.request.prompt.digests:
            self._encoder_cache.discard(digest)

    def _schedule_decode(self, budget: StepBudget) -> tuple[list[Segment], list[SequenceGroup]]:
        """One position for every decoding sequence. Where blocks run out, the group of the last rank is preempted.

        Returns:
            The segments, and the groups that were preempted.
        """
        segments, preempted = list[Segment](), list[SequenceGroup]()
        for group in list(self.running):
            if group in preempted or (group.batch and not budget.batch):
                continue
            if any(sequence.num_pending != 1 for sequence in group.active) or (group.pins and not group.forked):
                continue
            sequences = group.active
            while sequences and not all(self._kv.grow(sequence) for sequence in sequences):
                victim = self.running[-1]
                preempted.append(victim)
                self._preempt(victim)
                if victim is group:
                    sequences = []
            if sequences:
                segments += [self._segment(sequence, len(sequence.token_ids)) for sequence in sequences]
                budget.tokens -= len(sequences)
        return segments, preempted

    def _schedule_prefill(self, group: SequenceGroup, budget: StepBudget, jobs: list[TileJob]) -> list[Segment]:
        """The next chunk of every sequence, as far as its images are encoded.

        Forked sequences leave their last position to `_schedule_decode`, so that all are sampled in the same step.
        """
        segments: list[Segment] = []
        for sequence in group.active:
            limit = self._encode(sequence, budget, jobs)
            last = len(sequence.token_ids) - (len(group.active) > 1)
            end = min(limit, last, sequence.num_computed + budget.tokens)
            if end > sequence.num_computed:
                segments.append(self._segment(sequence, end))
                budget.take_tokens(end - sequence.num_computed)
        return segments

    def _segment(self, sequence: Sequence, end: int) -> Segment:
        full_blocks = self._kv.new_full_blocks(sequence, end)
        return Segment(sequence, sequence.num_computed, end, end == len(sequence.token_ids), full_blocks)

    def _encode(self, sequence: Sequence, budget: StepBudget, jobs: list[TileJob]) -> int:
        """Schedules a sequence's images for the tower, in order, within the budget.

        Returns:
            The position up to which the sequence can be computed.
        """
        prompt = sequence.request.prompt
        for at, (start, end) in enumerate(prompt.image_spans):
            if end <= sequence.num_computed:
                continue
            if start >= sequence.num_computed + budget.tokens:
                return start
            digest, tiles = prompt.digests[at], prompt.tiles[at]
            if count := budget.take_tiles(self._encoder_cache.missing(digest)):
                chosen = self._encoder_cache.encode(digest, count)
                jobs.append(TileJob(digest, chosen.start, len(tiles), tiles[chosen.start : chosen.stop]))
            if self._encoder_cache.missing(digest):
                return start
        return len(sequence.token_ids)

    def _admit_waiting(self, budget: StepBudget, jobs: list[TileJob], batch: bool) -> list[Segment]:
        """Admits waiting groups of one class within `max_num_seqs`, the budget and the free blocks.

        A prompt whose prefix another sequence is computing waits: it will be a prefix-cache hit. An online one does not
        wait for batch work, which may pause.
        """
        segments: list[Segment] = []
        if not self.waiting or (batch and not self.waiting[0].batch):  # an online group lacks room, and goes first
            return segments
        free = self.max_num_seqs - self.num_running
        computing = self._pending_keys(group for group in self.running if group.batch <= batch)
        for group in [each for each in self.waiting if each.batch == batch]:
            if budget.tokens <= 0 or len(group.sequences) > free:
                break
            if computing and self._kv.next_missing(group.sequences[0]) in computing:
                continue
            admitted = self._admit(group)
            if not admitted and not self.running:
                self._kv.clear()  # cached blocks may fragment the memory of a group that only just fits
                admitted = self._admit(group)
            if not admitted:
                break
            free -= len(group.sequences)
            computing.update(key for sequence in group.active for key in self._kv.pending_keys(sequence))
            segments += self._schedule_prefill(group, budget, jobs)
        return segments

    def _pending_keys(self, groups: Iterable[SequenceGroup]) -> set[bytes]:
        """Of the blocks that prompts of groups fill in this step or a later one."""
        prompts = [each for group in groups for each in group.active if each.num_pending > 1]
        return {key for sequence in prompts for key in self._kv.pending_keys(sequence)}

    def _admit(self, group: SequenceGroup) -> bool:
        """Moves a waiting group into the KV cache, all its sequences or none."""
        for sequence in group.sequences:
            if not self._kv.admit(sequence):
                for admitted in group.sequences:
                    self._kv.release(admitted)
                return False
        first = min(sequence.num_computed for sequence in group.active)
        prompt = group.request.prompt
        needed = [at for at, (_, end) in enumerate(prompt.image_spans) if end > first]
        for at in needed:
            self._encoder_cache.pin(prompt.digests[at], len(prompt.tiles[at]))
        group.pins = tuple(prompt.digests[at] for at in needed)
        group.timeline.admit()
        self.waiting.remove(group)
        insort(self.running, group, key=lambda other: other.rank)
        return True

    def _preempt(self, group: SequenceGroup) -> None:
        """Moves a running group back to the queue. It is recomputed from its tokens."""
        self.preemptions += 1
        self.running.remove(group)
        self._release(group)
        self.add(group)

    def _release(self, group: SequenceGroup) -> None:
        for sequence in group.sequences:
            self._kv.release(sequence)
        self.unpin_images(group)


def _num_sequences(groups: Iterable[SequenceGroup]) -> int:
    return sum(len(group.sequences) for group in groups)
