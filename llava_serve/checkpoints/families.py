"""The models of either layout that are supported, and their relatives that are not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava_serve.errors import CheckpointError

_CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}
_NEXT_CANVASES = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_ONEVISION_CANVASES = tuple((384 * down, 384 * across) for down in range(1, 7) for across in range(1, 7))


@dataclass(frozen=True, slots=True)
class Family:
    """What the class of a `model_type` does, and its config's defaults, which files may leave out.

    Attributes:
        name: for messages.
        text_type, vision: of the language model, and of the tower if the file describes none.
        image_token_id: of the image token.
        select_layers: hidden states of the tower.
        select_strategy: `default` drops the class token, `full` keeps all features.
        canvases: as (height, width); empty makes one tile of an image.
        max_grid_tiles: as `ImageProcessing` has it, if the file has no `vision_aspect_ratio`; None knows no such key.
        one_tile_of_several: each of several images of a request is one padded tile with a newline.
        has_projector_norm: a LayerNorm comes before the projector.
    """

    name: str
    text_type: str = "llama"
    vision: dict[str, Any] = field(default_factory=lambda: _CLIP)
    image_token_id: int = 32000
    select_layers: tuple[int, ...] = (-2,)
    select_strategy: str = "default"
    canvases: tuple[tuple[int, int], ...] = ()
    max_grid_tiles: int | None = None
    one_tile_of_several: bool = False
    has_projector_norm: bool = False


FAMILIES = {
    "llava": Family("LLaVA-1.5"),
    "vipllava": Family("ViP-LLaVA", select_layers=(-2, -5, -8, -11, 6), has_projector_norm=True),
    "llava_next": Family("LLaVA-NeXT", canvases=_NEXT_CANVASES),
    "llava_next_video": Family("LLaVA-NeXT-Video", canvases=_NEXT_CANVASES, image_token_id=32001),
    "llava_onevision": Family(
        "LLaVA-OneVision",
        text_type="qwen2",
        vision=_SIGLIP,
        image_token_id=151646,
        select_layers=(-1,),
        select_strategy="full",
        canvases=_ONEVISION_CANVASES,
        max_grid_tiles=9,
        one_tile_of_several=True,
    ),
}
"""By `model_type`."""

_OTHER_MODELS = {
    "video_llava": "Video-LLaVA, which answers questions about videos",
    "llavaonevision1_5": "LLaVA-OneVision-1.5, which has another tower and merger and code of its own",
    "llava_onevision2": "LLaVA-OneVision-2, which has another tower and merger and code of its own",
    "fast_vlm": "FastVLM, whose tower is FastViT",
    "llava_qwen2": "FastVLM in its own layout, whose tower is MobileCLIP",
    "bunny": "Bunny, which has code of its own",
    "mgm": "Mini-Gemini, which has two towers",
    "cambrian": "Cambrian, which has several towers",
    "moe_llava": "MoE-LLaVA, which has code of its own",
    "tiny_llava": "TinyLLaVA, which has code of its own",
    "tinyllava": "TinyLLaVA, which has code of its own",
    "omnilmm": "OmniLMM, which has a resampler and code of its own",
}
"""Relatives by the beginning of their `model_type`."""
_VILA_KEYS = ("llm_cfg", "vision_tower_cfg", "mm_projector_cfg")


def refuse_other_models(config: dict[str, Any], folder: Path) -> None:
    """Refuses a relative of LLaVA that is built otherwise.

    Args:
        config: of the checkpoint.
        folder: that it is in, for the message.

    Raises:
        CheckpointError: says what it is.
    """
    if is_xtuners_own(folder) and config.get("model_type") not in FAMILIES and "mm_projector_type" not in config:
        raise CheckpointError(
            f"{folder} is in xtuner's own layout, with the projector in a folder of its own, which is not supported: "
            "convert it with xtuner's convert_xtuner_weights_to_llava.py, or take the published conversion."
        )
    kind = str(config.get("model_type")).replace("-", "_")
    vision = config.get("vision_config") or {}
    if any(key in config for key in _VILA_KEYS):
        name = "VILA, which keeps its parts in folders of their own and has code of its own"
    elif kind == "pixtral" or vision.get("model_type") == "pixtral":
        name = "Pixtral, whose tower takes images of any size with a token after each line"
    else:
        name = next((name for start, name in _OTHER_MODELS.items() if kind.startswith(start)), "")
    if name:
        classes = config.get("architectures") or [config.get("model_type")]
        raise CheckpointError(f"config.json in {folder} describes {name}: {classes[0]} is not supported.")


def is_xtuners_own(folder: Path) -> bool:
    """Whether a folder holds what xtuner's training leaves: a projector with a config of its own, beside a language
    model or an adapter of one."""
    return (folder / "projector" / "config.json").is_file()


def family_of(config: dict[str, Any], folder: Path) -> Family:
    """The family of a checkpoint in transformers' layout.

    Raises:
        CheckpointError: it is of none.
    """
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        names = ", ".join(family.name for family in FAMILIES.values())
        raise CheckpointError(
            f"config.json in {folder} describes a model of type {kind!r}, which is not supported; of transformers' "
            f"models these are: {names}."
        )
    return FAMILIES[kind]


ORIGINAL_CLASSES = {
    "LlavaGemmaForCausalLM": "gemma",
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaMixtralForCausalLM": "mixtral",
    "LlavaMptForCausalLM": "mpt",
    "LlavaPhi3ForCausalLM": "phi3",
    "LlavaQwen3ForCausalLM": "qwen3",
    "LlavaQwenForCausalLM": "qwen2",
    "LlavaQwenMoeForCausalLM": "qwen2_moe",
    "Share4VLlamaForCausalLM": "llama",
}
"""The original's classes and those of its descendants with the same files, by the language model's `model_type`."""
_ORIGINAL_TYPES = {
    "llava_gemma": "gemma",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_mixtral": "mixtral",
    "llava_mpt": "mpt",
    "llava_qwen": "qwen2",
    "llava_qwen_moe": "qwen2_moe",
    "share4v": "llama",
}
"""What `model_type` means where none of the classes is known."""


_NEXT_KEYS = ("mm_tunable_parts", "mm_newline_position", "vision_tower_pretrained")


def is_llava_next(config: Mapping[str, Any]) -> bool:
    """Whether LLaVA-NeXT's code trained a checkpoint in the original's layout: its keys, or a language model that the
    original's code does not have."""
    return any(key in config for key in _NEXT_KEYS) or original_decoder(config) not in ("llama", "mistral", "mpt")


def original_decoder(config: Mapping[str, Any]) -> str:
    """The `model_type` of the language model of a checkpoint in the original's layout.

    Raises:
        CheckpointError: it is none of the known.
    """
    classes = config.get("architectures") or []
    for name in classes:
        if name in ORIGINAL_CLASSES:
            return ORIGINAL_CLASSES[name]
    model_type = str(config.get("model_type"))
    if model_type in _ORIGINAL_TYPES:
        return _ORIGINAL_TYPES[model_type]
    if model_type == "llava" and not classes:  # of the first release; some later classes have it, too
        return "llama"
    raise CheckpointError(
        f"config.json describes {classes or model_type}, which is not supported; the classes of the original's layout "
        f"are {', '.join(ORIGINAL_CLASSES)}."
    )
