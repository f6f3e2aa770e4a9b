"""LLaVA: a vision tower, a projector and a language model; all but the glue is transformers'."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.activations import ACT2FN

from llava_serve.checkpoints import CheckpointSpec
from llava_serve.checkpoints.weights import stored_tensors
from llava_serve.config import Quantization
from llava_serve.errors import CheckpointError, reason
from llava_serve.images.tiles import kept_features, shrunk_grid, tile_grid
from llava_serve.model.allocator import mapped_tensors
from llava_serve.model.memory import check_memory
from llava_serve.model.quantized import check_files, load_quantized, quantized_bytes
from llava_serve.model.vocabulary import fit_vocabulary
from llava_serve.model.weight_loader import (
    load_weights,
    quantize_layers,
    refuse_delta,
    untie_other_head,
    weight_bytes,
)

_log = logging.getLogger(__name__)


class Llava(nn.Module):
    """The model in memory. Load one with `Llava.load`.

    Attributes:
        spec: what was loaded.
        vision_tower: without the layers after the last selected one.
        projector_norm: of the features before the projector; None in most models.
        projector: from tower features to the language model's hidden size.
        image_newline: [hidden], follows each line of features in `spatial_unpad`, or a single tile; None elsewhere.
        language_model: transformers' causal language model.
    """

    _mean: Tensor
    _std: Tensor

    def __init__(self, spec: CheckpointSpec, text_config: Any) -> None:
        super().__init__()
        self.spec = spec
        self._layers = selected_layers(spec)
        vision = AutoConfig.for_model(**{**spec.vision_config, "num_hidden_layers": self.vision_tower_layers})
        self.vision_tower = AutoModel.from_config(vision)
        self.language_model = AutoModelForCausalLM.from_config(text_config)
        if spec.layout == "transformers":
            self.language_model.get_output_embeddings().bias = None  # Phi's, which transformers' LLaVA leaves out
        elif hasattr(self.language_model.base_model, "rotary_emb"):
            self.language_model.base_model.rotary_emb = HalfRotary(self.language_model.base_model.rotary_emb)
        hidden = text_config.hidden_size
        norm = spec.projector_norm
        self.projector_norm = None if norm is None else nn.LayerNorm(spec.feature_width, eps=norm)
        self.projector = make_projector(spec, spec.feature_width, hidden)
        self.image_newline = nn.Parameter(torch.empty(hidden)) if _uses_newline(spec) else None
        self.register_buffer("_mean", torch.tensor(spec.image.mean, dtype=torch.float32), persistent=False)
        self.register_buffer("_std", torch.tensor(spec.image.std, dtype=torch.float32), persistent=False)

    @classmethod
    @mapped_tensors()
    def load(
        cls,
        spec: CheckpointSpec,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        quantization: Quantization | None = None,
        *,
        kv_cache_bytes: int = 0,
    ) -> Llava:
        """Loads a checkpoint, tensor by tensor.

        Args:
            spec: of the checkpoint.
            device: where the model runs.
            dtype: of all weights, but for quantized layers.
            quantization: of the language model's linear layers, without its head.
            kv_cache_bytes: that come on top of the weights; a warning says if there is no room for them.

        Raises:
            CheckpointError: a tensor is missing, surplus, or of the wrong shape; a file is missing or damaged; the
                weights do not fit the free memory.
        """
        if spec.quantization is not None:
            return cls._load_quantized(spec, torch.device(device), dtype, kv_cache_bytes)
        device = torch.device(device)
        tensors = stored_tensors(spec)
        tensors = {name: t for name, t in tensors.items() if not _is_unused(name, spec)}
        tensors, text_config = fit_vocabulary(spec, tensors)
        if spec.layout == "transformers" or spec.adapter == "lora":
            untie_other_head(tensors, text_config)
        model = cls._on_meta(spec, text_config)
        if quantization is not None:
            quantize_layers(model.language_model, quantization, device, dtype)
        check_memory(spec.name, weight_bytes(model, dtype), kv_cache_bytes, device, dtype)
        load_weights(model, tensors, spec, device, dtype)
        refuse_delta(model.language_model, spec)
        return model._loaded(device, dtype)

    @classmethod
    def _on_meta(cls, spec: CheckpointSpec, text_config: Any) -> Llava:
        """The modules without weights."""
        try:
            with init_empty_weights(include_buffers=False):
                return cls(spec, text_config)
        except (ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError, RuntimeError) as error:
            raise CheckpointError(
                f"config.json in {spec.path} describes a model that transformers cannot build ({reason(error)}); "
                "correct it."
            ) from error

    @classmethod
    def _load_quantized(
        cls, spec: CheckpointSpec, device: torch.device, dtype: torch.dtype, kv_cache_bytes: int
    ) -> Llava:
        """As `load`, of weights that are quantized in the files."""
        _, text_config = fit_vocabulary(spec, {})
        model = cls._on_meta(spec, text_config)
        check_files(model, spec)
        check_memory(spec.name, quantized_bytes(model, spec, dtype), kv_cache_bytes, device, dtype)
        load_quantized(model, spec, device, dtype)
        return model._loaded(device, dtype)

    def _loaded(self, device: torch.device, dtype: torch.dtype) -> Llava:
        """The model for inference, and lines about it in the log."""
        spec = self.spec
        self.eval().requires_grad_(False)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        for note in spec.notes:
            _log.warning("%s: %s", spec.name, note)
        for remark in spec.remarks:
            _log.info("%s: %s", spec.name, remark)
        _log.info("%s is on %s in %s.", spec.name, device, str(dtype).removeprefix("torch."))
        return self

    @property
    def vision_tower_layers(self) -> int:
        """How many of the tower's layers are used."""
        return max(self._layers)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        device: torch.device = next(self.vision_tower.parameters()).device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are not quantized."""
        dtype: torch.dtype = next(self.vision_tower.parameters()).dtype
        return dtype

    @torch.inference_mode()
    def tower_features(self, tiles: Tensor) -> Tensor:
        """Runs the vision tower, up to the projector.

        Args:
            tiles: uint8 [tiles, height, width, 3].

        Returns:
            [tiles, features, feature width].
        """
        pixels = (tiles.to(self.device, non_blocking=True).float() / 255 - self._mean) / self._std
        pixels = pixels.permute(0, 3, 1, 2).to(self.dtype)
        # Not the last hidden state: SigLIP's is normalized.
        states = self.vision_tower(pixels, output_hidden_states=list(self._layers)).hidden_states
        hidden = torch.cat([states[layer] for layer in self._layers], dim=-1)
        return hidden[:, 1:] if self.spec.select_feature == "patch" else hidden

    @torch.inference_mode()
    def image_embeddings(self, features: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Projects and joins one image's features.

        Args:
            features: [tiles, features, feature width] of the image's tiles, the overview first.
            image_size: (width, height) before tiling.

        Returns:
            [positions, hidden], as many as `num_features` says.
        """
        if self.projector_norm is not None:
            features = self.projector_norm(features)
        projected: Tensor = self.projector(features)
        image = self.spec.image.for_tiles(len(features))
        if image.newline and self.image_newline is not None:
            return torch.cat([projected.flatten(0, 1), self.image_newline[None]])
        if image.aspect != "anyres" or image.merge == "flat":
            return projected.flatten(0, 1)
        across, down = tile_grid(image_size, image)
        side = image.grid_side
        # [tiles down, tiles across, side, side, hidden] -> [features down, features across, hidden]
        grid = projected[1:].view(down, across, side, side, -1).transpose(1, 2)
        grid = grid.reshape(down * side, across * side, -1)
        if self.image_newline is not None:
            top, bottom, left, right = kept_features(image_size, image)
            grid = _resized(grid[top:bottom, left:right], shrunk_grid(bottom - top, right - left, image))
            grid = torch.cat([grid, self.image_newline.expand(grid.shape[0], 1, -1)], dim=1)
        return torch.cat([projected[0], grid.flatten(0, 1)])

    @torch.inference_mode()
    def embed(self, ids: Tensor) -> Tensor:
        """Embeddings [positions, hidden] of token ids [positions]."""
        embeddings: Tensor = self.language_model.get_input_embeddings()(ids.to(self.device))
        return embeddings


