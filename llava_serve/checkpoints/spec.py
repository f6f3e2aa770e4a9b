"""One description of a checkpoint, whatever its format: frozen plain values, made without torch, read by both tiers."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llava_serve.checkpoints.quantized import StoredQuantization
from llava_serve.errors import CheckpointError
from llava_serve.prompts.chat_template import ChatTemplate

Aspect = Literal["square", "pad", "anyres"]
Merge = Literal["flat", "spatial", "spatial_unpad"]
Layout = Literal["original", "transformers"]
Adapter = Literal["lora", "projector"]

GRID_LIMIT = re.compile(r"anyres_max_([1-9]\d?)")
"""How files of both layouts write `ImageProcessing.max_grid_tiles`."""


@dataclass(frozen=True, slots=True)
class ImageProcessing:
    """How a picture becomes tiles, and how many features it takes.

    Attributes:
        layout: whose rules of rounding and of ties apply: the original's and transformers' differ for some sizes.
        aspect: `square` crops the centre, `pad` pads to a square, `anyres` makes an overview and a grid of tiles.
        grid_pinpoints: anyres canvases as (width, height).
        merge: how the features of several tiles are laid out.
        crop_size: (height, width) of a tile.
        shortest_edge: the shorter side before the centre crop; None resizes to `resize_to`.
        resize_to: (height, width), where the shorter side does not decide.
        do_resize, do_center_crop: as the tower's processor says.
        resample: Pillow's filter number.
        mean, std: per channel, in units of [0, 1].
        patch_size: of the tower, in pixels.
        extra_features: 1 where the class token is kept (`cls_patch`), else 0.
        max_grid_tiles: where a grid has more features than so many tiles, they are interpolated to about as many
            (`anyres_max_N`); None keeps all.
        newline: a single tile ends with a newline feature.
        of_several: how each image of a request with several is processed, where that differs.
    """

    layout: Layout
    aspect: Aspect
    grid_pinpoints: tuple[tuple[int, int], ...]
    merge: Merge
    crop_size: tuple[int, int]
    shortest_edge: int | None
    resize_to: tuple[int, int] | None
    do_resize: bool
    do_center_crop: bool
    resample: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    patch_size: int
    extra_features: int
    max_grid_tiles: int | None = None
    newline: bool = False
    of_several: ImageProcessing | None = None

    @property
    def max_tiles(self) -> int:
        """Most tiles of an image, without the overview of a grid."""
        return max((self._tiles(canvas) for canvas in self.grid_pinpoints), default=1)

    def for_images(self, count: int) -> ImageProcessing:
        """How an image is processed in a request with so many."""
        return self.of_several if self.of_several is not None and count > 1 else self

    def for_tiles(self, count: int) -> ImageProcessing:
        """How an image was processed that has so many tiles, the overview included. The canvas that was chosen for it
        is the best of those with as many tiles, too, whatever other ones there were."""
        if self.aspect != "anyres":
            return self
        if count == 1 and self.of_several is not None:
            return self.of_several
        canvases = tuple(canvas for canvas in self.grid_pinpoints if self._tiles(canvas) == count - 1)
        return dataclasses.replace(self, grid_pinpoints=canvases)

    def limited(self, max_tiles: int) -> ImageProcessing:
        """With the canvases of at most so many tiles.

        Raises:
            CheckpointError: there is none.
        """
        canvases = tuple(canvas for canvas in self.grid_pinpoints if self._tiles(canvas) <= max_tiles)
        if self.grid_pinpoints and not canvases:
            least = min(self._tiles(canvas) for canvas in self.grid_pinpoints)
            raise CheckpointError(f"max_tiles is {max_tiles}, but the model's smallest grid has {least} tiles.")
        return dataclasses.replace(self, grid_pinpoints=canvases)

    def _tiles(self, canvas: tuple[int, int]) -> int:
        return canvas[0] // self.crop_size[1] * (canvas[1] // self.crop_size[0])

    @property
    def grid_side(self) -> int:
        """Patches along one side of a tile."""
        return self.crop_size[0] // self.patch_size

    @property
    def features_per_tile(self) -> int:
        """Features that the tower gives for one tile."""
        return self.grid_side**2 + self.extra_features


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """Where the tokenizer is and how it is used.

    Attributes:
        folder: that holds its files.
        kind: `sentencepiece` (`tokenizer.model`) or `tokenizers` (`tokenizer.json`).
        added_tokens: tokens behind the vocabulary, in order of their ids (`<im_start>`, `<im_end>`, `<im_patch>`).
        shown_tokens: those of `added_tokens` that are not special: they are a part of the text of an answer.
        image_token: its name in transformers' layout, where the whole prompt is tokenized as one string; None in the
            original's, where each chunk between images is tokenized by itself.
        fast_decoding: an invalid run of byte tokens gives one U+FFFD per byte, as in the fast tokenizer that the
            original takes for Mistral; else sentencepiece keeps the run's valid characters.
    """

    folder: Path
    kind: Literal["sentencepiece", "tokenizers"]
    added_tokens: tuple[str, ...] = ()
    shown_tokens: tuple[str, ...] = ()
    image_token: str | None = None
    fast_decoding: bool = False


@dataclass(frozen=True, slots=True)
class CheckpointSpec:
    """What a checkpoint is. The reader of each format returns one.

    Attributes:
        name: of the model, as `model_name` makes it.
        path: the checkpoint's folder.
        layout: of the weights.
        adapter: `lora` or `projector` if the folder is only an addition to `base`.
        base: folder of the base.
        tower: folder of the vision tower; None where the checkpoint describes it itself.
        tower_in_checkpoint: the tower's weights are those in the checkpoint, else those in the tower's folder (the
            original's rule on `unfreeze_mm_vision_tower`).
        text_config: keyword arguments of the language model's transformers config, with its `model_type`.
        vision_config: those of the vision tower's.
        projector_type: `linear`, `mlpNx_gelu`, `identity`.
        projector_bias, projector_act: of transformers' two-layer projector.
        projector_norm: epsilon of a LayerNorm before the projector; None has none.
        select_layers: indices into the tower's hidden states, usually -2 alone; the features of several are joined.
        select_feature: `patch` drops the class token, `cls_patch` keeps it.
        mm_use_im_start_end: an image stands between `<im_start>` and `<im_end>`.
        context_length: positions that the model has.
        eos_token_ids: end tokens of the generation config.
        conv_mode, conv_reason: the template and why it was chosen.
        chat_template: transformers' one, if the checkpoint has one.
        torch_dtype: the precision that the files declare.
        quantization: of the weights in the files; None where they are plain.
        notes: what the files say and is not followed, and what may make answers wrong: a sentence each, also a warning
            in the log.
        remarks: what is otherwise than in training because the files say so: a sentence each, also in the log at INFO.
    """

    name: str
    path: Path
    layout: Layout
    adapter: Adapter | None
    base: Path | None
    tower: Path | None
    tower_in_checkpoint: bool
    tokenizer: TokenizerSpec
    image: ImageProcessing
    text_config: dict[str, Any]
    vision_config: dict[str, Any]
    projector_type: str
    projector_bias: bool
    projector_act: str
    projector_norm: float | None
    select_layers: tuple[int, ...]
    select_feature: Literal["patch", "cls_patch"]
    mm_use_im_start_end: bool
    context_length: int
    eos_token_ids: tuple[int, ...]
    conv_mode: str
    conv_reason: str
    chat_template: ChatTemplate | None
    torch_dtype: str
    quantization: StoredQuantization | None = None
    notes: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def vocab_size(self) -> int:
        return int(self.text_config["vocab_size"])

    @property
    def feature_width(self) -> int:
        """Channels of a feature, before the projector."""
        return int(self.vision_config["hidden_size"]) * len(self.select_layers)

    def limited_to(self, max_model_len: int | None) -> CheckpointSpec:
        """The same with a shorter context; None keeps it.

        Raises:
            CheckpointError: the model has no such context.
        """
        if max_model_len is None:
            return self
        if max_model_len > self.context_length:
            raise CheckpointError(
                f"engine.max_model_len is {max_model_len}, and the context of {self.name} has {self.context_length} "
                "positions (config.json): choose no more."
            )
        return dataclasses.replace(self, context_length=max_model_len)
