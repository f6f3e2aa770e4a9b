"""Metrics for Ray's own endpoint; Serve adds the tags `application`, `deployment` and `replica`."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any, Protocol

from ray.serve.metrics import Counter, Gauge, Histogram

from llava_serve.engine.metrics import EngineMetrics
from llava_serve.engine.stats import EngineStats
from llava_serve.metrics.definitions import Metric
from llava_serve.metrics.exporter import Series, Several

EXPORT_S = 1.0
"""Ray's processes collect metrics less often."""


class Measured(Protocol):
    """Has an engine's statistics."""

    def stats(self) -> EngineStats: ...


def export_in_thread(source: Measured, metrics: EngineMetrics) -> None:
    """Brings metrics up to date at intervals while their source lives: Ray's are pushed, not asked for."""
    found = weakref.ref(source)

    def export() -> None:
        while (living := found()) is not None:
            metrics.update(living.stats())
            del living
            time.sleep(EXPORT_S)

    threading.Thread(target=export, name="metrics", daemon=True).start()


class RayExporter:
    """Exports series through Ray, under our names and under vLLM's: its dashboard "Serve LLM" reads `ray_vllm_*`.

    Args:
        model_name: the tag `model_name` of the latter.
    """

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._instruments: dict[str, Any] = {}

    def series(self, metric: Metric, *labels: str) -> Series:
        """As `Exporter` says."""
        own = [self._tagged(metric, metric.name, dict(zip(metric.labels, labels, strict=True)))]
        if metric.vllm is not None:
            tags = dict(zip(metric.vllm_labels or metric.labels, labels, strict=True))
            own.append(self._tagged(metric, f"vllm_{metric.vllm}", {"model_name": self._model_name} | tags))
        return Several(own)

    def _tagged(self, metric: Metric, name: str, tags: dict[str, str]) -> Series:
        if name not in self._instruments:
            self._instruments[name] = _instrument(metric, name, tuple(tags))
        return _Tagged(self._instruments[name], tags)


class _Tagged:
    """A series of an instrument of Ray's."""

    __slots__ = ("_instrument", "_tags")

    def __init__(self, instrument: Any, tags: dict[str, str]) -> None:
        self._instrument = instrument
        self._tags = tags

    def inc(self, amount: float = 1) -> None:
        self._instrument.inc(amount, self._tags)

    def set(self, value: float) -> None:
        self._instrument.set(value, self._tags)

    def observe(self, value: float) -> None:
        self._instrument.observe(value, self._tags)


def _instrument(metric: Metric, name: str, tags: tuple[str, ...]) -> Counter | Gauge | Histogram:
    if metric.kind == "histogram":
        return Histogram(name, description=metric.help, boundaries=list(metric.buckets), tag_keys=tags)
    kind = Counter if metric.kind == "counter" else Gauge
    return kind(name, description=metric.help, tag_keys=tags)
