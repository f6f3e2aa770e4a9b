"""Reads the description of a checkpoint in the original (liuhaotian) layout: full, LoRA, or projector only."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_serve.checkpoints.chat_templates import (
    find_templates,
    none_is_default,
    read_chat_template,
    writes_chat_tokens,
)
from llava_serve.checkpoints.companions import find_tower, unused_adapter, unused_shards
from llava_serve.checkpoints.decoders import DECODERS, UNUSED_KEYS, refuse_unsupported_text
from llava_serve.checkpoints.families import ORIGINAL_CLASSES, is_llava_next, original_decoder
from llava_serve.checkpoints.files import first_file, no_weights, read_json, weight_files
from llava_serve.checkpoints.folders import find_folder
from llava_serve.checkpoints.model_name import name_for_templates
from llava_serve.checkpoints.spec import (
    GRID_LIMIT,
    Adapter,
    Aspect,
    CheckpointSpec,
    ImageProcessing,
    Merge,
    TokenizerSpec,
)
from llava_serve.checkpoints.tokenizer_files import has_token, read_tokenizer
from llava_serve.checkpoints.towers import TOWERS, image_processing, read_vision_config
from llava_serve.config import ModelOptions
from llava_serve.errors import CheckpointError
from llava_serve.prompts.templates import CHAT_TEMPLATE, Content, choose_template, note_on_guess

_SUPPORTED = {
    "mm_projector_type": (r"linear|identity|mlp[1-9]\d?x_gelu", "linear, identity and mlpNx_gelu"),
    "mm_vision_select_feature": ("patch|cls_patch", "patch and cls_patch"),
    "image_aspect_ratio": (rf"square|pad|anyres|{GRID_LIMIT.pattern}", "square, pad, anyres and anyres_max_N"),
    "mm_patch_merge_type": ("flat|spatial|spatial_unpad", "flat, spatial and spatial_unpad"),
    # Without weights; the first pools the features of videos only, the second drops features in training only.
    "mm_resampler_type": ("spatial_pool|masked_drop", "spatial_pool and masked_drop"),
}
"""Keys of config.json: their values that are supported, and how a message names those. An absent one or null is the
original's default."""
_GRID_RANGE = re.compile(r"(?=\((\d{1,2})x(\d{1,2})\)).*\((\d{1,2})x(\d{1,2})\)")


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config is the original's: its own keys, or its own classes."""
    classes = config.get("architectures") or []
    return (
        any(name in ORIGINAL_CLASSES for name in classes)
        or "mm_vision_tower" in config
        or "mm_projector_type" in config
    )


