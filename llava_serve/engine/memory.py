"""The KV memory itself: one line of positions per layer and head, written in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from llava_serve.engine.sequence import Copy


class KVMemory:
    """Keys and values of all layers, [layers, 2, kv_heads, positions, head_dim].

    A sequence's positions are neighbours, so that its keys and values are views. On a CPU the memory is touched, and
    so taken from the system, only as it is first written.
    """

    def __init__(
        self, layers: int, kv_heads: int, positions: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._memory = torch.empty(layers, 2, kv_heads, positions, head_dim, dtype=dtype, device=device)
        self.layers = [(layer[0], layer[1]) for layer in self._memory]

    def copy(self, copies: Iterable[Copy]) -> None:
        """Carries out the copies in order."""
        for move in copies:
            source = self._memory[..., move.source : move.source + move.length, :]
            if abs(move.source - move.target) < move.length:
                source = source.clone()
            self._memory[..., move.target : move.target + move.length, :].copy_(source)

    def write(self, layer: int, targets: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes keys and values [kv_heads, tokens, head_dim] to the positions `targets` [tokens]."""
        k, v = self.layers[layer]
        k.index_copy_(1, targets, keys)
        v.index_copy_(1, targets, values)
