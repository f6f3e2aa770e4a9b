"""Small line plots as an SVG file, with no library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from llava_serve.bench.bar_chart import COLOURS


def write_lines(path: Path, title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """A small plot for each series, both axes logarithmic and of the same scale; a line of slope 1 lies behind it."""
    columns, cell, decade = 4, 180, 40
    rows = -(-len(series) // columns)
    parts = [f'<text x="10" y="20" font-size="14">{title}; the grey line has slope 1</text>']
    for number, (name, points) in enumerate(series.items()):
        left, bottom = 20 + number % columns * cell, 30 + (number // columns + 1) * cell - 30
        first, last = points[0], points[-1]
        lowest = min(taken for _, taken in points)
        at = [
            (left + decade * math.log10(size / first[0]), bottom - decade * math.log10(taken / lowest))
            for size, taken in points
        ]
        width = at[-1][0] - left
        parts += [
            f'<text x="{left}" y="{bottom + 14}">{name}</text>',
            f'<text x="{left}" y="{bottom + 26}" fill="#777">{first[0]:g} to {last[0]:g}: {last[1]:g} ms</text>',
            f'<path d="M{left} {bottom}l{width:.1f} {-width:.1f}" stroke="#ccc"/>',
            f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in at)}" fill="none" stroke="{COLOURS[0]}"/>',
        ]
    _write(path, parts, 20 + columns * cell, 40 + rows * cell)


def write_times(path: Path, title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """A small plot for each series, both axes linear and from 0; the highest value and the last stand below it."""
    columns, cell, side = 4, 180, 120
    rows = -(-len(series) // columns)
    parts = [f'<text x="10" y="20" font-size="14">{title}</text>']
    end = max((points[-1][0] for points in series.values()), default=0) or 1
    for number, (name, points) in enumerate(sorted(series.items())):
        left, bottom = 20 + number % columns * cell, 30 + (number // columns + 1) * cell - 30
        most = max(value for _, value in points) or 1
        line = " ".join(f"{left + side * x / end:.1f},{bottom - side * value / most:.1f}" for x, value in points)
        parts += [
            f'<text x="{left}" y="{bottom + 14}">{name}</text>',
            f'<text x="{left}" y="{bottom + 26}" fill="#777">most {most:.0f}, last {points[-1][1]:.0f}</text>',
            f'<path d="M{left} {bottom - side}v{side}h{side}" fill="none" stroke="#ccc"/>',
            f'<polyline points="{line}" fill="none" stroke="{COLOURS[0]}"/>',
        ]
    _write(path, parts, 20 + columns * cell, 40 + rows * cell)


def _write(path: Path, parts: Sequence[str], width: int, height: int) -> None:
    frame = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"'
    head = f'<svg {frame} font-family="sans-serif" font-size="10">'
    path.write_text("\n".join([head, *parts, "</svg>", ""]), encoding="utf-8")
