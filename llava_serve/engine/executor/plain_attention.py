"""Attention of one sequence after the other by torch's own kernel: on a CPU, and where a GPU's fast one cannot run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import scaled_dot_product_attention

from llava_serve.engine.executor.kv_pool import PackedSequence


@dataclass(frozen=True, slots=True)
class KeyRange:
    """Keys that a sequence attends to: `count` from `begin` in the KV pool, less those that the mask hides."""

    begin: int
    count: int
    mask: torch.Tensor | None
    causal: bool


def find_keys(one: PackedSequence, window: int | None, slopes: torch.Tensor | None, query: torch.Tensor) -> KeyRange:
    """The keys of a sequence in a step.

    Args:
        window, slopes: see `Step.attend`.
        query: any, of the precision and on the device of the step.
    """
    start, length, end = one.start, one.length, one.start + one.length
    first = 0 if window is None else max(0, start + 1 - window)
    unmasked = start == 0 and (window is None or end <= window)
    mask = None
    if slopes is not None:
        mask = _alibi_bias(start, length, slopes).to(torch.promote_types(query.dtype, torch.float32))
    elif length > 1 and not unmasked:
        mask = _causal_mask(start, length, first, window, query.device).to(query.dtype)
    return KeyRange(one.base + first, end - first, mask, causal=mask is None and length > 1)


def _alibi_bias(start: int, length: int, slopes: torch.Tensor) -> torch.Tensor:
    """ALiBi with a causal mask, [1, heads, length, keys].

    The bias depends on the key's position only: a bias by distance differs by a constant per query, which softmax
    cancels.
    """
    distances = torch.arange(1 - start - length, 1, device=slopes.device)
    return (slopes[:, None, None] * distances + _causal_mask(start, length, 0, None, slopes.device))[None]


def _causal_mask(start: int, length: int, first: int, window: int | None, device: torch.device) -> torch.Tensor:
    """float32 [length, keys from `first`]: 0 where a query attends to a key, -inf elsewhere."""
    queries = torch.arange(start, start + length, device=device)[:, None]
    keys = torch.arange(first, start + length, device=device)[None]
    hidden = keys > queries
    if window is not None:
        hidden |= keys <= queries - window
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))


def attend_keys(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, key_range: KeyRange, scaling: float | None
) -> torch.Tensor:
    """Attention of one sequence, [1, heads, length, head_dim]. Grouped heads are unfolded: the CPU kernel has none."""
    shape = query.shape
    groups = shape[1] // keys.shape[1]
    if groups == 1 and key_range.mask is None:  # most decoding sequences: their fast path
        return scaled_dot_product_attention(query, keys, values, is_causal=key_range.causal, scale=scaling)
    if groups > 1 and shape[2] == 1:
        query = query.view(1, keys.shape[1], groups, shape[3])
    elif groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    dtype, mask = query.dtype, key_range.mask
    if mask is not None and mask.dtype != dtype and query.is_cuda:  # its kernels take masks of the same dtype only
        query, keys, values = (part.to(mask.dtype) for part in (query, keys, values))
    out = scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=key_range.causal, scale=scaling)
    return out.to(dtype).reshape(shape)
