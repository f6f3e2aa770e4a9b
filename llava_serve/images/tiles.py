"""RGB picture to uint8 tiles, and the number of positions that a picture takes. Pillow's resize, the original's rules.

Sources: `process_images`, `select_best_resolution`, `unpad_image` of the original; transformers' PIL image processors.
"""

from __future__ import annotations

import math
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llava_serve.checkpoints.spec import ImageProcessing
from llava_serve.errors import InvalidImageError

Size = tuple[int, int]

_MAX_CANVAS = 100_000_000
"""Pixels of the largest intermediate picture: a thin strip, padded or enlarged, must not fill the memory."""


_MIN_RATIO = 1.1
"""A grid that is too large by less, along each side, is left as it is."""


def make_tiles(image: Image.Image, processing: ImageProcessing) -> NDArray[np.uint8]:
    """Makes the tower's input.

    Args:
        image: in mode RGB.
        processing: of the checkpoint.

    Returns:
        uint8 [tiles, height, width, 3], not normalised; one tile but for anyres, where the overview comes first.

    Raises:
        InvalidImageError: so thin that its intermediate picture would be too large.
    """
    if processing.aspect == "anyres":
        views = [_resize(view, processing) for view in _anyres_views(image, processing)]
    elif processing.aspect == "pad":
        views = [_pad_to_square(image, processing)]
    else:
        views = [_resize(image, processing)]
    return np.stack([np.asarray(_crop(view, processing)) for view in views])


def num_features(size: Size, processing: ImageProcessing) -> int:
    """Positions that a picture of (width, height) takes in the prompt."""
    if processing.aspect != "anyres":
        return processing.features_per_tile + processing.newline
    if processing.merge == "flat":
        return num_tiles(size, processing) * processing.features_per_tile
    top, bottom, left, right = kept_features(size, processing)
    height, width = shrunk_grid(bottom - top, right - left, processing)
    newline = 1 if processing.merge == "spatial_unpad" else 0
    return processing.features_per_tile + height * (width + newline)


