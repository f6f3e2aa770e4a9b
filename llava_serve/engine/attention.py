"""Attention of one packed step over the KV memory, as transformers' models call it.

A step packs the positions of all sequences in one row, [1, tokens, hidden]. Each layer writes its new keys and values
into the memory; then every sequence attends to its own extent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from llava_serve.engine.memory import KVMemory

IMPLEMENTATION = "llava_serve"
"""The name under which transformers' models find `attend`."""


@dataclass(frozen=True, slots=True)
class Span:
    """A sequence's part of the step.

    Attributes:
        row: where its tokens begin in the packed row.
        length: tokens in this step.
        base: where its extent begins in the memory.
        start: its position of the first of these tokens.
    """

    row: int
    length: int
    base: int
    start: int


class PackedStep:
    """What attention must know of a step.

    Args:
        spans: the sequences, in the order in which their tokens are packed.
    """

    def __init__(self, memory: KVMemory, spans: list[Span], dtype: torch.dtype, device: torch.device) -> None:
        self._memory = memory
        self._spans = spans
        self._dtype = dtype
        positions = [torch.arange(span.start, span.start + span.length) for span in spans]
        self.positions = torch.cat(positions).to(device)
        self._targets = torch.cat([at + span.base for at, span in zip(positions, spans, strict=True)]).to(device)
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None = None,
        slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes the keys and values and attends to what each sequence then has.

        Args:
            query: [1, heads, tokens, head_dim]; key, value: [1, kv_heads, tokens, head_dim].
            window: positions that a query sees, itself included; None sees all.
            slopes: ALiBi's, [heads]; None adds no bias.

        Returns:
            [1, tokens, heads, head_dim].
        """
        self._memory.write(layer, self._targets, key[0], value[0])
        keys, values = self._memory.layers[layer]
        out = torch.empty_like(query)
        for index, span in enumerate(self._spans):
            end = span.start + span.length
            first = 0 if window is None else max(0, span.start + 1 - window)
            rows = slice(span.row, span.row + span.length)
            reach = slice(span.base + first, span.base + end)
            mask = self._mask(index, span, first, window) if slopes is None else self._bias(index, span, slopes)
            out[:, :, rows] = scaled_dot_product_attention(
                query[:, :, rows],
                keys[None, :, reach],
                values[None, :, reach],
                attn_mask=mask,
                is_causal=mask is None and span.length > 1,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        return out.transpose(1, 2)

    def _mask(self, index: int, span: Span, first: int, window: int | None) -> torch.Tensor | None:
        """Additive mask [length, keys] of a span; None where all keys are seen, or plain causality says it."""
        end = span.start + span.length
        if span.length == 1 or (span.start == 0 and (window is None or end <= window)):
            return None
        if (index, window) not in self._masks:
            self._masks[index, window] = self._hide(span, first, window).to(self._dtype)
        return self._masks[index, window]

    def _bias(self, index: int, span: Span, slopes: torch.Tensor) -> torch.Tensor:
        """ALiBi and causality, float32 [1, heads, length, keys].

        The bias goes by key position: it differs from that by distance by a constant per query, which softmax ignores.
        """
        if (index, None) not in self._masks:
            distances = torch.arange(1 - span.start - span.length, 1, device=slopes.device)
            bias = slopes[:, None, None] * distances + self._hide(span, 0, None)
            self._masks[index, None] = bias[None].to(torch.promote_types(self._dtype, torch.float32))
        return self._masks[index, None]

    def _hide(self, span: Span, first: int, window: int | None) -> torch.Tensor:
        """float32 [length, keys from `first`]: 0 where a query sees a key, -inf elsewhere."""
        end = span.start + span.length
        queries = torch.arange(span.start, end, device=self.positions.device)[:, None]
        keys = torch.arange(first, end, device=self.positions.device)[None]
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    step: PackedStep,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """`PackedStep.attend` in the form of transformers' `AttentionInterface`; `step` comes through the model's call."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    return step.attend(layer, query, key, value, scaling, sliding_window), None


AttentionInterface.register(IMPLEMENTATION, attend)
