"""Results, as the library's user gets them."""

from __future__ import annotations

from dataclasses import dataclass

from llava_serve.types import FinishReason, TokenLogprob


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer. `token_ids` includes the end token where one was produced; `text` is stripped as the original's."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """The answers to a prompt: `outputs` holds all `n`; the short names are those of the first.

    Attributes:
        num_prompt_tokens: positions, images merged in.
        num_cached_tokens: those of them that came from a cache.
        prompt_logprobs: of each position, where asked for; None for the first one, before which nothing comes, and for
            those of images.
        num_image_tokens: those of them that images take.
    """

    prompt: str
    input_ids: list[int]
    num_prompt_tokens: int
    outputs: tuple[Completion, ...]
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    num_image_tokens: int = 0

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> tuple[TokenLogprob, ...] | None:
        return self.outputs[0].logprobs
