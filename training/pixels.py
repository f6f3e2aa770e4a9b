"""From a picture to the vision tower's input, as LLaVA-1.5 does it with `image_aspect_ratio: pad`."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

IMAGE_SIZE = 160
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_PAD = (122, 116, 104)  # int(mean * 255)


def to_tile(picture: Image.Image) -> NDArray[np.uint8]:
    """An RGB picture padded to a square and scaled: [160, 160, 3]."""
    side = max(picture.size)
    if picture.width != picture.height:
        square = Image.new("RGB", (side, side), _PAD)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        picture = square
    return np.asarray(picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))


def normalise(tiles: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 160, 160, 3] to the tower's float32 [n, 3, 160, 160]."""
    mean = torch.tensor(CLIP_MEAN) * 255
    std = torch.tensor(CLIP_STD) * 255
    return ((tiles.float() - mean) / std).permute(0, 3, 1, 2).contiguous()
