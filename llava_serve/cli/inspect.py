"""`llava-serve inspect`: describes a checkpoint by its files. No weights are read."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from llava_serve.cli import options as flags

if TYPE_CHECKING:
    from llava_serve.checkpoints import CheckpointSpec, ImageProcessing

_EXAMPLES = ((640, 480), (480, 640), (1000, 1000), (1920, 1080))
"""Sizes of pictures (width, height) whose number of tokens is printed."""

_RESAMPLE = {0: "nearest", 1: "Lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "Hamming"}


def add_to(commands: flags.Commands) -> None:
    """Declares the command."""
    parser = commands.add_parser(
        "inspect",
        help="describe a checkpoint",
        description="Describe a checkpoint without loading it.",
        **flags.examples("llava-serve inspect /models/llava-v1.5-13b", "llava-serve inspect org/llava-v1.6-7b --json"),
    )
    parser.add_argument("path", nargs="?", default="builtin", help="builtin (the default), a folder, or a hub id")
    flags.add_description_flags(parser)
    parser.add_argument("--json", action="store_true", help="print JSON: a list of lines for each part")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints one screen."""
    from llava_serve.checkpoints import open_checkpoint

    spec = open_checkpoint(
        options.path,
        model_base=options.model_base,
        vision_tower=options.vision_tower,
        vision_tower_weights=options.vision_tower_weights,
        conv_mode=options.conv_mode,
        image_aspect=options.image_aspect,
    )
    if options.json:
        print(json.dumps(as_lists(describe(spec)), ensure_ascii=False))
        return 0
    for name, value in describe(spec):
        print(f"{name:<15} {value}")
    return 0


def as_lists(described: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """The lines of each part; a line without a name belongs to the part above it."""
    lists: dict[str, list[str]] = {}
    part = ""
    for name, value in described:
        part = name or part
        lists.setdefault(part, []).append(value)
    return lists


def describe(spec: CheckpointSpec) -> Iterator[tuple[str, str]]:
    """The parts of a checkpoint with a line on each; one without a name goes on with the part above it."""
    text, vision = _Decoder(spec.text_config), spec.vision_config
    yield "name", spec.name
    yield "folder", str(spec.path)
    yield "layout", {"original": "the original LLaVA's", "transformers": "transformers'"}[spec.layout]
    if spec.adapter is not None:
        what = {"lora": "LoRA weights", "projector": "only the projector"}[spec.adapter]
        yield "holds", f"{what}; the rest is in {spec.base}"
    yield "language model", f"{text.family}: {text.layers} layers of {text.width}, {text.heads}"
    yield "vocabulary", f"{spec.vocab_size} tokens ({spec.tokenizer.kind})"
    yield "context", f"{spec.context_length} tokens"
    yield "dtype", f"{spec.torch_dtype} in the files"
    if spec.quantization is not None:
        yield "quantized", f"in the files, by {spec.quantization}"
    tower = f"{vision['model_type']}: {vision['num_hidden_layers']} layers of {vision['hidden_size']}"
    yield "vision tower", f"{tower}, {vision['image_size']} px in patches of {vision['patch_size']}"
    yield "", f"weights {_tower_weights(spec)}"
    yield "features", _features(spec)
    norm = "" if spec.projector_norm is None else ", after a norm"
    yield "projector", f"{spec.projector_type} ({spec.feature_width} to {text.width}{norm})"
    yield "pictures", _images(spec.image)
    if (several := spec.image.of_several) is not None:
        yield "", f"of several in a request each {_images(several)}, {_tokens(several)}"
    if spec.image.aspect == "anyres":
        yield "", f"at most {spec.image.max_tiles} tiles beside the overview; images.max_tiles sets fewer"
    yield from _differences()
    yield "tokens", _tokens(spec.image)
    yield "template", f"{spec.conv_mode}: {spec.conv_reason}"
    for note in (*spec.notes, *spec.remarks):
        yield "note", note


class _Decoder:
    """The sizes of a language model, with those that its file leaves out."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from transformers import AutoConfig

        config = AutoConfig.for_model(**settings)
        self.family = config.model_type
        self.layers, self.width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
        shared = getattr(config, "num_key_value_heads", None) or heads
        self.heads = f"{heads} heads" + (f" ({shared} for keys and values)" if shared != heads else "")


def _tower_weights(spec: CheckpointSpec) -> str:
    if spec.tower_in_checkpoint:
        return "in the checkpoint"
    return f"from {spec.tower}"


def _features(spec: CheckpointSpec) -> str:
    from llava_serve.checkpoints.towers import TOWERS

    layers = ", ".join(map(str, spec.select_layers))
    layers = f"of layer {layers}" if len(spec.select_layers) == 1 else f"of the layers {layers}, joined"
    if not TOWERS[spec.vision_config["model_type"]].class_token:
        return layers
    return f"{layers}, {'without' if spec.select_feature == 'patch' else 'with'} the class token"


def _images(image: ImageProcessing) -> str:
    height, width = image.crop_size
    how = {
        "square": f"the centre, {width} x {height}" if image.do_center_crop else f"squashed to {width} x {height}",
        "pad": f"padded to a square, then {width} x {height}",
        "anyres": f"an overview and a grid of tiles, each {width} x {height}",
    }[image.aspect]
    canvases = ", ".join(f"{width} x {height}" for width, height in image.grid_pinpoints)
    return f"{how} ({_RESAMPLE[image.resample]})" + (f"; grids of {canvases}" if canvases else "")


def _differences() -> Iterator[tuple[str, str]]:
    """What is seen otherwise than the original sees it."""
    from llava_serve.config import ImageOptions

    options = ImageOptions()
    yield "", "upright as EXIF says; deep samples are scaled to 8 bits by their range"
    yield "", f"JPEGs over {options.max_pixels:,} pixels are decoded at 1/2, 1/4 or 1/8 of their size"
    transparency = {"white": "over white; images.transparency: drop is the original's way", "drop": "dropped"}
    yield "transparency", transparency[options.transparency]


def _tokens(image: ImageProcessing) -> str:
    from llava_serve.images.tiles import num_features

    if image.aspect != "anyres":
        return f"{image.features_per_tile + image.newline} per picture"
    return ", ".join(f"{num_features(size, image)} for {size[0]} x {size[1]}" for size in _EXAMPLES)
