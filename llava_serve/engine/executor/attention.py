"""Attention of one packed step over the KV pool, as transformers' models call it.

A step packs the tokens of all sequences in a batch of one, [1, tokens, hidden]. Each layer writes its new keys and
values into the pool; then every sequence attends to its own extent.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from llava_serve.engine.executor import varlen
from llava_serve.engine.executor.cascade_attention import SharedPrefix, attend_shared_prefix
from llava_serve.engine.executor.kv_pool import KVPool, KVWrite
from llava_serve.engine.executor.transfer import to_device
from llava_serve.engine.executor.varlen import VarlenAttention
from llava_serve.errors import CheckpointError

IMPLEMENTATION = "llava_serve"
"""The name under which transformers' models find `attend`."""

_UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")
"""Arguments of some models' attention that change its result. Other ones, such as the dropout, do not in inference."""


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
class _KeyRange:
    """Keys that a sequence attends to: `count` from `begin` in the KV pool, less those that the mask hides."""

    begin: int
    count: int
    mask: torch.Tensor | None
    causal: bool


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
    """

    def __init__(
        self,
        memory: KVPool,
        sequences: list[PackedSequence],
        dtype: torch.dtype,
        device: torch.device,
        padding: int = 0,
        shared_prefixes: Sequence[SharedPrefix] = (),
    ) -> None:
        self.memory = memory
        self._sequences = sequences
        self._dtype = dtype
        self._padding = padding
        self._shared_prefixes = shared_prefixes
        self._lengths = [one.length for one in sequences]
        positions = [at for one in sequences for at in range(one.start, one.start + one.length)]
        self.positions = to_device(torch.tensor([*positions, *[0] * padding]), device)
        self._writes = _writes(sequences, device)
        self._key_ranges: dict[int | None, list[_KeyRange]] = {}  # by window
        self._varlen: VarlenAttention | None = None
        if self._fast():
            ends = [one.start + one.length for one in sequences]
            self._varlen = VarlenAttention.of(self._lengths, [one.base for one in sequences], ends, device)

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
        self.memory.write(layer, self._writes, key[0], value[0])
        return self.attend_stored(layer, query, scaling, window, slopes)

    @cached_property
    def slots(self) -> torch.Tensor:
        """See `Step.slots`. Padding is written to the last position, which belongs to no sequence."""
        last = self.memory.layers[0][0].shape[1] - 1
        slots = [one.base + at for one in self._sequences for at in range(one.start, one.start + one.length)]
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
        if self._varlen is not None and (slopes is None or self._fast(alibi=True)):
            return self._varlen.attend(query, *self.memory.layers[layer], scaling, window, slopes)
        keys, values = (memory[None] for memory in self.memory.layers[layer])

        def stored(start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
            return keys.narrow(2, start, count), values.narrow(2, start, count)

        *parts, rest = torch.split_with_sizes(query, [*self._lengths, self._padding], dim=2)
        done: set[int] = set()
        for prefix in self._shared_prefixes if window is None and slopes is None else ():
            sequences = [self._sequences[index] for index in prefix.indices]
            shared = stored(sequences[0].base, prefix.length)
            own = [stored(one.base + prefix.length, one.start + 1 - prefix.length) for one in sequences]
            outputs = attend_shared_prefix([parts[index] for index in prefix.indices], shared, own, scaling)
            for index, output in zip(prefix.indices, outputs, strict=True):
                parts[index] = output
            done.update(prefix.indices)
        if window not in self._key_ranges:
            self._key_ranges[window] = [self._key_range(one, window, slopes) for one in self._sequences]
        for index, key_range in enumerate(self._key_ranges[window]):
            if index not in done:
                parts[index] = _attend(parts[index], *stored(key_range.begin, key_range.count), key_range, scaling)
        if self._padding:
            parts.append(torch.zeros_like(rest))
        return (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]).transpose(1, 2)

    def _fast(self, *, alibi: bool = False) -> bool:
        """One call of a fast kernel attends to the extents of all sequences."""
        memory = self.memory
        return varlen.available(memory.device, self._dtype, memory.kv_heads, memory.head_dim, alibi=alibi)

    def _key_range(self, one: PackedSequence, window: int | None, slopes: torch.Tensor | None) -> _KeyRange:
        end = one.start + one.length
        first = 0 if window is None else max(0, one.start + 1 - window)
        unmasked = one.start == 0 and (window is None or end <= window)
        mask = None
        if slopes is not None:
            mask = self._alibi_bias(one, slopes)
        elif one.length > 1 and not unmasked:
            mask = self._causal_mask(one, first, window).to(self._dtype)
        return _KeyRange(one.base + first, end - first, mask, causal=mask is None and one.length > 1)

    def _alibi_bias(self, one: PackedSequence, slopes: torch.Tensor) -> torch.Tensor:
        """ALiBi with a causal mask, float32 or better [1, heads, length, keys].

        The bias depends on the key's position only: a bias by distance differs by a constant per query, which softmax
        cancels.
        """
        distances = torch.arange(1 - one.start - one.length, 1, device=slopes.device)
        bias = slopes[:, None, None] * distances + self._causal_mask(one, 0, None)
        return bias[None].to(torch.promote_types(self._dtype, torch.float32))

    def _causal_mask(self, one: PackedSequence, first: int, window: int | None) -> torch.Tensor:
        """float32 [length, keys from `first`]: 0 where a query attends to a key, -inf elsewhere."""
        end = one.start + one.length
        queries = torch.arange(one.start, end, device=self.positions.device)[:, None]
        keys = torch.arange(first, end, device=self.positions.device)[None]
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, float("-inf"))


def _writes(sequences: list[PackedSequence], device: torch.device) -> list[KVWrite]:
    """Where a step's keys and values are written: those of the decoding sequences, which come first, as one."""
    decoding = list(itertools.takewhile(lambda one: one.length == 1, sequences))
    writes = [KVWrite(one.offset, one.length, one.base + one.start) for one in sequences[len(decoding) :]]
    if decoding:
        targets = to_device(torch.tensor([one.base + one.start for one in decoding]), device)
        writes.insert(0, KVWrite(0, len(decoding), targets=targets))
    return writes


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, key_range: _KeyRange, scaling: float | None
) -> torch.Tensor:
    """Attention of one sequence, [1, heads, length, head_dim]. Grouped heads are unfolded: the CPU kernel has none."""
    shape = query.shape
    groups = shape[1] // keys.shape[1]
    if groups == 1 and key_range.mask is None:  # most decoding sequences: their fast path
        return scaled_dot_product_attention(query, keys, values, is_causal=key_range.causal, scale=scaling)
    if groups > 1 and shape[2] == 1:
        query = query.view(1, keys.shape[1], groups, shape[3])
    elif groups > 1:
        keys, values = keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)
    dtype, mask = query.dtype, key_range.mask
    if mask is not None and mask.dtype != dtype and query.is_cuda:  # its kernels take masks of the same dtype only
        query, keys, values = (part.to(mask.dtype) for part in (query, keys, values))
    out = scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=key_range.causal, scale=scaling)
    return out.to(dtype).reshape(shape)


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
