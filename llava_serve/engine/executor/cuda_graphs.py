"""CUDA graphs of decode steps: one launch for a forward pass in which every sequence has one token, and its sampling.

A graph repeats the same kernels on the same addresses. What changes from step to step (tokens, positions, extents, what
sampling needs) is copied into its input first. There are graphs for some batch sizes, the buckets, one for each kind of
sampling. A batch is padded to the next bucket; padding reads and writes a position of the KV pool that belongs to no
sequence.
"""

from __future__ import annotations

import itertools
import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llava_serve.engine.executor.decoder import Decoder
from llava_serve.engine.executor.graph_sampling import (
    SampleKernel,
    SamplingKind,
    next_tokens,
    sampling_kind,
    sampling_numbers,
)
from llava_serve.engine.executor.kernels.selection import DecodeKernel, current_device
from llava_serve.engine.executor.kv_pool import KVPool, KVWrite, PackedSequence
from llava_serve.engine.executor.paged_attention import PagedAttention
from llava_serve.engine.executor.transfer import fill
from llava_serve.engine.executor.varlen import VarlenAttention
from llava_serve.engine.sequence import Sequence as EngineSequence

_logger = logging.getLogger(__name__)
_SMALL = (1, 2, 4)
_STRIDE = 8
_TOLERANCE = 2e-2
"""Largest difference between logits of a graph and of the same kernels without one, as a share of the largest logit."""
_TRIAL_NUMBERS = torch.tensor([0.7, 0.9, 5, 0.01, 0.4], dtype=torch.float64)
"""See `sampling_numbers`."""

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
        sample_kernel: None leaves all sampling but greedy's to others.
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
        sample_kernel: SampleKernel | None,
    ) -> None:
        self._decoder = decoder
        self._embed = embed
        self._memory = memory
        self._max_keys = max_keys
        self._padding_position = padding_position
        self._page_size, self._kernel = page_size, kernel
        self._sample_kernel = sample_kernel
        self._kinds = [*SamplingKind][: 1 if sample_kernel is None else None]
        self._buckets = buckets(max_batch_size)
        self._device = memory.layers[0][0].device
        self._inputs = {size: decode_input([], [], size, padding_position).to(self._device) for size in self._buckets}
        self._numbers = {size: sampling_numbers([], size).to(self._device) for size in self._buckets}
        self._replays: dict[tuple[int, SamplingKind], Callable[[], None]] = {}
        # [max_batch_size, vocabulary] and [max_batch_size]: one buffer each for the graphs of all sizes and kinds
        self._logits: torch.Tensor | None = None
        self._ids = torch.zeros(max_batch_size, dtype=torch.long, device=self._device)

    @torch.inference_mode()
    def capture(self) -> bool:
        """Captures all graphs, the largest first: the others reuse its memory pool. False if that fails."""
        try:
            with torch.cuda.device(self._device):
                # One stream for all: torch's default one belongs to the device that captured first.
                stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
                every = itertools.product(reversed(self._buckets), self._kinds)
                captured = all(self._capture(size, kind, stream, pool) for size, kind in every)
        except Exception as error:  # a kernel that cannot be captured or compiled, or not enough memory
            if not isinstance(error, RuntimeError) and not type(error).__module__.startswith("triton."):
                raise
            _logger.warning("Decode steps cannot be captured as CUDA graphs; they are slower.", exc_info=True)
            captured = False
        if not captured:
            self._replays.clear()
            self._logits = None
        return captured

    def run(
        self, sequences: Sequence[EngineSequence], packed: Sequence[PackedSequence], sampled: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes a step of at most `max_batch_size` sequences with one token each.

        Args:
            sampled: the tokens, where only the device has them yet.

        Returns:
            Logits [sequences, vocabulary] and the next tokens, int64 [sequences]; None where these are to be sampled by
            others. The next run overwrites both.
        """
        count, kind = len(sequences), sampling_kind(sequences)
        if kind not in self._kinds:
            kind = None
        size = self._buckets[bisect_left(self._buckets, count)]
        tokens = [sequence.token_ids[-1] for sequence in sequences]
        fill(self._inputs[size], decode_input(tokens, packed, size, self._padding_position))
        if kind not in (None, SamplingKind.GREEDY):
            fill(self._numbers[size], sampling_numbers(sequences, size))
        if sampled is not None:
            self._inputs[size][0, :count].copy_(sampled)
        with current_device(self._device):
            self._replays[size, kind or SamplingKind.GREEDY]()
        assert self._logits is not None, "there are graphs"
        return self._logits[:count], None if kind is None else self._ids[:count]

    def _capture(self, batch_size: int, kind: SamplingKind, stream: torch.cuda.Stream, pool: Any) -> bool:
        """Captures one graph. False if it gives otherwise than its kernels, on another input than the captured."""
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):  # restores the thread's stream, however the capture ends
            self.compute(batch_size, kind)  # what libraries set up at their first call must not be captured
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                self.compute(batch_size, kind)
        torch.cuda.current_stream().wait_stream(stream)
        self._replays[batch_size, kind] = graph.replay
        at, extent = torch.arange(batch_size, device=self._device), extent_of_two(self._page_size)
        for half in itertools.chain(*self._memory.layers):  # no sequence is in the pool yet
            half[:, : extent * batch_size].zero_()
        self._inputs[batch_size].copy_(torch.stack([at % 64, torch.ones_like(at), extent * at]))
        self._numbers[batch_size].copy_(_TRIAL_NUMBERS[:, None].expand(-1, batch_size))
        logits, ids = self.compute(batch_size, kind)
        expected, expected_ids = logits.clone(), ids.clone()
        graph.replay()
        correct = bool((logits - expected).abs().max() <= _TOLERANCE * expected.abs().max())
        if torch.equal(logits, expected):  # else tokens that are about equally likely may change places
            correct &= torch.equal(ids, expected_ids)
        if not correct:
            _logger.warning("CUDA graphs of decode steps give wrong results here; they are not used.")
        return correct

    def compute(self, batch_size: int, kind: SamplingKind) -> tuple[torch.Tensor, torch.Tensor]:
        """What a graph repeats: a step, from its input to the buffers of logits and ids, which it returns."""
        tokens, positions, bases = self._inputs[batch_size]
        step = _StaticStep(self._memory, positions, bases, self._max_keys, self._page_size, self._kernel)
        found = self._decoder.logits(self._decoder.forward(self._embed(tokens), step))
        if self._logits is None:  # the largest size comes first
            self._logits = torch.empty_like(found)
        logits, ids = self._logits[:batch_size], self._ids[:batch_size]
        ids.copy_(next_tokens(found, self._numbers[batch_size], kind, self._sample_kernel))
        return logits.copy_(found), ids
