"""Scenes: one to five shapes placed without overlap on a background that each stands out from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from training import palette
from training.palette import COLOURS, HELD_OUT, KINDS, RGB

Split = Literal["train", "test", "held-out"]
MAX_SHAPES = 5
# Share of scenes with 1 to 5 shapes.
_COUNTS = (0.14, 0.2, 0.22, 0.22, 0.22)
# The longest side of a shape's box, as a share of the picture's shorter side, by number of shapes.
_LARGEST = (0.75, 0.52, 0.44, 0.38, 0.34)
SMALLEST = 1 / 6
_SMALL = 0.26
_CONTRAST = 80.0


@dataclass(frozen=True)
class Shape:
    """One shape; x, y are the centre of its box and size the box's longer side, in pixels of the picture."""

    kind: str
    colour: str
    rgb: RGB
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """A scene before it is drawn: pixels wide and high, shapes, two background colours, and a seed for the drawing."""

    width: int
    height: int
    shapes: tuple[Shape, ...]
    background: tuple[RGB, RGB]
    seed: int


def draw_scene(
    rng: np.random.Generator,
    split: Split = "train",
    *,
    sides: tuple[int, int] | None = None,
    count: int | None = None,
    small: bool = False,
) -> Scene:
    """One random scene.

    `train` and `test` never hold a held-out combination of colour and kind; `held-out` scenes hold at least one.
    `sides` fixes the range of the picture's sides in pixels (drawn log-uniformly, up to 2:1), `count` the shapes, and
    `small` leaves only shapes little larger than the smallest.
    """
    width, height = _sides(rng, sides)
    while True:
        n = count or 1 + int(rng.choice(MAX_SHAPES, p=_COUNTS))
        names = _names(n, rng, split)
        background = _background(rng)
        colours = [_visible(colour, background, rng) for colour, _ in names]
        boxes = _place(n, width, height, _SMALL if small else _LARGEST[n - 1], rng)
        if boxes is not None and all(c is not None for c in colours):
            break
    shapes = tuple(
        Shape(kind, colour, rgb, x, y, size)
        for (colour, kind), rgb, (x, y, size) in zip(names, colours, boxes, strict=True)
        if rgb is not None
    )
    return Scene(width, height, shapes, background, int(rng.integers(2**31)))


def _sides(rng: np.random.Generator, sides: tuple[int, int] | None) -> tuple[int, int]:
    if sides is None:
        # Small pictures are quick to draw, and a large one looks the same to the model once it is scaled down.
        sides = (64, 420) if rng.random() < 0.97 else (420, 1000)
    low, high = sides
    longer = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    shorter = longer if rng.random() < 0.45 else max(float(low), longer / rng.uniform(1, 2))
    wide = rng.random() < 0.6
    return (round(longer), round(shorter)) if wide else (round(shorter), round(longer))


def _names(n: int, rng: np.random.Generator, split: Split) -> list[tuple[str, str]]:
    names: list[tuple[str, str]] = []
    # Few kinds or few colours in a scene make counts above one common.
    kinds = rng.choice(len(KINDS), size=int(rng.integers(1, len(KINDS) + 1)), replace=False)
    colours = rng.choice(len(COLOURS), size=int(rng.integers(1, len(COLOURS) + 1)), replace=False)
    tries = 0
    while len(names) < n:
        tries += 1
        pool = (colours, kinds) if tries < 40 else (np.arange(len(COLOURS)), np.arange(len(KINDS)))
        name = (COLOURS[int(rng.choice(pool[0]))], KINDS[int(rng.choice(pool[1]))])
        if name not in HELD_OUT:
            names.append(name)
    if split == "held-out":
        held_out = sorted(HELD_OUT)
        names[int(rng.integers(n))] = held_out[int(rng.integers(len(held_out)))]
    return names


def _background(rng: np.random.Generator) -> tuple[RGB, RGB]:
    """Two colours, alike unless the background is a gradient."""
    first = _plain(rng)
    if rng.random() > 0.15:
        return first, first
    shift = rng.integers(-45, 46, size=3)
    second = tuple(int(v) for v in np.clip(np.array(first) + shift, 0, 255))
    return first, (second[0], second[1], second[2])


def _plain(rng: np.random.Generator) -> RGB:
    style = rng.choice(6, p=[0.22, 0.1, 0.18, 0.17, 0.2, 0.13])
    if style == 0:
        return 255, 255, 255
    if style == 1:
        light = int(rng.integers(235, 256))
        return light, light, light
    if style == 2:
        grey = int(rng.integers(40, 236))
        return grey, grey, grey
    if style == 3:
        return palette.from_hsv(rng.uniform(0, 360), rng.uniform(0, 1), rng.uniform(0, 0.25))
    if style == 4:
        return palette.from_hsv(rng.uniform(0, 360), rng.uniform(0.05, 0.3), rng.uniform(0.8, 1))
    return palette.from_hsv(rng.uniform(0, 360), rng.uniform(0, 1), rng.uniform(0.1, 1))


def _visible(colour: str, background: tuple[RGB, RGB], rng: np.random.Generator) -> RGB | None:
    """A value of the named colour that stands out from both background colours, or None."""
    for _ in range(6):
        rgb = palette.draw_colour(colour, rng)
        middle = [(a + b) // 2 for a, b in zip(*background, strict=True)]
        grounds = (*background, (middle[0], middle[1], middle[2]))
        if min(palette.distance(rgb, ground) for ground in grounds) >= _CONTRAST:
            return rgb
    return None


def _place(
    n: int, width: int, height: int, largest: float, rng: np.random.Generator
) -> list[tuple[float, float, float]] | None:
    """Boxes (x, y, size) that do not touch each other or the border, or None when there was no room."""
    shorter = min(width, height)
    sizes = shorter * (SMALLEST + (largest - SMALLEST) * rng.random(n) ** 1.3)
    if rng.random() < 0.25:
        sizes[:] = sizes[0]
    line = rng.random()
    margin = 0.012 * shorter
    boxes: list[tuple[float, float, float]] = []
    # Rows and columns of exactly aligned shapes are rare by chance and common in pictures made by hand.
    row_y = rng.uniform(0.3, 0.7) * height if n > 1 and line < 0.08 else None
    column_x = rng.uniform(0.3, 0.7) * width if n > 1 and 0.08 <= line < 0.16 else None
    for size in sizes:
        for _ in range(60):
            half = size / 2 + margin
            x = column_x if column_x is not None else rng.uniform(half, width - half)
            y = row_y if row_y is not None else rng.uniform(half, height - half)
            inside = half <= x <= width - half and half <= y <= height - half
            if inside and all(
                max(abs(x - other_x), abs(y - other_y)) > (size + other) / 2 + 2 * margin
                for other_x, other_y, other in boxes
            ):
                boxes.append((float(x), float(y), float(size)))
                break
        else:
            return None
    return boxes
