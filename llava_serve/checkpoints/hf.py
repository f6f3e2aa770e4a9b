"""Reads the description of a checkpoint in transformers' layout (`llava-hf/*`): LLaVA-1.5 and LLaVA-NeXT."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_serve.checkpoints.chat_templates import read_chat_template
from llava_serve.checkpoints.companions import unused_adapter
from llava_serve.checkpoints.decoders import refuse_unsupported_text
from llava_serve.checkpoints.files import no_weights, read_json, weight_files
from llava_serve.checkpoints.model_name import name_for_templates
from llava_serve.checkpoints.original import token_ids
from llava_serve.checkpoints.spec import CheckpointSpec, ImageProcessing, TokenizerSpec
from llava_serve.checkpoints.tokenizer_files import has_token, load_fast, read_tokenizer
from llava_serve.checkpoints.towers import clip_config, image_processing
from llava_serve.config import ModelOptions
from llava_serve.errors import CheckpointError
from llava_serve.prompts.chat_probe import Judgement
from llava_serve.prompts.templates import TEMPLATES, Choice, Content, choose_template

_SUPPORTED = {"llava": "LLaVA-1.5", "llava_next": "LLaVA-NeXT"}
_OTHER_MODELS = {
    "llava_onevision": "LLaVA-OneVision",
    "llava_next_video": "LLaVA-NeXT-Video",
    "video_llava": "Video-LLaVA",
    "vipllava": "VipLLaVA",
}
# transformers' own defaults, which files may leave out.
_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16} | {
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_IMAGE_TOKEN_ID = 32000


def read_hf(
    name: str, folder: Path, config: dict[str, Any], options: ModelOptions, *, weights: bool = True
) -> CheckpointSpec:
    """Reads it; arguments and errors as `read_original`."""
    kind = str(config.get("model_type"))
    _refuse_other_models(kind, folder)
    if options.model_base is not None or options.vision_tower is not None:
        raise CheckpointError(
            f"{name} is in transformers' layout, which holds the whole model; leave model_base and vision_tower out."
        )
    text = _text_config(config, kind)
    vision = _vision_config(config)
    if weights and not weight_files(folder):
        raise CheckpointError(
            f"{no_weights(folder)}, neither model.safetensors nor pytorch_model.bin; copy them there."
        )
    tokenizer = _tokenizer(folder, config)
    judged = _chat_template(folder, tokenizer, options.conv_mode)
    content = Content(text["model_type"], has_chatml=has_token(tokenizer, "<|im_start|>"))
    choice = choose_template(name_for_templates(name), content)
    if judged is not None:
        choice = Choice("chat_template", "the checkpoint has a chat template")
    generation = read_json(folder, "generation_config.json", optional=True)
    keeps_class_token = config.get("vision_feature_select_strategy", "default") == "full"
    return CheckpointSpec(
        name=name,
        path=folder,
        layout="transformers",
        adapter=None,
        base=None,
        tower=None,
        tower_in_checkpoint=True,
        tokenizer=tokenizer,
        image=_image_processing(folder, config, vision, keeps_class_token),
        text_config=text,
        vision_config=vision,
        projector_type="mlp2x_gelu",
        projector_bias=bool(config.get("multimodal_projector_bias", True)),
        projector_act=str(config.get("projector_hidden_act", "gelu")),
        select_layer=_select_layer(config),
        select_feature="cls_patch" if keeps_class_token else "patch",
        mm_use_im_start_end=False,
        context_length=int(text.get("max_position_embeddings", 32768 if text["model_type"] == "mistral" else 2048)),
        eos_token_ids=token_ids(generation.get("eos_token_id", text.get("eos_token_id", 2))),
        conv_mode=choice.key,
        conv_reason=choice.reason,
        chat_template=judged.template if judged else None,
        torch_dtype=_dtype(config),
        notes=tuple(
            note
            for note in (choice.contradiction, *(judged.notes if judged else ()), unused_adapter(folder, None))
            if note
        ),
    )


def read_hf_adapter(
    name: str, folder: Path, base: Path, config: dict[str, Any], options: ModelOptions, *, weights: bool = True
) -> CheckpointSpec:
    """Reads a PEFT adapter over a base in this layout. A tokenizer that was saved with the adapter is the one to use.

    Args:
        name, folder: of the adapter.
        base: its base.
        config: the base's config.json.
        options, weights: as `read_original` has them.
    """
    alone = options.model_copy(update={"model_base": None})
    spec = read_hf(name, base, config, alone, weights=weights)
    if (folder / "tokenizer.json").is_file():
        tokenizer = _tokenizer(folder, config)
        spec = replace(spec, tokenizer=tokenizer)
        if (judged := _chat_template(folder, tokenizer, options.conv_mode)) is not None:
            spec = replace(spec, chat_template=judged.template, conv_mode="chat_template")
    return replace(spec, path=folder, base=base, adapter="lora")


def _refuse_other_models(kind: str, folder: Path) -> None:
    if kind not in _SUPPORTED:
        named = f"a {_OTHER_MODELS[kind]} model" if kind in _OTHER_MODELS else f"a model of type {kind!r}"
        raise CheckpointError(
            f"config.json in {folder} describes {named}, which is not supported; of transformers' models "
            f"{' and '.join(_SUPPORTED.values())} are."
        )


def _text_config(config: dict[str, Any], kind: str) -> dict[str, Any]:
    text = {"model_type": "llama", "vocab_size": 32000, **(config.get("text_config") or {})}
    if text["model_type"] == "mpt":
        raise CheckpointError(f"config.json: a {_SUPPORTED[kind]} on MPT is supported in the original's layout only.")
    refuse_unsupported_text(text, _SUPPORTED[kind])
    # transformers ties the head to the embeddings by the outer config; LLaVA-1.5's copies the inner one's value.
    inner = kind == "llava" and bool(text.get("tie_word_embeddings"))
    text["tie_word_embeddings"] = bool(config.get("tie_word_embeddings")) or inner
    return {key: value for key, value in text.items() if key not in ("_name_or_path", "torch_dtype", "dtype")}


def _vision_config(config: dict[str, Any]) -> dict[str, Any]:
    vision = config.get("vision_config") or _VISION
    kind = vision.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise CheckpointError(f"config.json: the vision tower is a {kind!r}, which is not supported yet; CLIP is.")
    return clip_config(vision)


def _select_layer(config: dict[str, Any]) -> int:
    layer = config.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise CheckpointError(f"config.json selects the layers {layer} (vision_feature_layer); only one is supported.")
    return layer


def _image_processing(
    folder: Path, config: dict[str, Any], vision: dict[str, Any], keeps_class_token: bool
) -> ImageProcessing:
    settings = read_json(folder, "processor_config.json", optional=True).get("image_processor")
    settings = settings or read_json(folder, "preprocessor_config.json")
    if config["model_type"] == "llava":
        return image_processing(
            settings,
            vision,
            layout="transformers",
            aspect="pad" if settings.get("do_pad") else "square",
            merge="flat",
            grid_pinpoints=(),
            keeps_class_token=keeps_class_token,
        )
    if keeps_class_token:
        raise CheckpointError(
            "config.json keeps the class token (vision_feature_select_strategy is full) beside a grid of tiles; "
            "transformers cannot join them either."
        )
    pinpoints = config.get("image_grid_pinpoints") or _PINPOINTS
    if pinpoints != (settings.get("image_grid_pinpoints") or _PINPOINTS):
        raise CheckpointError(
            "image_grid_pinpoints of config.json and of preprocessor_config.json differ; correct the one that is wrong."
        )
    return image_processing(
        settings,
        vision,
        layout="transformers",
        aspect="anyres",
        merge="spatial_unpad",
        grid_pinpoints=tuple((int(width), int(height)) for height, width in pinpoints),  # (height, width) in the file
        keeps_class_token=False,
    )


def _tokenizer(folder: Path, config: dict[str, Any]) -> TokenizerSpec:
    processor = read_json(folder, "processor_config.json", optional=True)
    settings = read_json(folder, "tokenizer_config.json", optional=True)
    image_token = str(processor.get("image_token") or settings.get("image_token") or "<image>")
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"tokenizer.json is missing in {folder}; save it there with transformers' AutoTokenizer.")
    found = load_fast(folder).token_to_id(image_token)
    wanted = config.get("image_token_index", config.get("image_token_id", _IMAGE_TOKEN_ID))
    if found != wanted:
        raise CheckpointError(
            f"tokenizer.json in {folder} has {image_token} as {'no token' if found is None else f'token {found}'}, "
            f"config.json as {wanted} (image_token_index): use the tokenizer that belongs to the model."
        )
    return read_tokenizer(folder, [], image_token)


def _chat_template(folder: Path, tokenizer: TokenizerSpec, conv_mode: str | None) -> Judgement | None:
    try:
        return read_chat_template(folder, tokenizer)
    except CheckpointError:
        if conv_mode in TEMPLATES:  # then one that cannot be called does no harm
            return None
        raise


def _dtype(config: dict[str, Any]) -> str:
    declared = (part.get(key) for part in (config, config.get("text_config") or {}) for key in ("dtype", "torch_dtype"))
    return str(next((one for one in declared if one), "float16"))
