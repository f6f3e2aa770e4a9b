"""What the engine needs of a model. `llava_serve.model.llava.Llava` is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

from llava_serve.checkpoints.spec import CheckpointSpec


class VisionLanguageModel(Protocol):
    """A vision tower, a projector, and a language model that is one of transformers' causal LMs."""

    @property
    def spec(self) -> CheckpointSpec: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def vision_tower(self) -> nn.Module: ...

    @property
    def language_model(self) -> Any: ...

    def modules(self) -> Iterator[nn.Module]:
        """All that compute it."""
        ...

    def tower_features(self, tiles: torch.Tensor) -> torch.Tensor:
        """uint8 [tiles, height, width, 3] -> [tiles, features, channels], before the projector."""
        ...

    def image_embeddings(self, features: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """[tiles, features, channels] of one image of (width, height) -> [span, hidden]."""
        ...

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """[tokens] -> [tokens, hidden]."""
        ...


def kv_shape(model: VisionLanguageModel) -> tuple[int, int, int]:
    """(layers, kv heads, head dim) of the language model's cache."""
    config = model.language_model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, kv_heads, head_dim