def shrunk_grid(height: int, width: int, processing: ImageProcessing) -> Size:
    """(height, width) to which a grid of features is interpolated; its own where it is small enough."""
    if processing.max_grid_tiles is None or processing.merge != "spatial_unpad":
        return height, width
    ratio = math.sqrt(height * width / (processing.max_grid_tiles * processing.grid_side**2))
    return (int(height // ratio), int(width // ratio)) if ratio > _MIN_RATIO else (height, width)


def num_tiles(size: Size, processing: ImageProcessing) -> int:
    """Tiles that `make_tiles` makes of a picture of (width, height)."""
    if processing.aspect != "anyres":
        return 1
    columns, rows = tile_grid(size, processing)
    return 1 + columns * rows


def tile_grid(size: Size, processing: ImageProcessing) -> Size:
    """(columns, rows) of anyres tiles for a picture of (width, height)."""
    width, height = best_resolution(size, processing.grid_pinpoints)
    return width // processing.crop_size[1], height // processing.crop_size[0]


def kept_features(size: Size, processing: ImageProcessing) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of the features of the picture in the grid of all tiles; those of the padding lie
    outside (all are kept unless the merge is `spatial_unpad`)."""
    columns, rows = tile_grid(size, processing)
    grid_width, grid_height = columns * processing.grid_side, rows * processing.grid_side
    if processing.merge != "spatial_unpad":
        return 0, grid_height, 0, grid_width
    width, height = size
    if width / height > grid_width / grid_height:
        padding = (grid_height - _truncate(height * (grid_width / width), processing)) // 2
        return padding, grid_height - padding, 0, grid_width
    padding = (grid_width - _truncate(width * (grid_height / height), processing)) // 2
    return 0, grid_height, padding, grid_width - padding


def best_resolution(size: Size, pinpoints: tuple[Size, ...]) -> Size:
    """The canvas (width, height) that keeps most pixels of a picture and wastes least; the first of equals.

    The two layouts list the same canvases in another order, so they choose differently among equals.
    """
    width, height = size

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / width, canvas[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas[0] * canvas[1]

    return max(pinpoints, key=merit)


def digest(tiles: NDArray[np.uint8], size: Size, processing: ImageProcessing) -> str:
    """Identifies a picture's tiles: equal digests mean equal features from the same tower."""
    state = blake2b(tiles.tobytes(), digest_size=16)
    state.update(repr((tiles.shape, size, processing)).encode())
    return state.hexdigest()


def _truncate(value: float, processing: ImageProcessing) -> int:
    # transformers first rounds the error of the division away: 2 sizes of 200,000 differ.
    return int(round(value, 7)) if processing.layout == "transformers" else int(value)


def _anyres_views(image: Image.Image, processing: ImageProcessing) -> list[Image.Image]:
    canvas_width, canvas_height = best_resolution(image.size, processing.grid_pinpoints)
    scale_width, scale_height = canvas_width / image.width, canvas_height / image.height
    if scale_width < scale_height:
        new = canvas_width, min(math.ceil(image.height * scale_width), canvas_height)
    else:
        new = min(math.ceil(image.width * scale_height), canvas_width), canvas_height
    canvas = Image.new("RGB", (canvas_width, canvas_height))
    resample = (
        Image.Resampling(processing.resample) if processing.layout == "transformers" else Image.Resampling.BICUBIC
    )
    canvas.paste(image.resize(new, resample), ((canvas_width - new[0]) // 2, (canvas_height - new[1]) // 2))
    height, width = processing.crop_size
    tiles = [
        canvas.crop((left, top, left + width, top + height))
        for top in range(0, canvas_height, height)
        for left in range(0, canvas_width, width)
    ]
    side = processing.shortest_edge
    overview = (side, side) if side else (width, height)
    return [image.resize(overview, resample), *tiles]


def _pad_to_square(image: Image.Image, processing: ImageProcessing) -> Image.Image:
    """Lays an image on a square of the mean colour, and resizes that."""
    side, size = max(image.size), image.size
    canvas, resample = [side, side], Image.Resampling(processing.resample)
    new = _resized((side, side), processing) if processing.do_resize else (side, side)
    if processing.do_resize and image.width == side:
        # Pillow resizes the rows, rounds, and then the columns. Rows of one colour do not change, so the padding
        # above and below is added before the columns: the same pixels and a fraction of the memory.
        canvas[0] = new[0]
        image = image.resize((new[0], image.height), resample)
    elif processing.do_resize and side * side > _MAX_CANVAS:
        # Columns first: rounded in another order, so a shade may differ by one where there is no room for the square.
        canvas[1] = new[1]
        image = image.resize((image.width, new[1]), resample)
    _bound(size, (canvas[0], canvas[1]))
    red, green, blue = (int(channel * 255) for channel in processing.mean)
    square = Image.new("RGB", (canvas[0], canvas[1]), (red, green, blue))
    square.paste(image, ((canvas[0] - image.width) // 2, (canvas[1] - image.height) // 2))
    return square.resize(new, resample) if processing.do_resize else square


def _resize(image: Image.Image, processing: ImageProcessing) -> Image.Image:
    if not processing.do_resize:
        return image
    new = _resized(image.size, processing)
    _bound(image.size, new)
    return image.resize(new, Image.Resampling(processing.resample))


def _crop(image: Image.Image, processing: ImageProcessing) -> Image.Image:
    """Crops to one tile, as CLIP's processor does."""
    if processing.do_center_crop:
        height, width = processing.crop_size
        top, left = (image.height - height) // 2, (image.width - width) // 2
        image = image.crop((left, top, left + width, top + height))
    if image.size != processing.crop_size[::-1]:
        raise InvalidImageError(f"A picture of {image.width} x {image.height} does not fit this model's processor.")
    return image


def _resized(size: Size, processing: ImageProcessing) -> Size:
    if processing.resize_to is not None:
        return processing.resize_to[1], processing.resize_to[0]
    edge = processing.shortest_edge
    assert edge is not None
    width, height = size
    return (edge, int(edge * height / width)) if width <= height else (int(edge * width / height), edge)


def _bound(size: Size, canvas: Size) -> None:
    if canvas[0] * canvas[1] > _MAX_CANVAS:
        raise InvalidImageError(f"The picture of {size[0]} x {size[1]} pixels is too long and thin.")
