"""FlashAttention over extents: on CUDA in half precision, one call for all sequences of a step.

A sequence's keys and values are contiguous in the KV pool: `cum_seq_k` holds where they begin, and `seqused_k` how many
there are. The call is the operation below torch's `varlen_attn`, with FlashAttention 2 inside: it has the same
parameters in torch 2.11 and 2.13, where those of `varlen_attn` differ, and it takes ALiBi's slopes.
"""

from __future__ import annotations

import logging
from functools import cache
from itertools import accumulate, product

import torch
from torch.nn.functional import scaled_dot_product_attention

from llava_serve.engine.executor.transfer import to_device

_logger = logging.getLogger(__name__)
_OPERATION = torch.ops.aten._flash_attention_forward.default
_WRONG_CALL = ("aten::_flash_attention_forward() ", "Unknown keyword argument")
"""How torch's RuntimeError begins where a call does not fit the operation's parameters."""
_UNSPLIT = {"num_splits": 1} if any(one.name == "num_splits" for one in _OPERATION._schema.arguments) else {}
"""A sequence's results do not depend on the others in the batch. torch 2.11 has no such parameter."""
_LEAST_CAPABILITY = (8, 0)
_MAX_HEAD_DIM = 256
_HEAD_DIM_STRIDE = 8
_TOLERANCE = 2e-2
"""Largest difference from the plain kernel in half precision, for values of about one."""


