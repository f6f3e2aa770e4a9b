"""One description for every checkpoint format. Reading it needs no torch; `weights` and `lora` read the tensors."""

from __future__ import annotations

import dataclasses
import logging

from llava_serve.checkpoints.families import refuse_other_models
from llava_serve.checkpoints.files import find_folder, read_json
from llava_serve.checkpoints.hf import read_hf
from llava_serve.checkpoints.model_name import model_name
from llava_serve.checkpoints.original import is_original, read_original
from llava_serve.checkpoints.spec import CheckpointSpec, ImageProcessing, TokenizerSpec
from llava_serve.errors import CheckpointError
from llava_serve.prompts.templates import TEMPLATES

__all__ = ["CheckpointSpec", "ImageProcessing", "TokenizerSpec", "open_checkpoint"]

_log = logging.getLogger(__name__)


def open_checkpoint(
    model: str,
    model_base: str | None = None,
    vision_tower: str | None = None,
    conv_mode: str | None = None,
    *,
    weights: bool = True,
) -> CheckpointSpec:
    """Describes a checkpoint by its files.

    Args:
        model: `builtin`, a folder, or a hub id.
        model_base: the base of a LoRA or projector-only checkpoint.
        vision_tower: overrides the checkpoint's own.
        conv_mode: overrides the detected template.
        weights: require the weights too, and download them where the hub has the checkpoint. Without them a
            checkpoint is an adapter if a base is named: the process that loads its weights checks them.

    Raises:
        CheckpointError: the checkpoint cannot be served; the message says why and what to do.
    """
    folder = find_folder(model, "model", weights=weights)
    config = read_json(folder, "config.json")
    if config.get("quantization_config"):
        raise CheckpointError(
            f"config.json in {folder} has a quantization_config: the weights are quantized already. Use the original "
            "ones; they are quantized while they load."
        )
    refuse_other_models(config, folder)
    reader = read_original if is_original(config) else read_hf
    try:
        spec = reader(model_name(model), folder, config, model_base, vision_tower, weights=weights)
    except (TypeError, ValueError, KeyError, AttributeError, SyntaxError) as error:
        raise CheckpointError(
            f"config.json in {folder}, or another .json file of the checkpoint, holds an invalid value "
            f"({error}); compare it with the published one."
        ) from error
    if conv_mode is not None:
        if conv_mode not in TEMPLATES:
            raise CheckpointError(f"There is no template {conv_mode!r}; there are {', '.join(TEMPLATES)}.")
        if conv_mode != spec.conv_mode:
            _log.warning("conv_mode %s contradicts %s (%s).", conv_mode, spec.conv_mode, spec.conv_reason)
        spec = dataclasses.replace(spec, conv_mode=conv_mode, conv_reason="it was set by conv_mode")
    _log.info("%s: template %s, because %s.", spec.name, spec.conv_mode, spec.conv_reason)
    return spec
