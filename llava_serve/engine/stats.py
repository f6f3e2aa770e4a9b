"""What the engine tells about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Where the engine stands.

    Attributes:
        running: rows in the cache.
        waiting: requests' groups that are not.
        free_blocks: blocks that no sequence holds; the prefix cache's count as free.
        cached_tokens: prompt positions that the prefix cache has saved since the start.
        computed_tokens: positions that were computed since the start.
        generated_tokens: tokens that were drawn since the start.
        steps: since the start.
        heartbeat_age_s: since the loop's last turn; 0 where no thread drives the engine.
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
