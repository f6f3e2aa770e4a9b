"""Attention of rows that begin alike, on a CPU: the keys that they share are read once for all of them.

Rows of one prompt, and questions about one picture, each have a copy of the same beginning in the KV memory. One copy
serves all. A row's attention to it and to what is the row's own are merged by their weights in the whole softmax.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_LEAST = 128
"""Positions that rows must share for a closer look."""
_WORTH = 1792
"""Positions that must not be read a second time, over all rows: below it the merging costs more than they do."""


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Rows of a step, in rising order, whose sequences have their first `shared` positions in common."""

    rows: tuple[int, ...]
    shared: int


def find_shared_prefixes(hashes: Sequence[Sequence[bytes]], block_size: int) -> list[SharedPrefix]:
    """Groups rows by how they begin.

    Args:
        hashes: of each row's computed full blocks; each stands for all before it, too.
    """
    first = max(1, _LEAST // block_size)
    groups: dict[bytes, list[int]] = defaultdict(list)
    for row, own in enumerate(hashes):
        if len(own) >= first:
            groups[own[first - 1]].append(row)
    found = []
    for rows in groups.values():
        one, most = hashes[rows[0]], min(len(hashes[row]) for row in rows)

        def differ(at: int, rows: list[int] = rows, one: Sequence[bytes] = one) -> bool:
            return any(hashes[row][at] != one[at] for row in rows)

        shared = bisect_left(range(most), True, lo=first, key=differ) * block_size
        if (len(rows) - 1) * shared >= _WORTH:
            found.append(SharedPrefix(tuple(rows), shared))
    return found


def attend_alike(
    queries: Sequence[torch.Tensor],
    shared: tuple[torch.Tensor, torch.Tensor],
    own: Sequence[tuple[torch.Tensor, torch.Tensor]],
    scaling: float | None,
) -> Sequence[torch.Tensor]:
    """Attention of single tokens to the keys and values that all share, and to their own.

    Args:
        queries: of each row [1, heads, 1, head_dim].
        shared, own: keys and values [1, kv_heads, positions, head_dim].

    Returns:
        of each row [1, heads, 1, head_dim].
    """
    common, common_weight = _attend(torch.cat([*queries], dim=2), *shared, scaling)
    parts = [_attend(query, *pair, scaling) for query, pair in zip(queries, own, strict=True)]
    rest, rest_weight = (torch.cat(halves, dim=2) for halves in zip(*parts, strict=True))
    share = torch.sigmoid(common_weight - rest_weight)[..., None]
    merged = torch.lerp(rest.to(share.dtype), common.to(share.dtype), share).to(rest.dtype)
    return torch.split_with_sizes(merged, [1] * len(queries), dim=2)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """[1, heads, rows, head_dim], and the logarithms of the softmax's denominators [1, heads, rows], not in half."""
    heads, rows, head_dim = query.shape[1:]
    if heads == keys.shape[1]:
        whole: tuple[torch.Tensor, torch.Tensor] = _flash(query, keys, values, scale=scaling)
        return whole
    folded = query.reshape(1, keys.shape[1], -1, head_dim)  # the kernel takes as many heads of queries as of keys
    out, weight = _flash(folded, keys, values, scale=scaling)
    return out.reshape(1, heads, rows, head_dim), weight.reshape(1, heads, rows)
