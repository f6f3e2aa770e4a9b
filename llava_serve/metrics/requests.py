"""What the ingress measures of requests."""

from __future__ import annotations

from collections.abc import Iterable

from llava_serve.metrics import definitions as metrics
from llava_serve.metrics.exporter import Exporter


class RequestMetrics:
    """Of one process. All methods are for its event loop."""

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter
        self._first_token = exporter.series(metrics.FIRST_TOKEN)
        self._stages = {stage: exporter.series(metrics.STAGE_SECONDS, stage) for stage in metrics.STAGES}
        self._queue = exporter.series(metrics.QUEUE_SECONDS)
        self._prefill = exporter.series(metrics.PREFILL_SECONDS)
        self._inter_token = exporter.series(metrics.INTER_TOKEN)
        self._seconds = exporter.series(metrics.REQUEST_SECONDS)
        self._decode = exporter.series(metrics.DECODE_SECONDS)
        self._prompt_tokens = exporter.series(metrics.REQUEST_PROMPT_TOKENS)
        self._output_tokens = exporter.series(metrics.REQUEST_OUTPUT_TOKENS)

    def first_token(self, seconds: float, stages: Iterable[tuple[str, float]]) -> None:
        """The first token has arrived: seconds since the request's arrival, and its stages."""
        self._first_token.observe(seconds)
        passed = dict.fromkeys(metrics.STAGES, 0.0)
        for stage, part in stages:
            passed[stage] += part
        for stage, part in passed.items():
            self._stages[stage].observe(part)
        self._queue.observe(passed["engine_queue"])
        self._prefill.observe(passed["vision"] + passed["prefill"])

    def tokens(self, seconds: float, count: int) -> None:
        """A group of so many tokens has arrived, so long after the one before."""
        self._inter_token.observe(seconds / count)

    def finished(self, reason: str) -> None:
        """A choice is complete."""
        self._exporter.series(metrics.CHOICES, reason).inc()

    def completed(self, seconds: float, first_token_s: float, prompt_tokens: int, output_tokens: int) -> None:
        """An answer is complete: seconds since the request's arrival, those to its first token, and its tokens."""
        self._seconds.observe(seconds)
        self._decode.observe(seconds - first_token_s)
        self._prompt_tokens.observe(prompt_tokens)
        self._output_tokens.observe(output_tokens)

    def refused(self, reason: str) -> None:
        """A request was not admitted."""
        self._exporter.series(metrics.REFUSALS, reason).inc()

    def ended(self, endpoint: str, outcome: str, status: int) -> None:
        """A request has ended."""
        self._exporter.series(metrics.REQUESTS, endpoint, outcome, str(status)).inc()
