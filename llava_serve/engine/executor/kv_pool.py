"""The tensors of the KV cache: contiguous positions per layer and head, written in place."""

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
class KVWrite:
    """`length` tokens of a packed step, from `offset`, are written to positions `targets` [length], or from `start`."""

    offset: int
    length: int
    start: int = 0
    targets: torch.Tensor | None = None


class KVPool:
    """Keys and values of all layers, [layers, 2, kv_heads, positions, head_dim].

    A sequence's positions are contiguous, so that its keys and values are views.
    """

    def __init__(
        self, layers: int, kv_heads: int, positions: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.kv_heads, self.head_dim, self.device = kv_heads, head_dim, device
        shape = (layers, 2, kv_heads, positions, head_dim)
        self._memory = _allocate(math.prod(shape), dtype, device).view(shape)
        self.layers = [(layer[0], layer[1]) for layer in self._memory]

    def copy(self, copies: Iterable[Copy]) -> None:
        """Does the copies in order."""
        for one in copies:
            source = self._memory[..., one.source : one.source + one.length, :]
            if abs(one.source - one.target) < one.length:
                source = source.clone()
            self._memory[..., one.target : one.target + one.length, :].copy_(source)

    def write(self, layer: int, writes: Iterable[KVWrite], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes keys and values [kv_heads, tokens, head_dim] of a packed step."""
        for memory, new in zip(self.layers[layer], (keys, values), strict=True):
            for write in writes:
                part = new.narrow(1, write.offset, write.length)
                if write.targets is None:
                    memory.narrow(1, write.start, write.length).copy_(part)
                else:
                    memory.index_copy_(1, write.targets, part)

    def finite(self, start: int, length: int) -> torch.Tensor:
        """Whether the keys and values of all layers at positions [start, start + length) are finite, as bool [1]."""
        return are_finite(self._memory[..., start : start + length, :])[None]


def _allocate(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialized memory. A CPU's operating system provides it at the first write, in huge pages where it can: with
    small ones the first write of a prompt takes as long as a decode step."""
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(elements, dtype=dtype, device=device)
    memory = mmap.mmap(-1, elements * dtype.itemsize)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)