def read_original(
    name: str, folder: Path, config: dict[str, Any], options: ModelOptions, *, weights: bool = True
) -> CheckpointSpec:
    """Reads it.

    Args:
        name: of the model, as `model_name` gives it.
        folder: of the checkpoint.
        config: its config.json.
        options: what overrides the files.
        weights: as `open_checkpoint` has it.

    Raises:
        CheckpointError: something is missing or not supported; the message names it.
    """
    base = options.model_base
    adapter = _adapter(folder) if weights else _named_adapter(folder, base)
    base_folder = _base_folder(name, folder, adapter, base, weights=weights)
    decoder = original_decoder(config)
    _refuse_unsupported(config)
    text = _text_config(config, decoder)
    refuse_unsupported_text(text, "LLaVA")
    tower, tower_inside, notes = find_tower(folder, base_folder, config, options, weights=weights)
    vision = read_vision_config(tower)
    kind = TOWERS[vision["model_type"]]
    image = _image_processing(config, tower, vision)
    tokenizer = _tokenizer(base_folder or folder, config, decoder)
    generation = read_json(folder, "generation_config.json", optional=True)
    if not generation and base_folder:
        generation = read_json(base_folder, "generation_config.json", optional=True)
    defaults = DECODERS[decoder]
    projector = config.get("mm_projector_type") or "linear"
    templates = find_templates(tokenizer.folder)
    own = templates.get("default", "\n".join(templates.values()))
    content = Content(
        decoder,
        has_chatml=has_token(tokenizer, "<|im_start|>"),
        has_headers=has_token(tokenizer, "<|start_header_id|>"),
        mlp="mlp" in projector,
        start_end=bool(config.get("mm_use_im_start_end", False)),
        tokenizer_template=own,
        has_chat_tokens=writes_chat_tokens(own, tokenizer),
        grid=image.aspect == "anyres",
    )
    choice = choose_template(name_for_templates(name), content)
    judged = read_chat_template(tokenizer.folder, tokenizer, options.conv_mode) if choice.key == CHAT_TEMPLATE else None
    guess = note_on_guess(choice, content) if options.conv_mode is None else None
    if judged is None and (fault := none_is_default(templates)):
        guess = f"The tokenizer's chat templates {fault}: none is used."
    return CheckpointSpec(
        name=name,
        path=folder,
        layout="original",
        adapter=adapter,
        base=base_folder,
        tower=tower,
        tower_in_checkpoint=tower_inside,
        tokenizer=tokenizer,
        image=image,
        text_config=text,
        vision_config=vision,
        projector_type=projector,
        projector_bias=True,
        projector_act="gelu",
        projector_norm=None,
        select_layers=(_select_layer(config) if kind.original_layer is None else kind.original_layer,),
        select_feature=(config.get("mm_vision_select_feature") or "patch") if kind.class_token else "cls_patch",
        mm_use_im_start_end=bool(config.get("mm_use_im_start_end", False)),
        context_length=int(
            text.get("max_seq_len" if decoder == "mpt" else "max_position_embeddings", defaults.context_length)
        ),
        eos_token_ids=token_ids(generation.get("eos_token_id", config.get("eos_token_id"))),
        conv_mode=choice.key,
        conv_reason=choice.reason,
        chat_template=judged.template if judged else None,
        torch_dtype=str(config.get("torch_dtype") or config.get("dtype") or "float16").removeprefix("torch."),
        notes=tuple(
            note
            for note in (
                choice.contradiction or guess,
                *(judged.notes if judged else ()),
                *notes,
                unused_adapter(folder, adapter),
                unused_shards(base_folder or folder, weights),
            )
            if note
        ),
    )


def _adapter(folder: Path) -> Adapter | None:
    # Released v1.5 checkpoints have an mm_projector.bin beside full weights: full weights take precedence.
    if weight_files(folder):
        return None
    if (folder / "adapter_config.json").is_file():
        return "lora"
    if (folder / "mm_projector.bin").is_file():
        return "projector"
    raise CheckpointError(
        f"{no_weights(folder)}: no model.safetensors, no pytorch_model.bin, no adapter_config.json "
        "and no mm_projector.bin."
    )


def _named_adapter(folder: Path, base: str | None) -> Adapter | None:
    if base is None:
        return None
    return "lora" if (folder / "adapter_config.json").is_file() else "projector"


def _base_folder(name: str, folder: Path, adapter: Adapter | None, base: str | None, *, weights: bool) -> Path | None:
    if adapter is None:
        if base is not None:
            raise CheckpointError(f"{name} holds full weights and takes no model_base (--model-base); leave it out.")
        return None
    if base is None:
        raise no_base(name, folder, "LoRA adapter" if adapter == "lora" else "projector")
    return find_base(folder, base, weights=weights)


def no_base(name: str, folder: Path, kind: str) -> CheckpointError:
    """The error for an adapter without a base."""
    wanted = read_json(folder, "adapter_config.json", optional=True).get("base_model_name_or_path")
    hint = f" (it was trained on {Path(wanted).name})" if wanted else ""
    return CheckpointError(
        f"{name} holds only a {kind}; name the model it adds to with model_base (--model-base){hint}."
    )


def find_base(folder: Path, base: str, *, weights: bool) -> Path:
    """The folder of an adapter's base.

    Raises:
        CheckpointError: there is none, or it holds no weights.
    """
    base_folder = find_folder(base, "base model", Path(), folder.parent, weights=weights)
    if weights and not weight_files(base_folder):
        raise CheckpointError(
            f"The base model {base_folder} holds no weights, neither model.safetensors nor pytorch_model.bin; name a "
            "full model with model_base (--model-base)."
        )
    return base_folder


def _refuse_unsupported(config: dict[str, Any]) -> None:
    if config.get("s2"):
        raise CheckpointError(
            "config.json sets `s2`: multi-scale (S2) vision towers are not supported; use a checkpoint without it."
        )
    for key, (supported, words) in _SUPPORTED.items():
        value = config.get(key)
        if value is not None and not re.fullmatch(supported, str(value)):
            raise CheckpointError(f"config.json sets {key} to {str(value)[:100]!r}; {words} are supported.")


