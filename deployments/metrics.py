"""Metrics for Ray's own endpoint; Serve adds the tags `application`, `deployment` and `replica`."""

from __future__ import annotations

from collections.abc import Sequence

from ray.serve.metrics import Counter, Histogram

from llava_serve.types import Chunk, PreparedPrompt

SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]


class PreprocessorMetrics:
    """Of one replica of the picture tier."""

    def __init__(self) -> None:
        self._prompts = Counter("llava_prompts", description="Prompts made ready for the model.")
        self._images = Counter("llava_images", description="Pictures made ready for the model.")
        self._ended = Counter(
            "llava_ended_decodings", description="Decodings whose process was ended at a limit, or crashed."
        )
        self._seconds = Histogram(
            "llava_prepare_seconds", description="Time to make a prompt ready.", boundaries=SECONDS
        )

    def prepared(self, prompt: PreparedPrompt, seconds: float) -> None:
        """Counts one prompt."""
        self._prompts.inc()
        if prompt.image_spans:
            self._images.inc(len(prompt.image_spans))
        self._seconds.observe(seconds)

    def decoding_ended(self) -> None:
        """Counts one decoding whose process is gone."""
        self._ended.inc()


class ModelMetrics:
    """Of one replica of the model tier."""

    def __init__(self) -> None:
        self._tokens = Counter("llava_generated_tokens", description="Tokens of answers.")
        self._answers = Counter(
            "llava_answers", description="Choices that came to their end.", tag_keys=("finish_reason",)
        )
        self._first = Histogram(
            "llava_first_chunk_seconds",
            description="Time from arrival at the model to the first chunk.",
            boundaries=SECONDS,
        )

    def produced(self, chunks: Sequence[Chunk]) -> None:
        """Counts the tokens and the finished choices of one group of a stream."""
        if tokens := sum(len(chunk.token_ids) for chunk in chunks):
            self._tokens.inc(tokens)
        for chunk in chunks:
            if chunk.finish_reason is not None:
                self._answers.inc(tags={"finish_reason": chunk.finish_reason})

    def first_chunk(self, seconds: float) -> None:
        """Records how long a request waited for its first chunk."""
        self._first.observe(seconds)
