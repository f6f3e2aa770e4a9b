"""Attention by the kernel for decode steps, which reads keys and values where they are, as 8-bit floats, too."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from llava_serve.engine.executor.kernels.selection import DecodeKernel, current_device
from llava_serve.engine.executor.kv_pool import KVPool, PackedSequence
from llava_serve.engine.executor.transfer import to_device
from llava_serve.engine.executor.varlen import VarlenAttention

_PAGES = 16
"""A table has a multiple of this number: Triton compiles a kernel anew for a width of another kind."""


class PagedAttention:
    """Attention of sequences with one token each. An extent is pages in a row.

    Args:
        bases: int64 [sequences], where extents begin in the KV pool: multiples of `page_size`.
        positions: int64 [sequences], of the tokens.
        max_keys: the most of a sequence.
        page_size: positions of a page.
    """

    def __init__(
        self, bases: torch.Tensor, positions: torch.Tensor, max_keys: int, page_size: int, kernel: DecodeKernel
    ) -> None:
        count = -(-max_keys // (_PAGES * page_size)) * _PAGES
        pages = torch.arange(count, device=bases.device)
        self._table = (bases[:, None] // page_size + pages).int()
        self._used = (positions + 1).int()
        self._page_size, self._kernel = page_size, kernel

    def attend(
        self,
        query: torch.Tensor,
        memory: KVPool,
        layer: int,
        scaling: float | None,
        window: int | None,
        slopes: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `attention.Step.attend_stored`."""
        packed, pages = query[0].transpose(0, 1), (self._table, self._used, self._page_size)
        with current_device(query.device):
            return self._kernel(packed, *memory.layers[layer], *pages, scaling, window, slopes, memory.scales[layer])[
                None
            ]


class Float8Attention:
    """Attention of a step on CUDA over a KV pool in 8-bit floats.

    Sequences with one token, which come first, go through the kernel. FlashAttention has no such numbers: for the
    others, and for all where there is no kernel, keys and values are brought to the model's precision.
    """

    def __init__(
        self, memory: KVPool, sequences: Sequence[PackedSequence], page_size: int, kernel: DecodeKernel | None
    ) -> None:
        self._memory = memory
        single = [] if kernel is None else [*itertools.takewhile(lambda one: one.length == 1, sequences)]
        rest = sequences[len(single) :]
        self._lengths = [len(single), sum(one.length for one in rest)]
        self._paged: PagedAttention | None = None
        self._varlen: VarlenAttention | None = None
        if kernel is not None and single:
            numbers = torch.tensor([[one.base for one in single], [one.start for one in single]])
            bases, positions = to_device(numbers, memory.device)
            self._paged = PagedAttention(bases, positions, max(one.start for one in single) + 1, page_size, kernel)
        if rest:
            ends = [one.start + one.length for one in rest]
            slots = [torch.arange(one.base, one.base + end) for one, end in zip(rest, ends, strict=True)]
            self._slots = to_device(torch.cat(slots), memory.device)
            begins = [*itertools.accumulate(ends[:-1], initial=0)]
            self._varlen = VarlenAttention.of([one.length for one in rest], begins, ends, memory.device)

    def attend(
        self,
        query: torch.Tensor,
        layer: int,
        scaling: float | None,
        window: int | None,
        slopes: torch.Tensor | None,
    ) -> torch.Tensor:
        """See `attention.Step.attend_stored`."""
        single, rest = torch.split_with_sizes(query, self._lengths, dim=2)
        parts = []
        if self._paged is not None:
            parts.append(self._paged.attend(single, self._memory, layer, scaling, window, slopes))
        if self._varlen is not None:
            found = self._memory.gather(layer, self._slots, query.dtype)
            parts.append(self._varlen.attend(rest, *found, scaling, window, slopes))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
