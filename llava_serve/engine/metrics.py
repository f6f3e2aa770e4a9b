"""Exports what the engine counts: whole steps at once, from its statistics."""

from __future__ import annotations

import threading

from llava_serve.engine.stats import EngineStats
from llava_serve.metrics import definitions as metrics
from llava_serve.metrics.exporter import Exporter

_COUNTERS = (
    (metrics.PROMPT_TOKENS, "prompt_tokens"),
    (metrics.IMAGE_TOKENS, "image_tokens"),
    (metrics.OUTPUT_TOKENS, "generated_tokens"),
    (metrics.PREFIX_QUERIES, "queried_tokens"),
    (metrics.PREFIX_HITS, "cached_tokens"),
    (metrics.FEATURE_QUERIES, "queried_images"),
    (metrics.FEATURE_HITS, "cached_images"),
    (metrics.PREEMPTIONS, "preemptions"),
    (metrics.ABORTED, "aborted"),
    (metrics.EXPIRED, "expired"),
    (metrics.STEPS, "steps"),
    (metrics.STEP_SECONDS, "step_seconds"),
    (metrics.SCHEDULE_SECONDS, "schedule_seconds"),
    (metrics.STEP_SEQUENCES, "computed_sequences"),
    (metrics.STEP_TOKENS, "computed_tokens"),
)
"""Each with its field of `EngineStats`."""


class EngineMetrics:
    """Of one engine; for several threads."""

    def __init__(self, exporter: Exporter) -> None:
        self._counters = [(exporter.series(metric), field) for metric, field in _COUNTERS]
        self._running = exporter.series(metrics.RUNNING)
        self._waiting = exporter.series(metrics.WAITING)
        self._usage = exporter.series(metrics.KV_USAGE)
        self._counted = dict.fromkeys((field for _, field in _COUNTERS), 0.0)
        self._lock = threading.Lock()

    def update(self, stats: EngineStats) -> None:
        """Brings the series up to date."""
        with self._lock:
            for series, field in self._counters:
                value = getattr(stats, field)
                if value > self._counted[field]:
                    series.inc(value - self._counted[field])
                    self._counted[field] = value
            self._running.set(stats.running)
            self._waiting.set(stats.waiting)
            self._usage.set(1 - stats.free_blocks / stats.total_blocks)
