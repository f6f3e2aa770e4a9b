"""Cascade attention on a CPU: the keys and values of a prefix that sequences share are read once for all of them.

Choices of one prompt, and questions about one image, each have a copy of the same prefix in the KV pool. One copy
serves all. A sequence's attention to the prefix and to its own suffix are merged by their shares of the whole softmax.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_MIN_SHARED = 128
"""Shortest shared prefix that is looked for, in positions."""
_MIN_SAVED = 1792
"""Fewest positions saved over all sequences of a prefix: below it merging costs more than reading them again."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


@dataclass(frozen=True, slots=True)
class SharedPrefix:
    """Sequences of a step, by index in rising order, that have their first `length` positions in common."""

    indices: tuple[int, ...]
    length: int


def find_shared_prefixes(hashes: Sequence[Sequence[bytes]], block_size: int) -> list[SharedPrefix]:
    """Groups sequences by the prefix that they share.

    Args:
        hashes: of each sequence's computed full blocks; each covers all blocks before it, too.
    """
    first = max(1, _MIN_SHARED // block_size)
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, own in enumerate(hashes):
        if len(own) >= first:
            groups[own[first - 1]].append(index)
    found = []
    for indices in groups.values():
        one, most = hashes[indices[0]], min(len(hashes[index]) for index in indices)

        def differ(at: int, indices: list[int] = indices, one: Sequence[bytes] = one) -> bool:
            return any(hashes[index][at] != one[at] for index in indices)

        length = bisect_left(range(most), True, lo=first, key=differ) * block_size
        if (len(indices) - 1) * length >= _MIN_SAVED:
            found.append(SharedPrefix(tuple(indices), length))
    return found


def attend_shared_prefix(
    queries: Sequence[torch.Tensor],
    shared: tuple[torch.Tensor, torch.Tensor],
    own: Sequence[tuple[torch.Tensor, torch.Tensor]],
    scaling: float | None,
) -> Sequence[torch.Tensor]:
    """Attention of single tokens to the keys and values of a shared prefix, and to their own.

    Args:
        queries: of each sequence [1, heads, 1, head_dim].
        shared, own: keys and values [1, kv_heads, positions, head_dim].

    Returns:
        Of each sequence [1, heads, 1, head_dim].
    """
    prefix, prefix_lse = _attend(torch.cat([*queries], dim=2), *shared, scaling)
    parts = [_attend(query, *pair, scaling) for query, pair in zip(queries, own, strict=True)]
    suffix, suffix_lse = (torch.cat(halves, dim=2) for halves in zip(*parts, strict=True))
    share = torch.sigmoid(prefix_lse - suffix_lse)[..., None]
    merged = torch.lerp(suffix.to(share.dtype), prefix.to(share.dtype), share).to(suffix.dtype)
    return torch.split_with_sizes(merged, [1] * len(queries), dim=2)


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [1, heads, tokens, head_dim], and log-sum-exps of the scores [1, heads, tokens] in float32 or better."""
    heads, tokens, head_dim = query.shape[1:]
    if heads == keys.shape[1]:
        whole: tuple[torch.Tensor, torch.Tensor] = _flash(query, keys, values, scale=scaling)
        return whole
    folded = query.reshape(1, keys.shape[1], -1, head_dim)  # the kernel takes no grouped heads
    output, lse = _flash(folded, keys, values, scale=scaling)
    return output.reshape(1, heads, tokens, head_dim), lse.reshape(1, heads, tokens)
