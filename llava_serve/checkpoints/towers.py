"""The vision tower's description: its architecture and how its processor makes tiles."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from llava_serve.checkpoints.bounds import check_tower
from llava_serve.checkpoints.files import read_json
from llava_serve.checkpoints.spec import Aspect, ImageProcessing, Layout, Merge
from llava_serve.errors import CheckpointError

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_CLIP_DEFAULTS = {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768} | {
    "image_size": 224,
    "patch_size": 32,
}
"""Of transformers' CLIPVisionConfig: files leave out what equals them."""
_UNIT = 1 / 255


def read_vision_config(folder: Path) -> dict[str, Any]:
    """The config of a CLIP tower, from a folder that holds one by itself or inside a two-tower CLIP.

    Raises:
        CheckpointError: it is not CLIP's.
    """
    config = read_json(folder, "config.json")
    vision = config.get("vision_config") if config.get("model_type") == "clip" else config
    if not isinstance(vision, dict) or config.get("model_type") not in ("clip", "clip_vision_model"):
        raise CheckpointError(
            f"config.json in {folder} describes a vision tower of type {config.get('model_type')!r}; only CLIP is "
            "supported: name one with vision_tower."
        )
    return clip_config(vision)


def clip_config(vision: dict[str, Any]) -> dict[str, Any]:
    """A CLIP tower's config with the sizes that its file may leave out."""
    return {**_CLIP_DEFAULTS, **vision, "model_type": "clip_vision_model"}


def image_processing(
    settings: dict[str, Any],
    vision: dict[str, Any],
    *,
    layout: Layout,
    aspect: Aspect,
    merge: Merge,
    grid_pinpoints: tuple[tuple[int, int], ...],
    keeps_class_token: bool,
) -> ImageProcessing:
    """Reads a CLIP processor's settings.

    Args:
        settings: of `preprocessor_config.json`.
        vision: the tower's config.
        layout, aspect, merge, grid_pinpoints, keeps_class_token: from the checkpoint.

    Raises:
        CheckpointError: tiles that the tower cannot take, or canvases that are too many or too large.
    """
    check_tower(vision, grid_pinpoints)
    side = int(vision["image_size"])
    crop = _pair(settings.get("crop_size", side))
    size = settings.get("size", {"shortest_edge": side})
    size = {"shortest_edge": size} if isinstance(size, int) else size
    shortest = size.get("shortest_edge")
    if crop != (side, side):
        raise CheckpointError(
            f"preprocessor_config.json makes tiles of {crop[0]} x {crop[1]}, but the vision tower of config.json takes "
            f"{side} x {side}: correct the one that is wrong."
        )
    for key, supported in (("do_normalize", True), ("do_rescale", True), ("rescale_factor", _UNIT)):
        if not math.isclose(settings.get(key, supported), supported):
            raise CheckpointError(
                f"preprocessor_config.json sets {key} to {settings[key]}; only {supported} is supported."
            )
    return ImageProcessing(
        layout=layout,
        aspect=aspect,
        grid_pinpoints=grid_pinpoints,
        merge=merge,
        crop_size=crop,
        shortest_edge=None if shortest is None else int(shortest),
        resize_to=None if shortest is not None else _pair(size),
        do_resize=bool(settings.get("do_resize", True)),
        do_center_crop=bool(settings.get("do_center_crop", True)),
        resample=int(settings.get("resample", 3)),
        mean=_triple(settings.get("image_mean", _CLIP_MEAN)),
        std=_triple(settings.get("image_std", _CLIP_STD)),
        patch_size=int(vision["patch_size"]),
        extra_features=int(keeps_class_token),
    )


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
