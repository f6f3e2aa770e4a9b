"""The KV memory itself: one line of positions per layer and head, written in place."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from llava_serve.engine.sequence import Copy
from llava_serve.model.numerics import are_finite


@dataclass(frozen=True, slots=True)
class Run:
    """Where `length` tokens of a packed step, from `row`, are written: at `targets` [length], or else from `start`."""

    row: int
    length: int
    start: int = 0
    targets: torch.Tensor | None = None


class KVPool:
    """Keys and values of all layers, [layers, 2, kv_heads, positions, head_dim].

    A sequence's positions are neighbours, so that its keys and values are views.
    """

    def __init__(
        self, layers: int, kv_heads: int, positions: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.kv_heads, self.head_dim = kv_heads, head_dim
        shape = (layers, 2, kv_heads, positions, head_dim)
        self._memory = _allocate(math.prod(shape), dtype, device).view(shape)
        self.layers = [(layer[0], layer[1]) for layer in self._memory]

    def copy(self, copies: Iterable[Copy]) -> None:
        """Carries out the copies in order."""
        for move in copies:
            source = self._memory[..., move.source : move.source + move.length, :]
            if abs(move.source - move.target) < move.length:
                source = source.clone()
            self._memory[..., move.target : move.target + move.length, :].copy_(source)

    def write(self, layer: int, runs: Iterable[Run], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes keys and values [kv_heads, tokens, head_dim], run by run."""
        for memory, new in zip(self.layers[layer], (keys, values), strict=True):
            for run in runs:
                part = new.narrow(1, run.row, run.length)
                if run.targets is None:
                    memory.narrow(1, run.start, run.length).copy_(part)
                else:
                    memory.index_copy_(1, run.targets, part)

    def finite(self, start: int, length: int) -> torch.Tensor:
        """Whether the keys and values of all layers at positions [start, start + length) are, as bool [1]."""
        return are_finite(self._memory[..., start : start + length, :])[None]


def _allocate(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory with any content. On a CPU it is taken from the system only as it is first written, in large pages where
    there are any: with small ones the first write of a prompt takes as long as a decode step."""
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(elements, dtype=dtype, device=device)
    memory = mmap.mmap(-1, elements * dtype.itemsize)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)
