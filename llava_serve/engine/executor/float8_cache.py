"""Keys and values in 8-bit floats (e4m3), with a scale for each head of each layer.

Heads differ by orders of magnitude, so one scale for a layer would leave some of them few bits; and attention applies
the scale of a head to whole products, which costs nothing. Scales are fixed at load, so that what is stored of a token
depends on no other one. They are powers of two: only the rounding to 8 bits loses something.
"""

from __future__ import annotations

import torch

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max
_NAN_BITS = 0x7F


def to_float8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Numbers [kv_heads, tokens, head_dim] by the scales [kv_heads]. What is too large becomes NaN, which fails its
    request: cut off, it would change an answer without a word."""
    scaled = values.float() / scale[:, None, None]
    return scaled.masked_fill(~(scaled.abs() <= LARGEST), torch.nan).to(FLOAT8)


def from_float8(stored: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `to_float8` has stored, [..., kv_heads, tokens, head_dim], in another precision."""
    return stored.to(dtype) * scale.to(dtype)[:, None, None]


def bits(stored: torch.Tensor) -> torch.Tensor:
    """8-bit floats as integers, which torch can index and move on any device; other numbers as they are."""
    return stored.view(torch.uint8) if stored.dtype == FLOAT8 else stored


def are_finite_float8(stored: torch.Tensor) -> torch.Tensor:
    """Whether no number is NaN; this kind has no infinity."""
    return (bits(stored) & _NAN_BITS).amax() < _NAN_BITS


def store(memory: torch.Tensor, slots: torch.Tensor, new: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Writes numbers [kv_heads, tokens, head_dim] at positions `slots` [tokens] of `memory` [kv_heads, positions,
    head_dim], which holds 8-bit floats where there are scales [kv_heads]."""
    bits(memory).index_copy_(1, slots, new if scale is None else bits(to_float8(new, scale)))


def load(memory: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Numbers [kv_heads, *slots, head_dim] at positions of `memory`, see `store`, in a precision."""
    found = bits(memory).index_select(1, slots.flatten()).view(memory.dtype)
    wide = found.to(dtype) if scale is None else from_float8(found, scale, dtype)
    return wide.view(len(memory), *slots.shape, -1)
