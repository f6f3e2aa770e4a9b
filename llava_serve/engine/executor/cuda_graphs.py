"""CUDA graphs of decode steps: one launch for a whole forward pass in which every sequence has one token.

A graph repeats the same kernels on the same addresses. What changes from step to step (tokens, positions, extents) is
copied into its input first. There is a graph for each of some batch sizes, the buckets. A batch is padded to the next
bucket; padding reads and writes a position of the KV pool that belongs to no sequence.
"""

from __future__ import annotations

import itertools
import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llava_serve.engine.executor.decoder import Decoder
from llava_serve.engine.executor.kernels.selection import DecodeKernel
from llava_serve.engine.executor.kv_pool import KVPool, KVWrite, PackedSequence
from llava_serve.engine.executor.paged_attention import PagedAttention
from llava_serve.engine.executor.varlen import VarlenAttention

_logger = logging.getLogger(__name__)
_SMALL = (1, 2, 4)
_STRIDE = 8
_TOLERANCE = 2e-2
"""Largest difference between logits of a graph and of the same kernels without one, as a share of the largest logit."""

Embed = Callable[[torch.Tensor], torch.Tensor]


def buckets(max_batch_size: int) -> list[int]:
    """Batch sizes that get a graph, in rising order; the last is `max_batch_size`."""
    sizes = {*_SMALL, *range(_STRIDE, max_batch_size, _STRIDE), max_batch_size}
    return sorted(size for size in sizes if size <= max_batch_size)


def extent_of_two(page_size: int) -> int:
    """Positions of the smallest extent that holds two."""
    return page_size if page_size > 1 else 2


def decode_input(
    tokens: Sequence[int], sequences: Sequence[PackedSequence], batch_size: int, padding_position: int
) -> torch.Tensor:
    """The input of a graph for `batch_size` sequences.

    Args:
        tokens, sequences: of the step, one token per sequence.
        padding_position: a position of the KV pool that belongs to no sequence.

    Returns:
        int64 [3, batch_size]: token ids, positions, and where the extents begin in the KV pool.
    """
    padding = batch_size - len(tokens)
    return torch.tensor(
        [
            [*tokens, *[0] * padding],
            [*(one.start for one in sequences), *[0] * padding],
            [*(one.base for one in sequences), *[padding_position] * padding],
        ]
    )


class _StaticStep:
    """An `attention.Step` that reads positions and extents from a graph's input.

    Args:
        max_keys: the most that a sequence can have.
        page_size: extents begin at multiples of it.
        kernel: for attention; None is that of `VarlenAttention`, which reads no 8-bit floats.
    """

    def __init__(
        self,
        memory: KVPool,
        positions: torch.Tensor,
        bases: torch.Tensor,
        max_keys: int,
        page_size: int,
        kernel: DecodeKernel | None,
    ) -> None:
        batch_size = len(positions)
        self.memory = memory
        self.positions = positions
        self.slots = bases + positions
        self._writes = [KVWrite(0, batch_size, targets=self.slots)]
        self._paged: PagedAttention | None = None
        if kernel is not None:
            self._paged = PagedAttention(bases, positions, max_keys, page_size, kernel)
        else:
            bounds = torch.arange(batch_size + 1, dtype=torch.int32, device=positions.device)
            begins = torch.cat([bases, bases[-1:]]).int()
            self._varlen = VarlenAttention(bounds, begins, (positions + 1).int(), 1, max_keys)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        window: int | None = None,
        slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `PackedStep.attend`."""
        self.memory.write(layer, self._writes, key[0], value[0])
        return self.attend_stored(layer, query, scaling, window, slopes)

    def attend_stored(
        self,
        layer: int,
        query: torch.Tensor,
        scaling: float | None,
        window: int | None = None,
        slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `PackedStep.attend_stored`."""
        if self._paged is not None:
            return self._paged.attend(query, self.memory, layer, scaling, window, slopes)
        return self._varlen.attend(query, *self.memory.layers[layer], scaling, window, slopes)


