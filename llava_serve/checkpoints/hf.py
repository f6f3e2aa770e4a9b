"""Reads the description of a checkpoint in transformers' layout (`llava-hf/*`): LLaVA-1.5 and LLaVA-NeXT."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llava_serve.checkpoints.files import checkpoint_name, read_json, weight_files
from llava_serve.checkpoints.original import token_ids
from llava_serve.checkpoints.spec import CheckpointSpec
from llava_serve.checkpoints.tokens import has_token, read_tokenizer
from llava_serve.checkpoints.tower import image_processing
from llava_serve.errors import CheckpointError
from llava_serve.templates import choose_template

_KNOWN = {"llava": "LLaVA", "llava_next": "LLaVA-NeXT"}
_TEXT_MODELS = ("llama", "mistral")


def read_hf(folder: Path, config: dict[str, Any], base: str | None, tower: str | None) -> CheckpointSpec:
    """Reads it; arguments and errors as `read_original`."""
    kind = str(config.get("model_type"))
    if kind not in _KNOWN:
        raise CheckpointError(
            f"config.json describes a {kind!r}; of transformers' models, {', '.join(_KNOWN)} are known."
        )
    if base is not None or tower is not None:
        raise CheckpointError("A checkpoint in transformers' layout takes neither model_base nor vision_tower.")
    text = {"model_type": "llama", **(config.get("text_config") or {})}
    if (
        text["model_type"] not in _TEXT_MODELS
        or text.get("rope_scaling", {})
        or "llama-3" in str(text.get("_name_or_path")).lower()
    ):
        raise CheckpointError(
            f"The text model {text['model_type']!r} of this {_KNOWN[kind]} is not supported yet; "
            f"{' and '.join(_TEXT_MODELS)} are."
        )
    vision = {"model_type": "clip_vision_model", **(config.get("vision_config") or {})}
    if vision["model_type"] != "clip_vision_model":
        raise CheckpointError(f"The vision tower is a {vision['model_type']!r}; only CLIP is supported.")
    if not weight_files(folder):
        raise CheckpointError(f"{folder} holds no weights: neither model.safetensors nor pytorch_model.bin.")
    select_layer = config.get("vision_feature_layer", -2)
    if not isinstance(select_layer, int):
        raise CheckpointError("config.json selects several layers in vision_feature_layer; one is supported.")
    keeps_class_token = config.get("vision_feature_select_strategy", "default") == "full"
    image_token = _image_token(folder, config)
    tokenizer = read_tokenizer(folder, [], image_token)
    chat_template = _chat_template(folder)
    name = checkpoint_name(folder)
    conv_mode, reason = choose_template(
        name, text["model_type"], has_chatml=has_token(tokenizer, "<|im_start|>"), modern=True
    )
    if chat_template:
        conv_mode, reason = "chat_template", "the checkpoint carries a chat template"
    generation = read_json(folder, "generation_config.json", optional=True)
    return CheckpointSpec(
        name=name,
        path=folder,
        layout="transformers",
        adapter=None,
        base=None,
        tower=None,
        tower_in_checkpoint=True,
        tokenizer=tokenizer,
        image=_processing(folder, config, vision, keeps_class_token),
        text_config=_with_defaults(text),
        vision_config=vision,
        projector_type="mlp2x_gelu",
        projector_bias=bool(config.get("multimodal_projector_bias", True)),
        projector_act=str(config.get("projector_hidden_act", "gelu")),
        select_layer=select_layer,
        select_feature="cls_patch" if keeps_class_token else "patch",
        mm_use_im_start_end=False,
        context_length=int(text.get("max_position_embeddings", 32768 if text["model_type"] == "mistral" else 2048)),
        eos_token_ids=token_ids(generation.get("eos_token_id", text.get("eos_token_id", 2))),
        conv_mode=conv_mode,
        conv_reason=reason,
        chat_template=chat_template,
        torch_dtype=str(config.get("dtype") or config.get("torch_dtype") or text.get("torch_dtype") or "float16"),
    )


def _with_defaults(text: dict[str, Any]) -> dict[str, Any]:
    # The hub's files leave out what equals transformers' defaults; both tiers need the vocabulary's size.
    kept = {key: value for key, value in text.items() if key not in ("_name_or_path", "torch_dtype", "dtype")}
    return {"vocab_size": 32000, **kept}


def _processing(folder: Path, config: dict[str, Any], vision: dict[str, Any], keeps_class_token: bool) -> Any:
    settings = read_json(folder, "preprocessor_config.json", optional=True)
    if not settings:
        settings = read_json(folder, "processor_config.json").get("image_processor") or {}
    anyres = config["model_type"] == "llava_next"
    if anyres and keeps_class_token:
        raise CheckpointError("config.json keeps the class token (`full`) with a grid of tiles: it cannot.")
    # transformers writes pinpoints as (height, width), the original as (width, height).
    pinpoints = settings.get("image_grid_pinpoints") or config.get("image_grid_pinpoints") or []
    if anyres and config.get("image_grid_pinpoints") not in (None, pinpoints):
        raise CheckpointError("image_grid_pinpoints of config.json and of the image processor differ.")
    return image_processing(
        settings,
        vision,
        layout="transformers",
        aspect="anyres" if anyres else ("pad" if settings.get("do_pad") else "square"),
        merge="spatial_unpad" if anyres else "flat",
        grid_pinpoints=tuple((int(width), int(height)) for height, width in pinpoints) if anyres else (),
        keeps_class_token=keeps_class_token,
    )


def _image_token(folder: Path, config: dict[str, Any]) -> str:
    processor = read_json(folder, "processor_config.json", optional=True)
    tokenizer = read_json(folder, "tokenizer_config.json", optional=True)
    return str(processor.get("image_token") or tokenizer.get("image_token") or "<image>")


def _chat_template(folder: Path) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = read_json(folder, name, optional=True).get("chat_template")
        if isinstance(template, str) and re.search(r"\S", template):
            return template
    return None
