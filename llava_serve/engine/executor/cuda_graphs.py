"""CUDA graphs of decode steps: the launches of a whole forward pass as one, where every row has one token.

A graph repeats the same kernels on the same addresses. What changes from step to step (tokens, positions, extents) is
copied into its input first. There is a graph for each of some batch sizes, the buckets; a batch is filled up to the
next one with rows that read and write a position of the memory that belongs to no sequence.
"""

from __future__ import annotations

import itertools
import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llava_serve.engine.executor.attention import Span
from llava_serve.engine.executor.decoder import Decoder
from llava_serve.engine.executor.kv_pool import KVPool, Run
from llava_serve.engine.executor.varlen import VarlenAttention, to_device

_logger = logging.getLogger(__name__)
_SMALL = (1, 2, 4)
_STRIDE = 8
_TOLERANCE = 2e-2
"""Largest difference between logits of a graph and of its kernels launched one by one, as a share of the largest."""

Embed = Callable[[torch.Tensor], torch.Tensor]


def buckets(max_rows: int) -> list[int]:
    """Batch sizes that get a graph, in rising order; the last is `max_rows`."""
    sizes = {*_SMALL, *range(_STRIDE, max_rows, _STRIDE), max_rows}
    return sorted(size for size in sizes if size <= max_rows)


def decode_input(tokens: Sequence[int], spans: Sequence[Span], rows: int, spare: int) -> torch.Tensor:
    """What a graph of `rows` rows must know of a step.

    Args:
        tokens, spans: of each row.
        spare: a position of the memory that no sequence has.

    Returns:
        int64 [3, rows]: token ids, positions, and where the extents begin in the memory.
    """
    padding = rows - len(tokens)
    return torch.tensor(
        [
            [*tokens, *[0] * padding],
            [*(span.start for span in spans), *[0] * padding],
            [*(span.base for span in spans), *[spare] * padding],
        ]
    )


class _StaticStep:
    """A step whose numbers are read from a graph's input; see `attention.Step`."""

    def __init__(self, memory: KVPool, positions: torch.Tensor, bases: torch.Tensor, max_keys: int) -> None:
        rows = len(positions)
        self._memory = memory
        self.positions = positions
        self._runs = [Run(0, rows, targets=bases + positions)]
        bounds = torch.arange(rows + 1, dtype=torch.int32, device=positions.device)
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
        """As `PackedStep.attend`; without slopes."""
        assert slopes is None, "a decoder with ALiBi has no graphs"
        self._memory.write(layer, self._runs, key[0], value[0])
        return self._varlen.attend(query, *self._memory.layers[layer], scaling, window)


class DecodeGraphs:
    """The graphs of one engine.

    Args:
        embed: token ids [rows] -> [rows, hidden].
        max_rows: of a step.
        max_keys: that a sequence can have.
        spare: see `decode_input`.
    """

    def __init__(
        self, decoder: Decoder, embed: Embed, memory: KVPool, max_rows: int, max_keys: int, spare: int
    ) -> None:
        self._decoder = decoder
        self._embed = embed
        self._memory = memory
        self._max_keys = max_keys
        self._spare = spare
        self._buckets = buckets(max_rows)
        self._device = memory.layers[0][0].device
        self._inputs = {rows: decode_input([], [], rows, spare).to(self._device) for rows in self._buckets}
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    @torch.inference_mode()
    def capture(self) -> bool:
        """Records all graphs, the largest first: the others find their memory in its pool. False if they cannot be."""
        try:
            with torch.cuda.device(self._device):
                # One stream of its own for all: torch's default one belongs to the device that recorded first.
                stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()  # type: ignore[no-untyped-call]
                good = all(self._record(rows, stream, pool) for rows in reversed(self._buckets))
        except RuntimeError:  # a kernel that cannot be recorded, or not enough memory
            _logger.warning("Decode steps cannot be recorded as CUDA graphs here; they will be slower.", exc_info=True)
            good = False
        if not good:
            self._graphs.clear()
        return good

    def run(self, tokens: Sequence[int], spans: Sequence[Span]) -> torch.Tensor:
        """Logits [rows, vocabulary] of a step of single tokens, at most `max_rows`. They stand until the next run."""
        rows = self._buckets[bisect_left(self._buckets, len(tokens))]
        numbers = decode_input(tokens, spans, rows, self._spare)
        self._inputs[rows].copy_(to_device(numbers, self._device), non_blocking=True)
        graph, logits = self._graphs[rows]
        with torch.cuda.device(self._device):
            graph.replay()
        return logits[: len(tokens)]

    def _record(self, rows: int, stream: torch.cuda.Stream, pool: Any) -> bool:
        """Records one graph; False if it does not give what its kernels give, for another input than the recorded."""
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):  # gives the thread its own stream back, however recording ends
            self._forward(rows)  # what libraries set up at their first call must not be recorded
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                logits = self._forward(rows)
        torch.cuda.current_stream().wait_stream(stream)
        self._graphs[rows] = graph, logits
        at = torch.arange(rows, device=self._device)
        for half in itertools.chain(*self._memory.layers):  # nothing else is in the memory yet
            half[:, : 2 * rows].zero_()
        self._inputs[rows].copy_(torch.stack([at % 64, torch.ones_like(at), 2 * at]))
        expected = self._forward(rows)
        graph.replay()
        good = bool((logits - expected).abs().max() <= _TOLERANCE * expected.abs().max())
        if not good:
            _logger.warning("CUDA graphs of decode steps give other logits here; they are not used.")
        return good

    def _forward(self, rows: int) -> torch.Tensor:
        tokens, positions, bases = self._inputs[rows]
        step = _StaticStep(self._memory, positions, bases, self._max_keys)
        return self._decoder.logits(self._decoder.forward(self._embed(tokens), step))
