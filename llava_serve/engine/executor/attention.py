"""Attention of one packed step over the KV pool, as transformers' models call it.

A step packs the tokens of all sequences in a batch of one, [1, tokens, hidden]. Each layer writes its new keys and
values into the pool; then every sequence attends to its own extent.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from llava_serve.engine.executor import varlen
from llava_serve.engine.executor.cascade_attention import SharedPrefix, attend_shared_prefix
from llava_serve.engine.executor.cpu_attention import NativeAttention, PageTable
from llava_serve.engine.executor.float8_cache import from_float8
from llava_serve.engine.executor.kernels.native_attention import decode_attention
from llava_serve.engine.executor.kernels.native_prefill import prefill_attention, supports
from llava_serve.engine.executor.kernels.selection import DecodeKernel
from llava_serve.engine.executor.kv_pool import KVPool, PackedSequence, kv_writes
from llava_serve.engine.executor.paged_attention import Float8Attention
from llava_serve.engine.executor.plain_attention import KeyRange, attend_keys, find_keys
from llava_serve.engine.executor.transfer import to_device
from llava_serve.engine.executor.varlen import VarlenAttention
from llava_serve.errors import CheckpointError

IMPLEMENTATION = "llava_serve"
"""The name under which transformers' models find `attend`."""

_UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")
"""Arguments of some models' attention that change its result. Other ones, such as the dropout, do not in inference."""


