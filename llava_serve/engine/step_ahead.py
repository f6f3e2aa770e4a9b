"""Which step is launched before the tokens of the one that precedes it are read. No tensors.

It is a decode step of what runs: all that it needs of those tokens is their ids, and they are on the device. Where one
of them ends its sequence, the step computes a position too many, and what that gives is dropped. The sequence's blocks
are free as soon as the token is read: the device works in order, and what is written there next is queued behind the
step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from llava_serve.engine.kv_cache import KVCache
from llava_serve.engine.scheduler import Schedule, Scheduler, Segment
from llava_serve.engine.sequence import Sequence

UNREAD_TOKEN_ID = -1
"""Stands for a token that only the device has."""


@dataclass(frozen=True, slots=True)
class StepAhead:
    """A decode step behind one whose tokens are not read.

    Attributes:
        indices: of its sequences among those that the other step samples.
    """

    schedule: Schedule
    indices: list[int]


@contextmanager
def planned_ahead(schedule: Schedule, scheduler: Scheduler, kv: KVCache) -> Iterator[StepAhead | None]:
    """The step behind a schedule that is launched; None where that must wait for the tokens. Within, its sequences have
    `UNREAD_TOKEN_ID` in their place.

    It must wait where another group may be admitted, where something that runs is not in the schedule or is not
    decoding behind it, where sampling needs the tokens themselves, and where a sequence must move to grow.
    """
    sampled = [segment for segment in schedule.segments if segment.needs_sampling]
    indices = [index for index, segment in enumerate(sampled) if _goes_on(segment.sequence)]
    last = [sampled[index] for index in indices]
    if not last or not _is_all(sampled, scheduler) or _may_admit(len(last), scheduler):
        yield None
        return
    for segment in last:
        segment.sequence.token_ids.append(UNREAD_TOKEN_ID)
    try:
        # A move would be queued for the next schedule, and blocks are committed meanwhile, where they are not yet.
        grown = all(kv.grow(segment.sequence, move=False) for segment in last)
        segments = tuple(_following(segment, kv) for segment in last)
        of_batch = len(last) if scheduler.running[0].batch else 0
        yield StepAhead(Schedule((), (), (), segments, len(last), of_batch), indices) if grown else None
    finally:
        for segment in last:
            segment.sequence.token_ids.pop()


def _goes_on(sequence: Sequence) -> bool:
    """It runs, and the token that is not read is not the last one of the answer for its number."""
    return sequence.is_running and sequence.num_output + 1 < sequence.request.max_new_tokens


def _is_all(sampled: list[Segment], scheduler: Scheduler) -> bool:
    """All that runs is sampled, of one class, and can be sampled again without its tokens. Both classes together are
    planned step by step: see `BatchShare`."""
    running = [sequence for group in scheduler.running for sequence in group.active]
    return (
        {segment.sequence for segment in sampled}.issuperset(running)
        and len({group.batch for group in scheduler.running}) == 1
        and not any(_needs_tokens(sequence) for sequence in running)
    )


def _needs_tokens(sequence: Sequence) -> bool:
    """A beam search, a grammar and penalties go by the tokens before the one that is sampled."""
    sampling = sequence.request.sampling
    penalized = sampling.repetition_penalty != 1 or bool(sampling.presence_penalty or sampling.frequency_penalty)
    return sampling.num_beams > 1 or sequence.matcher is not None or penalized


def _may_admit(num_running: int, scheduler: Scheduler) -> bool:
    """There is a place for the group that waits first, or one that batch work would leave to it. Whether there are
    blocks for it is not asked."""
    if not scheduler.waiting:
        return False
    first = scheduler.waiting[0]
    free = scheduler.max_num_seqs - num_running
    return len(first.sequences) <= free or (scheduler.running[-1].batch and not first.batch)


def _following(last: Segment, kv: KVCache) -> Segment:
    """The position behind a segment. The last one checks the blocks that it fills itself."""
    start, end = last.end, last.end + 1
    full = kv.new_full_blocks(last.sequence, end)
    return Segment(last.sequence, start, end, True, range(last.new_full_blocks.stop, full.stop))