class HalfRotary(nn.Module):
    """Rotary tables rounded to half precision. The original builds its model in float16, tables included: only with
    such tables are the logits those of the original, whatever the precision of the weights."""

    def __init__(self, exact: nn.Module) -> None:
        super().__init__()
        self.exact = exact

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [batch, positions, head width], in x's precision."""
        cos, sin = self.exact(x, position_ids)
        return cos.half().to(x.dtype), sin.half().to(x.dtype)


def make_projector(spec: CheckpointSpec, vision_hidden: int, hidden: int) -> nn.Sequential:
    """The projector of a type: `linear`, `mlpNx_gelu` (N linear layers with the activation between), `identity`."""
    if spec.projector_type == "identity":
        if vision_hidden != hidden:
            raise CheckpointError(
                f"config.json names an identity projector, which cannot join widths {vision_hidden} and {hidden}."
            )
        return nn.Sequential(nn.Identity())
    depth = re.fullmatch(r"mlp(\d+)x_gelu", spec.projector_type)
    layers: list[nn.Module] = [nn.Linear(vision_hidden, hidden, bias=spec.projector_bias)]
    for _ in range(int(depth[1]) - 1 if depth else 0):
        layers += [ACT2FN[spec.projector_act], nn.Linear(hidden, hidden, bias=spec.projector_bias)]
    return nn.Sequential(*layers)


def _resized(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """A grid of features [height, width, hidden], interpolated to (height, width) where it has another size."""
    if size == tuple(grid.shape[:2]):
        return grid
    return interpolate(grid.permute(2, 0, 1)[None], size, mode="bilinear")[0].permute(1, 2, 0)


def selected_layers(spec: CheckpointSpec) -> tuple[int, ...]:
    """How many of the tower's layers come before each of the selected hidden states.

    Raises:
        CheckpointError: the tower has no such layer.
    """
    layers = int(spec.vision_config["num_hidden_layers"])
    selected = tuple(layer if layer >= 0 else layers + 1 + layer for layer in spec.select_layers)
    for layer, written in zip(selected, spec.select_layers, strict=True):
        if not 1 <= layer <= layers:
            raise CheckpointError(
                f"config.json selects layer {written} of a vision tower with {layers} layers; name the tower that it "
                "was trained with."
            )
    return selected


def _uses_newline(spec: CheckpointSpec) -> bool:
    """Whether a learned newline feature follows each line of an image's features, or a single tile."""
    return spec.image.newline or (spec.image.aspect == "anyres" and spec.image.merge == "spatial_unpad")


def _is_unused(name: str, spec: CheckpointSpec) -> bool:
    """Tensors that a checkpoint may hold although no answer depends on them: the tower's layers after the last selected
    one and its pooling head, and the newline feature where it follows nothing."""
    if name.startswith("vision_tower.head."):
        return True
    if name == "image_newline":
        return spec.image.merge == "spatial_unpad" and not _uses_newline(spec)
    layer = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", name)
    used, stored = max(selected_layers(spec)), int(spec.vision_config["num_hidden_layers"])
    return layer is not None and used <= int(layer[1]) < stored
