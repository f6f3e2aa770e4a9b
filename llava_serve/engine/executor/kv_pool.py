"""The tensors of the KV cache: contiguous positions per layer and head, written in place."""

from __future__ import annotations

import contextlib
import itertools
import math
import mmap
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from llava_serve.engine.executor.float8_cache import FLOAT8, are_finite_float8, bits, load, to_float8
from llava_serve.engine.executor.transfer import to_device
from llava_serve.engine.sequence import Copy
from llava_serve.model.numerics import are_finite


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """A sequence's tokens in a packed step.

    Attributes:
        offset: where its tokens begin in the step.
        length: tokens in this step.
        base: where its extent begins in the KV pool.
        start: position of the first of these tokens in the sequence.
    """

    offset: int
    length: int
    base: int
    start: int


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

    Args:
        dtype: of what is computed, and of what is stored without `scales`.
        scales: float32 [layers, 2, kv_heads], with which 8-bit floats are stored.

    Attributes:
        scales: of each layer [2, kv_heads], or None.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        positions: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        scales: torch.Tensor | None = None,
    ) -> None:
        self.kv_heads, self.head_dim, self.device = kv_heads, head_dim, device
        self.float8 = scales is not None
        shape = (layers, 2, kv_heads, positions, head_dim)
        self._memory = _allocate(math.prod(shape), FLOAT8 if self.float8 else dtype, device).view(shape)
        self.layers = [(layer[0], layer[1]) for layer in self._memory]
        self.scales: list[torch.Tensor | None] = [None] * layers if scales is None else [*scales]

    def copy(self, copies: Iterable[Copy]) -> None:
        """Does the copies in order."""
        memory = bits(self._memory)
        for one in copies:
            source = memory[..., one.source : one.source + one.length, :]
            if abs(one.source - one.target) < one.length:
                source = source.clone()
            memory[..., one.target : one.target + one.length, :].copy_(source)

    def write(self, layer: int, writes: Iterable[KVWrite], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Writes keys and values [kv_heads, tokens, head_dim] of a packed step."""
        scales = self.scales[layer]
        for half, (memory, new) in enumerate(zip(self.layers[layer], (keys, values), strict=True)):
            if scales is not None:
                memory, new = bits(memory), bits(to_float8(new, scales[half]))
            for write in writes:
                part = new.narrow(1, write.offset, write.length)
                if write.targets is None:
                    memory.narrow(1, write.start, write.length).copy_(part)
                else:
                    memory.index_copy_(1, write.targets, part)

    def gather(self, layer: int, slots: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [kv_heads, len(slots), head_dim] at some positions, in a precision."""
        (keys, values), scales = self.layers[layer], self.scales[layer]
        of_keys, of_values = (None, None) if scales is None else scales
        return load(keys, slots, of_keys, dtype), load(values, slots, of_values, dtype)

    def finite(self, start: int, length: int) -> torch.Tensor:
        """Whether the keys and values of all layers at positions [start, start + length) are finite, as bool [1]."""
        stored = self._memory[..., start : start + length, :]
        return (are_finite_float8(stored) if self.float8 else are_finite(stored))[None]


def kv_writes(sequences: list[PackedSequence], device: torch.device) -> list[KVWrite]:
    """Where a step's keys and values are written: those of the decoding sequences, which come first, as one."""
    decoding = list(itertools.takewhile(lambda one: one.length == 1, sequences))
    writes = [KVWrite(one.offset, one.length, one.base + one.start) for one in sequences[len(decoding) :]]
    if decoding:
        targets = to_device(torch.tensor([one.base + one.start for one in decoding]), device)
        writes.insert(0, KVWrite(0, len(decoding), targets=targets))
    return writes


def _allocate(elements: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialized memory. A CPU's operating system provides it at the first write, in huge pages where it can: with
    small ones the first write of a prompt takes as long as a decode step."""
    if device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(elements, dtype=dtype, device=device)
    memory = mmap.mmap(-1, elements * dtype.itemsize)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype)