class DecodeGraphs:
    """The graphs of one engine.

    Args:
        embed: token ids [tokens] -> [tokens, hidden].
        max_batch_size: of a step.
        max_keys: the most that a sequence can have.
        padding_position: see `decode_input`.
        page_size: extents begin at multiples of it, and so does the padding position.
        kernel: for attention; None is that of `VarlenAttention`.
    """

    def __init__(
        self,
        decoder: Decoder,
        embed: Embed,
        memory: KVPool,
        max_batch_size: int,
        max_keys: int,
        padding_position: int,
        page_size: int,
        kernel: DecodeKernel | None,
    ) -> None:
        self._decoder = decoder
        self._embed = embed
        self._memory = memory
        self._max_keys = max_keys
        self._padding_position = padding_position
        self._page_size, self._kernel = page_size, kernel
        self._buckets = buckets(max_batch_size)
        self._device = memory.layers[0][0].device
        self._inputs = {size: decode_input([], [], size, padding_position).to(self._device) for size in self._buckets}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._logits: torch.Tensor | None = None  # [max_batch_size, vocabulary]: one buffer for the graphs of all sizes

    @torch.inference_mode()
    def capture(self) -> bool:
        """Captures all graphs, the largest first: the others reuse its memory pool. False if that fails."""
        try:
            with torch.cuda.device(self._device):
                # One stream for all: torch's default one belongs to the device that captured first.
                stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
                captured = all(self._capture(size, stream, pool) for size in reversed(self._buckets))
        except RuntimeError:  # a kernel that cannot be captured, or not enough memory
            _logger.warning("Decode steps cannot be captured as CUDA graphs; they are slower.", exc_info=True)
            captured = False
        if not captured:
            self._graphs.clear()
            self._logits = None
        return captured

    def run(
        self, tokens: Sequence[int], sequences: Sequence[PackedSequence], sampled: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [sequences, vocabulary] of a step of at most `max_batch_size` tokens. The next run overwrites them.
        `sampled` are the tokens where only the device has them yet."""
        size = self._buckets[bisect_left(self._buckets, len(tokens))]
        numbers = decode_input(tokens, sequences, size, self._padding_position)
        self._inputs[size].copy_(numbers.pin_memory(), non_blocking=True)  # this thread does not wait for it
        if sampled is not None:
            self._inputs[size][0, : len(tokens)].copy_(sampled)
        with torch.cuda.device(self._device):
            self._graphs[size].replay()
        assert self._logits is not None, "there are graphs"
        return self._logits[: len(tokens)]

    def _capture(self, batch_size: int, stream: torch.cuda.Stream, pool: Any) -> bool:
        """Captures one graph. False if it gives other logits than its kernels, on another input than the captured."""
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):  # restores the thread's stream, however the capture ends
            warm = self._forward(batch_size)  # what libraries set up at their first call must not be captured
            if self._logits is None:
                self._logits = torch.empty_like(warm)
            logits = self._logits[:batch_size]
            del warm
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                logits.copy_(self._forward(batch_size))
        torch.cuda.current_stream().wait_stream(stream)
        self._graphs[batch_size] = graph
        at, extent = torch.arange(batch_size, device=self._device), extent_of_two(self._page_size)
        for half in itertools.chain(*self._memory.layers):  # no sequence is in the pool yet
            half[:, : extent * batch_size].zero_()
        self._inputs[batch_size].copy_(torch.stack([at % 64, torch.ones_like(at), extent * at]))
        expected = self._forward(batch_size)
        graph.replay()
        correct = bool((logits - expected).abs().max() <= _TOLERANCE * expected.abs().max())
        if not correct:
            _logger.warning("CUDA graphs of decode steps give wrong logits here; they are not used.")
        return correct

    def _forward(self, batch_size: int) -> torch.Tensor:
        tokens, positions, bases = self._inputs[batch_size]
        step = _StaticStep(self._memory, positions, bases, self._max_keys, self._page_size, self._kernel)
        return self._decoder.logits(self._decoder.forward(self._embed(tokens), step))
