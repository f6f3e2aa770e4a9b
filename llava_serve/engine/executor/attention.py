"""Attention of one packed step over the KV memory, as transformers' models call it.

A step packs the positions of all sequences in one row, [1, tokens, hidden]. Each layer writes its new keys and values
into the memory; then every sequence attends to its own extent.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from llava_serve.engine.executor import varlen
from llava_serve.engine.executor.cascade_attention import SharedPrefix, attend_alike
from llava_serve.engine.executor.kv_pool import KVPool, Run
from llava_serve.engine.executor.varlen import VarlenAttention

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


@dataclass(frozen=True, slots=True)
class _Reach:
    """Keys that a span sees: `count` from `begin` in the memory, less what the mask hides."""

    begin: int
    count: int
    mask: torch.Tensor | None
    causal: bool


class Step(Protocol):
    """What the model is given of a step: positions [tokens], and attention that knows all sequences' memory."""

    positions: torch.Tensor

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
        """See `PackedStep.attend`."""
        ...


class PackedStep:
    """A step of any tokens of any sequences.

    Args:
        spans: the sequences, in the order in which their tokens are packed.
        padding: rows behind them that are nobody's. They are not written, and attend to nothing.
        alike: rows of single tokens whose sequences begin alike.
    """

    def __init__(
        self,
        memory: KVPool,
        spans: list[Span],
        dtype: torch.dtype,
        device: torch.device,
        padding: int = 0,
        alike: Sequence[SharedPrefix] = (),
    ) -> None:
        self._memory = memory
        self._spans = spans
        self._dtype = dtype
        self._padding = padding
        self._alike = alike
        self._lengths = [span.length for span in spans]
        positions = [at for span in spans for at in range(span.start, span.start + span.length)]
        self.positions = torch.tensor([*positions, *[0] * padding], device=device)
        self._runs = _runs(spans, device)
        self._reaches: dict[int | None, list[_Reach]] = {}
        self._varlen: VarlenAttention | None = None
        if varlen.available(device, dtype, memory.kv_heads, memory.head_dim):
            ends = [span.start + span.length for span in spans]
            self._varlen = VarlenAttention.of(self._lengths, [span.base for span in spans], ends, device)

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
            slopes: ALiBi's, [heads], the same in all layers; None adds no bias.

        Returns:
            [1, tokens, heads, head_dim].
        """
        self._memory.write(layer, self._runs, key[0], value[0])
        if self._varlen is not None and slopes is None:
            return self._varlen.attend(query, *self._memory.layers[layer], scaling, window)
        keys, values = (memory[None] for memory in self._memory.layers[layer])

        def stored(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
            return keys.narrow(2, start, count), values.narrow(2, start, count)

        *parts, rest = torch.split_with_sizes(query, [*self._lengths, self._padding], dim=2)
        together: set[int] = set()
        for group in self._alike if window is None and slopes is None else ():
            spans = [self._spans[row] for row in group.rows]
            common = stored(spans[0].base, group.shared)
            own = [stored(span.base + group.shared, span.start + 1 - group.shared) for span in spans]
            outs = attend_alike([parts[row] for row in group.rows], common, own, scaling)
            for row, out in zip(group.rows, outs, strict=True):
                parts[row] = out
            together.update(group.rows)
        if window not in self._reaches:
            self._reaches[window] = [self._reach(span, window, slopes) for span in self._spans]
        for row, reach in enumerate(self._reaches[window]):
            if row not in together:
                parts[row] = _attend(parts[row], *stored(reach.begin, reach.count), reach, scaling)
        if self._padding:
            parts.append(torch.zeros_like(rest))
        return (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]).transpose(1, 2)

    def _reach(self, span: Span, window: int | None, slopes: torch.Tensor | None) -> _Reach:
        end = span.start + span.length
        first = 0 if window is None else max(0, span.start + 1 - window)
        plain = span.start == 0 and (window is None or end <= window)
        mask = None
        if slopes is not None:
            mask = self._bias(span, slopes)
        elif span.length > 1 and not plain:
            mask = self._hide(span, first, window).to(self._dtype)
        return _Reach(span.base + first, end - first, mask, causal=mask is None and span.length > 1)

    def _bias(self, span: Span, slopes: torch.Tensor) -> torch.Tensor:
        """ALiBi and causality, float32 or better [1, heads, length, keys].

        The bias goes by key position: it differs from that by distance by a constant per query, which softmax ignores.
        """
        distances = torch.arange(1 - span.start - span.length, 1, device=slopes.device)
        bias = slopes[:, None, None] * distances + self._hide(span, 0, None)
        return bias[None].to(torch.promote_types(self._dtype, torch.float32))

    def _hide(self, span: Span, first: int, window: int | None) -> torch.Tensor:
        """float32 [length, keys from `first`]: 0 where a query sees a key, -inf elsewhere."""
        end = span.start + span.length
        queries = torch.arange(span.start, end, device=self.positions.device)[:, None]
        keys = torch.arange(first, end, device=self.positions.device)[None]
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _runs(spans: list[Span], device: torch.device) -> list[Run]:
    """Where a step's tokens are written: those of the rows that decode, which come first, in one go."""
    decoding = list(itertools.takewhile(lambda span: span.length == 1, spans))
    runs = [Run(span.row, span.length, span.base + span.start) for span in spans[len(decoding) :]]
    if decoding:
        targets = torch.tensor([span.base + span.start for span in decoding], device=device)
        runs.insert(0, Run(0, len(decoding), targets=targets))
    return runs


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, reach: _Reach, scaling: float | None
) -> torch.Tensor:
    """Attention of one span, [1, heads, length, head_dim]. Grouped heads are unfolded: the CPU's kernel takes none."""
    shape = query.shape
    groups = shape[1] // keys.shape[1]
    if groups == 1 and reach.mask is None:  # what a row that decodes mostly is: nothing more should cost it anything
        return scaled_dot_product_attention(query, keys, values, is_causal=reach.causal, scale=scaling)
    if groups > 1 and shape[2] == 1:
        query = query.view(1, keys.shape[1], groups, shape[3])
    elif groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    dtype, mask = query.dtype, reach.mask
    if mask is not None and mask.dtype != dtype and query.is_cuda:  # its kernels take no other masks
        query, keys, values = (part.to(mask.dtype) for part in (query, keys, values))
    out = scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=reach.causal, scale=scaling)
    return out.to(dtype).reshape(shape)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    step: Step,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """`Step.attend` in the form of transformers' `AttentionInterface`; `step` comes through the model's call."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    return step.attend(layer, query, key, value, scaling, sliding_window), None


AttentionInterface.register(IMPLEMENTATION, attend)