class VarlenAttention:
    """The extents of one step, as int32 tensors on the device.

    Args:
        cum_seq_q: [sequences + 1], where each sequence's tokens begin in the step, and its end.
        cum_seq_k: [sequences + 1], where each extent begins in the KV pool; nothing reads the last.
        seqused_k: [sequences], keys of each sequence, those of this step included.
        max_q, max_k: the most tokens and keys of a sequence.
    """

    def __init__(
        self, cum_seq_q: torch.Tensor, cum_seq_k: torch.Tensor, seqused_k: torch.Tensor, max_q: int, max_k: int
    ) -> None:
        self._cum_seq_q, self._cum_seq_k, self._seqused_k = cum_seq_q, cum_seq_k, seqused_k
        self._max_q, self._max_k = max_q, max_k

    @classmethod
    def of(cls, lengths: list[int], bases: list[int], ends: list[int], device: torch.device) -> VarlenAttention:
        """From each sequence's number of tokens, in packed order, where its extent begins, and its number of keys."""
        offsets = [*accumulate(lengths, initial=0)]
        bounds = torch.tensor([offsets, [*bases, bases[-1] + ends[-1]], [*ends, 0]], dtype=torch.int32)
        on_device = to_device(bounds, device)
        return cls(on_device[0], on_device[1], on_device[2, :-1].contiguous(), max(lengths), max(ends))

    def attend(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float | None,
        window: int | None,
        slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of all sequences.

        Args:
            query: [1, heads, tokens, head_dim].
            keys, values: the layer's KV pool, [kv_heads, positions, head_dim].
            window: positions that a query attends to, its own included; None is all.
            slopes: of ALiBi, float32 [heads]; None adds no bias.

        Returns:
            [1, tokens, heads, head_dim].
        """
        output: torch.Tensor = _OPERATION(
            query[0].transpose(0, 1).contiguous(),
            keys.transpose(0, 1),
            values.transpose(0, 1),
            self._cum_seq_q,
            self._cum_seq_k,
            self._max_q,
            self._max_k,
            0.0,
            False,
            False,
            scale=scaling,
            window_size_left=-1 if window is None else window - 1,
            # No key is behind a sequence's only new token. Without a bound the kernel packs the heads of a group in one
            # tile, and reads their keys and values once.
            window_size_right=-1 if self._max_q == 1 else 0,
            seqused_k=self._seqused_k,
            alibi_slopes=slopes,
            **_UNSPLIT,
        )[0]
        return output[None]


@cache
def available(device: torch.device, dtype: torch.dtype, kv_heads: int, head_dim: int, *, alibi: bool = False) -> bool:
    """Whether the kernel is there and correct for such heads: it is run and compared with the plain one.

    On CUDA a warning says why it is not.

    Raises:
        RuntimeError: this module calls the operation in a way that it does not have.
    """
    if device.type != "cuda":
        return False
    reason = _missing(device, dtype, head_dim) or _failed_trial(device, dtype, kv_heads, head_dim, alibi=alibi)
    if reason:
        _logger.warning("Attention is slow: FlashAttention over extents is not used, since %s.", reason)
    return not reason


def _missing(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """What the kernel lacks to run; empty where nothing is missing."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it has half precisions only, and the model's is {str(dtype).removeprefix('torch.')}"
    if head_dim > _MAX_HEAD_DIM or head_dim % _HEAD_DIM_STRIDE:
        return f"it has no heads of width {head_dim}"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this build of torch has none"
    if (capability := torch.cuda.get_device_capability(device)) < _LEAST_CAPABILITY:
        return f"the GPU is older than it needs (compute capability {capability[0]}.{capability[1]})"
    return ""


def _failed_trial(device: torch.device, dtype: torch.dtype, kv_heads: int, head_dim: int, *, alibi: bool) -> str:
    """Why the kernel cannot be used after a trial with grouped heads, windows and decode steps; empty where it can."""
    trials = product((1,), (None,), ([1, 3], [1, 1])) if alibi else product((1, 4, 7), (None, 9), ([1, 3], [1, 1]))
    try:
        for groups, window, lengths in trials:
            if trial_error(device, dtype, kv_heads, head_dim, groups, window, lengths, alibi=alibi) > _TOLERANCE:
                return f"it gives wrong results here (groups of {groups}, window {window}, {lengths} tokens)"
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except RuntimeError as error:
        if is_wrong_call(error):
            raise
        return f"it refuses to run: {str(error).splitlines()[0]}"
    return ""


def is_wrong_call(error: RuntimeError) -> bool:
    """The call does not fit the operation's parameters: a fault of this module, not of a build or a GPU."""
    return str(error).startswith(_WRONG_CALL)


def trial_error(
    device: torch.device,
    dtype: torch.dtype,
    kv_heads: int,
    head_dim: int,
    groups: int,
    window: int | None,
    lengths: list[int],
    *,
    alibi: bool,
) -> float:
    """The largest difference from the plain kernel, for two sequences of so many new tokens."""
    generator = torch.Generator(device).manual_seed(0)

    def random(heads: int, tokens: int) -> torch.Tensor:
        return torch.randn(heads, tokens, head_dim, device=device, dtype=dtype, generator=generator)

    heads = kv_heads * groups
    keys, values, query = random(kv_heads, 64), random(kv_heads, 64), random(heads, sum(lengths))
    slopes = torch.linspace(0.1, 0.8, heads, device=device) if alibi else None
    bases, ends = [40, 8], [17, 20]  # out of order, with a gap between
    outputs = VarlenAttention.of(lengths, bases, ends, device).attend(query[None], keys, values, None, window, slopes)
    worst = 0.0
    offset = 0
    for base, length, end in zip(bases, lengths, ends, strict=True):
        distances = torch.arange(end, device=device) - torch.arange(end - length, end, device=device)[:, None]
        bias = torch.zeros(heads, length, end, device=device)
        if slopes is not None:
            bias += slopes[:, None, None] * distances
        bias.masked_fill_((distances > 0) | (distances <= -(window or end)), float("-inf"))
        expected = scaled_dot_product_attention(
            query[:, offset : offset + length].float(),
            keys[:, base : base + end].float().repeat_interleave(groups, dim=0),
            values[:, base : base + end].float().repeat_interleave(groups, dim=0),
            attn_mask=bias,
        ).transpose(0, 1)
        worst = max(worst, float((outputs[0, offset : offset + length] - expected).abs().max()))
        offset += length
    return worst
