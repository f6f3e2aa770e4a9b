"""Attention on a CPU: sequences with one token by the kernel in C++, the others one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llava_serve.engine.executor.cascade_attention import SharedPrefix
from llava_serve.engine.executor.kernels.native_attention import compiled, launch
from llava_serve.engine.executor.kernels.selection import DecodeKernel, LayerShape, native_decode_kernel
from llava_serve.engine.executor.kv_pool import KVPool, PackedSequence
from llava_serve.engine.executor.model import VisionLanguageModel, kv_shape


def native_kernel(model: VisionLanguageModel, page_size: int, *, float8: bool, alibi: bool) -> DecodeKernel | None:
    """The kernel for a model's heads, where it can be compiled and is right."""
    heads = model.language_model.config.num_attention_heads
    shape = LayerShape(0, 0, heads, *kv_shape(model)[1:], model.dtype, model.device, float8)
    return native_decode_kernel(shape, page_size, alibi=alibi)


class PageTable:
    """The pages of each token's sequence, and the keys that it attends to: those up to its own.

    Attributes:
        count: tokens.
        table: int32 [tokens, pages], and `used` int32 [tokens]: see `twins.decode_attention`.

    Args:
        sequences: at least one; those with a single token come first where there are shared prefixes.
        page_size: the extents begin at multiples of it: an extent is pages in a row.
        shared_prefixes: the sequences of each read one copy of it, which the processor's cache keeps.
    """

    def __init__(
        self, sequences: Sequence[PackedSequence], page_size: int, shared_prefixes: Sequence[SharedPrefix]
    ) -> None:
        tokens = [[one.base, at + 1] for one in sequences for at in range(one.start, one.start + one.length)]
        self.page_size, self.count = page_size, len(tokens)
        bases, used = torch.tensor(tokens, dtype=torch.int32).T
        self.used = used.contiguous()
        pages = -(-max(one.start + one.length for one in sequences) // page_size)
        self.table = bases[:, None] // page_size + torch.arange(pages, dtype=torch.int32)
        for prefix in shared_prefixes:
            first, *others = prefix.indices
            shared = prefix.length // page_size
            self.table[others, :shared] = self.table[first, :shared]


class NativeAttention:
    """Attention of the sequences with one token, which come first in a step. `native_decode_kernel` has tried it.

    Args:
        pages: of their tokens.
    """

    def __init__(self, memory: KVPool, pages: PageTable) -> None:
        self._memory, self._pages = memory, pages
        self.count = pages.count

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        new: tuple[torch.Tensor, torch.Tensor] | None,
        scaling: float | None,
        window: int | None,
        slopes: torch.Tensor | None,
        out: torch.Tensor,
    ) -> None:
        """See `attention.Step.attend`.

        Args:
            query, new: of all tokens, [1, heads, tokens, head_dim]. `new` are keys and values, which it writes first.
            out: contiguous [1, tokens, heads, head_dim], of which it writes the first `count` tokens.
        """
        keys, values = self._memory.layers[layer]
        group = query.shape[1] // len(keys)
        launch(
            compiled(query.dtype, keys.dtype, query.shape[3], group, self._pages.page_size),
            query[0],
            (new[0][0], new[1][0]) if new else None,
            keys,
            values,
            self._pages.table,
            self._pages.used,
            scaling,
            window,
            slopes,
            self._memory.scales[layer],
            out,
        )
