"""Metrics on a page in Prometheus' format, from a registry of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from llava_serve.metrics.definitions import Metric
from llava_serve.metrics.exporter import Exporter, NoExporter, Series, Several

_KINDS: dict[str, type[Any]] = {"counter": Counter, "gauge": Gauge, "histogram": Histogram}


class PrometheusExporter:
    """Keeps the series of this process, under our names and under vLLM's.

    Args:
        model_name: the label `model_name` of the latter.
        also: gets every value, too.
    """

    def __init__(self, model_name: str, also: Exporter | None = None) -> None:
        self._model_name = model_name
        self._also = also or NoExporter()
        self._registry = CollectorRegistry()
        self._instruments: dict[str, Any] = {}
        self._series: dict[tuple[str, ...], Series] = {}
        self._collectors: list[Callable[[], None]] = []
        ProcessCollector(registry=self._registry)

    def series(self, metric: Metric, *labels: str) -> Series:
        """As `Exporter` says. To be called in one thread, the event loop's."""
        key = (metric.name, *labels)
        if key not in self._series:
            own = [self._child(metric, metric.name, metric.labels, labels)]
            if metric.vllm is not None:
                names = ("model_name", *(metric.vllm_labels or metric.labels))
                own.append(self._child(metric, f"vllm:{metric.vllm}", names, (self._model_name, *labels)))
            self._series[key] = Several([*own, self._also.series(metric, *labels)])
        return self._series[key]

    def collect_by(self, collect: Callable[[], None]) -> None:
        """Has this called before each page: it brings series up to date."""
        self._collectors.append(collect)

    def page(self) -> bytes:
        """All series, in Prometheus' text format."""
        for collect in self._collectors:
            collect()
        return generate_latest(self._registry)

    def _child(self, metric: Metric, name: str, label_names: tuple[str, ...], labels: tuple[str, ...]) -> Series:
        if name not in self._instruments:
            options = {"buckets": metric.buckets} if metric.buckets else {}
            made = _KINDS[metric.kind](name, metric.help, label_names, registry=self._registry, **options)
            self._instruments[name] = made
        instrument: Any = self._instruments[name]
        child: Series = instrument.labels(*labels) if labels else instrument
        return child