class Step(Protocol):
    """A step as a model gets it: positions [tokens], and attention over the KV pool."""

    positions: torch.Tensor
    memory: KVPool

    @property
    def slots(self) -> torch.Tensor:
        """int64 [tokens], positions of the KV pool for the keys and values of each token."""
        ...

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
        """See `PackedStep.attend`."""
        ...

    def attend_stored(
        self,
        layer: int,
        query: torch.Tensor,
        scaling: float | None,
        window: int | None = None,
        slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `attend`, to keys and values that are written at `slots`."""
        ...


class PackedStep:
    """A step with any number of tokens of each sequence.

    Args:
        sequences: in the order in which their tokens are packed.
        padding: tokens behind them that belong to no sequence. They are not written, and attend to nothing.
        shared_prefixes: of sequences with a single token, by their indices.
        page_size: the extents begin at multiples of it.
        kernel: for sequences with a single token: the one in C++ for CPUs, or on CUDA where the KV pool holds 8-bit
            floats.
    """

    def __init__(
        self,
        memory: KVPool,
        sequences: list[PackedSequence],
        dtype: torch.dtype,
        device: torch.device,
        padding: int = 0,
        shared_prefixes: Sequence[SharedPrefix] = (),
        page_size: int = 1,
        kernel: DecodeKernel | None = None,
    ) -> None:
        self.memory = memory
        self.sequences = sequences
        self._dtype = dtype
        self._padding = padding
        self._shared_prefixes = shared_prefixes
        self._lengths = [one.length for one in sequences]
        positions = [at for one in sequences for at in range(one.start, one.start + one.length)]
        self.positions = to_device(torch.tensor([*positions, *[0] * padding]), device)
        self._writes = kv_writes(sequences, device)
        self._key_ranges: dict[int | None, list[KeyRange]] = {}  # by window
        self._varlen: VarlenAttention | None = None
        self._float8: Float8Attention | None = None
        self._page_size = page_size
        self._in_cpp = kernel is decode_attention
        self._native_prefill = self._in_cpp and supports(memory.head_dim)
        if self._fast() and memory.float8:
            self._float8 = Float8Attention(memory, sequences, page_size, kernel)
        elif self._fast():
            ends = [one.start + one.length for one in sequences]
            self._varlen = VarlenAttention.of(self._lengths, [one.base for one in sequences], ends, device)

    @cached_property
    def pages(self) -> PageTable | None:
        """Of each token, where there is a kernel in C++."""
        return PageTable(self.sequences, self._page_size, self._shared_prefixes) if self._in_cpp else None

    @cached_property
    def _native(self) -> NativeAttention | None:
        """Of the sequences with one token, where there is a kernel in C++."""
        single = [*itertools.takewhile(lambda one: one.length == 1, self.sequences)] if self._in_cpp else []
        if not single:
            return None
        return NativeAttention(self.memory, PageTable(single, self._page_size, self._shared_prefixes))

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
        """Writes the keys and values, then attends to all keys of each sequence.

        Args:
            query: [1, heads, tokens, head_dim]; key, value: [1, kv_heads, tokens, head_dim].
            window: positions that a query attends to, its own included; None is all.
            slopes: of ALiBi, [heads], the same in all layers; None adds no bias.

        Returns:
            [1, tokens, heads, head_dim].
        """
        if self._native is None or self.memory.float8:
            self.memory.write(layer, self._writes, key[0], value[0])
            return self.attend_stored(layer, query, scaling, window, slopes)
        if len(self._writes) > 1:
            self.memory.write(layer, self._writes[1:], key[0], value[0])
        return self._attend_on_cpu(layer, query, (key, value), scaling, window, slopes)

    @cached_property
    def slots(self) -> torch.Tensor:
        """See `Step.slots`. Padding is written to the last position, which belongs to no sequence."""
        last = self.memory.layers[0][0].shape[1] - 1
        slots = [one.base + at for one in self.sequences for at in range(one.start, one.start + one.length)]
        return to_device(torch.tensor([*slots, *[last] * self._padding]), self.memory.device)

    def attend_stored(
        self,
        layer: int,
        query: torch.Tensor,
        scaling: float | None,
        window: int | None = None,
        slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Step.attend_stored`."""
        if slopes is None or self._fast(alibi=True):
            if self._varlen is not None:
                return self._varlen.attend(query, *self.memory.layers[layer], scaling, window, slopes)
            if self._float8 is not None:
                return self._float8.attend(query, layer, scaling, window, slopes)
        return self._attend_on_cpu(layer, query, None, scaling, window, slopes)

    def _attend_on_cpu(
        self,
        layer: int,
        query: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor] | None,
        scaling: float | None,
        window: int | None,
        slopes: torch.Tensor | None,
    ) -> torch.Tensor:
        """`attend_stored` where no kernel takes all sequences. `new` are keys and values that `_native` writes."""
        out = query.new_empty(1, *query.shape[2:0:-1], query.shape[3])
        done: set[int] = set()
        if self._native is not None:
            self._native.attend(layer, query, new, scaling, window, slopes, out)
            done.update(range(self._native.count))
        if self._native_prefill:
            done.update(self._attend_natively(layer, query, scaling, window, slopes, out))
        if len(done) < len(self.sequences):
            self._attend_each(layer, query, scaling, window, slopes, out, done)
        if self._padding:
            out[:, -self._padding :] = 0
        return out

    def _attend_natively(
        self,
        layer: int,
        query: torch.Tensor,
        scaling: float | None,
        window: int | None,
        slopes: torch.Tensor | None,
        out: torch.Tensor,
    ) -> list[int]:
        """Attention of the sequences with several tokens by the kernel in C++: their indices."""
        several = [index for index, one in enumerate(self.sequences) if one.length > 1]
        for one in (self.sequences[index] for index in several):
            keys, values = (half.narrow(1, one.base, one.start + one.length) for half in self.memory.layers[layer])
            own, scales = query[0].narrow(1, one.offset, one.length), self.memory.scales[layer]
            result = prefill_attention(own, keys, values, scaling, window, slopes, scales)
            out[0, one.offset : one.offset + one.length] = result
        return several

    def _attend_each(
        self,
        layer: int,
        query: torch.Tensor,
        scaling: float | None,
        window: int | None,
        slopes: torch.Tensor | None,
        out: torch.Tensor,
        done: set[int],
    ) -> None:
        """Attention of one sequence after the other, but for those of which `out` has the results."""
        keys, values = (memory[None] for memory in self.memory.layers[layer])
        scales = self.memory.scales[layer]

        def stored(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
            own = keys.narrow(2, start, count), values.narrow(2, start, count)
            if scales is None:
                return own
            return from_float8(own[0], scales[0], query.dtype), from_float8(own[1], scales[1], query.dtype)

        parts = torch.split_with_sizes(query, [*self._lengths, self._padding], dim=2)
        outputs: dict[int, torch.Tensor] = {}
        for prefix in self._shared_prefixes if window is None and slopes is None and not done else ():
            sequences = [self.sequences[index] for index in prefix.indices]
            shared = stored(sequences[0].base, prefix.length)
            suffixes = [stored(one.base + prefix.length, one.start + 1 - prefix.length) for one in sequences]
            merged = attend_shared_prefix([parts[index] for index in prefix.indices], shared, suffixes, scaling)
            outputs |= zip(prefix.indices, merged, strict=True)
        if window not in self._key_ranges:
            self._key_ranges[window] = [find_keys(one, window, slopes, query) for one in self.sequences]
        for index, (one, key_range) in enumerate(zip(self.sequences, self._key_ranges[window], strict=True)):
            if index in done:
                continue
            if index not in outputs:
                own = stored(key_range.begin, key_range.count)
                outputs[index] = attend_keys(parts[index], *own, key_range, scaling)
            out[:, one.offset : one.offset + one.length] = outputs[index].transpose(1, 2)

    def _fast(self, *, alibi: bool = False) -> bool:
        """One call of a fast kernel attends to the extents of all sequences."""
        memory = self.memory
        return varlen.available(memory.device, self._dtype, memory.kv_heads, memory.head_dim, alibi=alibi)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    step: Step,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """`Step.attend` in the form of transformers' `AttentionInterface`; `step` is an argument of the model's call.

    Raises:
        CheckpointError: the model's attention has an argument that changes its result and is not supported.
    """
    refuse_arguments(others)
    layer: int = module.layer_idx  # type: ignore[assignment]
    return step.attend(layer, query, key, value, scaling, sliding_window), None


def refuse_arguments(others: dict[str, Any]) -> None:
    """Raises `CheckpointError` for an argument of a model's attention that changes its result."""
    for name in _UNSUPPORTED:
        if others.get(name) is not None:
            raise CheckpointError(f"The attention of this language model has {name}, which is not supported.")


AttentionInterface.register(IMPLEMENTATION, attend)
