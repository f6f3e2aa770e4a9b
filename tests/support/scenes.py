"""Pictures of any size, made without files."""

from __future__ import annotations

import numpy as np
from PIL import Image


def picture(width: int, height: int) -> Image.Image:
    """Colours that differ from place to place, so that a shifted or transposed tile shows."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    noise = np.random.default_rng(width * 1000 + height).random((height, width))
    return Image.fromarray((np.stack([x, y**2, noise], -1) * 255).astype(np.uint8))
