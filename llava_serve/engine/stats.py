"""The counters that the engine reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The state of the engine after a step.

    Attributes:
        running: sequences in the KV cache.
        waiting: sequence groups that are not admitted.
        free_blocks: blocks that no sequence holds; the prefix cache's count as free.
        cached_tokens: prompt positions that were prefix-cache hits since the start.
        computed_tokens: positions computed since the start.
        generated_tokens: tokens sampled since the start.
        steps: since the start.
        heartbeat_age_s: seconds since the loop's last turn; 0 where no thread drives the engine.
        slow_attention: on a GPU, attention runs without its fast kernel; the log says why.
    """

    running: int
    waiting: int
    free_blocks: int
    total_blocks: int
    cached_tokens: int
    computed_tokens: int
    generated_tokens: int
    steps: int
    heartbeat_age_s: float = 0.0
    slow_attention: bool = False
