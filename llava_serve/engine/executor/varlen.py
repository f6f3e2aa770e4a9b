"""FlashAttention over extents: on CUDA in half precision, one call for all sequences of a step.

A sequence's keys and values are contiguous in the KV pool: `cu_seq_k` holds where they begin, and `seqused_k` how many
there are (torch's `varlen_attn`, with FlashAttention 2 inside).
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
"""Largest difference from the plain kernel in half precision, for values of about one."""


class VarlenAttention:
    """The extents of one step, as int32 tensors on the device.

    Args:
        cu_seq_q: [sequences + 1], where each sequence's tokens begin in the step, and its end.
        cu_seq_k: [sequences + 1], where each extent begins in the KV pool; nothing reads the last.
        seqused_k: [sequences], keys of each sequence, those of this step included.
        max_q, max_k: the most tokens and keys of a sequence.
    """

    def __init__(
        self, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor, seqused_k: torch.Tensor, max_q: int, max_k: int
    ) -> None:
        self._cu_seq_q, self._cu_seq_k, self._seqused_k = cu_seq_q, cu_seq_k, seqused_k
        self._max_q, self._max_k = max_q, max_k

    @classmethod
    def of(cls, lengths: list[int], bases: list[int], ends: list[int], device: torch.device) -> VarlenAttention:
        """From each sequence's number of tokens, in packed order, where its extent begins, and its number of keys."""
        offsets = [*accumulate(lengths, initial=0)]
        bounds = torch.tensor([offsets, [*bases, bases[-1] + ends[-1]], [*ends, 0]], dtype=torch.int32)
        on_device = to_device(bounds, device)
        return cls(on_device[0], on_device[1], on_device[2, :-1].contiguous(), max(lengths), max(ends))

    def attend(
        self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None, window: int | None
    ) -> torch.Tensor:
        """Causal attention of all sequences.

        Args:
            query: [1, heads, tokens, head_dim].
            keys, values: the layer's KV pool, [kv_heads, positions, head_dim].
            window: positions that a query attends to, its own included; None is all.

        Returns:
            [1, tokens, heads, head_dim].
        """
        out = varlen_attn(
            query[0].transpose(0, 1).contiguous(),
            keys.transpose(0, 1),
            values.transpose(0, 1),
            self._cu_seq_q,
            self._cu_seq_k,
            self._max_q,
            self._max_k,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=query.shape[1] != keys.shape[0],
            seqused_k=self._seqused_k,
            num_splits=1,  # a sequence's results do not depend on the others in the batch
        )
        assert isinstance(out, torch.Tensor), "without auxiliary outputs there is one output"
        return out[None]


@cache
def available(device: torch.device, dtype: torch.dtype, kv_heads: int, head_dim: int) -> bool:
    """Whether the kernel is available and correct for such heads: it is run once and compared with the plain one."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_dim > _MAX_HEAD_DIM:
        return False
    try:
        correct = _is_correct(device, dtype, kv_heads, head_dim)
    except Exception:  # whatever a build or a GPU without the kernel raises: the plain one is used
        _logger.warning("FlashAttention over extents is not available; attention is slower.", exc_info=True)
        return False
    if not correct:
        _logger.warning("FlashAttention over extents gives wrong results here and is not used; attention is slower.")
    return correct


def _is_correct(device: torch.device, dtype: torch.dtype, kv_heads: int, head_dim: int) -> bool:
    generator = torch.Generator(device).manual_seed(0)

    def random(tokens: int) -> torch.Tensor:
        return torch.randn(kv_heads, tokens, head_dim, device=device, dtype=dtype, generator=generator)

    keys, values, query = random(64), random(64), random(4)
    bases, lengths, ends = [40, 8], [1, 3], [17, 20]  # out of order, with a gap between
    output = VarlenAttention.of(lengths, bases, ends, device).attend(query[None], keys, values, None, None)[0]
    offset = 0
    for base, length, end in zip(bases, lengths, ends, strict=True):
        visible = torch.ones(length, end, dtype=torch.bool, device=device).tril(end - length)
        expected = scaled_dot_product_attention(
            query[None, :, offset : offset + length],
            keys[None, :, base : base + end],
            values[None, :, base : base + end],
            attn_mask=visible,
        )[0].transpose(0, 1)
        if (output[offset : offset + length] - expected).abs().max() > _TOLERANCE:
            return False
        offset += length
    return True


def to_device(host: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies a tensor to the device; to CUDA from pinned memory, so that this thread does not wait for it."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
