"""Attention over packed sequences, computed only where something is seen.

A packed sequence is a shared part of `p` tokens, then bins of `s` tokens that see the shared part and themselves:
products of [p, p] and [s, p + s] instead of one over everything. Softmax stays in the dtype of the values, bfloat16
in training: on a CPU, traffic is what costs.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

NAME = "packed"


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    """Query, key, value [b, h, n, d] to [b, n, h, d].

    With a mask [b, 1, q, k] of as many rows as there are queries, this is ordinary attention. With fewer rows, those
    are the rows of the bins, [b, 1, bins * s, p + s], and the p tokens before them attend causally. A module with a
    list `watched` gets there what the bins of its first two heads see of the shared part, [b, bins * s, p] each.
    """
    # Under autocast the rotation has made float32 of queries and keys.
    query, key = query.to(value.dtype) * scaling, key.to(value.dtype)
    n = query.shape[2]
    if attention_mask is None or attention_mask.shape[2] == n:
        return _attend(query, key, value, attention_mask).transpose(1, 2).contiguous(), None
    b, h, _, d = query.shape
    in_bins = attention_mask.shape[2]
    p = n - in_bins
    s = attention_mask.shape[3] - p
    causal = torch.full((p, p), torch.finfo(query.dtype).min, dtype=query.dtype).triu(1)
    if not in_bins:
        return _attend(query, key, value, causal).transpose(1, 2).contiguous(), None
    # Splitting once, not slicing often: each slice costs a full-size gradient of zeros on the way back.
    shared_query, own_query = torch.split(query, [p, in_bins], dim=2)
    shared_key, own_key = torch.split(key, [p, in_bins], dim=2)
    shared_value, own_value = torch.split(value, [p, in_bins], dim=2)
    first = _attend(shared_query, shared_key, shared_value, causal)

    def binned(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(b, h, in_bins // s, s, d)

    on_shared = own_query @ shared_key.transpose(2, 3)
    on_bin = (binned(own_query) @ binned(own_key).transpose(3, 4)).view(b, h, in_bins, s)
    scores = torch.cat([on_shared, on_bin], dim=3) + attention_mask.to(query.dtype)
    seen_shared, seen_bin = torch.split(scores.softmax(dim=3), [p, s], dim=3)
    watched: list[torch.Tensor] | None = getattr(module, "watched", None)
    if watched is not None:
        watched += [seen_shared[:, 0], seen_shared[:, 1]]
    from_bin = seen_bin.reshape(b, h, in_bins // s, s, s) @ binned(own_value)
    rest = seen_shared @ shared_value + from_bin.view(b, h, in_bins, d)
    return torch.cat([first, rest], dim=2).transpose(1, 2).contiguous(), None


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    scores = query @ key.transpose(2, 3)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    return scores.softmax(dim=3) @ value


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, eager_mask)
