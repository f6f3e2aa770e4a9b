"""What the model can name: six kinds, ten colours, and the combinations of both that training never draws."""

from __future__ import annotations

import colorsys
from typing import NamedTuple

import numpy as np

RGB = tuple[int, int, int]

KINDS = ("circle", "square", "triangle", "star", "cross", "heart")
PLURALS = ("circles", "squares", "triangles", "stars", "crosses", "hearts")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink", "black", "white")

# Never drawn and never asked about in training: none of those that people try first.
HELD_OUT: frozenset[tuple[str, str]] = frozenset({("purple", "triangle"), ("green", "cross"), ("orange", "heart")})


class HsvRange(NamedTuple):
    """A box in HSV: hue in degrees (the low end may be negative), saturation and value from 0 to 1."""

    hue: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]


# Between neighbouring hues there are gaps, so that no drawn colour could bear two names.
_RANGES: dict[str, tuple[HsvRange, ...]] = {
    "red": (HsvRange((-10, 8), (0.72, 1), (0.62, 1)),),
    "orange": (HsvRange((22, 40), (0.78, 1), (0.85, 1)),),
    "yellow": (HsvRange((51, 63), (0.6, 1), (0.84, 1)),),
    "green": (HsvRange((95, 152), (0.5, 1), (0.4, 1)),),
    "cyan": (HsvRange((173, 190), (0.55, 1), (0.72, 1)),),
    "blue": (HsvRange((208, 246), (0.55, 1), (0.5, 1)),),
    "purple": (HsvRange((264, 292), (0.5, 1), (0.42, 0.95)), HsvRange((290, 302), (0.6, 1), (0.42, 0.7))),
    "pink": (HsvRange((322, 350), (0.25, 0.6), (0.93, 1)), HsvRange((320, 332), (0.5, 0.93), (0.95, 1))),
    "black": (HsvRange((0, 360), (0, 1), (0, 0.1)), HsvRange((0, 360), (0, 0.15), (0, 0.16))),
    "white": (HsvRange((0, 360), (0, 0.04), (0.95, 1)),),
}

# What people type: pure colours and the well-known names of HTML and plotting tools.
_WELL_KNOWN: dict[str, tuple[RGB, ...]] = {
    "red": ((255, 0, 0), (220, 20, 60), (200, 0, 0), (214, 39, 40), (220, 40, 40), (230, 30, 30)),
    "orange": ((255, 165, 0), (255, 140, 0), (255, 128, 0), (255, 127, 14), (240, 140, 20)),
    "yellow": ((255, 255, 0), (255, 215, 0), (250, 220, 30), (240, 220, 40), (255, 235, 59)),
    "green": ((0, 128, 0), (0, 255, 0), (0, 200, 0), (34, 139, 34), (44, 160, 44), (0, 160, 60), (76, 175, 80)),
    "cyan": ((0, 255, 255), (0, 200, 200), (0, 220, 230), (64, 224, 208)),
    "blue": ((0, 0, 255), (30, 144, 255), (65, 105, 225), (0, 0, 200), (0, 0, 139), (40, 80, 220), (31, 119, 180)),
    "purple": ((128, 0, 128), (148, 0, 211), (138, 43, 226), (160, 32, 240), (148, 103, 189), (120, 40, 160)),
    "pink": ((255, 192, 203), (255, 105, 180), (255, 182, 193), (255, 20, 147), (250, 150, 190)),
    "black": ((0, 0, 0), (20, 20, 20), (30, 30, 30)),
    "white": ((255, 255, 255), (250, 250, 250), (245, 245, 245)),
}


def draw_colour(name: str, rng: np.random.Generator) -> RGB:
    """One RGB value (0 to 255 each) that bears the name: a well-known one in three of ten draws."""
    if rng.random() < 0.3:
        known = _WELL_KNOWN[name]
        return known[int(rng.integers(len(known)))]
    ranges = _RANGES[name]
    box = ranges[int(rng.integers(len(ranges)))]
    hue, saturation, value = (rng.uniform(low, high) for low, high in box)
    return from_hsv(hue, saturation, value)


def from_hsv(hue: float, saturation: float, value: float) -> RGB:
    """Hue in degrees, saturation and value from 0 to 1, as RGB from 0 to 255."""
    r, g, b = colorsys.hsv_to_rgb((hue % 360) / 360, saturation, value)
    return round(r * 255), round(g * 255), round(b * 255)


def distance(a: RGB, b: RGB) -> float:
    """Euclidean distance of two RGB values, 0 to 441."""
    return float(np.hypot(np.hypot(a[0] - b[0], a[1] - b[1]), a[2] - b[2]))
