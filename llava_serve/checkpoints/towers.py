"""The vision tower's description: its architecture and how its processor makes tiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_serve.checkpoints.bounds import check_tower
from llava_serve.checkpoints.decoders import UNUSED_KEYS
from llava_serve.checkpoints.files import read_json
from llava_serve.checkpoints.spec import Aspect, ImageProcessing, Layout, Merge
from llava_serve.errors import CheckpointError

_UNIT = 1 / 255
_HALF = (0.5, 0.5, 0.5)
_BASE = {"num_hidden_layers": 12, "num_attention_heads": 12, "hidden_size": 768, "image_size": 224}


@dataclass(frozen=True, slots=True)
class Tower:
    """What differs between the kinds of vision towers.

    Attributes:
        name: for messages.
        defaults: of its config class in transformers: files leave out what equals them.
        settings: of its config here, whatever its file says.
        class_token: its first feature is that of no patch.
        crops: its processor crops the centre, where its file does not say; else an image is squashed to a square.
        mean, std: of its processor, where its file does not say.
        original_layer: the hidden state that the original takes, whatever config.json selects; None takes that one.
        original_processor: settings that are in the original's code; None takes those of the tower's file.
    """

    name: str
    defaults: dict[str, int]
    settings: dict[str, Any]
    class_token: bool
    crops: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    original_layer: int | None
    original_processor: dict[str, Any] | None


TOWERS = {
    "clip_vision_model": Tower(
        name="CLIP",
        defaults={**_BASE, "patch_size": 32},
        settings={},
        class_token=True,
        crops=True,
        mean=(0.48145466, 0.4578275, 0.40821073),
        std=(0.26862954, 0.26130258, 0.27577711),
        original_layer=None,
        original_processor=None,
    ),
    "siglip_vision_model": Tower(
        name="SigLIP",
        defaults={**_BASE, "patch_size": 16},
        settings={"vision_use_head": False},  # it pools all features to one, which LLaVA does not use
        class_token=False,
        crops=False,
        mean=_HALF,
        std=_HALF,
        original_layer=-2,
        original_processor={"resample": 3},
    ),
}
"""By the `model_type` of the tower's config."""
_TOWER_NAMES = " and ".join(tower.name for tower in TOWERS.values())


def read_vision_config(folder: Path) -> dict[str, Any]:
    """The config of a tower, from a folder that holds one by itself or beside a text model.

    Raises:
        CheckpointError: it is of no supported kind.
    """
    config = read_json(folder, "config.json")
    kind = str(config.get("model_type"))
    both = f"{kind}_vision_model" in TOWERS
    vision = (config.get("vision_config") or {}) if both else config
    return tower_config(vision, f"{kind}_vision_model" if both else kind, f"config.json in {folder}")


def tower_config(vision: dict[str, Any], kind: str, file: str) -> dict[str, Any]:
    """A tower's config with the sizes that its file may leave out.

    Args:
        vision: the config.
        kind: its `model_type`.
        file: that it is from, for the message.

    Raises:
        CheckpointError: the kind is not supported.
    """
    if kind not in TOWERS:
        raise CheckpointError(
            f"{file} describes a vision tower of type {kind!r}, which is not supported; {_TOWER_NAMES} are."
        )
    tower = TOWERS[kind]
    used = {key: value for key, value in vision.items() if key not in UNUSED_KEYS}
    return {**tower.defaults, **used, **tower.settings, "model_type": kind}


def image_processing(
    settings: dict[str, Any],
    vision: dict[str, Any],
    *,
    layout: Layout,
    aspect: Aspect,
    merge: Merge,
    grid_pinpoints: tuple[tuple[int, int], ...],
    keeps_class_token: bool,
    max_grid_tiles: int | None = None,
) -> ImageProcessing:
    """Reads the settings of a tower's processor.

    Args:
        settings: of `preprocessor_config.json`.
        vision: the tower's config.
        layout, aspect, merge, grid_pinpoints, keeps_class_token, max_grid_tiles: from the checkpoint.

    Raises:
        CheckpointError: tiles that the tower cannot take, or canvases that are too many or too large.
    """
    check_tower(vision, grid_pinpoints)
    tower = TOWERS[vision["model_type"]]
    side = int(vision["image_size"])
    crops = bool(settings.get("do_center_crop", tower.crops))
    crop = _pair(settings.get("crop_size") or side)
    size = settings.get("size") or side
    size = ({"shortest_edge": size} if crops else {"height": size, "width": size}) if isinstance(size, int) else size
    shortest = size.get("shortest_edge")
    if crop != (side, side):
        raise CheckpointError(
            f"preprocessor_config.json makes tiles of {crop[0]} x {crop[1]}, but the vision tower of config.json takes "
            f"{side} x {side}: correct the one that is wrong."
        )
    for key, supported in (("do_normalize", True), ("do_rescale", True), ("rescale_factor", _UNIT)):
        if not math.isclose(supported if settings.get(key) is None else settings[key], supported):
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
        do_center_crop=crops,
        resample=int(settings.get("resample", 3)),
        mean=_triple(settings.get("image_mean") or tower.mean),
        std=_triple(settings.get("image_std") or tower.std),
        patch_size=int(vision["patch_size"]),
        extra_features=int(keeps_class_token and tower.class_token),
        max_grid_tiles=max_grid_tiles,
    )


def refuse_other_tiles(image: ImageProcessing) -> None:
    """Raises `CheckpointError` for a processor whose tiles are of another size than the tower's."""
    if image.do_center_crop:
        return
    edge = None if image.shortest_edge is None else (image.shortest_edge, image.shortest_edge)
    made = image.resize_to or (None if image.aspect == "square" else edge)
    if not image.do_resize or made != image.crop_size:
        size = f"{made[1]} x {made[0]}" if image.do_resize and made else "any size"
        raise CheckpointError(
            f"preprocessor_config.json does not crop (do_center_crop) and makes tiles of {size}, but the vision tower "
            f"takes {image.crop_size[1]} x {image.crop_size[0]}: correct the one that is wrong."
        )


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def _triple(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
