"""One description for every checkpoint format. Reading it needs no torch; `weights` and `lora` read the tensors."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Literal, Unpack

from llava_serve.checkpoints.decoders import DECODER_NOTES
from llava_serve.checkpoints.families import is_xtuners_own, refuse_other_models
from llava_serve.checkpoints.files import read_json, weight_files
from llava_serve.checkpoints.folders import find_folder
from llava_serve.checkpoints.hf import read_hf, read_hf_adapter
from llava_serve.checkpoints.model_name import model_name
from llava_serve.checkpoints.original import find_base, is_original, no_base, read_original
from llava_serve.checkpoints.quantized import read_quantization
from llava_serve.checkpoints.spec import CheckpointSpec, ImageProcessing, TokenizerSpec
from llava_serve.checkpoints.towers import refuse_other_tiles
from llava_serve.config import ModelKeywords, ModelOptions, resolve_model_options
from llava_serve.errors import CheckpointError
from llava_serve.prompts.templates import TEMPLATES

__all__ = ["CheckpointSpec", "ImageProcessing", "TokenizerSpec", "open_checkpoint"]

_log = logging.getLogger(__name__)


def open_checkpoint(
    model: str | Path | ModelOptions, *, weights: bool = True, **keywords: Unpack[ModelKeywords]
) -> CheckpointSpec:
    """Describes a checkpoint by its files.

    Args:
        model: `builtin`, a folder, or a hub id; or all options of a model.
        weights: require the weights too, and download them where the hub has the checkpoint. Without them a
            checkpoint is an adapter if a base is named: the process that loads its weights checks them.
        keywords: the other fields of `ModelOptions`.

    Raises:
        CheckpointError: the checkpoint cannot be served; the message says why and what to do.
    """
    options = resolve_model_options(model, **keywords)
    model, conv_mode = options.model, options.conv_mode
    if re.search(r"(?<![a-z0-9])delta-v\d", model_name(model).lower()):
        raise CheckpointError(
            f"{model} is a delta, by its name: it holds differences to LLaMA. Add LLaMA's weights to them with the "
            "original's apply_delta, and name the result."
        )
    folder = find_folder(model, "model", weights=weights)
    base = _base_of_adapter(folder, options, weights=weights)
    config = read_json(base or folder, "config.json", optional=is_xtuners_own(folder))
    # That of an adapter says how its base was loaded for training.
    holds_weights = base is not None or (bool(weight_files(folder)) if weights else options.model_base is None)
    reader = read_original if is_original(config) else read_hf
    try:
        refuse_other_models(config, folder)
        quantization = None
        if holds_weights:
            quantization = read_quantization(config, base or folder, options, original=is_original(config))
        if base is not None and reader is read_hf:
            spec = read_hf_adapter(model_name(model), folder, base, config, options, weights=weights)
        else:
            spec = reader(model_name(model), folder, config, options, weights=weights)
    except (TypeError, ValueError, KeyError, AttributeError, SyntaxError) as error:
        raise CheckpointError(
            f"config.json in {folder}, or another .json file of the checkpoint, holds an invalid value "
            f"({error}); compare it with the published one."
        ) from error
    if conv_mode is not None and conv_mode != spec.conv_mode:
        if conv_mode not in TEMPLATES:
            raise CheckpointError(f"There is no template {conv_mode!r}; there are {', '.join(TEMPLATES)}.")
        _log.warning("conv_mode %s contradicts %s (%s).", conv_mode, spec.conv_mode, spec.conv_reason)
        spec = dataclasses.replace(spec, conv_mode=conv_mode, conv_reason="it was set by conv_mode")
    spec = dataclasses.replace(_with_aspect(spec, options.image_aspect), quantization=quantization)
    refuse_other_tiles(spec.image)
    spec = _without_absent_ends(spec)
    if note := DECODER_NOTES.get(spec.text_config["model_type"]):
        spec = dataclasses.replace(spec, notes=(*spec.notes, note))
    _log.info("%s: template %s, because %s.", spec.name, spec.conv_mode, spec.conv_reason)
    return spec


def _base_of_adapter(folder: Path, options: ModelOptions, *, weights: bool) -> Path | None:
    """The base of an adapter that its own config.json does not describe, as PEFT saves it; None for all else."""
    if not (folder / "adapter_config.json").is_file() or weight_files(folder):
        return None
    config = read_json(folder, "config.json", optional=True)
    if config and is_original(config):
        return None
    if options.model_base is None:
        raise no_base(model_name(options.model), folder, "LoRA adapter")
    return find_base(folder, options.model_base, weights=weights)


def _without_absent_ends(spec: CheckpointSpec) -> CheckpointSpec:
    """The description without end tokens that the vocabulary does not have. An adapter may add the rows of one."""
    absent = [token for token in spec.eos_token_ids if not 0 <= token < spec.vocab_size]
    if not absent or spec.adapter is not None:
        return spec
    note = (
        f"generation_config.json or config.json ends an answer at the tokens {', '.join(map(str, absent))} "
        f"(eos_token_id), which a vocabulary of {spec.vocab_size} does not have: they are not used."
    )
    ends = tuple(token for token in spec.eos_token_ids if token not in absent)
    return dataclasses.replace(spec, eos_token_ids=ends, notes=(*spec.notes, note))


def _with_aspect(spec: CheckpointSpec, aspect: Literal["pad", "square"] | None) -> CheckpointSpec:
    """The description with the aspect that was asked for; else with a remark where images are cropped unlike in
    training, as transformers' processors do."""
    image = spec.image
    if aspect is None:
        if spec.layout == "original" or image.aspect != "square" or not image.do_center_crop:
            return spec
        remark = (
            "Images are cropped to their centre, as the processor says; LLaVA-1.5 was trained on padded ones. "
            "--image-aspect pad pads them."
        )
        return dataclasses.replace(spec, remarks=(*spec.remarks, remark))
    if image.aspect == "anyres":
        raise CheckpointError(f"{spec.name} takes images as a grid of tiles; leave image_aspect (--image-aspect) out.")
    return dataclasses.replace(spec, image=dataclasses.replace(image, aspect=aspect))
