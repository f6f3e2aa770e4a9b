"""The six kinds as polygons: centred, and scaled so that the longer side of the bounding box is 1."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]


def outline(kind: str, rng: np.random.Generator) -> Points:
    """A random outline of this kind, as corner points [n, 2] (x to the right, y down) in -0.5 to 0.5."""
    points, turn = _SHAPES[kind](rng)
    angle = np.radians(rng.uniform(-turn, turn))
    rotation = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    points = points @ rotation
    low, high = points.min(axis=0), points.max(axis=0)
    return np.asarray((points - (low + high) / 2) / (high - low).max())


def _circle(rng: np.random.Generator) -> tuple[Points, float]:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return np.stack([np.cos(t) * rng.uniform(0.95, 1.05), np.sin(t)], axis=1), 180


def _square(rng: np.random.Generator) -> tuple[Points, float]:
    half = rng.uniform(0.93, 1.07) if rng.random() < 0.5 else 1.0
    # Upright in half of the draws, and never turned so far that one could speak of a diamond.
    turn = 0.0 if rng.random() < 0.5 else 12.0
    return np.array([[-half, -1], [half, -1], [half, 1], [-half, 1]]), turn


def _triangle(rng: np.random.Generator) -> tuple[Points, float]:
    height = rng.uniform(0.75, 1.2) * 2
    apex = 0.0 if rng.random() < 0.7 else rng.uniform(-1, 1)
    turn = (0.0, 15.0, 180.0)[int(rng.choice(3, p=[0.5, 0.25, 0.25]))]
    return np.array([[-1, height / 2], [1, height / 2], [apex, -height / 2]]), turn


def _star(rng: np.random.Generator) -> tuple[Points, float]:
    inner = rng.uniform(0.36, 0.5)
    t = np.arange(10) * np.pi / 5 - np.pi / 2
    radius = np.where(np.arange(10) % 2 == 0, 1.0, inner)
    turn = 0.0 if rng.random() < 0.6 else 36.0
    return np.stack([np.cos(t) * radius, np.sin(t) * radius], axis=1), turn


def _cross(rng: np.random.Generator) -> tuple[Points, float]:
    w = rng.uniform(0.22, 0.42)
    corners = [
        (-w, -1),
        (w, -1),
        (w, -w),
        (1, -w),
        (1, w),
        (w, w),
        (w, 1),
        (-w, 1),
        (-w, w),
        (-1, w),
        (-1, -w),
        (-w, -w),
    ]
    return np.array(corners), 0.0 if rng.random() < 0.6 else 14.0


def _heart(rng: np.random.Generator) -> tuple[Points, float]:
    if rng.random() < 0.5:
        t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        x = 16 * np.sin(t) ** 3
        y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
        points = np.stack([x, y * rng.uniform(0.9, 1.1)], axis=1)
    else:
        # Two lobes over a point, as people put it together from circles and a triangle.
        t = np.linspace(-np.pi * 0.2, np.pi, 20)
        right = np.stack([0.5 + 0.5 * np.cos(t), -0.5 * np.sin(t)], axis=1)
        left = right[::-1] * np.array([-1, 1])
        points = np.concatenate([np.array([[0, rng.uniform(1.0, 1.35)]]), right, left])
    return points, 0.0 if rng.random() < 0.6 else 12.0


_SHAPES: dict[str, Callable[[np.random.Generator], tuple[Points, float]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
}
