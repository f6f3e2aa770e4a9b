"""FlashAttention over extents: on CUDA in half precision, one call for all sequences of a step.

A sequence's keys and values are neighbours in the memory, so where they begin and how many there are says it all:
`cu_seq_k` holds the beginnings and `seqused_k` the lengths (torch's `varlen_attn`, FlashAttention 2 inside).
"""

from __future__ import annotations

import logging
from functools import cache
from itertools import accumulate

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

_logger = logging.getLogger(__name__)
_MAX_HEAD_DIM = 256
_TOLERANCE = 2e-2
"""Largest difference to the plain kernel in half precision, for values of about one."""


class VarlenAttention:
    """The extents of one step, as int32 tensors on the device.

    Args:
        rows: [sequences + 1], where each sequence's tokens begin in the step, and its end.
        bases: [sequences + 1], where each extent begins in the memory; nothing reads the last.
        used: [sequences], keys of each sequence, those of this step included.
        max_q, max_k: the most tokens and keys of a sequence.
    """

    def __init__(self, rows: torch.Tensor, bases: torch.Tensor, used: torch.Tensor, max_q: int, max_k: int) -> None:
        self._rows, self._bases, self._used = rows, bases, used
        self._max_q, self._max_k = max_q, max_k

    @classmethod
    def of(cls, lengths: list[int], bases: list[int], ends: list[int], device: torch.device) -> VarlenAttention:
        """Of each sequence's tokens, as they are packed, where its extent begins, and its keys."""
        rows = [*accumulate(lengths, initial=0)]
        bounds = torch.tensor([rows, [*bases, bases[-1] + ends[-1]], [*ends, 0]], dtype=torch.int32)
        on_device = to_device(bounds, device)
        return cls(on_device[0], on_device[1], on_device[2, :-1].contiguous(), max(lengths), max(ends))

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None, window: int | None
    ) -> torch.Tensor:
        """Causal attention of all sequences.

        Args:
            query: [1, heads, tokens, head_dim].
            keys, values: the memory of the layer, [kv_heads, positions, head_dim].
            window: positions that a query sees, itself included; None sees all.

        Returns:
            [1, tokens, heads, head_dim].
        """
        out = varlen_attn(
            query[0].transpose(0, 1).contiguous(),
            keys.transpose(0, 1),
            values.transpose(0, 1),
            self._rows,
            self._bases,
            self._max_q,
            self._max_k,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != keys.shape[0],
            seqused_k=self._used,
            num_splits=1,  # a sequence's numbers do not depend on who else is in the batch
        )
        assert isinstance(out, torch.Tensor), "without auxiliary outputs there is one"
        return out[None]


@cache
def available(device: torch.device, dtype: torch.dtype, kv_heads: int, head_dim: int) -> bool:
    """Whether the kernel is there and right for such heads: it is tried once, against the plain one."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_dim > _MAX_HEAD_DIM:
        return False
    try:
        good = _agrees(device, dtype, kv_heads, head_dim)
    except Exception:  # whatever a build or a card without the kernel raises: the plain one is there
        _logger.warning("FlashAttention over extents cannot be used here; attention will be slower.", exc_info=True)
        return False
    if not good:
        _logger.warning("FlashAttention over extents gives other results here; attention will be slower.")
    return good


def _agrees(device: torch.device, dtype: torch.dtype, kv_heads: int, head_dim: int) -> bool:
    generator = torch.Generator(device).manual_seed(0)

    def draw(tokens: int) -> torch.Tensor:
        return torch.randn(kv_heads, tokens, head_dim, device=device, dtype=dtype, generator=generator)

    keys, values, query = draw(64), draw(64), draw(4)
    bases, lengths, ends = [40, 8], [1, 3], [17, 20]  # out of order, with a gap between
    got = VarlenAttention.of(lengths, bases, ends, device).attend(query[None], keys, values, None, None)[0]
    row = 0
    for base, length, end in zip(bases, lengths, ends, strict=True):
        seen = torch.ones(length, end, dtype=torch.bool, device=device).tril(end - length)
        expected = scaled_dot_product_attention(
            query[None, :, row : row + length],
            keys[None, :, base : base + end],
            values[None, :, base : base + end],
            attn_mask=seen,
        )[0].transpose(0, 1)
        if (got[row : row + length] - expected).abs().max() > _TOLERANCE:
            return False
        row += length
    return True


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy there; on CUDA from pinned memory, so that this thread does not wait for it."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
