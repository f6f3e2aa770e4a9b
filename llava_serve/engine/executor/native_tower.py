"""Attention of a vision tower on a CPU by the kernel in C++ that prompts have."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llava_serve.engine.executor.kernels.native_prefill import prefill_attention, supports
from llava_serve.engine.executor.kernels.selection import LayerShape, tower_kernel
from llava_serve.engine.executor.model import VisionLanguageModel

_logger = logging.getLogger(__name__)

IMPLEMENTATION = "llava_serve_tower"
"""The name under which transformers' towers find `attend`."""
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""How far features may differ, as a share of them, by the precisions that have the kernel."""


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of all tokens of a tile to all, [tiles, heads, tokens, head_dim] -> [tiles, tokens, heads, head_dim],
    in the form of transformers' `AttentionInterface`."""
    if attention_mask is not None:
        out: torch.Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **others
        )[0]
        return out, None
    key, value = key.contiguous(), value.contiguous()
    tiles = [prefill_attention(*tile, scaling, None, None, None, False) for tile in zip(query, key, value, strict=True)]
    return torch.stack(tiles), None


AttentionInterface.register(IMPLEMENTATION, attend)


@torch.inference_mode()
def use_native_tower(model: VisionLanguageModel) -> None:
    """Lets the vision tower attend in C++, where that is possible and right."""
    tower = model.vision_tower
    if not isinstance(tower, PreTrainedModel):
        return
    config, height, width = tower.config, *model.spec.image.crop_size
    heads: int = config.num_attention_heads
    head_dim: int = config.hidden_size // heads
    shape = LayerShape(0, 0, heads, heads, head_dim, model.dtype, model.device)
    if model.dtype not in _TOLERANCES or config._attn_implementation != "sdpa" or not supports(head_dim):
        return
    if tower_kernel(shape) is None:
        return
    tile = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = model.tower_features(tile).float()
    tower.set_attn_implementation(IMPLEMENTATION)
    difference = float((model.tower_features(tile).float() - expected).norm() / expected.norm())
    if not difference <= _TOLERANCES[model.dtype]:
        tower.set_attn_implementation("sdpa")
        _logger.warning("The tower's attention is not computed in C++: its features differ by %.1g.", difference)
