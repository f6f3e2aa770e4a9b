"""The counters that the engine reports."""

from __future__ import annotations

from dataclasses import dataclass

from llava_serve.engine.online_load import NO_LOAD, OnlineLoad
from llava_serve.types import PreparedPrompt


@dataclass
class Counts:
    """What an engine counts itself; the fields are those of `EngineStats`."""

    cached_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    queried_tokens: int = 0
    expired: int = 0
    step_seconds: float = 0.0
    schedule_seconds: float = 0.0
    computed_sequences: int = 0

    def add_prompt(self, prompt: PreparedPrompt, cached: int, *, first: bool) -> None:
        """Adds the prompt of a choice, with so many hits; `first`: of its request."""
        self.queried_tokens += prompt.num_tokens
        self.cached_tokens += cached
        if first:
            self.prompt_tokens += prompt.num_tokens
            self.image_tokens += prompt.num_image_tokens


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The state of the engine after a step.

    Attributes:
        running: sequences in the KV cache.
        waiting: sequence groups that are not admitted.
        free_blocks: blocks that no sequence holds; the prefix cache's count as free.
        cached_tokens: prompt positions that were prefix-cache hits since the start. They count, as do those of the next
            three, with the first token of a choice.
        computed_tokens: positions computed since the start.
        generated_tokens: tokens sampled since the start.
        steps: since the start; so are all that follow, up to `prefill_seconds`.
        prompt_tokens, image_tokens: of the prompts, once for each request; the latter are a part of the former.
        queried_tokens: prompt positions that were looked up in the prefix cache.
        queried_images, cached_images: whose features a prefill needed, and those of them that another had computed.
        preemptions: groups that lost their place in the KV cache.
        aborted, expired: requests whose caller ended them, and whose deadline passed.
        step_seconds, schedule_seconds: in steps, and in the scheduler, which is a part of them.
        computed_sequences: of all steps.
        prefill_seconds: by which prefill and the tower have made steps longer.
        prefill_tokens_per_s: positions of prompts that are computed in a second of steps with prefill; 0 while nothing
            is measured. It is of the last such steps; the rest is of the state after the last step.
        online: what online requests ask for.
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
    prompt_tokens: int = 0
    image_tokens: int = 0
    queried_tokens: int = 0
    queried_images: int = 0
    cached_images: int = 0
    preemptions: int = 0
    aborted: int = 0
    expired: int = 0
    step_seconds: float = 0.0
    schedule_seconds: float = 0.0
    computed_sequences: int = 0
    prefill_seconds: float = 0.0
    prefill_tokens_per_s: float = 0.0
    online: OnlineLoad = NO_LOAD
    heartbeat_age_s: float = 0.0
    slow_attention: bool = False
