"""Reads the description of a checkpoint in transformers' layout (`llava-hf/*`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from llava_serve.checkpoints.chat_templates import read_chat_template
from llava_serve.checkpoints.companions import unused_adapter, unused_shards
from llava_serve.checkpoints.decoders import DECODERS, UNUSED_KEYS, refuse_unsupported_text
from llava_serve.checkpoints.families import Family, family_of
from llava_serve.checkpoints.files import no_weights, read_json, weight_files
from llava_serve.checkpoints.model_name import name_for_templates
from llava_serve.checkpoints.original import token_ids
from llava_serve.checkpoints.spec import GRID_LIMIT, Aspect, CheckpointSpec, ImageProcessing, TokenizerSpec
from llava_serve.checkpoints.tokenizer_files import has_token, load_fast, named_tokens, read_tokenizer
from llava_serve.checkpoints.towers import TOWERS, image_processing, tower_config
from llava_serve.config import ModelOptions
from llava_serve.errors import CheckpointError
from llava_serve.prompts.templates import CHAT_TEMPLATE, Choice, Content, choose_template, note_on_guess


def read_hf(
    name: str, folder: Path, config: dict[str, Any], options: ModelOptions, *, weights: bool = True
) -> CheckpointSpec:
    """Reads it; arguments and errors as `read_original`."""
    family = family_of(config, folder)
    if options.model_base is not None or options.vision_tower is not None:
        raise CheckpointError(
            f"{name} is in transformers' layout, which holds the whole model; leave model_base and vision_tower out."
        )
    text = _text_config(config, family)
    vision = config.get("vision_config") or family.vision
    vision = tower_config(vision, vision.get("model_type", family.vision["model_type"]), "config.json")
    if weights and not weight_files(folder):
        raise CheckpointError(
            f"{no_weights(folder)}, neither model.safetensors nor pytorch_model.bin; copy them there."
        )
    tokenizer = _tokenizer(folder, config, family)
    judged = read_chat_template(folder, tokenizer, options.conv_mode)
    content = Content(
        text["model_type"],
        has_chatml=has_token(tokenizer, "<|im_start|>"),
        has_headers=has_token(tokenizer, "<|start_header_id|>"),
    )
    choice = choose_template(name_for_templates(name), content)
    guess = None if judged or options.conv_mode else note_on_guess(choice, content)
    if judged is not None:
        choice = Choice(CHAT_TEMPLATE, "the checkpoint has a chat template")
    generation = read_json(folder, "generation_config.json", optional=True)
    keeps_all = _strategy(config, family) == "full"
    defaults = DECODERS[text["model_type"]]
    return CheckpointSpec(
        name=name,
        path=folder,
        layout="transformers",
        adapter=None,
        base=None,
        tower=None,
        tower_in_checkpoint=True,
        tokenizer=tokenizer,
        image=_image_processing(folder, config, family, vision, keeps_all),
        text_config=text,
        vision_config=vision,
        projector_type="mlp2x_gelu",
        projector_bias=bool(config.get("multimodal_projector_bias", True)),
        projector_act=str(config.get("projector_hidden_act", "gelu")),
        projector_norm=float(config.get("projector_layernorm_eps", 1e-5)) if family.has_projector_norm else None,
        select_layers=_select_layers(config, family, int(vision["num_hidden_layers"])),
        select_feature="cls_patch" if keeps_all else "patch",
        mm_use_im_start_end=False,
        context_length=int(text.get("max_position_embeddings", defaults.context_length)),
        eos_token_ids=token_ids(generation.get("eos_token_id", text.get("eos_token_id", [*defaults.eos_token_ids]))),
        conv_mode=choice.key,
        conv_reason=choice.reason,
        chat_template=judged.template if judged else None,
        torch_dtype=_dtype(config),
        notes=tuple(
            note
            for note in (
                choice.contradiction or guess,
                *(judged.notes if judged else ()),
                unused_adapter(folder, None),
                unused_shards(folder, weights),
            )
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
        tokenizer = _tokenizer(folder, config, family_of(config, base))
        spec = replace(spec, tokenizer=tokenizer)
        if (judged := read_chat_template(folder, tokenizer, options.conv_mode)) is not None:
            spec = replace(spec, chat_template=judged.template, conv_mode=CHAT_TEMPLATE)
    return replace(spec, path=folder, base=base, adapter="lora")


def _text_config(config: dict[str, Any], family: Family) -> dict[str, Any]:
    text = {"model_type": family.text_type, **(config.get("text_config") or {})}
    if text["model_type"] == "mpt":
        raise CheckpointError(f"config.json: a {family.name} on MPT is supported in the original's layout only.")
    refuse_unsupported_text(text, family.name)
    defaults = DECODERS[text["model_type"]]
    # Which of the two configs decides depends on transformers' class and release. A file has no head where it was tied;
    # another head in it counts (`untie_other_head`).
    inner = text.get("tie_word_embeddings", defaults.tied)
    text["tie_word_embeddings"] = bool(config.get("tie_word_embeddings") or inner)
    text["vocab_size"] = text.get("vocab_size") or defaults.vocab_size
    return {key: value for key, value in text.items() if key not in UNUSED_KEYS}


def _strategy(config: dict[str, Any], family: Family) -> str:
    strategy = config.get("vision_feature_select_strategy") or family.select_strategy
    if strategy not in ("default", "full"):
        raise CheckpointError(
            f"config.json sets vision_feature_select_strategy to {str(strategy)[:100]!r}; default and full are "
            "supported."
        )
    return str(strategy)


def _select_layers(config: dict[str, Any], family: Family, layers_of_tower: int) -> tuple[int, ...]:
    layers = config.get("vision_feature_layer", config.get("vision_feature_layers", family.select_layers))
    selected = tuple(layers) if isinstance(layers, list | tuple) else (layers,)
    if not 1 <= len(selected) <= layers_of_tower:
        raise CheckpointError(
            f"config.json selects {len(selected)} layers (vision_feature_layer) of a vision tower with "
            f"{layers_of_tower}; compare it with the published one."
        )
    return tuple(int(layer) for layer in selected)


def _image_processing(
    folder: Path, config: dict[str, Any], family: Family, vision: dict[str, Any], keeps_all: bool
) -> ImageProcessing:
    tower = TOWERS[vision["model_type"]]
    if not keeps_all and not tower.class_token:
        raise CheckpointError(
            "config.json drops the class token (vision_feature_select_strategy is default), and the features of "
            f"{tower.name} have none: full keeps all of them."
        )
    if keeps_all and tower.class_token and family.canvases:
        raise CheckpointError(
            "config.json keeps the class token (vision_feature_select_strategy is full) beside a grid of tiles; "
            "transformers cannot join them either."
        )
    settings = read_json(folder, "processor_config.json", optional=True).get("image_processor")
    settings = settings or read_json(folder, "preprocessor_config.json")
    one_tile: Aspect = "pad" if settings.get("do_pad") else "square"
    image = image_processing(
        settings,
        vision,
        layout="transformers",
        aspect="anyres" if family.canvases else one_tile,
        merge="spatial_unpad" if family.canvases else "flat",
        grid_pinpoints=_grid_pinpoints(config, settings, family),
        keeps_class_token=keeps_all,
        max_grid_tiles=_max_grid_tiles(config, family),
    )
    if family.one_tile_of_several:
        return replace(image, of_several=replace(image, aspect="pad", grid_pinpoints=(), newline=True))
    return image


def _grid_pinpoints(config: dict[str, Any], settings: dict[str, Any], family: Family) -> tuple[tuple[int, int], ...]:
    """Canvases as (width, height); the files have (height, width)."""
    if not family.canvases:
        return ()
    models, processors = (one.get("image_grid_pinpoints") or family.canvases for one in (config, settings))
    canvases = tuple((int(width), int(height)) for height, width in models)
    if canvases != tuple((int(width), int(height)) for height, width in processors):
        raise CheckpointError(
            "image_grid_pinpoints of config.json and of preprocessor_config.json differ; correct the one that is wrong."
        )
    return canvases


def _max_grid_tiles(config: dict[str, Any], family: Family) -> int | None:
    aspect = config.get("vision_aspect_ratio")
    if family.max_grid_tiles is None or aspect is None:
        return family.max_grid_tiles
    limit = GRID_LIMIT.fullmatch(str(aspect))
    if limit is None:
        raise CheckpointError(
            f"config.json sets vision_aspect_ratio to {str(aspect)[:100]!r}; anyres_max_N is supported."
        )
    return int(limit[1])


def _tokenizer(folder: Path, config: dict[str, Any], family: Family) -> TokenizerSpec:
    processor = read_json(folder, "processor_config.json", optional=True)
    # transformers asks the tokenizer first.
    image_token = str(named_tokens(folder).get("image_token") or processor.get("image_token") or "<image>")
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(f"tokenizer.json is missing in {folder}; save it there with transformers' AutoTokenizer.")
    found = load_fast(folder).token_to_id(image_token)
    wanted = config.get("image_token_index", config.get("image_token_id", family.image_token_id))
    if found != wanted:
        raise CheckpointError(
            f"tokenizer.json in {folder} has {image_token} as {'no token' if found is None else f'token {found}'}, "
            f"config.json as {wanted} (image_token_index): use the tokenizer that belongs to the model."
        )
    return read_tokenizer(folder, [], image_token)


def _dtype(config: dict[str, Any]) -> str:
    declared = (part.get(key) for part in (config, config.get("text_config") or {}) for key in ("dtype", "torch_dtype"))
    return str(next((one for one in declared if one), "float16")).removeprefix("torch.")
