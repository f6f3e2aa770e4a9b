"""Where measured values go."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from llava_serve.metrics.definitions import Metric


class Series(Protocol):
    """One metric with values for all its labels. For several threads; which method fits is the metric's kind."""

    def inc(self, amount: float = 1) -> None:
        """Adds to a counter; above 0."""
        ...

    def set(self, value: float) -> None:
        """Sets a gauge."""
        ...

    def observe(self, value: float) -> None:
        """Adds a value to a histogram."""
        ...


class Exporter(Protocol):
    """Makes series. Whoever measures often asks for its series once, and keeps them."""

    def series(self, metric: Metric, *labels: str) -> Series:
        """The series of a metric, by the values of its labels; the same one for the same values."""
        ...


class Several:
    """Several series as one."""

    __slots__ = ("_series",)

    def __init__(self, series: Iterable[Series] = ()) -> None:
        self._series = tuple(series)

    def inc(self, amount: float = 1) -> None:
        for each in self._series:
            each.inc(amount)

    def set(self, value: float) -> None:
        for each in self._series:
            each.set(value)

    def observe(self, value: float) -> None:
        for each in self._series:
            each.observe(value)


class NoExporter:
    """Drops all values: the library, where nobody serves it."""

    def series(self, metric: Metric, *labels: str) -> Series:
        """A series that drops its values."""
        return Several()
