"""How much online requests ask of an engine: from it follows how many engines there should be. No tensors."""

from __future__ import annotations

from dataclasses import dataclass

from llava_serve.engine.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class OnlineLoad:
    """Batch work does not count: it takes what online requests leave.

    Attributes:
        waiting_tokens: positions of prompts, text and images, that are not computed.
        sequences: in the KV cache and in the queue.
        room: share of the engine's room that these take or will take, of its places for sequences or of its KV blocks,
            whichever is larger; above 1 they do not fit at once.
    """

    waiting_tokens: int = 0
    sequences: int = 0
    room: float = 0.0


NO_LOAD = OnlineLoad()


def online_load(scheduler: Scheduler, num_blocks: int) -> OnlineLoad:
    """The load of an engine with so many KV blocks. What waits is taken to need as many of them as what runs has."""
    tokens = placed = queued = blocks = 0
    for group in scheduler.running:
        if not group.batch:
            placed += len(group.sequences)
            blocks += sum(each.extent.size for each in group.sequences if each.extent)
            tokens += sum(each.num_pending for each in group.active if each.num_pending > 1)
    for group in scheduler.waiting:
        if not group.batch:
            queued += len(group.sequences)
            tokens += sum(each.num_pending for each in group.active)
    sequences = placed + queued
    of_blocks = blocks / num_blocks * sequences / placed if placed else 0.0
    return OnlineLoad(tokens, sequences, max(sequences / scheduler.max_num_seqs, of_blocks))
