"""Counts the tokens of an answer, and notices one that is not complete."""

from __future__ import annotations

from llava_serve.api.protocol import PromptTokensDetails, Usage
from llava_serve.errors import EngineDeadError
from llava_serve.types import Chunk, PreparedPrompt


class UsageCounter:
    """Counts the tokens of an answer, chunk by chunk, and the choices that are not finished.

    Args:
        prepared: the prompt.
        choices: how many are expected.
    """

    def __init__(self, prepared: PreparedPrompt, choices: int) -> None:
        self._prompt = prepared.num_tokens
        self._image = prepared.num_image_tokens
        self._cached = 0
        self._completion = 0
        self._open = set(range(choices))

    def add(self, chunk: Chunk) -> None:
        """Takes a chunk of any choice."""
        self._completion += len(chunk.token_ids)
        self._cached = max(self._cached, chunk.num_cached_tokens)
        if chunk.finish_reason is not None:
            self._open.discard(chunk.index)

    def check_complete(self) -> None:
        """Refuses a stream that ended without its finish reasons: it was aborted, and the answer is incomplete.

        Raises:
            EngineDeadError: a choice has no finish reason.
        """
        if self._open:
            raise EngineDeadError("The model ended the request before its answer was complete.")

    def usage(self) -> Usage:
        """The prompt counts once, however many choices there are."""
        return Usage(
            prompt_tokens=self._prompt,
            completion_tokens=self._completion,
            total_tokens=self._prompt + self._completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self._cached, image_tokens=self._image),
        )