def _select_layer(config: dict[str, Any]) -> int:
    layer = config.get("mm_vision_select_layer")
    if layer is None:
        raise CheckpointError("config.json lacks mm_vision_select_layer; add it, -2 in all released checkpoints.")
    if isinstance(layer, list):
        raise CheckpointError(
            f"config.json selects the layers {layer} (mm_vision_select_layer): of ViP-LLaVA transformers' layout is "
            "supported, llava-hf/vip-llava-7b-hf."
        )
    return int(layer)


def _image_processing(config: dict[str, Any], tower: Path, vision: dict[str, Any]) -> ImageProcessing:
    written: Any = config.get("image_aspect_ratio") or "square"
    limit = GRID_LIMIT.fullmatch(written)
    aspect: Aspect = "anyres" if limit else written
    merge: Merge = config.get("mm_patch_merge_type") or "flat"
    kind = TOWERS[vision["model_type"]]
    keeps_class_token = kind.class_token and config.get("mm_vision_select_feature") == "cls_patch"
    if aspect == "anyres" and merge != "flat" and keeps_class_token:
        raise CheckpointError(
            "config.json joins tiles in space (mm_patch_merge_type) and keeps the class token; only one is possible."
        )
    image = image_processing(
        read_json(tower, "preprocessor_config.json") if kind.original_processor is None else kind.original_processor,
        vision,
        layout="original",
        aspect=aspect,
        merge=merge,
        grid_pinpoints=_grid_pinpoints(config, int(vision["image_size"])) if aspect == "anyres" else (),
        keeps_class_token=keeps_class_token,
        max_grid_tiles=int(limit[1]) if limit else None,
    )
    # LLaVA-NeXT joins the features of one image at a time, in training too; the original joins those of a batch, and
    # adds a newline to grids only.
    single = aspect != "anyres" and merge == "spatial_unpad"
    return replace(image, newline=single and is_llava_next(config))


def _grid_pinpoints(config: dict[str, Any], side: int) -> tuple[tuple[int, int], ...]:
    """Canvases as (width, height): a list, or all grids from the first to the last of `(1x1),...,(6x6)` tiles."""
    written = config.get("image_grid_pinpoints")
    if isinstance(written, str) and (sizes := _GRID_RANGE.fullmatch(written.strip())):
        left, top, right, bottom = map(int, sizes.groups())
        return tuple((i * side, j * side) for i in range(left, right + 1) for j in range(top, bottom + 1))
    try:
        pairs: Any = ast.literal_eval(written) if isinstance(written, str) else written
        pinpoints = tuple((int(width), int(height)) for width, height in pairs)
    except (TypeError, ValueError, SyntaxError, RecursionError, MemoryError):  # the last two where it is nested
        pinpoints = ()
    if not pinpoints:
        raise CheckpointError(
            "config.json asks for anyres, but has no list of (width, height) in image_grid_pinpoints: "
            f"{str(written)[:100]}; compare it with the published one."
        )
    return pinpoints


def _tokenizer(folder: Path, config: dict[str, Any], decoder: str) -> TokenizerSpec:
    extra = ["<im_patch>"] if config.get("mm_use_im_patch_token", True) else []
    extra += ["<im_start>", "<im_end>"] if config.get("mm_use_im_start_end", False) else []
    if first_file(folder, "tokenizer.model", "tokenizer.json") is None:
        raise CheckpointError(f"{folder} has neither tokenizer.model nor tokenizer.json; copy one there.")
    return replace(read_tokenizer(folder, extra), fast_decoding=decoder == "mistral")


def _text_config(config: dict[str, Any], decoder: str) -> dict[str, Any]:
    ours = ("mm_", "image_", "tune_mm", "freeze_mm", "unfreeze_mm", "tokenizer_", "architectures", "auto_map")
    dropped = UNUSED_KEYS | {"use_mm_proj", "quantization_config"}
    text = {key: value for key, value in config.items() if not key.startswith(ours) and key not in dropped}
    return text | {"vocab_size": text.get("vocab_size") or DECODERS[decoder].vocab_size, "model_type": decoder}


def token_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(int(one) for one in value) if isinstance(value, list) else (int(value),)
