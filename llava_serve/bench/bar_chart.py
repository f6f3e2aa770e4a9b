"""Grouped bars as an SVG file, with no library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

COLOURS = ("#2f6f9f", "#c98a2b", "#6a9f58", "#a05195")
_WIDTH, _HEIGHT, _MARGIN, _HEAD = 640, 320, 40, 60


@dataclass(frozen=True)
class Panel:
    """One plot: a group of bars per label, one colour per series."""

    title: str
    labels: Sequence[str]
    series: Mapping[str, Sequence[float]]


def write_bars(path: Path, panels: Sequence[Panel]) -> None:
    """Writes the panels below each other. Each bar shows its value."""
    frame = (
        f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT * len(panels)}" style="background:white"'
    )
    lines = [f'<svg {frame} font-family="sans-serif" font-size="11">']
    for number, panel in enumerate(panels):
        lines += [f'<g transform="translate(0 {number * _HEIGHT})">', *_bars(panel), "</g>"]
    path.write_text("\n".join([*lines, "</svg>", ""]), encoding="utf-8")


def _bars(panel: Panel) -> Iterator[str]:
    highest = max(max(values) for values in panel.series.values()) or 1
    group = (_WIDTH - 2 * _MARGIN) / len(panel.labels)
    bar = group * 0.8 / len(panel.series)
    bottom = _HEIGHT - _MARGIN
    yield f'<text x="{_MARGIN}" y="20" font-size="14">{escape(panel.title)}</text>'
    for number, (name, values) in enumerate(panel.series.items()):
        colour = COLOURS[number % len(COLOURS)]
        yield f'<text x="{_MARGIN + 160 * number}" y="36" fill="{colour}">{escape(name)}</text>'
        for at, value in enumerate(values):
            height = (bottom - _HEAD) * value / highest
            x = _MARGIN + at * group + number * bar
            box = f'x="{x:.1f}" y="{bottom - height:.1f}" width="{bar:.1f}" height="{height:.1f}"'
            yield f'<rect {box} fill="{colour}"/>'
            yield f'<text x="{x:.1f}" y="{bottom - height - 4:.1f}">{value:g}</text>'
    for at, label in enumerate(panel.labels):
        yield f'<text x="{_MARGIN + at * group:.1f}" y="{bottom + 16}">{escape(label)}</text>'
